"""Which GPU is a rank's, and what its launcher says of it."""

from __future__ import annotations

import pytest

from megatron_stable.errors import ConfigError
from megatron_stable.parallel import launcher
from megatron_stable.parallel.world import device_index


@pytest.mark.parametrize(
    ("local_rank", "devices", "index"),
    [(0, 1, 0), (3, 8, 3), (7, 8, 7), (5, 1, 0)],  # the last: Slurm shows each task just its own
)
def test_device_of_a_rank(local_rank: int, devices: int, index: int) -> None:
    assert device_index(local_rank, devices) == index


def test_too_few_devices_for_the_ranks_of_a_machine() -> None:
    with pytest.raises(ConfigError, match=r"has 4 GPUs for this process and at least 6 ranks.*--gpus-per-task=1"):
        device_index(5, 4)


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
