"""The operations: from the parameters of one model to those of another that computes the same, or nearly.

::

    norm added        gain by least squares (see measuring)                   nearly; its moments are zero
    norm removed      what stands for it goes into the matrix beside it       nearly
    LayerScale added  ones                                                    exact
          … removed   into the output norm's gain, or into Proj and FC2       exact
    embeddings untied the head is a copy, moments too                         exact
    vocabulary grown  new rows are the mean of the old ones                   exact for logits of old tokens
    positions grown   a learned table is repeated (arXiv 2004.05150)          exact up to the old length
    blocks stacked    copies that write nothing yet (arXiv 2401.02415)        exact
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_stable.config.schema import Config
from megatron_stable.optim.groups import settings
from megatron_stable.optim.optimizer import MOMENTS
from megatron_stable.parallel.shards import Place
from megatron_stable.surgery.measuring import Fit, Measured, new_norm, turned
from megatron_stable.surgery.parameters import Parameter, Parameters, constant, copied, extended, scaled, shifted
from megatron_stable.surgery.streaming import places

STRETCH = 2**24  # elements of an embedding that are read at a time
BRANCHES = {"attention": "attention.proj", "mlp": "mlp.fc2"}  # and the matrix that each ends with
# what stands beside a norm: a matrix in front of it, whose rows take its gain, or behind it, whose columns do
BEFORE = {"attention_output_norm": "attention.proj", "mlp_output_norm": "mlp.fc2"}
BEHIND = {"attention_input_norm": "attention.qkv", "mlp_input_norm": "mlp.fc1"}


def operate(parameters: Parameters, before: Config, after: Config, measured: Measured) -> Parameters:
    """The parameters of ``after``, made of those of ``before``."""
    found = dict(parameters)
    trained = any(len(each.kinds) > 1 for each in parameters.values())
    for number in range(before.model.layers):
        block = f"blocks.{number}"
        _remove_norms(found, block, before, after, measured)
        _add_norms(found, block, before, after, measured, trained)
        _layer_scale(found, block, before, after, trained)
    if before.model.tied_embeddings and not after.model.tied_embeddings:
        found["head.weight"] = found["embedding.weight"]
    if before.model.vocab_size != after.model.vocab_size:
        _grow_vocabulary(found, before, after)
    if before.model.sequence_length != after.model.sequence_length and "positions.weight" in found:
        table, known = found["positions.weight"], before.model.sequence_length
        length = after.model.sequence_length
        found["positions.weight"] = extended(table, length, length, lambda row: _row(table, row % known), known)
    if after.model.layers > before.model.layers:
        found = _stack(found, before, after)
    return found


def _vector_kinds(config: Config, name: str, shape: tuple[int, ...], trained: bool) -> tuple[str, ...]:
    rule = settings(Place(shape, name=name), config)["rule"]
    return ("weight", *MOMENTS[rule]) if trained else ("weight",)


def _add_norms(found: Parameters, block: str, before: Config, after: Config, measured: Measured, trained: bool) -> None:
    number = int(block.split(".")[1])
    for slot in turned(before.model, after.model, True):
        norm, fit = new_norm(after.model, slot), measured.added[number, slot]
        of_heads = slot.startswith("attention.")
        shared = of_heads and after.model.qk_norm_scope == "head"
        gain, offset = fit.line(hasattr(norm, "bias") and norm.bias is not None, shared)
        for name, values in (("weight", gain), ("bias", offset)):
            if dict(norm.named_parameters()).get(name) is not None:
                key = f"{block}.{slot}.{name}"
                found[key] = constant(values.flatten(), _vector_kinds(before, key, (values.numel(),), trained))


def _remove_norms(found: Parameters, block: str, before: Config, after: Config, measured: Measured) -> None:
    number = int(block.split(".")[1])
    for slot in turned(before.model, after.model, False):
        fit = measured.removed[number, slot]
        for name in ("weight", "bias"):
            found.pop(f"{block}.{slot}.{name}", None)
        if slot in BEHIND:
            key = f"{block}.{BEHIND[slot]}.weight"
            found[key] = scaled(found[key], columns=fit.line(False)[0])
        elif slot in BEFORE:
            _multiply(found, f"{block}.{BEFORE[slot]}", *fit.line(f"{block}.{BEFORE[slot]}.bias" in found))
        else:
            _multiply_heads(found, f"{block}.attention.qkv", slot, fit, before)


def _multiply(found: Parameters, matrix: str, rows: Tensor, offset: Tensor | None = None) -> None:
    """Multiply the output of a linear layer."""
    found[f"{matrix}.weight"] = scaled(found[f"{matrix}.weight"], rows=rows)
    if (key := f"{matrix}.bias") in found:
        found[key] = scaled(found[key], rows=rows)
        if offset is not None:
            found[key] = shifted(found[key], offset)


def _multiply_heads(found: Parameters, matrix: str, slot: str, fit: Fit, before: Config) -> None:
    """Multiply queries, keys or values, which QKV has group by group."""
    model = before.model
    queries, part = model.heads // model.groups, slot.split(".")[1][0]
    where = {"q": slice(0, queries), "k": slice(queries, queries + 1), "v": slice(queries + 1, queries + 2)}[part]
    lines = fit.line(f"{matrix}.bias" in found)  # [heads, d]
    shape = (model.groups, queries + 2, model.head_dim)
    rows, offset = torch.ones(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    rows[:, where], offset[:, where] = (line.view(model.groups, -1, model.head_dim) for line in lines)
    _multiply(found, matrix, rows.flatten(), offset.flatten())


def _layer_scale(found: Parameters, block: str, before: Config, after: Config, trained: bool) -> None:
    old, new = before.model.layer_scale, after.model.layer_scale
    if (old is None) == (new is None):
        return
    for branch, matrix in BRANCHES.items():
        key = f"{block}.{branch}_scale.weight"
        if new is not None:
            size = (before.model.hidden,)
            found[key] = constant(torch.ones(size), _vector_kinds(before, key, size, trained))
            continue
        factors = found.pop(key).read("weight", 0, before.model.hidden)
        normed = getattr(after.model, f"{branch}_output_norm")
        _multiply(found, f"{block}.{branch}_output_norm" if normed else f"{block}.{matrix}", factors)


def _grow_vocabulary(found: Parameters, before: Config, after: Config) -> None:
    """New rows are the mean of the old ones: by Jensen's inequality a new token is no likelier than the average one, so
    that k new ones take at most log(1 + k / V) nats (nlp.stanford.edu/~johnhew/vocab-expansion.html)."""
    known, full = before.model.vocab_size, after.model.vocab_size
    assert known is not None and full is not None
    shapes = {name: place.full_shape for name, place in places(after).items()}
    for name in ("embedding.weight", "head.weight"):
        if name in found:
            mean = _mean(found, name, known)
            found[name] = extended(found[name], shapes[name][0], full, _always(mean), known)


def _always(mean: Tensor) -> Callable[[int], Tensor]:
    return lambda row: mean


def _mean(found: Parameters, name: str, rows: int) -> Tensor:
    """Of the rows, ``[h]``."""
    width = found[name].shape[-1]
    total, many = torch.zeros(width, dtype=torch.float64), max(1, STRETCH // width)
    for first in range(0, rows, many):
        last = min(first + many, rows)
        total += found[name].read("weight", first * width, last * width).view(-1, width).sum(0, dtype=torch.float64)
    return (total / rows).float()


def _row(table: Parameter, row: int) -> Tensor:
    width = table.shape[-1]
    return table.read("weight", row * width, (row + 1) * width)


def origins(before: int, after: int) -> list[tuple[int, bool]]:
    """Of each block of a deeper model: the block that it comes from, and whether it is a copy; the copies of a block
    come right behind it."""
    sources = [number * before // after for number in range(after)]
    return [(source, i > 0 and sources[i - 1] == source) for i, source in enumerate(sources)]


def _stack(found: Parameters, before: Config, after: Config) -> Parameters:
    """A copy is silent: the last thing that a branch does before it joins the residual stream begins at zero."""
    stacked = {name: each for name, each in found.items() if not name.startswith("blocks.")}
    for number, (source, copy) in enumerate(origins(before.model.layers, after.model.layers)):
        prefix = f"blocks.{source}."
        for name, each in found.items():
            if name.startswith(prefix):
                rest = name.removeprefix(prefix)
                stacked[f"blocks.{number}.{rest}"] = copied(each, _last(rest, after)) if copy else each
    return stacked


def _last(name: str, after: Config) -> bool:
    """Whether a parameter of a block is of what ends a branch: the output norm, or the matrix."""
    ends = {
        f"{branch}_output_norm" if getattr(after.model, f"{branch}_output_norm") else matrix
        for branch, matrix in BRANCHES.items()
    }
    return name.rpartition(".")[0] in ends
