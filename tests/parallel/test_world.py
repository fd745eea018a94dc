"""Which GPU is a rank's."""

from __future__ import annotations

import pytest

from megatron_stable.errors import ConfigError
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
