"""What the operating system lets a rank have: files, processes, memory."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from megatron_stable.analysis.footprint import footprints
from megatron_stable.config.checks import conflicts
from megatron_stable.doctor.crew import Crew
from megatron_stable.doctor.finding import Finding, Verdict

GB = 1e9
INFINIBAND = Path("/sys/class/infiniband")
OTHER_FILES = 512  # that a rank has open beside its connections: data, libraries, checkpoints
TIGHT = 0.9  # of the memory


def check_limits(crew: Crew) -> list[Finding]:
    """Of this machine."""
    return [open_files(crew.size), *_processes(), _shared_memory(crew), *_locked_memory(crew), *_memory(crew)]


def open_files(ranks: int, limit: int | None = None) -> Finding:
    """Each rank has a gloo connection to each other, and rank 0's store two with each; ``limit``: by default, ours."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1] if limit is None else limit
    needed = 3 * ranks + OTHER_FILES
    who = f"{ranks} rank{'s' * (ranks > 1)} need{'s' * (ranks == 1)}"
    if hard == resource.RLIM_INFINITY:
        return Finding("open files", f"no limit; {who} up to {needed}")
    text = f"at most {hard:,} per process; {who} up to {needed:,}"
    if hard < needed:
        remedy = f"raise the hard limit: nofile {2 ** needed.bit_length()} in /etc/security/limits.conf, or ulimit -Hn"
        return Finding("open files", text, Verdict.FAILURE, remedy)
    return Finding("open files", text)


def _processes() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and soft < 4096:
        text = f"at most {soft} processes and threads of this user"
        yield Finding("processes", text, Verdict.WARNING, "raise nproc in /etc/security/limits.conf to 4096 or more")


def _shared_memory(crew: Crew) -> Finding:
    """NCCL passes through it what GPUs of a machine cannot send each other directly."""
    try:
        size = psutil.disk_usage("/dev/shm")
    except OSError as error:
        return Finding("shared memory", f"/dev/shm: {error.strerror}", Verdict.WARNING, "mount a tmpfs there")
    text, numbers = "{free:.1f} of {total:.1f} GB free in /dev/shm", {"free": size.free / GB, "total": size.total / GB}
    if not crew.on_gpu:
        return Finding("shared memory", f"{text}; ranks on a CPU do not use it", numbers=numbers)
    if len(crew.local) > 1 and size.free < GB:
        remedy = "NCCL wants some between GPUs without a direct link: docker run --shm-size=8g (or --ipc=host)"
        return Finding("shared memory", text, Verdict.WARNING, remedy, numbers)
    return Finding("shared memory", text, numbers=numbers)


def _locked_memory(crew: Crew) -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if crew.on_gpu and INFINIBAND.is_dir() and any(INFINIBAND.iterdir()):
        if soft == resource.RLIM_INFINITY:
            yield Finding("locked memory", "no limit")
        else:
            remedy = "InfiniBand locks its buffers: memlock unlimited (docker run --ulimit memlock=-1)"
            yield Finding("locked memory", f"at most {soft // 1024:,} KiB", Verdict.WARNING, remedy)


def _memory(crew: Crew) -> Iterator[Finding]:
    """Main memory of this machine for each of its ranks, and what the run's states take."""
    memory, ranks = psutil.virtual_memory(), len(crew.local)
    limit = cgroup_limit()
    free = memory.available if limit is None else min(memory.available, limit)
    share = free / ranks / GB
    text = "{free:.1f} GB free for each rank"
    if limit is not None and limit < memory.total:
        text += " (the cgroup has {limit:.1f} of the machine's {total:.1f} GB)"
    verdict, remedy = (Verdict.WARNING, "end what holds the memory") if share < 2 else (Verdict.OK, "")
    numbers = {"free": share, "limit": (limit or memory.total) / GB, "total": memory.total / GB}
    yield Finding("main memory", text, verdict, remedy, numbers)
    swap = psutil.swap_memory()
    if swap.total and swap.percent > 20:
        numbers = {"percent": swap.percent, "total": swap.total / GB}
        remedy = "a run that is swapped out stands still: end what fills it"
        yield Finding("swap", "{percent:.0f}% of {total:.0f} GB in use", Verdict.WARNING, remedy, numbers)
    if (needed := states(crew)) is not None:
        yield _room(crew, needed / GB, torch.cuda.mem_get_info(crew.device)[1] / GB if crew.on_gpu else share)


def states(crew: Crew) -> float | None:
    """Bytes of weights, gradients and optimizer on the fullest rank of the run, if its layout fits these ranks."""
    if crew.config is None or crew.config.model.vocab_size is None or conflicts(crew.config, crew.size):
        return None
    return max(each.states for each in footprints(crew.config, crew.size))


def _room(crew: Crew, needed: float, there: float) -> Finding:
    text = "weights, gradients and optimizer take {needed:.2f} GB of each rank, activations come on top; "
    text += "its GPU has {there:.1f} GB" if crew.on_gpu else "it has {there:.1f} GB"
    numbers = {"needed": needed, "there": there}
    if needed > TIGHT * there:
        remedy = "more parallel.tensor, parallel.pipeline or ranks, or parallel.zero_stage=2 or 3"
        return Finding("memory of the run", text, Verdict.FAILURE, remedy, numbers)
    return Finding("memory of the run", text, numbers=numbers)


def cgroup_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that the control groups of this process may have together, of version 2 or 1; ``None``: no limit."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    found = []
    for _, controllers, path in lines:
        if controllers == "":
            base, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = base / path.lstrip("/")
        for each in (folder, *folder.parents):
            if not each.is_relative_to(base):
                break
            try:
                found.append(int((each / name).read_text()))
            except (OSError, ValueError):  # not mounted here, or "max"
                continue
    return min((limit for limit in found if limit < 2**60), default=None)
