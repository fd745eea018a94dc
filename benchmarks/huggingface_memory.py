"""Memory of a conversion for Hugging Face, both ways: one layer of the 30b, its embedding and its head.

Further layers take time, not memory: a tensor is let go before the next is read. Peak memory is the kernel's (VmHWM),
of a process of its own per conversion, which for comparison has begun by importing all it needs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from megatron_stable.checkpoint.catalog import newest_whole
from megatron_stable.checkpoint.format import Index, Manifest, StoredShard, parameters_of, rank_file, write_contents
from megatron_stable.checkpoint.state import Layout, RunState
from megatron_stable.checkpoint.tensors import write_tensors
from megatron_stable.config.load import load_config
from megatron_stable.config.schema import Config
from megatron_stable.convert.huggingface.export import export
from megatron_stable.convert.huggingface.function import knobs_of
from megatron_stable.convert.huggingface.importing import take
from megatron_stable.convert.huggingface.names import own_names, parts
from megatron_stable.data.course import Course
from megatron_stable.parallel.shards import Place, Shard
from megatron_stable.records.directory import RunDirectory

STRETCH = 2**24  # elements


def write_run(path: Path, config: Config) -> int:
    """A run with a checkpoint of ones; returns its parameters."""
    shapes = {part.name: part.shape for part in parts(own_names(knobs_of(config)), config.model, knobs_of(config))}
    shards = {name: Shard(Place(shape, name=name), 0, Place(shape).numel) for name, shape in shapes.items()}

    def ones(key: str) -> Iterator[Tensor]:
        numel = shards[key.removesuffix(":weight")].numel
        for low in range(0, numel, STRETCH):
            yield torch.ones(min(STRETCH, numel - low))

    checkpoint = RunDirectory(path).checkpoints / "step_00000001"
    checkpoint.mkdir(parents=True)
    sizes = {f"{name}:weight": shard.numel for name, shard in shards.items()}
    files = {rank_file(0): write_tensors(checkpoint / rank_file(0), sizes, ones)}
    held = {0: {name: StoredShard.of(shard, ("weight",)) for name, shard in shards.items()}}
    state = RunState(optimizer_steps=1, course=Course.begin(1))
    manifest = Manifest(step=1, layout=Layout(), config=config.model_dump(mode="json"), state=state)
    write_contents(checkpoint, Index(files=files, parameters=parameters_of(held)), manifest)
    RunDirectory(path).commit(config)
    return sum(shard.numel for shard in shards.values())


def peak() -> float:
    """GB of this process at most, so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def convert(name: str, folder: Path, send: Connection) -> None:
    """In a process of its own: one conversion; sends (GB before, GB at most, seconds)."""
    before, began = peak(), time.perf_counter()
    if name == "--to hf":
        export(newest_whole(folder / "run"), folder / "hf", "bf16")
    else:
        take(folder / "hf", folder / "back")
    send.send((before, peak(), time.perf_counter() - began))


def measured(name: str, folder: Path) -> tuple[float, float, float]:
    """What :func:`convert` sends."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=convert, args=(name, folder, send))
    process.start()
    send.close()
    found = receive.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="30b")
    parser.add_argument("--vocab-size", type=int, default=128000)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="where to write some 20 GB; default: a temporary one")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.directory))
    shape = [f"model.size={arguments.size}", f"model.vocab_size={arguments.vocab_size}"]
    config = load_config(None, [*shape, f"model.layers={arguments.layers}", "model.tied_embeddings=true"])
    try:
        count = write_run(folder / "run", config)
        largest = config.model.hidden * arguments.vocab_size * 4 / 1e9
        print(f"{count / 1e9:.2f}e9 parameters; the largest tensor has {largest:.1f} GB in fp32")
        for name in ("--to hf", "--from hf"):
            before, most, seconds = measured(name, folder)
            print(f"{name}: {before:.2f} GB before, {most:.2f} GB at most, {seconds:.0f} s")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
