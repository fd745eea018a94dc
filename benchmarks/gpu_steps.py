"""A step of ours and of plain PyTorch, in turn: how long, how much memory; ``benchmarks/gpu.py`` chooses of what."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import nan
from typing import Any, NamedTuple

import numpy as np
import torch
from kernel_kinds import Profile, profiled
from step import Bare, batches, in_turn, timed
from torch import Tensor

from megatron_stable.config.schema import Config, ModelConfig
from megatron_stable.engine.engine import Engine
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.shards import Init
from megatron_stable.parallel.topology import Topology
from megatron_stable.training.flops import flops_per_token, peak_flops

LONG = {"sequence_length": 4096, "vocab_size": 64000}
# fields of ``model`` beside the case's; sequences of a micro batch, which should fit into 80 GB beside the yardstick
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "85m": ({"size": "85m", **LONG}, 8),
    "302m": ({"size": "302m", **LONG}, 8),
    "830m": ({"size": None, "layers": 30, "hidden": 1408, "heads": 11, **LONG}, 4),
    "830m/256k": ({"size": "830m"}, 2),  # examples/830m.yaml
    "small": ({"layers": 2, "vocab_size": 512}, 4),
    "tiny": ({"layers": 2, "hidden": 64, "heads": 2, "sequence_length": 64, "vocab_size": 512}, 2),
}


PAIRS, FEWEST, WARMUP = 16, 2, 3  # pairs of steps, and before them
STEPPING = 30.0  # seconds for the steps of a case
UNKNOWN = (nan, nan, nan)


class TooLong(BaseException):
    """The time of a case is up; no ``Exception``, as compilers catch these and go on by another way."""


class Case(NamedTuple):
    """What is measured.

    Attributes:
        attention: A backend of ``model.attention``; ``sdpa:CUDNN``: SDPA held to one of its kernels.
        accumulation: Micro batches of a step.
        micro: Sequences of a micro batch; 0: as ``MODELS`` says.
    """

    model: str
    recipe: str = "qk_norm"
    compiled: bool = True
    attention: str = "auto"
    recompute: str = "none"
    accumulation: int = 1
    micro: int = 0

    @property
    def sequences(self) -> int:
        return self.micro or MODELS[self.model][1]

    @property
    def name(self) -> str:
        said = [self.model, self.recipe, "compiled" if self.compiled else "plain"]
        said += [self.attention] * (self.attention != "auto") + ["recomputed"] * (self.recompute == "full")
        return " ".join([*said, f"{self.accumulation}x{self.sequences}"])


class Row(NamedTuple):
    """What was measured of a case: three numbers are the 10th, 50th and 90th percentile; what is not known is NaN."""

    case: str
    error: str = ""
    pairs: int = 0
    seconds: tuple[float, float, float] = UNKNOWN
    tokens_per_second: float = nan
    mfu: float = nan
    mfu_causal: float = nan
    ratio: tuple[float, float, float] = UNKNOWN
    gigabytes: float = nan
    kernels: int = 0
    compile_seconds: float = nan

    def __str__(self) -> str:
        if self.error:
            return f"| {self.case} | **{self.error.replace('|', '/')}** |" + " |" * 7
        low, middle, high = (1e3 * x for x in self.seconds)
        mfu, causal = (f"{x:.1%}" if x == x else "–" for x in (self.mfu, self.mfu_causal))
        slow, ratio, fast = self.ratio
        return (
            f"| {self.case} | {middle:.1f} ({low:.1f}–{high:.1f}) | {self.tokens_per_second:,.0f} | {mfu} | {causal} "
            f"| {ratio:.3f} ({slow:.3f}–{fast:.3f}) | {self.gigabytes:.2f} | {self.kernels} "
            f"| {self.compile_seconds:.1f} |"
        )


def make_config(case: Case, dtype: str) -> Config:
    """The run of a case; the z-loss goes with every recipe but the baseline."""
    shape, recipe = MODELS[case.model][0], case.recipe
    attention, micro = case.attention.partition(":")[0], case.sequences
    model = {"recipe": recipe, "compile": case.compiled, "attention": attention} | shape
    return Config.model_validate(
        {
            "model": {**model, "activation_checkpointing": case.recompute},
            "precision": {"dtype": dtype},
            "batch": {"global_size": micro * case.accumulation, "micro_size": micro},
            "loss": {"z_loss": 0.0 if recipe == "baseline" else 1e-4},
        }
    )


def sdpa_kernel(case: Case) -> AbstractContextManager[None]:
    """Holds SDPA to the kernel that the case names, if it does."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    held = case.attention.partition(":")[2]
    return sdpa_kernel(getattr(SDPBackend, f"{held}_ATTENTION")) if held else nullcontext()


