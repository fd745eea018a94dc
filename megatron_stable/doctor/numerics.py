"""Whether the ranks compute what one process would: gradients and a step of a tiny model, in the run's precision and
layout, against a plain reference in float64.

The reference is the same list of layers with the same weights on one rank: no DeepSpeed, no parallelism, attention
written out, PyTorch's own cross-entropy, Adam by its formula. What the engine's optimizer was given is read from Adam's
first moment after the first step, (1 - beta_1) g, so all ways of reducing gradients are looked at alike.
"""

from __future__ import annotations

import gc
from math import isfinite
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_stable.config.checks import conflicts
from megatron_stable.config.parametrization import model_multipliers
from megatron_stable.config.schema import Config
from megatron_stable.doctor.crew import Crew
from megatron_stable.doctor.finding import Finding, Verdict
from megatron_stable.engine.construction import DTYPES
from megatron_stable.engine.engine import Engine
from megatron_stable.engine.shards import ShardState
from megatron_stable.model import sigma
from megatron_stable.model.transformer import Transformer, layer_list
from megatron_stable.parallel.agreement import everywhere
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.topology import TensorParallel, Topology

RATE, EPS, BETA = 1e-3, 1e-3, 0.9  # Adam with a small eps hides errors in the scale of gradients
# of a parameter's gradient, in parts of its root mean square; a lost or doubled sum over two ranks is off by 0.5
BOUNDS = {"fp32": 1e-3, "bf16": 0.15, "fp16": 0.05}
FLOOR = 1e-2  # of the root mean square over all parameters: gradients below it are zero but for rounding
FEW = 4.0  # deviations by which a single element may be off
VOCAB = 200  # not a multiple of 128: there is padding


class Reference(NamedTuple):
    """What one process finds, by name of the parameter, full size.

    Attributes:
        loss: All of it, nats per token.
        norm: Of the whole gradient.
        rms: Of the whole gradient, per element.
    """

    loss: float
    norm: float
    rms: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


class Part(NamedTuple):
    """How far off a rank's part of a parameter is.

    Attributes:
        copy: Of the parameter's slice, of which replicas hold parts: pipeline stage and TP rank.
        numel: Elements.
        gradient, weight: Sums of squared differences.
    """

    rank: int
    parameter: str
    copy: tuple[int, int]
    numel: int
    gradient: float
    weight: float


class Error(NamedTuple):
    """The largest error of a kind, in parts of what a parameter's values are like; where, and on which rank."""

    size: float
    parameter: str
    rank: int


def check_numerics(crew: Crew) -> list[Finding]:
    """Findings on rank 0; collective."""
    findings = []
    for config in cases(crew.config, crew.size):
        if (why := _unsupported(config)) is not None:
            findings.append(why)
            continue
        findings.append(compare(config, crew))
    if crew.config is not None and conflicts(crew.config, crew.size):
        parallel = crew.config.parallel
        text = f"TP {parallel.tensor} x PP {parallel.pipeline} of the run cannot be had with {crew.size} rank(s)"
        remedy = "start the doctor on all ranks of the run, as the run is started"
        findings.append(Finding("numerics", text, Verdict.WARNING, remedy, scope="world"))
    return findings if crew.rank == 0 else []


def cases(config: Config | None, ranks: int) -> list[Config]:
    """What is computed: the run shrunken, if its layout fits these ranks; without a run, layouts that fit them."""
    if config is not None:
        parallel = config.parallel
        fits = ranks % (parallel.tensor * parallel.pipeline) == 0
        alone = {"tensor": 1, "pipeline": 1, "sequence": False, "zero_stage": parallel.zero_stage}
        return [shrunken(config, ranks, None if fits else alone)]
    tensor = 2 if ranks % 2 == 0 else 1
    pipeline = 2 if ranks // tensor % 2 == 0 else 1
    grid = {"tensor": tensor, "pipeline": pipeline, "sequence": tensor > 1}
    layouts: list[tuple[str, dict[str, Any]]] = [("fp32", grid), ("bf16", grid)]
    if ranks > 1:
        layouts += [("fp32", {"zero_stage": stage}) for stage in (1, 3)]
    if ranks == 2:
        layouts.append(("fp32", {"pipeline": 2}))
    plain = Config.model_validate({"model": {"recipe": "qk_norm"}, "loss": {"z_loss": 1e-3}})
    return [
        shrunken(plain.model_copy(update={"precision": plain.precision.model_copy(update={"dtype": dtype})}), ranks, p)
        for dtype, p in layouts
    ]


