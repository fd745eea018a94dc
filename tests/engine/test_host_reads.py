"""How often a step makes the host wait for the device, counted over ten steps of each way through DeepSpeed."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.layouts import engine_on_rank, global_batches, make_config, micro_batches
from tests.harness.ranks import Ranks

STEPS = 10
# (dtype, ZeRO stage, PP): reads per step. One is ours: what the step has to say, and whether its update may be made.
# The others are DeepSpeed's: whether the gradient overflowed (fp16), and whether its norm did (all but bf16 under
# ZeRO 1 and 2, and fp32 whose weights are the masters).
READS = {
    **{("bf16", *layout): 1 for layout in ((1, 1), (1, 2), (2, 1))},
    ("bf16", 3, 1): 2,
    ("fp32", 1, 1): 1,
    **{("fp32", *layout): 2 for layout in ((1, 2), (2, 1), (3, 1))},
    **{("fp16", *layout): 3 for layout in ((1, 1), (1, 2), (2, 1), (3, 1))},
}
OFTEN = [("bf16", 1, 1), ("bf16", 1, 2), ("bf16", 2, 1), ("fp16", 1, 1)]
WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)


class Reads(TorchDispatchMode):
    """Counts what brings a value from the device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.where: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        callers = reversed(traceback.extract_stack()[-8:-2])
        self.where[" < ".join(f"{Path(caller.filename).name}:{caller.name}" for caller in callers)] += 1


def reads_on_rank(values: dict[str, Any]) -> dict[str, int]:
    """On a rank: where the steps read from the device, and how often."""
    from megatron_stable.engine.outcome import Refused

    with engine_on_rank(values) as engine:
        config, topology, batch = engine.config, engine.topology, global_batches(1)[0]
        engine.train_step(1, micro_batches(batch, config, topology), 1e-3)  # builds what lasts
        reads = Reads()
        tolist = torch.Tensor.tolist

        def counted(tensor: torch.Tensor) -> Any:
            reads.note()
            return tolist(tensor)

        torch.Tensor.tolist = counted  # type: ignore[method-assign]
        with reads:
            for step in range(2, STEPS + 2):
                outcome = engine.train_step(step, micro_batches(batch, config, topology), 1e-3, lambda m: Refused(True))
                assert not outcome.metrics.skipped
    return dict(reads.where)


@pytest.mark.parametrize(
    "dtype, zero_stage, pipeline",
    [pytest.param(*case, marks=[] if case in OFTEN else pytest.mark.full) for case in READS],
)
def test_reads_per_step(ranks: Ranks, dtype: str, zero_stage: int, pipeline: int) -> None:
    config = make_config(
        parallel={"zero_stage": zero_stage, "pipeline": pipeline}, precision={"dtype": dtype, "initial_scale_power": 8}
    )
    for where in ranks.run(2, reads_on_rank, config.model_dump(mode="json")):
        assert sum(where.values()) == STEPS * READS[dtype, zero_stage, pipeline], where