@torch.no_grad()
def fill(weight: Tensor, init: Init) -> None:
    """Draw on the device, which a benchmark may: the run's own draw is exact, on the CPU, and takes 15 s for 830m."""
    weight.normal_(init.mean, init.std or float(init.mean == 0))  # sigmaReparam's vectors must not be zero


class Yardstick:
    """Plain PyTorch on the shape of the case at hand, kept while it is the same."""

    def __init__(self, device: torch.device, dtype: str, compiled: bool) -> None:
        self.device, self.dtype, self.compiled = device, dtype, compiled
        self.shape: tuple[str, int] | None = None
        self.bare: Bare | None = None

    def of(self, case: Case, micro_batches: list[Tensor]) -> Callable[[], object]:
        """Its step, which has been run once; if it cannot run here, nothing."""
        if self.shape != (case.model, case.sequences):
            self.drop()
            like = Case(case.model, "baseline", self.compiled, "sdpa", micro=case.sequences)
            try:
                self.bare = Bare(make_config(like, self.dtype), self.device, draw=False)
                with torch.no_grad():
                    for master, weight in zip(self.bare.masters, self.bare.weights, strict=True):
                        fill(master, place(master).init)
                        weight.copy_(master)
                self.bare.step(micro_batches)
            except (torch.OutOfMemoryError, TooLong):
                self.drop()
                raise
            except Exception as error:
                self.drop()
                print(Row(f"the yardstick of {case.model}", told(error)), flush=True)
            self.shape = (case.model, case.sequences)
        bare = self.bare
        return (lambda: bare.step(micro_batches)) if bare is not None else (lambda: None)

    def drop(self) -> None:
        self.shape = self.bare = None
        free(self.device)


def measure(
    case: Case, device: torch.device, yardstick: Yardstick, deadline: float, profiling: bool = False
) -> tuple[Row, Profile]:
    """Measure a case; the profile is of one step."""
    config = make_config(case, yardstick.dtype)
    micro_batches = [tokens.to(device) for tokens in batches(config)]
    torch._dynamo.reset()  # else what was compiled for an earlier case counts against the limit of recompilations
    theirs = yardstick.of(case, micro_batches)
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    engine = Engine(config, Topology(), draw=False)
    try:
        for state in engine.shards():
            fill(state.tensors["weight"], state.shard.place.init)
        engine.refresh()
        numbers = iter(range(1, 10**9))

        def ours() -> None:
            with sdpa_kernel(case):
                engine.train_step(next(numbers), micro_batches, 1e-4)

        first = timed(ours, device)
        for _ in range(WARMUP):
            theirs()
            ours()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        timed(ours, device)
        peak = peak_bytes(device) - held
        did = profiled(ours, device)
        until, pairs = min(deadline, time.monotonic() + STEPPING), list[tuple[float, float]]()
        while len(pairs) < FEWEST or (len(pairs) < PAIRS and time.monotonic() < until):
            pairs += in_turn(lambda own: in_stride(ours if own else theirs, device), 2)
    finally:
        engine.close()
    mine, other = (np.array(times) for times in zip(*pairs, strict=True))
    seconds = percentiles(mine)
    rate = config.batch.global_size * config.model.sequence_length / seconds[1]
    peak_rate = peak_flops(config.precision.dtype) or nan
    whole = flops_per_token(config.model)
    row = Row(
        case.name,
        "",
        len(pairs),
        seconds,
        rate,
        whole * rate / peak_rate,
        (whole - masked_flops(config.model)) * rate / peak_rate,
        percentiles(other / mine) if yardstick.bare is not None else UNKNOWN,
        peak / 1e9,
        did.launched,
        max(0.0, first - seconds[1]),
    )
    return row, did


def in_stride(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of a step that the host begins while the device is at work on the one before, as in training."""
    if device.type != "cuda":
        return timed(step, device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step()
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def percentiles(values: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9)).tolist()
    return low, middle, high


def masked_flops(model: ModelConfig) -> float:
    """What :func:`flops_per_token` counts of attention to later tokens: half of 3 x 4 s per layer and feature."""
    return 6.0 * model.layers * model.sequence_length * model.heads * model.head_dim


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free(device: torch.device) -> None:
    """Give back what an engine held; what its weights held as attributes is found when they are gone."""
    gc.collect()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def smaller(case: Case, error: BaseException) -> list[Case]:
    """The case with half the micro batch, if it did not fit into the device's memory and there is less."""
    fits_not = isinstance(error, torch.OutOfMemoryError) and case.sequences > 1
    return [case._replace(micro=case.sequences // 2)] if fits_not else []


def told(error: BaseException) -> str:
    """The first line of an error's first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:200] if lines else ''}"
