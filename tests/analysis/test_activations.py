"""What autograd keeps of a forward pass, counted in the real model on the CPU beside the arithmetic of the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_stable.analysis.activations import Layers, backend
from megatron_stable.analysis.tape import Tape, Value
from megatron_stable.config.parametrization import model_multipliers
from megatron_stable.config.recipes import RECIPES
from megatron_stable.config.schema import Config
from megatron_stable.engine.construction import DTYPES
from megatron_stable.model.documents import DocumentMask
from megatron_stable.model.loss import language_model_loss
from megatron_stable.model.transformer import Transformer, layer_list
from megatron_stable.parallel.topology import TensorParallel
from tests.engine.layouts import make_config

SHAPE: dict[str, Any] = {"layers": 3, "hidden": 64, "heads": 4, "sequence_length": 128, "vocab_size": 300}
KNOBS: dict[str, dict[str, Any]] = {
    "rmsnorm, swiglu": {"norm": "rmsnorm", "activation": "swiglu", "recipe": "qk_norm"},
    "grouped queries": {"kv_heads": 2, "activation": "squared_relu"},
    "grouped queries, capped": {"kv_heads": 2, "recipe": "qk_norm_cap"},
    "dropout": {"dropout": 0.1, "bias": True},
    "attention dropout": {"attention_dropout": 0.1},
    "dropout, step by step": {"attention_dropout": 0.1, "attention": "math"},
    "learned positions": {"positions": "learned", "embedding_norm": True, "tied_embeddings": True},
    "no positions, norm on values": {"positions": "none", "recipe": "qkv_norm"},
    "all recomputed": {"activation_checkpointing": "full"},
    "every second recomputed": {"activation_checkpointing": 2},
    "final cap": {"final_logit_cap": 30.0, "embedding_scale": True, "embedding_gradient": 0.1},
}
DOCUMENTS: dict[str, dict[str, Any]] = {
    "sdpa": {"kv_heads": 2},
    "math": {"recipe": "qk_norm_cap"},
    "learned positions": {"positions": "learned"},
    "every second recomputed": {"activation_checkpointing": 2},
}
CASES = {**{name: {"recipe": name} for name in RECIPES}, **KNOBS}


def counted(config: Config) -> float:
    """Bytes that autograd saves, each storage once, without weights and tables that all layers share."""
    assert config.model.vocab_size is not None
    by, dtype = model_multipliers(config), DTYPES[config.precision.dtype]
    among = config.data.document_mask
    model = Transformer(layer_list(config.model, TensorParallel(), 0, multipliers=by, dtype=dtype, documents=among))
    model.train()
    length, batch = config.model.sequence_length, config.batch.micro_size
    tokens = torch.randint(0, config.model.vocab_size, (batch, length + 1))
    known = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
    saved: dict[int, tuple[torch.Tensor, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        is_table = tensor.dtype == torch.float32 and tensor.shape == (length, 1, config.model.head_dim)
        if storage.data_ptr() not in known and not is_table:
            saved[storage.data_ptr()] = (tensor, storage.nbytes())  # the tensor, so that no other takes its place
        return tensor

    if among:
        DocumentMask(model, config.model, 0, torch.device("cpu")).announce(tokens[:, :-1])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(tokens[:, :-1].contiguous())
        targets = tokens[:, 1:].contiguous()
        cap = config.model.final_logit_cap
        language_model_loss(logits, targets, TensorParallel(), config.model.vocab_size, 1e-4, cap)
    return sum(size for _, size in saved.values())


def planned(config: Config) -> float:
    layers, tape = Layers(config, "cpu"), Tape()
    x = layers.embedding(tape)
    for index in range(config.model.layers):
        x = layers.block(tape, x, index)
    layers.loss(tape, layers.head(tape, layers.final_norm(tape, x)))
    return tape.kept()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_plan_keeps_what_autograd_keeps(case: str, dtype: str) -> None:
    config = make_config(
        {**SHAPE, **CASES[case]}, precision={"dtype": dtype}, batch={"global_size": 2, "micro_size": 2}
    )
    assert planned(config) == pytest.approx(counted(config), rel=0.005)


@pytest.mark.parametrize("case", DOCUMENTS)
def test_plan_keeps_what_autograd_keeps_of_documents(case: str) -> None:
    batch, data = {"global_size": 2, "micro_size": 2}, {"document_mask": True, "end_of_document": 0}
    config = make_config({**SHAPE, **DOCUMENTS[case]}, batch=batch, data=data)
    assert planned(config) == pytest.approx(counted(config), rel=0.005)
    apart = make_config({**SHAPE, **DOCUMENTS[case]}, batch=batch)
    assert planned(config) > planned(apart)


def test_a_gpu_keeps_no_scores_where_its_kernel_does_not() -> None:
    """By hand, of a block: what FlashAttention and fused kernels save (bf16; b s = n, all widths h but the MLP's 4 h).

    input norm: x, mean and 1 / std in fp32; QKV: its input; attention: QKV itself (values are a view of it), rotated q
    and k, output, and a number per head; Proj: the same output; then x, statistics, FC1's input and output, FC2's
    input.
    """
    model = {**SHAPE, "activation_checkpointing": "none"}
    config = make_config(model, precision={"dtype": "bf16"}, batch={"global_size": 2, "micro_size": 2})
    layers, tape = Layers(config, "cuda"), Tape()
    layers.block(tape, Value(layers.stream), 0)
    n, h = 2 * 128, 64
    assert tape.kept() == 2 * n * h * (1 + 1 + 3 + 2 + 1 + 1 + 1 + 4 + 4) + 4 * n * (2 + 4 + 2)


def test_the_backend_is_that_of_the_device() -> None:
    capped = make_config({**SHAPE, "recipe": "qk_norm_cap"})
    clipped = make_config({**SHAPE, "recipe": "soft_clip"})
    assert (backend(capped, "cpu"), backend(capped, "cuda")) == ("math", "flex")
    assert (backend(clipped, "cpu"), backend(clipped, "cuda")) == ("math", "math")
    assert backend(make_config(SHAPE), "cuda") == "sdpa"
    documents = make_config(SHAPE, data={"document_mask": True, "end_of_document": 0})
    assert (backend(documents, "cpu"), backend(documents, "cuda")) == ("sdpa", "flex")


def test_a_gpu_keeps_the_logits_gradient_where_the_logits_were() -> None:
    """Of n tokens, bf16: beside the logits log Z and the target of each token, in backward two weights of each in fp32;
    a CPU has the gradient, and two fp32 copies of a chunk, which here is all."""
    config = make_config(SHAPE, precision={"dtype": "bf16"}, batch={"global_size": 2, "micro_size": 2})
    n, columns = 2 * 128, 384
    most = {}
    for device in ("cuda", "cpu"):
        tape, logits = Tape(), Value(2.0 * n * columns)
        Layers(config, device).loss(tape, logits)
        most[device] = tape.most(beside=(logits,))
    assert most == {"cuda": n * (12 + 8), "cpu": n * 12 + n * columns * (2 + 2 * 4)}
