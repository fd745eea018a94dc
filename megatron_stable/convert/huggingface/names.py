"""Which tensors of theirs one of ours is, and how it is cut into them.

Our names are those of the checkpoint, without the block's number and ``weight`` or ``bias`` at the end; theirs are
complete but for these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_stable.config.schema import GATED, ModelConfig
from megatron_stable.model.transformer import layer_list
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.topology import TensorParallel

Knobs = dict[str, Any]


class Cut(NamedTuple):
    """How one tensor of ours becomes several of theirs, and back. ``None``: it is the same, element by element."""

    split: Callable[[Tensor, Knobs], list[Tensor]]
    join: Callable[[list[Tensor], Knobs], Tensor]


class Map(NamedTuple):
    """Where a module of ours is with them."""

    theirs: tuple[str, ...]
    cut: Cut | None = None


def same(theirs: str) -> Map:
    """The same tensor by another name."""
    return Map((theirs,))


# ---- cuts ----


def _split_groups(qkv: Tensor, knobs: Knobs) -> list[Tensor]:
    """``[groups x (r + 2) x d, ...]``, each group r queries, their key, their value -> queries, keys, values."""
    groups, rest = knobs["kv_heads"], qkv.shape[1:]
    grouped = qkv.view(groups, knobs["heads"] // groups + 2, -1, *rest)
    return [part.reshape(-1, *rest) for part in (grouped[:, :-2], grouped[:, -2], grouped[:, -1])]


def _join_groups(parts: list[Tensor], knobs: Knobs) -> Tensor:
    groups, rest = knobs["kv_heads"], parts[0].shape[1:]
    width = parts[1].shape[0] // groups
    return torch.cat([part.view(groups, -1, width, *rest) for part in parts], 1).view(-1, *rest)


def _conv1d(weight: Tensor) -> Tensor:
    """GPT-2 keeps matrices as ``[in, out]``; a bias is as it is."""
    return weight.t() if weight.dim() == 2 else weight


QKV = Cut(_split_groups, _join_groups)
GATE_UP = Cut(lambda fc1, _: list(fc1.unbind()), lambda parts, _: torch.stack(parts))
CONV1D = Cut(lambda weight, _: [_conv1d(weight)], lambda parts, _: _conv1d(parts[0]))
CONV1D_QKV = Cut(
    lambda qkv, knobs: [_conv1d(torch.cat(_split_groups(qkv, knobs)))],
    lambda parts, knobs: _join_groups(list(_conv1d(parts[0]).chunk(3)), knobs),
)
ABOVE_ONE = Cut(lambda weight, _: [weight - 1], lambda parts, _: parts[0] + 1)  # Gemma multiplies with 1 + weight


# ---- names ----


def llama_names(**more: Map) -> dict[str, Map]:
    """Of Llama, and of all that go back to it; ``more`` replaces and adds, with a dot for each two underscores."""
    layer = "model.layers.{i}."
    names = {
        "embedding": same("model.embed_tokens"),
        "attention_input_norm": same(f"{layer}input_layernorm"),
        "attention.qkv": Map(tuple(f"{layer}self_attn.{which}_proj" for which in "qkv"), QKV),
        "attention.q_norm": same(f"{layer}self_attn.q_norm"),
        "attention.k_norm": same(f"{layer}self_attn.k_norm"),
        "attention.proj": same(f"{layer}self_attn.o_proj"),
        "mlp_input_norm": same(f"{layer}post_attention_layernorm"),
        "mlp.fc1": Map((f"{layer}mlp.gate_proj", f"{layer}mlp.up_proj"), GATE_UP),
        "mlp.fc2": same(f"{layer}mlp.down_proj"),
        "final_norm": same("model.norm"),
        "head": same("lm_head"),
    }
    return names | {ours.replace("__", "."): theirs for ours, theirs in more.items()}


def post_norms(layer: str = "model.layers.{i}.") -> dict[str, Map]:
    """Of norms behind attention and MLP."""
    return {
        "attention_output_norm": same(f"{layer}post_attention_layernorm"),
        "mlp_output_norm": same(f"{layer}post_feedforward_layernorm"),
    }


def gemma_names() -> dict[str, Map]:
    """Of Gemma: norms before and behind, all of them less one."""
    norms = post_norms() | {"mlp_input_norm": same("model.layers.{i}.pre_feedforward_layernorm")}
    names = llama_names(**norms)
    return {ours: Map(each.theirs, ABOVE_ONE) if "norm" in ours else each for ours, each in names.items()}


def gpt2_names() -> dict[str, Map]:
    """Of GPT-2."""
    layer = "transformer.h.{i}."
    return {
        "embedding": same("transformer.wte"),
        "positions": same("transformer.wpe"),
        "attention_input_norm": same(f"{layer}ln_1"),
        "attention.qkv": Map((f"{layer}attn.c_attn",), CONV1D_QKV),
        "attention.proj": Map((f"{layer}attn.c_proj",), CONV1D),
        "mlp_input_norm": same(f"{layer}ln_2"),
        "mlp.fc1": Map((f"{layer}mlp.c_fc",), CONV1D),
        "mlp.fc2": Map((f"{layer}mlp.c_proj",), CONV1D),
        "final_norm": same("transformer.ln_f"),
        "head": same("lm_head"),
    }


def neox_names() -> dict[str, Map]:
    """Of GPT-NeoX, whose QKV is laid out head by head, as ours is without groups."""
    layer = "gpt_neox.layers.{i}."
    return {
        "embedding": same("gpt_neox.embed_in"),
        "attention_input_norm": same(f"{layer}input_layernorm"),
        "attention.qkv": same(f"{layer}attention.query_key_value"),
        "attention.proj": same(f"{layer}attention.dense"),
        "mlp_input_norm": same(f"{layer}post_attention_layernorm"),
        "mlp.fc1": same(f"{layer}mlp.dense_h_to_4h"),
        "mlp.fc2": same(f"{layer}mlp.dense_4h_to_h"),
        "final_norm": same("gpt_neox.final_layer_norm"),
        "head": same("embed_out"),
    }


def own_names(knobs: Knobs) -> dict[str, Map]:
    """Of :mod:`megatron_stable.hf`: Llama's where it has them, else ours."""
    layer = "model.layers.{i}."
    more: dict[str, Map] = {}
    for side in ("attention", "mlp"):
        more |= {f"{side}_{norm}": same(f"{layer}{side}_{norm}") for norm in ("input_norm", "output_norm", "post_norm")}
        more[f"{side}_scale"] = same(f"{layer}{side}_layer_scale")
    more |= {"attention__v_norm": same(f"{layer}self_attn.v_norm")}
    more |= {"positions": same("model.embed_positions"), "embedding_norm": same("model.embed_norm")}
    if knobs["activation"] not in GATED:
        more["mlp__fc1"] = same(f"{layer}mlp.up_proj")
    return llama_names(**more)


