"""Where the time of a step goes: kernels by kind, from one recorded by torch.profiler; ``benchmarks/gpu.py`` uses it.

On a GPU the kernels are those of the device, on a CPU the operators, each without the operators that it calls.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

# a kernel is of the first kind whose pattern is found in its name, in lower case
KINDS = {
    "collectives": r"nccl|c10d|all_?reduce|all_?gather|reduce_?scatter|gloo",
    # but not what Inductor calls by it because it prepares its inputs
    "attention": r"^(?!triton_(poi|per|red)_).*(flash|fmha|attention|attn|sdpa)|flex_attention|largest_of_a_block",
    # fused and foreach kernels: AdamW, norms of gradients, sums of gradients, copies to the weights
    "optimizer": r"multi_tensor_apply|adamw?_|_foreach_|lpnorm",
    # what the eager loss calls by names that nothing else of a step has
    "loss": r"cross_?entropy|nll_loss|softmax|logsumexp|exp_kernel|aten::exp|scatter_add|scatter_gather|maxops|amax",
    "embedding": r"embedding|index_?select|vectorized_gather|compute_grad_weight|sum_and_scatter|krn_partial",
    "matrix products": r"gemm|gemv|nvjet|cutlass|cublas|xmma|wgmma|splitk|triton_tem|_mm_|"
    r"aten::(_scaled_mm|mm|addmm|bmm|baddbmm|matmul|linear|mv|dot)$",
    "norms": r"layer_?norm|rms_?norm|rowwisemoments|gammabeta|triton_(per|red)_|welford",
    "copies": r"memcpy|memset|copy_kernel|copy_device|catarray|fillfunctor|\btranspose|"
    r"aten::(_?copy_|clone|contiguous|cat|fill_|zero_|zeros|_to_copy|to)$",
    "reductions": r"reduce_kernel|reduceop|aten::(sum|mean|all|any|norm|linalg_vector_norm)$",
    "element-wise": r"elementwise|triton_poi|gelu|aten::\w*(add|sub|mul|div|pow|sqrt|rsqrt|neg|tanh|sin|cos|where|fill|"
    r"clamp|silu|log|square|reciprocal|masked)\w*$",
}
OTHER, IDLE = "other", "idle"
ON_DEVICE, KERNEL, OPERATOR = ("kernel", "gpu_memcpy", "gpu_memset"), "kernel", "cpu_op"  # categories of a trace


class Span(NamedTuple):
    """A kernel, copy or operator that ran: seconds, and the stream or thread that it ran in."""

    name: str
    category: str
    start: float
    end: float
    lane: tuple[Any, Any]


class Profile(NamedTuple):
    """What a step did.

    Attributes:
        seconds: From the beginning of the first kernel to the end of the last.
        kinds: Seconds of each kind, the longest first, ``idle`` included: when none ran.
        names: Of each kind, its kernels as (name, seconds, how many), the longest first.
        launched: Kernels without copies, on a CPU operators.
    """

    seconds: float
    kinds: dict[str, float]
    names: dict[str, list[tuple[str, float, int]]]
    launched: int


def classify(name: str) -> str:
    """The kind of a kernel or operator."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), OTHER)


def profiled(step: Callable[[], object], device: torch.device) -> Profile:
    """Run a step, and see what it did."""
    host, own = ProfilerActivity.CPU, ProfilerActivity.CUDA
    # kernels alone disturb the step least; should a driver give none so, then operators beside them
    for activities in ([own], [host, own]) if device.type == "cuda" else ([host],):
        with profile(activities=activities) as recorded:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
        with TemporaryDirectory() as directory:
            path = Path(directory) / "trace.json"
            recorded.export_chrome_trace(str(path))
            found = spans(json.loads(path.read_text(encoding="utf-8", errors="replace"), strict=False))
        if found:
            break
    return summary(found)


def spans(trace: dict[str, Any]) -> list[Span]:
    """What a Chrome trace of torch.profiler says of the device; of the host, if it says nothing of a device."""
    complete = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    chosen = [event for event in complete if event.get("cat") in ON_DEVICE]
    return [
        Span(
            e["name"], e["cat"], e["ts"] / 1e6, (e["ts"] + e.get("dur", 0)) / 1e6, (e.get("pid"), e.get("tid"))
        )
        for e in chosen or [event for event in complete if event.get("cat") == OPERATOR]
    ]  # fmt: skip


def summary(found: list[Span]) -> Profile:
    """Time by kind."""
    if not found:
        return Profile(0.0, {}, {}, 0)
    first, last = min(span.start for span in found), max(span.end for span in found)
    seconds, count = defaultdict[str, float](float), Counter(span.name for span in found)
    for span, own in zip(found, own_times(found), strict=True):
        seconds[span.name] += own
    names: dict[str, list[tuple[str, float, int]]] = defaultdict(list)
    for name in sorted(seconds, key=lambda name: -seconds[name]):
        names[classify(name)].append((name, seconds[name], count[name]))
    kinds = {kind: sum(own for _, own, _ in members) for kind, members in names.items()}
    kinds[IDLE] = last - first - busy(found)
    launched = sum(
        span.category == KERNEL or (span.category == OPERATOR and span.name.startswith("aten::")) for span in found
    )
    return Profile(last - first, dict(sorted(kinds.items(), key=lambda item: -item[1])), dict(names), launched)


def own_times(found: list[Span]) -> list[float]:
    """Seconds of each span without those that began within it in the same lane, as an operator's parts do."""
    own, within = [span.end - span.start for span in found], list[int]()
    for i in sorted(range(len(found)), key=lambda i: (str(found[i].lane), found[i].start, -found[i].end)):
        span = found[i]
        while within and (found[within[-1]].lane != span.lane or found[within[-1]].end <= span.start):
            within.pop()
        if within:
            own[within[-1]] -= min(found[within[-1]].end, span.end) - span.start
        within.append(i)
    return own


def busy(found: list[Span]) -> float:
    """Seconds in which at least one span ran."""
    total, reached = 0.0, -float("inf")
    for span in sorted(found, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return total


def short(name: str, length: int = 72) -> str:
    """A kernel's name as a person reads it."""
    name = name.replace("|", "/")  # which would end a cell of the table
    name = re.sub(r"^void |\(anonymous namespace\)::|<unnamed>::|at::native::|c10::|std::", "", name)
    return name if len(name) <= length else f"{name[: length - 1]}…"


def report(found: Profile) -> str:
    """A Markdown table of kinds, and the three largest costs beside matrix products."""
    if not found.kinds:
        return "The profiler has seen no kernel."
    lines = [
        "| kind | ms | share | kernels | the longest |",
        "|---|---|---|---|---|",
        *(
            f"| {kind} | {seconds * 1e3:.2f} | {seconds / found.seconds:.1%} "
            f"| {sum(count for *_, count in found.names.get(kind, []))} | {_longest(found, kind)} |"
            for kind, seconds in found.kinds.items()
        ),
        f"| all | {found.seconds * 1e3:.2f} | 100.0% | {found.launched} | |",
    ]
    beside = [kind for kind in found.kinds if kind != "matrix products"][:3]
    said = ", ".join(f"{kind} ({found.kinds[kind] / found.seconds:.1%})" for kind in beside)
    return "\n".join([*lines, "", f"Largest beside matrix products: {said}."])


def _longest(found: Profile, kind: str) -> str:
    members = found.names.get(kind, [])
    return f"`{short(members[0][0])}` × {members[0][2]}, {members[0][1] * 1e3:.2f} ms" if members else ""
