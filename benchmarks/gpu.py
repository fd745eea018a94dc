"""Our training step on one GPU, beside a loop in plain PyTorch: correct first, then how fast. At most 8 minutes.

    python benchmarks/gpu.py --json gpu.jsonl --chart gpu.png --profile
    python benchmarks/gpu.py --cases 'cap|flex' --minutes 4     # only the cases whose name has a match
    python benchmarks/gpu.py --smoke                            # tiny cases on any machine: that all of it runs

First a tiny model trains on the device, and its losses are compared with those of plain PyTorch in fp32 on the CPU.
Then come the cases below, the most important first, until the time is up; the rest is named. The yardstick takes turns
with each: the baseline recipe on the same shape and micro batch, with SDPA, compiled blocks and fused AdamW, in the
loop that one would write by hand (``benchmarks/step.py``). A step is timed by events of the device, and begins while
the device is at work on the one before. A case that fails is a row with its error; one that does not fit into memory is
tried again with half the micro batch.

MFU is by the PaLM convention, attention over the full s x s, and with causal attention counted once. Peak memory is
what the case allocates, without what the yardstick holds; on a CPU, of the process so far. Compile time is what the
first step takes beyond the median; Inductor's cache of earlier runs shortens it. Kernels are those of one step, on a
CPU the operators. The exit code is 1 if the device computes something else than the CPU, or nothing was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf, isnan
from pathlib import Path
from typing import Any

# AOTAutograd's cache does not know that SDPA was held to one of its kernels
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import torch
import torch.distributed as dist
from gpu_steps import MODELS, Case, Row, TooLong, Yardstick, free, make_config, measure, smaller, told
from kernel_kinds import Profile, report
from step import Bare, batches

from megatron_stable.analysis.drawing import COLORS, INK, MUTED, canvas, plain, png, tidy
from megatron_stable.config.schema import ModelConfig
from megatron_stable.engine.engine import Engine
from megatron_stable.model.transformer import parameter_count
from megatron_stable.numbers import finite
from megatron_stable.parallel.topology import Topology
from megatron_stable.parallel.world import join_world

# the most important first
CASES = [
    Case("830m"),
    Case("830m", compiled=False),
    Case("830m", "baseline"),
    Case("830m", "qk_norm_cap"),
    Case("830m", attention="sdpa:CUDNN"),
    Case("830m", recompute="full"),
    Case("302m"),
    Case("85m"),
    Case("830m/256k", "qk_norm_cap"),
    Case("830m", accumulation=8),
    Case("830m", "qkv_norm"),
    Case("830m", "sigma_reparam"),
    Case("830m", attention="flex"),
    Case("830m", "olmo2"),
    Case("830m", "gemma2"),
    Case("830m", "qk_norm_cap", attention="flash"),
    Case("830m", attention="math", recompute="full", micro=1),
    Case("302m", compiled=False),
    Case("302m", "qk_norm_cap"),
    Case("302m", recompute="full"),
    Case("85m", compiled=False),
]
SMOKE = [
    Case("tiny", compiled=False),
    Case("tiny", compiled=False, attention="flex"),  # which fails on a CPU
    Case("tiny"),
    Case("tiny", "qk_norm_cap", compiled=False, recompute="full", accumulation=2),
]
# dtype, recipe, compiled, and the most that a loss may be off, of itself. Rounding is 2^-9 of a value in bf16, and
# averages out over a thousand tokens; in fp32 the first updates of Adam follow the signs of gradients near zero
CHECKS = [
    ("fp32", "qk_norm", False, 1e-3),
    ("bf16", "qk_norm", False, 1e-2),
    ("bf16", "qk_norm", True, 1e-2),
    ("bf16", "qk_norm_cap", True, 1e-2),
]
CHECK_STEPS, CHECK_RATE, CHECK_LIMIT = 6, 1e-3, 75.0  # steps, learning rate, seconds at most
BEGAN = time.monotonic() - time.process_time()  # what was imported took about as long as the processor worked
HEAD = "| case | ms/step (10–90 %) | tokens/s | MFU | causal | × yardstick (10–90 %) | peak GB | kernels | compile s |"


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Break off what is within after so many seconds, be it a compilation."""

    def stop(*_: object) -> None:
        raise TooLong(f"broken off after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds), 10.0)  # again, should it be swallowed all the same
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check(device: torch.device, dtype: str, recipe: str, compiled: bool) -> tuple[list[float], list[float]]:
    """Losses of the engine on the device, and of plain PyTorch in fp32 on the CPU, over the same steps."""
    case = Case("small", recipe, compiled)
    bare = Bare(make_config(case._replace(compiled=False), "fp32"), torch.device("cpu"))
    for group in bare.optimizer.param_groups:
        group["lr"] = CHECK_RATE
    config = make_config(case, dtype)
    engine, micro_batches, steps = Engine(config, Topology()), batches(config), range(1, CHECK_STEPS + 1)
    try:
        ours = [engine.train_step(step, micro_batches, CHECK_RATE).metrics.loss for step in steps]
    finally:
        engine.close()
    return ours, [bare.step(micro_batches).item() for _ in steps]


def all_correct(checks: list[tuple[str, str, bool, float]], device: torch.device, note: Callable[..., None]) -> bool:
    """Print how far the device's losses are from those of the CPU; whether none is too far."""
    print(f"Losses of {CHECK_STEPS} steps against plain PyTorch in fp32 on the CPU:\n", flush=True)
    wrong = 0
    for dtype, recipe, compiled, bound in checks:
        name = f"{dtype} {recipe} {'compiled' if compiled else 'plain'}"
        try:
            with limit(CHECK_LIMIT):
                ours, theirs = check(device, dtype, recipe, compiled)
            off = max(inf if isnan(a) else abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
            said = f"{theirs[0]:.4f} to {theirs[-1]:.4f}, off by {off:.1e} at most of {bound:.0e} allowed"
        except (Exception, TooLong) as error:
            traceback.print_exc()
            off, said = inf, told(error)
        wrong += off > bound
        print(
            f"- {name}: {said}: {'**WRONG: no figure below is of a correct step**' if off > bound else 'ok'}",
            flush=True,
        )
        note(check=name, off=off, bound=bound, said=said)
    print(flush=True)
    return not wrong


def attention(did: Profile | None) -> str:
    """The kernel of attention that took longest."""
    members = did.names.get("attention") if did is not None else None
    return members[0][0] if members else ""


def known(value: Any) -> Any:
    """With null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: known(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [known(each) for each in value]
    return finite(value) if isinstance(value, float) else value


def header() -> str:
    return f"{HEAD}\n|{'---|' * HEAD.count(' | ')}---|"


def run(cases: list[Case], args: argparse.Namespace, device: torch.device, note: Callable[..., None]) -> list[Row]:
    """Measure the cases in their order while there is time, and print a row of each."""
    yardstick = Yardstick(device, "fp32" if args.smoke else "bf16", compiled=not args.smoke)
    deadline, queue, rows = BEGAN + 60 * args.minutes, list(cases), list[Row]()
    print(header(), flush=True)
    while queue and deadline - time.monotonic() > args.least:
        case, did = queue.pop(0), None
        try:
            with limit(min(args.limit, deadline - time.monotonic())):
                row, did = measure(case, device, yardstick, deadline)
        except (Exception, TooLong) as error:
            traceback.print_exc()
            row = Row(case.name, told(error))
            queue[:0] = smaller(case, error)
        free(device)
        rows.append(row)
        print(row, flush=True)
        note(**case._replace(micro=case.sequences)._asdict() | row._asdict(), attention_kernel=attention(did))
        if args.profile and did is not None:
            print(f"\nWhere a step of {case.name} goes:\n\n{report(did)}\n\n{header() if queue else ''}", flush=True)
            note(profile=case.name, **did._asdict())
            args.profile = False
    if queue:
        print(f"\nNot measured, as the time was up: {'; '.join(case.name for case in queue)}.", flush=True)
    return rows


def draw(rows: list[Row], path: Path, title: str) -> None:
    """A bar per case: tokens/s over those of the yardstick."""
    figure = canvas(9, 1.2 + 0.32 * len(rows), layout="constrained")
    axes = figure.subplots()
    tidy(axes)
    for y, row in enumerate(rows):
        low, middle, high = row.ratio
        if middle == middle:
            axes.barh(y, middle, color=COLORS[0], height=0.65)
            axes.plot([low, high], [y, y], color=INK, linewidth=1.2)
        said = row.error[:80] or f"{middle:.2f} · {row.tokens_per_second:,.0f}/s"
        axes.annotate(
            plain(said), (high if middle == middle else 0, y), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=8, color=MUTED if row.error else INK,
        )  # fmt: skip
    axes.axvline(1, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    axes.set_yticks(range(len(rows)), [plain(row.case) for row in rows], fontsize=8)
    axes.set_xlim(0, 1.3 * max([1.0, *(row.ratio[2] for row in rows if row.ratio[2] == row.ratio[2])]))
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s, as a ratio to plain PyTorch's (line: 10th to 90th percentile)", fontsize=8.5)
    axes.set_title(plain(title), fontsize=9, loc="left", color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(figure))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="in all, from the start")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds after which a case is broken off")
    parser.add_argument("--cases", default="", help="a regular expression: of the names of the cases to measure")
    parser.add_argument("--smoke", action="store_true", help="tiny cases, in fp32")
    parser.add_argument("--profile", action="store_true", help="where a step of the first case goes, by kind of kernel")
    parser.add_argument("--no-checks", action="store_true", help="leave out the comparison with the CPU")
    parser.add_argument("--json", type=Path, help="write what is measured here, a line each, as it goes")
    parser.add_argument("--chart", type=Path, help="draw tokens/s over the yardstick's here (PNG)")
    args = parser.parse_args()
    args.least = 5.0 if args.smoke else 25.0  # seconds under which no case begins
    for case in CASES:
        make_config(case, "bf16")  # so that a slip in the table shows wherever this is run
    cases = [case for case in (SMOKE if args.smoke else CASES) if re.search(args.cases, case.name)]
    if not (args.smoke or torch.cuda.is_available()):
        parser.error("there is no GPU here; --smoke runs anywhere")
    # join_world alone would ask for the version of the installed package, and here may be no more than the source
    on_gpu = torch.cuda.is_available()
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=dist.TCPStore("127.0.0.1", 0, 1, is_master=True), rank=0, world_size=1
    )
    join_world()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    machine = torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} used"
    title = f"{machine}; torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{title}; vocabulary 64000 and sequences of 4096 unless said otherwise; case: micro batches x sequences\n")
    for name in dict.fromkeys(case.model for case in cases):
        print(f"- {name}: {parameter_count(ModelConfig(**MODELS[name][0]))[0] / 1e6:,.3g} M parameters")
    print(flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    out = args.json.open("w") if args.json else None

    def note(**values: Any) -> None:
        if out is not None:
            print(json.dumps(known({"machine": title, **values})), file=out, flush=True)

    correct = args.no_checks or all_correct(CHECKS[: 2 if args.smoke else None], device, note)
    rows = run(cases, args, device, note)
    if args.chart and rows:
        draw(rows, args.chart, title)
    said = "" if correct else "; **the device computes something else**"
    print(f"\n{time.monotonic() - BEGAN:.0f} s in all{said}", flush=True)
    dist.destroy_process_group()
    return int(not correct or not any(not row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
