"""Every example, as the first, middle and last rank of its layout would meet it: its slices, memory, data and files."""

from __future__ import annotations

import struct
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_stable.analysis.footprint import footprints
from megatron_stable.config.load import load_config
from megatron_stable.config.schema import Config
from megatron_stable.data import Batches, open_dataset
from megatron_stable.data.course import Course
from megatron_stable.engine.deepspeed_config import BUCKET
from megatron_stable.model.transformer import layer_list, padded_vocabulary, parameter_count
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.stages import stage_bounds
from megatron_stable.parallel.topology import TensorParallel
from tests.test_examples import CONFIGS, ranks

GPU = 80 * 10**9  # bytes
VOCABULARY = 64000  # where the tokenizer would say


def example(path: Path) -> tuple[Config, int]:
    config = load_config(path)
    if config.model.vocab_size is None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": VOCABULARY})})
    return config, ranks(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_slices_of_all_ranks_make_the_whole(path: Path) -> None:
    """Of each parameter, over stages and TP ranks, each element once; replicated ones on the first TP rank."""
    config, world = example(path)
    size, model = config.parallel.tensor, config.model.model_copy(update={"attention": "math"})
    held: Counter[str] = Counter()
    full: dict[str, int] = {}
    assert world % (size * config.parallel.pipeline) == 0
    with torch.device("meta"):
        for rank in range(size):
            for layer in layer_list(model, TensorParallel(None, rank, size, config.parallel.sequence), 0, draw=False):
                for weight in layer.build().parameters():
                    known = place(weight)
                    assert weight.shape == known.shape
                    full[known.name] = int(torch.Size(known.full_shape).numel())
                    held[known.name] += known.numel if known.dim is not None or rank == 0 else 0
    assert held == full
    assert config.model.vocab_size is not None
    padding = padded_vocabulary(config.model.vocab_size, size) - config.model.vocab_size
    matrices = 1 if config.model.tied_embeddings else 2
    assert sum(full.values()) == parameter_count(config.model)[0] + matrices * padding * config.model.hidden


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_states_fit_and_stages_are_even(path: Path) -> None:
    config, world = example(path)
    stages = footprints(config, world)
    assert len(stages) == config.parallel.pipeline
    for stage in stages:
        assert stage.states < GPU / 2, "and the other half is for activations"
        assert stage.buckets <= 4 * BUCKET
    layers = layer_list(config.model, TensorParallel(), 0, draw=False)
    costs = [layer.cost for layer in layers]
    bounds = stage_bounds(costs, [layer.name.startswith("blocks.") for layer in layers], config.parallel.pipeline)
    work = [sum(costs[low:high]) for low, high in pairwise(bounds)]
    assert max(work) < 1.2 * sum(work) / len(work)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_first_middle_and_last_replica_read_their_share(path: Path, tmp_path: Path) -> None:
    config, world = example(path)
    replicas = world // (config.parallel.tensor * config.parallel.pipeline)
    batch, length = config.batch, config.model.sequence_length
    write_tokens(tmp_path / "data", 2 * batch.global_size * length + 1)
    dataset = open_dataset(tmp_path / "data", length, config.run.seed)
    batches = Batches(dataset, Course.begin(batch.global_size), batch.micro_size)
    assert len(set(batches.samples(1)) | set(batches.samples(2))) == 2 * batch.global_size
    share = batch.global_size // replicas
    seen: set[tuple[int, ...]] = set()
    some = sorted({0, replicas // 2, replicas - 1})
    for replica in some:
        read = list(batches.micro_batches(1, replica, replicas))
        assert [part.shape for part in read] == [(batch.micro_size, length + 1)] * (share // batch.micro_size)
        seen |= {tuple(row[:8]) for part in read for row in part}
    assert len(seen) == share * len(some), "replicas read the same samples"


def write_tokens(prefix: Path, count: int) -> None:
    """A dataset of one document of random tokens, by the format's description."""
    np.random.default_rng(0).integers(0, 2**16, count, dtype=np.uint16).tofile(f"{prefix}.bin")
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 1, 2)
    Path(f"{prefix}.idx").write_bytes(head + struct.pack("<i", count) + struct.pack("<qqq", 0, 0, 1))
