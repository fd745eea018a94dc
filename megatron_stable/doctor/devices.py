"""What computes: GPUs or cores, and how fast they multiply matrices in each precision."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator

import torch

from megatron_stable.doctor.crew import Crew
from megatron_stable.doctor.finding import Finding, Verdict

SECONDS = 0.2  # for each precision
QUERY = (
    "name", "driver_version", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.hw_slowdown",
)  # fmt: skip
TAKEN = 2000  # MiB of a GPU that a process other than ours may hold; a context takes some hundreds
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_gpus(crew: Crew) -> list[Finding]:
    """The GPUs of this machine."""
    if not crew.on_gpu:
        why = "" if torch.version.cuda is None else ", though this torch is built for CUDA: nvidia-smi says why"
        return [Finding("GPUs", f"none{why}; ranks compute on the CPU", alike=True)]
    lines = _nvidia_smi()
    properties = torch.cuda.get_device_properties(crew.device)
    memory = properties.total_memory / 1e9
    text = f"{torch.cuda.device_count()} x {properties.name}, {memory:.0f} GB each, {len(crew.local)} ranks"
    driver = f", driver {lines[0][1]}" if lines else ""
    return [Finding("GPUs", text + driver, alike=True), *_troubles(lines)]


def _nvidia_smi() -> list[list[str]]:
    """What nvidia-smi says of each GPU, by ``QUERY``; nothing if it is not there."""
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    command = [program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines() if line.count(",") == 5]


def _troubles(lines: list[list[str]]) -> Iterator[Finding]:
    for number, (_, _, total, used, errors, slowdown) in enumerate(lines):
        if errors.isdigit() and int(errors):
            text = f"GPU {number} has had {errors} ECC errors that were not corrected since it was started"
            yield Finding("GPU memory errors", text, Verdict.FAILURE, "reset or replace it: nvidia-smi -q -d ECC")
        if slowdown == "Active":
            text = f"GPU {number} is slowed down by its hardware (heat, or power)"
            yield Finding("GPU clocks", text, Verdict.WARNING, "nvidia-smi -q -d PERFORMANCE,TEMPERATURE")
        if used.isdigit() and int(used) > TAKEN:
            text = f"GPU {number} has {used} of {total} MiB in use"
            remedy = "end what holds it, unless that is a check of this run's own ranks: nvidia-smi"
            yield Finding("GPU memory", text, Verdict.WARNING, remedy)


def check_cores(crew: Crew) -> list[Finding]:
    """The cores of this machine, and the threads that its ranks start."""
    cores, threads, ranks = len(os.sched_getaffinity(0)), torch.get_num_threads(), len(crew.local)
    text = f"{cores} cores, {ranks} rank{'s' * (ranks > 1)} with {threads} thread{'s' * (threads > 1)} each"
    if not crew.on_gpu and ranks * threads > cores:
        remedy = f"set OMP_NUM_THREADS={max(1, cores // ranks)}" if threads > 1 else "start fewer ranks"
        return [Finding("cores", text, Verdict.WARNING, f"threads wait for each other: {remedy}")]
    return [Finding("cores", text)]


def check_speed(crew: Crew) -> list[Finding]:
    """How fast this rank's device multiplies matrices while all others do; the run's precision decides."""
    rates = {name: rate(dtype, crew.device) for name, dtype in DTYPES.items()}
    wanted = crew.config.precision.dtype if crew.config is not None else "fp32"
    text = ", ".join(f"{name} {{{name}:.3g}}" for name in rates) + " GFLOP/s"
    verdict, remedy = Verdict.OK, ""
    if not crew.on_gpu and crew.config is not None and rates[wanted] < 0.5 * rates["fp32"]:
        verdict = Verdict.WARNING
        remedy = f"precision.dtype {wanted} is slower than fp32 on this CPU: set precision.dtype=fp32"
    alike = crew.on_gpu or len(crew.local) <= len(os.sched_getaffinity(0))  # else they take turns
    return [Finding("matrix products", text, verdict, remedy, rates, "rank", speed=wanted if alike else "")]


def rate(dtype: torch.dtype, device: torch.device, seconds: float = SECONDS) -> float:
    """GFLOP/s of the product of two square matrices; ``device`` must be idle."""
    size = 8192 if device.type == "cuda" else 256
    a = torch.randn(size, size, device=device).to(dtype)

    def some(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    some(1)
    count, spent = 1, some(1)
    while spent < seconds and count < 2**16:
        count = min(4 * count, max(count + 1, int(count * seconds / max(spent, 1e-6))) + 1)
        spent = some(count)
    return 2 * size**3 * count / spent / 1e9