# ---- the tensors of a model ----


class Part(NamedTuple):
    """A tensor of ours, and the tensors of theirs that hold it.

    Attributes:
        name: In the checkpoint.
        shape: Without padding of the vocabulary.
        theirs: Names and shapes.
        cut: Between the two; ``None``: the same.
    """

    name: str
    shape: tuple[int, ...]
    theirs: dict[str, tuple[int, ...]]
    cut: Cut | None

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)


def parts(names: dict[str, Map], model: ModelConfig, knobs: Knobs) -> Iterator[Part]:
    """All parameters of the model, in its order, without sigmaReparam."""
    for name, shape in _shapes(model):
        inner = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name)
        assert inner is not None
        number, module, kind = inner.groups()
        each = names[module]
        pieces = [torch.empty(shape, device="meta")]
        if each.cut is not None:
            pieces = each.cut.split(pieces[0], knobs)
        theirs = [f"{their.format(i=number)}.{kind}" for their in each.theirs]
        yield Part(name, shape, {t: tuple(p.shape) for t, p in zip(theirs, pieces, strict=True)}, each.cut)


def _shapes(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    plain = model.model_copy(update={"sigma_reparam": False, "attention": "math", "compile": False})
    assert plain.vocab_size is not None
    with torch.device("meta"):
        for layer in layer_list(plain, TensorParallel(), seed=0, draw=False):
            if layer.tied is None:
                for weight in layer.build().parameters():
                    known = place(weight)
                    rows = plain.vocab_size if layer.name in ("embedding", "head") else known.full_shape[0]
                    yield known.name, (rows, *known.full_shape[1:])
