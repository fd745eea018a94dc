"""The command that starts all ranks, for each launcher, and the environment that must travel with it."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_stable.errors import ConfigError
from megatron_stable.parallel.launcher import START

# What decides how ranks compute and talk; an ssh or an mpirun would leave most of it behind. Not CUDA_VISIBLE_DEVICES:
# launchers set it by the hostfile's slots.
PREFIXES = (
    "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "CUDA_DEVICE_MAX", "CUDA_LAUNCH", "CUBLAS_", "OMP_", "MKL_", "UCX_", "FI_",
    "DS_", "TRITON_", "MEGATRON_STABLE_", "PYTHON", "LD_LIBRARY_PATH", "DEEPSPEED_",
)  # fmt: skip
USERS_FILE = ".deepspeed_env"
UNSAFE = re.compile(r"[^\w@%+=:,./-]")  # as DeepSpeed has it
_QUOTED, _ESCAPED = r"""(["\\$`])""", r"\\\1"


@dataclass(frozen=True)
class Start:
    """One start of all ranks.

    Attributes:
        slots: Ranks by host; the first is rank 0's.
        hostfile: Where they were read.
        arguments: For ``megatron_stable.pretrain``.
        on_gpus: Whether the machines have GPUs.
    """

    slots: Mapping[str, int]
    hostfile: Path
    address: str
    port: int
    arguments: Sequence[str]
    on_gpus: bool = False

    @property
    def ranks(self) -> int:
        """All of them."""
        return sum(self.slots.values())


def pdsh(start: Start, environment: Mapping[str, str]) -> list[str]:
    """DeepSpeed's launcher over pdsh; reads the environment from the file that DS_ENV_FILE names."""
    for what, path in (("this folder", str(Path.cwd())), ("this Python", sys.executable)):
        if UNSAFE.search(path):
            raise ConfigError(
                f"{what}, {path}, is not quoted by DeepSpeed: start from a path without special characters"
            )
    arguments = [_for_shell(word) for word in start.arguments]
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(start.hostfile), "--force_multi",
        "--master_addr", start.address, "--master_port", str(start.port), "--no_local_rank",
        "--module", "megatron_stable.pretrain", *arguments,
    ]  # fmt: skip


def _for_shell(word: str) -> str:
    """A word as the machines' shells must find it: DeepSpeed puts those with spaces into double quotes, whose quotes it
    escapes, and leaves all others as they are; pdsh takes % for its own."""
    word = word.replace("%", "%%")
    return re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)


def for_file(environment: Mapping[str, str]) -> str:
    """The environment as a file for DeepSpeed, which puts values with special characters into double quotes.

    Raises:
        ConfigError: A value has several lines.
    """
    lines = []
    for name, value in environment.items():
        if "\n" in value:
            raise ConfigError(
                f"{name} has several lines, and DeepSpeed takes one: unset it, or start with --launcher openmpi"
            )
        lines.append(f"{name}={re.sub(_QUOTED, _ESCAPED, value) if UNSAFE.search(value) else value}\n")
    return "".join(lines)


def openmpi(start: Start, environment: Mapping[str, str]) -> list[str]:
    """Open MPI's mpirun. Ranks are not bound to one core."""
    sent = {**environment, "MASTER_ADDR": start.address, "MASTER_PORT": str(start.port)}
    return [
        "mpirun", *["--allow-run-as-root"] * (os.geteuid() == 0), "-n", str(start.ranks),
        "--hostfile", str(start.hostfile), "--bind-to", "none",
        *(word for name in sorted(sent) for word in ("-x", f"{name}={sent[name]}")),
        sys.executable, "-u", "-m", "megatron_stable.pretrain", *start.arguments,
    ]  # fmt: skip


def slurm(start: Start, environment: Mapping[str, str]) -> list[str]:
    """Slurm's srun, which passes the environment on by itself; but not, since 22.05, the cores per task of its job.

    Raises:
        ConfigError: Not the same number of ranks on each host.
    """
    if len(each := set(start.slots.values())) > 1:
        raise ConfigError("srun starts as many ranks on each machine: give all hosts in the hostfile the same slots")
    return [
        "srun", f"--nodes={len(start.slots)}", f"--nodelist={','.join(start.slots)}",
        f"--ntasks-per-node={each.pop()}", *_cores_and_gpus(start), "--kill-on-bad-exit=1",
        sys.executable, "-u", "-m", "megatron_stable.pretrain", *start.arguments,
    ]  # fmt: skip


def _cores_and_gpus(start: Start) -> list[str]:
    """Options of srun. Inside an allocation that has GPUs, a step has them without asking."""
    cores = os.environ.get("SLURM_CPUS_PER_TASK")
    ask = start.on_gpus and "SLURM_JOB_ID" not in os.environ
    return [*[f"--cpus-per-task={cores}"] * bool(cores), *[f"--gpus-per-node={max(start.slots.values())}"] * ask]


LAUNCHERS = {"pdsh": pdsh, "openmpi": openmpi, "slurm": slurm}
NEEDS = {"pdsh": "pdsh", "openmpi": "mpirun", "slurm": "srun"}


def travelling(threads: int, named: bool = True) -> dict[str, str]:
    """What of this environment the ranks need, ``.deepspeed_env`` of the home and of this folder included.

    Args:
        threads: For OMP_NUM_THREADS, where nobody has said.
        named: With a name for this one start, so that no rank of another one joins it.

    Raises:
        ConfigError: A line of such a file is no NAME=VALUE, on which DeepSpeed would fail.
    """
    found = {name: value for name, value in os.environ.items() if name.startswith(PREFIXES)}
    for folder in (Path.home(), Path.cwd()):
        found |= _users_file(folder / os.environ.get("DS_ENV_FILE", USERS_FILE))
    found.setdefault("OMP_NUM_THREADS", str(threads))
    return {**found, "PYTHONUNBUFFERED": "1", **({START: secrets.token_hex(8)} if named else {})}


def as_text(command: Sequence[str], environment: Mapping[str, str], file: str) -> str:
    """For the user, to read or to run: after the environment to set, and what ``.deepspeed_env`` is to hold."""
    lines = [f"export {name}={shlex.quote(environment[name])}" for name in sorted(environment)]
    if file:
        lines += [
            f"# {USERS_FILE} in this folder, or in the home:",
            *(f"#   {line}" for line in sorted(file.splitlines())),
        ]
    return "\n".join([*lines, shlex.join(command)])


def _users_file(path: Path) -> dict[str, str]:
    found = {}
    if path.is_file():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            name, separator, value = line.partition("=")
            if not separator or not name.strip().isidentifier():
                raise ConfigError(
                    f"{path}, line {number}: {line!r} is not NAME=VALUE, and DeepSpeed takes nothing else"
                )
            found[name.strip()] = value.strip()
    return found
