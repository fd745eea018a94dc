"""SIGTERM and SIGINT finish the step in progress, save, and exit with 0 and a message."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.harness.ranks import Ranks
from tests.training.runs import curve, finish, layout, pretrain, rank_processes, settings, train
from tests.training.test_killed import _wait_for_steps

STEPS = 400  # more than are trained before the signals arrive
LAYOUTS = {"tensor": (layout(tensor=2), signal.SIGTERM), "pipeline": (layout(pipeline=2), signal.SIGINT)}


@pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS)
def test_a_signal_stops_in_order_and_the_run_goes_on_bit_for_bit(
    ranks: Ranks, folder: Path, case: tuple[dict[str, int], signal.Signals]
) -> None:
    parallel, number = case
    values = settings(folder, "run", STEPS, parallel=parallel, checkpoint={"every": 1000})
    process = pretrain(values)
    _wait_for_steps(process, folder / "run", 5)
    process.send_signal(number)
    code, output = finish(process)
    assert code == 0, output
    stopped = max(curve(folder / "run"))
    assert 5 <= stopped < STEPS
    assert (
        output.splitlines()[-1] == f"{number.name}: stopped after step {stopped}, saved; the same command resumes there"
    )
    assert [path.name for path in (folder / "run/checkpoints").glob("step_*")] == [f"step_{stopped:08d}"]
    # the schedule is that of all steps, so the same command is what must go on; a few steps show it
    _train_to(ranks, values, stopped + 4)
    whole = settings(folder, "whole", STEPS, parallel=parallel, checkpoint={"every": 1000})
    _train_to(ranks, whole, stopped + 4)
    upto = {step: point for step, point in curve(folder / "run").items() if step <= stopped + 4}
    assert upto == {step: point for step, point in curve(folder / "whole").items() if step <= stopped + 4}
    assert len(upto) == stopped + 4


def _train_to(ranks: Ranks, values: dict[str, dict[str, object]], step: int) -> None:
    assert ranks.run(2, train_and_stop, values, step) == [0, 0]


def train_and_stop(values: dict[str, dict[str, object]], step: int) -> int:
    """Train; rank 1 sends itself SIGTERM when it has begun ``step``."""
    from megatron_stable.engine.engine import Engine

    original = Engine.train_step

    def train_step(self: Engine, now: int, *args: object) -> object:
        if now == step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, now, *args)  # type: ignore[arg-type]

    Engine.train_step = train_step  # type: ignore[assignment]
    return train(values)


def test_a_signal_before_the_first_step_stops_there(
    ranks: Ranks, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ranks.run(2, stop_at_once, settings(folder, "run")) == [0, 0]
    assert "[rank 0] a signal: stopped after step 0" in capsys.readouterr().out
    assert not list((folder / "run/checkpoints").iterdir())


def stop_at_once(values: dict[str, dict[str, object]]) -> int:
    """Rank 1 receives SIGTERM while the model is being built."""
    from megatron_stable.training.trainer import Trainer

    original = Trainer.resume

    def resume(self: Trainer) -> object:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    Trainer.resume = resume  # type: ignore[assignment,method-assign]
    return train(values)


def test_a_signal_while_starting_up_ends_all_processes_at_once(folder: Path) -> None:
    process = pretrain(settings(folder, "run"))
    while not rank_processes(process.pid):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, output = finish(process, 60)
    assert code == 0, output
    assert output.splitlines()[-1] == "SIGTERM: stopped before training began"
    assert not rank_processes(process.pid)
