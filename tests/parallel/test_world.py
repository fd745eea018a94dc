"""Which GPU is a rank's, and what its launcher says of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from logging import INFO, WARNING
from pathlib import Path

import pytest

from megatron_stable.errors import ConfigError
from megatron_stable.parallel import launcher
from megatron_stable.parallel.world import device_index, quiet
from tests.harness.ranks import ROOT


@pytest.mark.parametrize(
    ("local_rank", "devices", "index"),
    [(0, 1, 0), (3, 8, 3), (7, 8, 7), (5, 1, 0)],  # the last: Slurm shows each task just its own
)
def test_device_of_a_rank(local_rank: int, devices: int, index: int) -> None:
    assert device_index(local_rank, devices) == index


def test_too_few_devices_for_the_ranks_of_a_machine() -> None:
    with pytest.raises(ConfigError, match=r"has 4 GPUs for this process and at least 6 ranks.*--gpus-per-task=1"):
        device_index(5, 4)


@pytest.mark.parametrize("verbose", [False, True])
def test_deepspeed_says_what_it_does_to_those_who_want_it(capsys: pytest.CaptureFixture[str], verbose: bool) -> None:
    from deepspeed.utils import logger

    capsys.readouterr()  # what it says when it is imported
    with quiet(verbose):
        print("said")
        speaks = logger.isEnabledFor(INFO) and all(handler.level <= INFO for handler in logger.handlers)
    with quiet():
        assert not logger.isEnabledFor(WARNING)
    assert (capsys.readouterr().out, speaks) == (("said\n", True) if verbose else ("", False))


LAUNCHED: dict[str, tuple[dict[str, str], tuple[int, int, int] | None, str]] = {
    "alone": ({}, None, ""),
    "alone in a batch job": ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None, ""),
    "deepspeed in a batch job": (
        {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_JOB_ID": "7"}, (3, 8, 1), "",  # not on all machines
    ),
    "torchrun": (
        {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "a", "SLURM_JOB_ID": "7"},
        (3, 8, 1), "a",
    ),
    "srun": (
        {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7",
         "SLURM_STEP_ID": "2"},
        (3, 8, 1), "7.2",
    ),
    "srun --mpi=pmi2": (
        {"PMI_RANK": "3", "PMI_SIZE": "8", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1",
         "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2"},
        (3, 8, 1), "7.2",
    ),
    "MPICH within Slurm": (
        {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
        (3, 8, 1), "",
    ),
    "mpirun": (
        {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
         "PMIX_NAMESPACE": "prte-1"},
        (3, 8, 1), "prte-1",
    ),
    "pretrain --ranks": (
        {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", launcher.START: "s", "TORCHELASTIC_RUN_ID": "a"},
        (3, 8, 1), "s.a",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHED)
def test_what_a_launcher_says(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    environment, seat, start = LAUNCHED[name]
    monkeypatch.setattr("os.environ", environment)
    assert launcher.seat() == (seat and launcher.Seat(*seat))
    assert launcher.start() == start


@pytest.mark.parametrize(
    ("hostlist", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[003-006,9],other", ["node003", "node004", "node005", "node006", "node9", "other"]),
        ("rack[1-2]n[01-02],login", ["rack1n01", "rack1n02", "rack2n01", "rack2n02", "login"]),
        ("a-[08-11]-ib", ["a-08-ib", "a-09-ib", "a-10-ib", "a-11-ib"]),
        ("", []),
    ],
)
def test_hosts_as_slurm_lists_them(hostlist: str, hosts: list[str]) -> None:
    assert launcher.expanded(hostlist) == hosts


STEP = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "n[08-10],x",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURMD_NODENAME": "n10",
}  # fmt: skip
PLACED = dict(enumerate(["n08", "n08", "n09", "n09", "n10", "n10", "x"]))


@pytest.mark.parametrize(
    ("changes", "size", "known"),
    [
        ({}, 7, True),
        ({"SLURM_DISTRIBUTION": "block:cyclic"}, 7, True),  # the second is of the sockets
        ({"RANK": "5", "WORLD_SIZE": "7"}, 7, True),  # as joining sets them
        ({"SLURM_DISTRIBUTION": "cyclic"}, 7, False),
        ({"SLURM_DISTRIBUTION": "arbitrary"}, 7, False),
        ({"SLURMD_NODENAME": "n09"}, 7, False),
        ({"RANK": "11", "WORLD_SIZE": "56"}, 56, False),  # torchrun, one on each
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3"}, 7, False),
        ({"SLURM_STEP_NODELIST": "n[a-b]"}, 7, False),
    ],
)
def test_the_machines_of_ranks_that_srun_has_placed(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], size: int, known: bool
) -> None:
    monkeypatch.setattr("os.environ", {**STEP, **changes})
    assert launcher.hosts(size) == (PLACED if known else {})


def test_where_rank_0_is_under_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {**STEP, "SLURM_STEP_NODELIST": "rack[1-2]n[01-02]"})
    assert launcher.first_machine(7) == "rack1n01"


def mpirun(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Two ranks of Open MPI."""
    if shutil.which("mpirun") is None:
        pytest.skip("no mpirun")
    run = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, *command]
    variables = {key: value for key, value in os.environ.items() if not key.startswith("MASTER_")}
    variables |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(run, env=variables, capture_output=True, text=True, timeout=120)


