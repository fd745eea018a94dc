"""TP has one queue of kernels, unless the user or ZeRO-3 wants more."""

from __future__ import annotations

import os

import pytest

from megatron_stable.config.schema import ParallelConfig
from megatron_stable.parallel.launch_order import VARIABLE, keep_launch_order


@pytest.mark.parametrize(
    ("parallel", "before", "after"),
    [
        ({"tensor": 2}, None, "1"),
        ({"tensor": 2, "zero_stage": 2}, None, "1"),
        ({"tensor": 2}, "8", "8"),
        ({"tensor": 2, "zero_stage": 3}, None, None),
        ({"tensor": 1}, None, None),
    ],
)
def test_one_queue_for_tensor_parallel_ranks(
    parallel: dict[str, int], before: str | None, after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "")  # so that it is put back
    monkeypatch.delenv(VARIABLE)
    if before is not None:
        monkeypatch.setenv(VARIABLE, before)
    said = keep_launch_order(ParallelConfig.model_validate(parallel))
    assert os.environ.get(VARIABLE) == after
    assert (said is None) == (after is None) and (after is None or f"{VARIABLE}={after}" in (said or ""))
