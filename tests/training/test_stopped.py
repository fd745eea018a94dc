"""SIGTERM and SIGINT finish the step, save and exit with 0 and a message; before the first step is done, at once."""

from __future__ import annotations

import os
import queue
import re
import signal
import time
from pathlib import Path

import pytest

from megatron_stable.training.stop import Stopped, StopSignal, Wish
from tests.harness.ranks import RankError, Ranks
from tests.training.runs import curve, finish, layout, metrics, pretrain, rank_processes, settings, train
from tests.training.test_killed import _wait_for_steps

STEPS = 400  # more than are trained before the signals arrive
LAYOUTS = {"tensor": (layout(tensor=2), signal.SIGTERM), "pipeline": (layout(pipeline=2), signal.SIGINT)}


@pytest.mark.full
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_signal_stops_in_order_and_the_run_goes_on_bit_for_bit(ranks: Ranks, folder: Path, name: str) -> None:
    parallel, number = LAYOUTS[name]
    values = settings(folder, "run", STEPS, parallel=parallel, checkpoint={"every": 1000})
    process = pretrain(values)
    _wait_for_steps(process, folder / "run", 5)
    process.send_signal(number)
    code, output = finish(process)
    assert code == 0, output
    stopped = max(curve(folder / "run"))
    assert 5 <= stopped < STEPS
    said = rf"{number.name}: stopped after step {stopped}, saved in \d+\.\d s; the same command resumes there"
    assert re.fullmatch(said, output.splitlines()[-1])
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


@pytest.mark.parametrize("on_signal", [True, False], ids=["saved", "left"])
def test_nobody_evaluates_once_a_signal_has_come(
    ranks: Ranks, folder: Path, capsys: pytest.CaptureFixture[str], on_signal: bool
) -> None:
    data = {"train": str(folder / "data"), "validation": str(folder / "data")}
    sections = {"checkpoint": {"every": 2, "on_signal": on_signal}, "evaluation": {"every": 1, "batches": 1}}
    values = settings(folder, "run", STEPS, parallel=layout(tensor=2), data=data, **sections)
    _train_to(ranks, values, 5)
    recorded = metrics(folder / "run")
    assert [step for step, record in recorded.items() if "validation_loss" in record] == [1, 2, 3, 4]
    stopped = max(recorded)
    assert stopped == 5
    saved = [2, 4, 5] if on_signal else [2, 4]
    assert sorted(path.name for path in (folder / "run/checkpoints").glob("step_*")) == [
        f"step_{step:08d}" for step in saved
    ]
    said = capsys.readouterr().out
    if on_signal:
        assert "SIGTERM: stopped after step 5, saved in 0." in said
    else:
        assert "SIGTERM: stopped after step 5, without saving; the same command" in said
        assert "goes on from step 4" in said


def test_a_signal_before_the_first_step_ends_all_ranks_at_once(ranks: Ranks, folder: Path) -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=r"ended without a report \(exit code 0\)"):
        ranks.run(2, stop_early, settings(folder, "run"))
    assert time.monotonic() - began < 60
    assert not list((folder / "run/checkpoints").iterdir())


def stop_early(values: dict[str, dict[str, object]]) -> int:
    """Rank 1 receives SIGTERM while the model is being built, and its main thread does not come back to Python."""
    import ctypes
    import threading

    from megatron_stable.training.trainer import Trainer

    def resume(self: Trainer) -> object:
        if os.environ["RANK"] == "1":
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        for _ in range(100):  # a signal ends a sleep, and the next one follows
            ctypes.CDLL(None).sleep(100)
        return {}

    Trainer.resume = resume  # type: ignore[assignment,method-assign]
    return train(values)


def test_a_save_that_nearly_takes_too_long_is_warned_of() -> None:
    saved = Stopped("SIGTERM", 7, 7, 19.0, 19.5)
    assert f"{saved}" == "SIGTERM: stopped after step 7, saved in 19.0 s; the same command resumes there"
    late = f"{Stopped('SIGTERM', 7, 7, 19.0, 20.6)}".splitlines()
    assert late[0].startswith(
        "warning: the signal came 21 s before the save was complete; many launchers kill after 30"
    )
    assert late[1:] == [f"{saved}"]


def test_a_signal_while_starting_up_ends_all_processes_at_once(folder: Path) -> None:
    process = pretrain(settings(folder, "run"))
    while not rank_processes(process.pid):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, output = finish(process, 60)
    assert code == 0, output
    assert output.splitlines()[-1] == "SIGTERM: stopped before training began"
    assert not rank_processes(process.pid)


def test_another_reason_while_starting_up_is_told_as_it_is() -> None:
    early: queue.SimpleQueue[Wish] = queue.SimpleQueue()
    gone = Wish("process 7 (deepspeed), which started it, has ended", forced=True)
    with StopSignal(early.put) as stop:
        stop.watch(lambda: gone)
        assert early.get(timeout=20.0) == gone
    with StopSignal(early.put):
        os.kill(os.getpid(), signal.SIGTERM)
        assert early.get(timeout=20.0) == Wish("SIGTERM")