# the two ranks are on one machine, but are not told so
FIRST_MACHINE = """
import os, sys
os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"] = "1"
from megatron_stable.parallel.launcher import first_machine
print("at", first_machine(2), flush=True)
sys.exit(int(sys.argv[1]) * int(os.environ["OMPI_COMM_WORLD_RANK"]))
"""


@pytest.mark.parametrize("code", [0, 7])
def test_mpi_tells_where_rank_0_is(code: int) -> None:
    """And is done with afterwards: an exit code is the ranks' own."""
    probe = mpirun("-c", "from mpi4py import MPI")
    if probe.returncode:
        pytest.skip(f"no mpi4py with an MPI: {probe.stderr.splitlines()[-1:]}")
    done = mpirun("-c", FIRST_MACHINE, str(code))
    assert done.returncode == code, done.stderr
    found = re.findall(r"at (\S+)", done.stdout)
    assert len({*found}) == 1 and not found[0].startswith("127."), done.stdout
    assert "improper" not in done.stderr


def test_without_mpi4py_it_is_said_what_to_set(tmp_path: Path) -> None:
    """Under a launcher that ends all ranks when the first ends, which need not be the one that tells."""
    (tmp_path / "mpi4py.py").write_text("raise ImportError('none here')")
    (tmp_path / "config.yaml").write_text(
        "run: {directory: run}\nmodel: {size: tiny, vocab_size: 64}\ndata: {train: data}\n"
    )
    code = (
        "import os, runpy, sys; os.environ['OMPI_COMM_WORLD_LOCAL_SIZE'] = '1'; "
        f"sys.path.insert(0, {str(tmp_path)!r}); sys.argv[1:] = ['--config', {str(tmp_path / 'config.yaml')!r}]; "
        "runpy.run_module('megatron_stable.pretrain', run_name='__main__')"
    )
    done = mpirun("-c", code)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "mpirun -x MASTER_ADDR=HOST" in line and "pip install 'megatron-stable[mpi]'" in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("slow", [0, 1])
def test_a_wrong_configuration_is_said_whichever_rank_is_first(tmp_path: Path, slow: int) -> None:
    code = (
        f"import os, runpy, sys, time; time.sleep(2.0 * (os.environ['OMPI_COMM_WORLD_RANK'] == '{slow}')); "
        "sys.argv[1:] = ['--config', 'none.yaml']; "
        "runpy.run_module('megatron_stable.pretrain', run_name='__main__')"
    )
    done = mpirun("-c", code)
    assert done.returncode == 2, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1, done.stderr
