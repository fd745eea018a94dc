"""Runs with known weights, written without training; what `transformers` reads of what is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_stable.checkpoint.format import Index, Manifest, StoredShard, parameters_of, rank_file, write_contents
from megatron_stable.checkpoint.model import load_model
from megatron_stable.checkpoint.state import Layout, RunState
from megatron_stable.checkpoint.tensors import write_tensors
from megatron_stable.config.load import parse_config
from megatron_stable.config.parametrization import model_multipliers
from megatron_stable.config.schema import Config
from megatron_stable.data.course import Course
from megatron_stable.model import sigma
from megatron_stable.model.elementwise import soft_cap
from megatron_stable.model.transformer import Transformer, layer_list
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.shards import Shard
from megatron_stable.parallel.topology import TensorParallel
from megatron_stable.records.directory import RunDirectory

VOCAB = 61
SHAPE = {"size": None, "layers": 2, "hidden": 32, "heads": 4, "ffn_hidden": 48, "sequence_length": 16}
GATED = {"norm": "rmsnorm", "activation": "swiglu", "kv_heads": 2}
SANDWICH = {"recipe": "sandwich", "embedding_scale": True, "attention_temperature": 0.5}
# of each class of `transformers`, models that it computes
CLASSES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {"llama": GATED, "llama_bias_tied": {**GATED, "bias": True, "tied_embeddings": True, "rope_theta": 500.0}},
    "mistral": {"mistral": GATED},
    "qwen3": {"qwen3": {**GATED, "qk_norm": True}, "qwen3_wide": {**GATED, "qk_norm": True, "head_width": 12}},
    "olmo2": {"olmo2": {**GATED, "recipe": "olmo2", "head_width": 12}},
    "gemma2": {
        "gemma2": {**GATED, "recipe": "gemma2", "tied_embeddings": True},
        "gemma2_own": {**GATED, "activation": "geglu", "recipe": "gemma2", "tied_embeddings": True},
        "gemma2_untied": {**GATED, **SANDWICH, "final_logit_cap": 3.0, "head_width": 6},
    },
    "gemma3_text": {"gemma3": {**GATED, **SANDWICH, "activation": "geglu", "qk_norm": True, "tied_embeddings": True}},
    "gpt_neox": {"gpt_neox": {"bias": True}, "gpt_neox_erf": {"bias": True, "activation": "gelu_erf"}},
    "gpt2": {
        "gpt2": {"bias": True, "positions": "learned", "tied_embeddings": True},
        "gpt2_relu": {"bias": True, "positions": "learned", "activation": "squared_relu"},
    },
}


def write_run(path: Path, optimizer: dict[str, Any] | None = None, **model: Any) -> Config:
    """A run with a checkpoint of random weights, none of them zero or symmetric."""
    fields = {**SHAPE, "vocab_size": VOCAB, **model}
    config = parse_config({"run": {"directory": str(path)}, "model": fields, "optimizer": optimizer or {}})
    torch.manual_seed(0)
    layers = layer_list(config.model, TensorParallel(), 1, multipliers=model_multipliers(config))
    net = Transformer(layers)
    tensors: dict[str, Tensor] = {}
    places = {}
    with torch.no_grad():
        for weight in net.parameters():
            noise = torch.randn(weight.shape)
            if weight.dim() == 1 and not place(weight).name.endswith("gamma"):
                weight.copy_((0 if place(weight).name.endswith("bias") else 1) + 0.1 * noise)
            elif not place(weight).name.endswith("gamma"):
                weight.copy_(noise / weight.shape[-1] ** 0.5)
            else:
                weight.copy_(2 + 0.1 * noise)
            tensors[place(weight).name], places[place(weight).name] = weight.detach().flatten(), place(weight)
        sigma.power_iteration(net)
    for known, vector in sigma.vectors(net):
        tensors[known.name], places[known.name] = vector.flatten(), known
    run = RunDirectory(path)
    checkpoint = run.checkpoints / "step_00000007"
    checkpoint.mkdir(parents=True)
    keys = {f"{name}:weight": tensor for name, tensor in tensors.items()}
    entry = write_tensors(checkpoint / rank_file(0), {k: t.numel() for k, t in keys.items()}, keys.__getitem__)
    held = {0: {n: StoredShard.of(Shard(places[n], 0, t.numel()), ("weight",)) for n, t in tensors.items()}}
    state = RunState(optimizer_steps=7, course=Course.begin(config.batch.global_size))
    manifest = Manifest(step=7, layout=Layout(), config=config.model_dump(mode="json"), state=state)
    write_contents(checkpoint, Index(files={rank_file(0): entry}, parameters=parameters_of(held)), manifest)
    run.commit(config)
    return config


def tokens(rows: int = 3, length: int = 16) -> Tensor:
    """Token ids."""
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def our_logits(run: Path, ids: Tensor) -> Tensor:
    """Of a run's model, ``[b, s, vocabulary]``, without padding."""
    config, model, _ = load_model(run)
    logits: Tensor = model(ids)[..., : config.model.vocab_size]
    cap = config.model.final_logit_cap
    return logits if cap is None else soft_cap(logits, cap)


def weights_of(run: Path) -> dict[str, Tensor]:
    """All weights of a run's newest checkpoint, without padding of the vocabulary."""
    from megatron_stable.checkpoint.catalog import newest_whole
    from megatron_stable.checkpoint.reader import Reader

    whole = newest_whole(run)
    reader = Reader(whole.directory, whole.manifest)
    found = {}
    for name in reader.names():
        shape = reader.shape(name)
        rows = VOCAB if name in ("embedding.weight", "head.weight") else shape[0]
        found[name] = reader.full(name, "weight", (rows, *shape[1:]))
    return found