def shrunken(config: Config, ranks: int, parallel: dict[str, Any] | None = None) -> Config:
    """A tiny model with a run's recipe, precision and layout, trained by plain Adam.

    Args:
        parallel: In place of the run's layout.
    """
    values = config.model_dump(mode="json")
    values["parallel"] = parallel = values["parallel"] if parallel is None else parallel
    tensor, pipeline = parallel.get("tensor", 1), parallel.get("pipeline", 1)
    data = ranks // (tensor * pipeline)
    model = config.model
    ratio = min(4, model.heads // model.groups)  # query heads for each key and value head
    groups = max(2, tensor) if ratio == 1 else tensor
    heads, layers = ratio * groups, 2 * pipeline
    every = model.activation_checkpointing
    values["model"] |= {
        "size": None, "layers": layers, "heads": heads, "hidden": 16 * heads, "ffn_hidden": 64 * heads,
        "kv_heads": None if ratio == 1 else groups, "vocab_size": VOCAB, "sequence_length": 16 * max(2, tensor),
        "dropout": 0.0, "attention_dropout": 0.0, "compile": False,
        "activation_checkpointing": min(every, 2) if isinstance(every, int) else every,
    }  # fmt: skip
    if not torch.cuda.is_available() and model.attention in ("flex", "flash"):
        values["model"]["attention"] = "auto"
    values["batch"] = {"micro_size": 1, "global_size": data * max(2, pipeline)}
    values["optimizer"] = {"learning_rate": RATE, "eps": EPS, "betas": [BETA, 0.99], "weight_decay": 0, "clip_grad": 0}
    values["schedule"] = {"kind": "constant", "warmup_steps": 0}
    values["precision"]["initial_scale_power"] = 10  # so that the first step does not overflow
    values["precision"]["min_scale"] = 1.0
    values["data"], values["guard"], values["checkpoint"] = {}, {}, {}
    return Config.model_validate(values)


def _unsupported(config: Config) -> Finding | None:
    """A finding where DeepSpeed does not train in the precision on this device."""
    from deepspeed.accelerator import get_accelerator

    if config.precision.dtype != "fp16" or get_accelerator().is_fp16_supported():
        return None
    text = "DeepSpeed does not train in fp16 on this device"
    return Finding("numerics", text, Verdict.FAILURE, "set precision.dtype to bf16 or fp32", scope="world")


def compare(config: Config, crew: Crew) -> Finding:
    """Take a step on all ranks, and the same on one. Collective."""
    parallel, tokens = config.parallel, _tokens(config)
    topology = Topology(parallel.tensor, parallel.pipeline, parallel.sequence)
    engine = Engine(config, topology)
    engine.faults.begin(1)
    starts = range(topology.data_rank, len(tokens), topology.data_size)
    metrics = engine.train_step(1, [tokens[at : at + 1] for at in starts], RATE).metrics
    word: list[Any] = [reference(config, tokens) if crew.rank == 0 else None]
    dist.broadcast_object_list(word, src=0)
    expected = Reference(*word[0])
    mine = [_part(state, expected, topology) for state in engine.shards() if "exp_avg" in state.tensors]
    parts = [part for parts in everywhere(mine) for part in parts]
    del engine
    gc.collect()
    loss = metrics.loss + metrics.z_loss + metrics.mu_loss
    gradient = _worst(parts, "gradient", {name: _size(g, expected) for name, g in expected.gradients.items()})
    weight = _worst(parts, "weight", {name: _moved(g, expected, name) for name, g in expected.gradients.items()})
    return judged(config, crew, abs(loss / expected.loss - 1), abs(metrics.grad_norm / expected.norm - 1), gradient,
                  weight)  # fmt: skip


def judged(config: Config, crew: Crew, loss: float, norm: float, gradient: Error, weight: Error) -> Finding:
    """What relative errors come to."""
    parallel, dtype = config.parallel, config.precision.dtype
    layout = f"TP {parallel.tensor}{' with SP' if parallel.sequence and parallel.tensor > 1 else ''}"
    data = crew.size // (parallel.tensor * parallel.pipeline)
    layout = f"{dtype}, {layout} x PP {parallel.pipeline} x DP {data}, ZeRO-{parallel.zero_stage}"
    errors = {"loss": loss, "gradient norm": norm, "gradient": gradient.size, "weight": weight.size}
    wrong = [f"the {what} is off by {errors[what]:.1e}" for what in ("loss", "gradient norm")
             if not errors[what] <= BOUNDS[dtype]]  # fmt: skip
    for what, error in (("gradient", gradient), ("weight after a step", weight)):
        if not error.size <= BOUNDS[dtype]:
            where = f"on rank {error.rank} ({crew.hosts[error.rank]})"
            wrong.append(f"the {what} of {error.parameter} is off by {error.size:.1e} {where}")
    numbers = {name: value for name, value in errors.items() if isfinite(value)}
    if wrong:
        text = f"{layout}: {'; '.join(wrong)}; rounding is {BOUNDS[dtype]:g} at most"
        remedy = "do not train on these ranks: see the versions, then which rank or machine it follows"
        return Finding("numerics", text, Verdict.FAILURE, remedy, numbers, "world")
    text = f"{layout}: gradients within {gradient.size:.1e} of one process in float64 ({gradient.parameter})"
    return Finding("numerics", text, numbers=numbers, scope="world")


def reference(config: Config, tokens: Tensor) -> Reference:
    """The same step in one process; ``tokens``: ``[global, s + 1]``."""
    dtype, model_config = DTYPES[config.precision.dtype], config.model
    plain = model_config.model_copy(update={"attention": "math", "activation_checkpointing": "none"})
    layers = layer_list(plain, TensorParallel(), config.run.seed, multipliers=model_multipliers(config), dtype=dtype)
    model = Transformer(layers).double()  # of weights as the run's precision rounds them
    sigma.power_iteration(model)
    names = {name: place(weight).name for name, weight in model.named_parameters()}
    output = "embedding.weight" if model_config.tied_embeddings else "head.weight"
    matrix = next(weight for name, weight in model.named_parameters() if names[name] == output)
    total = 0.0
    for sample in tokens.split(8):
        logits = model(sample[:, :-1])[..., : model_config.vocab_size]
        if (cap := model_config.final_logit_cap) is not None:
            logits = cap * (logits / cap).tanh()
        loss = F.cross_entropy(logits.flatten(0, 1), sample[:, 1:].flatten())
        loss = loss + config.loss.z_loss * logits.logsumexp(-1).square().mean()
        centre = matrix[: model_config.vocab_size].mean(0)
        loss = (loss + config.loss.mu_loss * centre.square().sum()) * (len(sample) / len(tokens))
        loss.backward()
        total += loss.item()
    weights, gradients = {}, {}
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        gradients[names[name]] = gradient = weight.grad
        # Adam's first step, whose moments are those of this gradient alone
        weights[names[name]] = weight.detach() - RATE * gradient / (gradient.abs() + EPS)
    flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
    return Reference(total, float(flat.norm()), float(flat.square().mean().sqrt()), gradients, weights)


def _part(state: ShardState, expected: Reference, topology: Topology) -> Part:
    """What this rank holds against what it should."""
    shard, name = state.shard, state.shard.place.name
    stretch = slice(shard.start, shard.start + shard.numel)
    gradient, weight = (
        shard.place.slice(full[name]).flatten()[stretch] for full in (expected.gradients, expected.weights)
    )
    found = state.tensors["exp_avg"].cpu().double() / (1 - BETA), state.tensors["weight"].cpu().double()
    squares = (float((have - wanted).square().sum()) for have, wanted in zip(found, (gradient, weight), strict=True))
    return Part(topology.rank, name, (topology.stage, topology.tensor_rank), shard.numel, *squares)


def _worst(parts: list[Part], kind: str, sizes: dict[str, float]) -> Error:
    """The largest error of a slice over all replicas that hold parts of it, or of a single part.

    A part of few elements may be off by more than a large one: one rounding counts there.
    """
    slices: dict[tuple[str, tuple[int, int]], list[Part]] = {}
    for part in parts:
        slices.setdefault((part.parameter, part.copy), []).append(part)
    worst = Error(0.0, "", 0)
    for (name, _), members in slices.items():
        squares = [(getattr(part, kind), part) for part in members]
        if not all(isfinite(square) for square, _ in squares):
            return Error(float("inf"), name, next(part.rank for square, part in squares if not isfinite(square)))
        largest, culprit = max(squares, key=lambda pair: pair[0] / pair[1].numel)
        whole = (sum(square for square, _ in squares) / sum(part.numel for part in members)) ** 0.5
        single = (largest / culprit.numel) ** 0.5 / (1 + FEW / culprit.numel**0.5)
        worst = max(worst, Error(max(whole, single) / sizes[name], name, culprit.rank))
    return worst


def _size(gradient: Tensor, expected: Reference) -> float:
    """What a parameter's gradient is like, per element."""
    return float(gradient.square().mean().sqrt()) + FLOOR * expected.rms


def _moved(gradient: Tensor, expected: Reference, name: str) -> float:
    """What a step changes in a parameter, per element; beside it what fp32 rounds off the weight."""
    step = float((RATE * gradient / (gradient.abs() + EPS)).square().mean().sqrt())
    rounding = 2.0**-23 * float(expected.weights[name].square().mean().sqrt())
    return max(step, 0.1 * RATE) + rounding / BOUNDS["fp32"]


def _tokens(config: Config) -> Tensor:
    """``[global, s + 1]``, skewed so that there is something to learn; on the CPU, the same everywhere."""
    generator = torch.Generator().manual_seed(config.run.seed)
    shape = config.batch.global_size, config.model.sequence_length + 1
    return (torch.rand(shape, generator=generator).square() * VOCAB).long()
