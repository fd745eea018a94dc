"""fp16: gradients are unscaled by the scale that they were made with, through real doublings and halvings."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from tests.engine.layouts import assemble, global_batches, initial_parameters, make_config, train_on_ranks, update_error
from tests.harness.ranks import Ranks
from tests.reference import optimizer as reference

STEPS, RATE = 10, 0.5


@pytest.mark.parametrize("clip_grad", [0.0, 0.1])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_updates_do_not_depend_on_changes_of_the_scale(ranks: Ranks, zero_stage: int, clip_grad: float) -> None:
    config = make_config(
        # with a large eps an update is proportional to the gradient: half a gradient is half an update
        optimizer={"eps": 1.0, "clip_grad": clip_grad, "learning_rate": RATE},
        schedule={"kind": "constant", "warmup_steps": 0},
        parallel={"zero_stage": zero_stage},
        precision={"dtype": "fp16", "initial_scale_power": 18, "scale_window": 2, "hysteresis": 1},
    )
    results = ranks.run(2, train_on_ranks, config.model_dump(mode="json"), STEPS)
    steps: list[dict[str, Any]] = results[0]["metrics"]
    scales, taken = [step["loss_scale"] for step in steps], [not step["skipped"] for step in steps]
    changes = [after / before for before, after in pairwise(scales)]
    assert 2.0 in changes and 0.5 in changes, scales

    batches = [batch for batch, used in zip(global_batches(STEPS), taken, strict=True) if used]
    start = {name: value.double() for name, value in initial_parameters(config).items()}
    expected = reference.train(start, [(b[:, :-1], b[:, 1:]) for b in batches], config, len(batches))
    norms = [step["grad_norm"] for step in steps if not step["skipped"]]
    assert norms == pytest.approx(expected.grad_norms, rel=3e-3)
    final = assemble(results)
    for name, value in expected.parameters.items():
        found = final[name][: len(value)].double()
        assert update_error(found, value, start[name].half().double(), RATE / 100) < 0.03, name
