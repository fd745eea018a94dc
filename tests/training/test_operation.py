"""The guard's last rung: attempts are used up, and the run operates on itself, on every rank alike."""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from megatron_stable.analysis.stopped_run import StoppedRun
from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.catalog import newest_whole
from megatron_stable.checkpoint.reader import Reader
from megatron_stable.config.load import load_config
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.parallel import lifeline as lifelines
from megatron_stable.parallel.lifeline import Lifeline
from megatron_stable.records.directory import RunDirectory
from megatron_stable.records.interventions import read_interventions
from megatron_stable.stability.events import GaveUp, Rollback, Stop, Surgery
from megatron_stable.stability.interventions import Intervention
from megatron_stable.training import operation, trainer
from megatron_stable.training.operation import settle
from megatron_stable.training.stop import StopSignal
from tests.harness.ranks import Ranks
from tests.training.faults import run_of, train_with_faults
from tests.training.runs import Values, layout, metrics, write_data

BASE = {"recipe": "baseline"}
GUARD = {"max_rollbacks": 1, "surgery": "qk_norm_cap", "surgery_rewarm": 4}
# the first costs the attempt; the second comes again after surgery, when there is an attempt again
FAULTS = [{"kind": "nan_gradient", "data_steps": [22, 26]}, {"kind": "nan_gradient", "data_steps": [40, 44]}]
LAYOUTS = {
    "alone": (1, layout(), "fp32"),
    "tp2-pp2": (4, layout(tensor=2, pipeline=2), "fp32"),
    "zero3": (2, layout(zero_stage=3), "bf16"),
    "zero2-fp16": (2, layout(zero_stage=2), "fp16"),
}
EVERY = [name if name == "tp2-pp2" else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS]


def values_of(folder: Path, steps: int = 60, name: str = "alone", **guard: Any) -> Values:
    _, parallel, dtype = LAYOUTS[name]
    values = run_of(folder, "run", steps, guard={**GUARD, **guard}, parallel=parallel, precision={"dtype": dtype})
    values["model"], values["batch"] = {**values["model"], **BASE}, {"global_size": 8, "micro_size": 4}
    return values


@pytest.mark.parametrize("name", EVERY)
def test_a_run_that_would_end_operates_on_itself_and_goes_on(ranks: Ranks, tmp_path: Path, name: str) -> None:
    world = LAYOUTS[name][0]
    write_data(tmp_path / "data", tokens=12000)
    values = values_of(tmp_path, name=name)
    # to fp16 a gradient that is not finite is the loss scale's business
    kind = "inf_loss" if "fp16" in name else "nan_gradient"
    told = ranks.run(world, train_with_faults, values, [{**fault, "kind": kind} for fault in FAULTS])
    assert [code for code, _ in told] == [0] * world
    decisions = [[(step, take) for step, take, *_ in said] for _, said in told]
    assert all(each == decisions[0] for each in decisions)
    run = RunDirectory(values["run"]["directory"])
    acts = [each for each in run.ledger.read() if isinstance(each, Rollback | Surgery | GaveUp)]
    assert [type(each) for each in acts] == [Rollback, Surgery, Rollback]
    surgery = acts[1]
    assert isinstance(surgery, Surgery)
    assert surgery.by == "guard"
    assert surgery.verdict in ("unchanged", "continuous")
    assert surgery.changes["model.qk_norm"] == (False, True)
    assert surgery.changes["schedule.rewarm"] == (None, [surgery.rollback_to, 4])
    config = load_config(run.config)
    assert (config.model.qk_norm, config.model.attention_cap) == (True, surgery.changes["model.attention_cap"][1])
    assert json.loads((run.path / "surgery.json").read_text())["before"] == surgery.before

    line = metrics(run.path)
    assert max(line) == 60
    begins = surgery.rollback_to
    rates = [line[begins + n]["learning_rate"] for n in range(1, 6)]
    assert rates == pytest.approx([rates[-1] * n / 4 for n in (1, 2, 3, 4, 4)])
    names = {entry.step: Reader(entry.directory, entry.manifest).names() for entry in usable(run)}
    assert begins in names
    assert all("blocks.0.attention.q_norm.weight" in each for each in names.values())
    kept = Path(surgery.source)
    assert kept == run.path / "before_surgery" / f"step_{begins:08d}"
    assert (kept / "manifest.json").is_file()


def usable(run: RunDirectory) -> list[Any]:
    return [entry for entry in store.entries(run.checkpoints) if entry.usable]


@pytest.fixture(scope="module")
def once(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Values:
    """The settings of a run that has operated on itself, and stopped soon after; they say nothing of it."""
    folder = tmp_path_factory.mktemp("operated")
    write_data(folder / "data", tokens=12000)
    values = values_of(folder, steps=34)
    ((code, _),) = ranks.run(1, train_with_faults, values, [FAULTS[0], {**FAULTS[1], "data_steps": [34, 37]}])
    assert code == 0
    StoppedRun(Path(values["run"]["directory"])).undo()  # a rollback of the other model's
    return values


@pytest.fixture
def operated(once: Values, tmp_path: Path) -> Values:
    """A copy of it."""
    shutil.copytree(once["run"]["directory"], tmp_path / "run")
    return {**once, "run": {**once["run"], "directory": str(tmp_path / "run")}}


def places(run: RunDirectory) -> tuple[Path, Path, Path]:
    """Of the operated checkpoint; of the one that was operated on; and of the first, until the operation is settled."""
    made = read_interventions(run.path)
    assert made is not None
    (item,) = [item for item in made.items if item.changes]
    place = run.checkpoints / f"step_{item.rollback_to:08d}"
    return place, run.path / "before_surgery" / place.name, run.checkpoints / f".operated_{item.id}"


def test_the_same_command_goes_on_with_the_other_model(ranks: Ranks, operated: Values) -> None:
    run = RunDirectory(operated["run"]["directory"])
    made = read_interventions(run.path)
    assert made is not None
    assert [bool(item.changes) for item in made.items] == [False, True]
    operated["run"]["steps"] = 38
    # a crash may have come before the configuration of the other model was written
    text = run.config.read_text()
    run.config.write_text(text.replace("qk_norm: true", "qk_norm: false"))
    assert ranks.run(1, train_with_faults, operated, [])[0][0] == 0
    assert max(metrics(run.path)) == 38
    assert load_config(run.config).model.qk_norm
    assert len([each for each in run.ledger.read() if isinstance(each, Surgery)]) == 1


def test_an_operation_that_a_crash_cut_short_is_finished_at_the_next_start(ranks: Ranks, operated: Values) -> None:
    run = RunDirectory(operated["run"]["directory"])
    place, kept, waiting = places(run)
    step = int(place.name.removeprefix("step_"))
    for entry in store.entries(run.checkpoints):
        if entry.step > step:
            shutil.rmtree(entry.directory)
    # as it was between the decision and the renaming; and what an operation that was never decided left behind
    place.rename(waiting)
    kept.rename(place)
    (run.checkpoints / ".operated_feedbeef0000").mkdir()
    lines = run.ledger.path.read_text().splitlines()
    run.ledger.path.write_text("\n".join(line for line in lines if '"surgery"' not in line) + "\n")
    assert ranks.run(1, train_with_faults, operated, [])[0][0] == 0
    assert not list(run.checkpoints.glob(".operated_*"))
    assert "blocks.0.attention.q_norm.weight" in Reader(place, newest_whole(run.path, step).manifest).names()
    assert (kept / "manifest.json").is_file()
    told = [each for each in run.ledger.read() if isinstance(each, Surgery)]
    assert [(each.id, each.before) for each in told] == [(waiting.name.removeprefix(".operated_"), None)]
    assert load_config(run.config).model.qk_norm


@pytest.mark.parametrize("crashed", ["before both", "between", "after"])
def test_from_wherever_a_crash_left_it_settling_comes_to_the_same(operated: Values, crashed: str) -> None:
    """Two directories are renamed."""
    run = RunDirectory(operated["run"]["directory"])
    made = read_interventions(run.path)
    place, kept, waiting = places(run)

    def contents() -> dict[str, bytes]:
        return {str(path.relative_to(run.path)): path.read_bytes() for path in run.path.rglob("*") if path.is_file()}

    wanted = contents()
    if crashed != "after":
        place.rename(waiting)
    if crashed == "before both":
        kept.rename(place)
    for _ in range(2):
        settle(run, made)
        assert contents() == wanted
    assert not waiting.exists()


def test_what_cannot_be_settled_is_an_error_with_a_name(operated: Values) -> None:
    run = RunDirectory(operated["run"]["directory"])
    place, kept, waiting = places(run)
    place.rename(waiting)
    kept.rename(place)
    kept.parent.rmdir()
    kept.parent.write_text("in the way")
    with pytest.raises(DataError, match=rf"cannot move .*{waiting.name}: File exists"):
        settle(run, read_interventions(run.path))
    assert waiting.is_dir() and place.is_dir()


def test_surgery_cannot_be_undone(operated: Values) -> None:
    with pytest.raises(ConfigError, match="before_surgery"):
        StoppedRun(Path(operated["run"]["directory"])).undo()


def test_without_it_the_run_ends(ranks: Ranks, tmp_path: Path) -> None:
    write_data(tmp_path / "data", tokens=12000)
    values = values_of(tmp_path, surgery=None)
    assert ranks.run(1, train_with_faults, values, FAULTS)[0][0] == 3


def early(folder: Path, steps: int = 16) -> Values:
    """Settings of a run that operates on itself at once; for :func:`train_with`."""
    write_data(folder / "data", tokens=12000)
    return values_of(folder, steps, max_rollbacks=0)


Act: TypeAlias = Callable[[Path, Lifeline], AbstractContextManager[None]]


def train_with(values: Values, act: Act) -> int:
    """On a rank: gradients are NaN from data step 12 on, until the run has operated on itself; meanwhile ``act`` holds,
    of the checkpoint that is operated on."""
    from megatron_stable.engine.faults import VARIABLE
    from megatron_stable.training.trainer import Trainer

    operate = Trainer._operate

    def operating(self: Trainer, intervention: Intervention, stop: StopSignal, lifeline: Lifeline) -> Any:
        place = self.directory.checkpoints / f"step_{intervention.rollback_to:08d}"
        with act(place, lifeline):
            made = operate(self, intervention, stop, lifeline)
        if made is not None:
            os.environ[VARIABLE] = "[]"
        return made

    Trainer._operate = operating  # type: ignore[method-assign]
    try:
        return train_with_faults(values, [{"kind": "nan_gradient", "data_steps": [12, 99]}])[0]
    finally:
        Trainer._operate = operate  # type: ignore[method-assign]


def surgeries(run: RunDirectory) -> list[Surgery]:
    return [each for each in run.ledger.read() if isinstance(each, Surgery)]


@contextmanager
def nothing(place: Path, lifeline: Lifeline) -> Iterator[None]:
    yield


@contextmanager
def stopped(place: Path, lifeline: Lifeline) -> Iterator[None]:
    """The last rank has received a signal, and rank 0 asks sooner than it could be done."""
    operation.TURN = 0.01
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    yield


def test_a_signal_during_surgery_stops_the_run_which_then_operates_again(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = early(tmp_path)
    values["parallel"] = layout(tensor=2)
    assert ranks.run(2, train_with, values, stopped) == [0, 0]
    assert "SIGTERM: stopped after step 15, without saving; the same command goes on from step 10" in (
        capsys.readouterr().out
    )
    run = RunDirectory(values["run"]["directory"])
    (stop,) = [each for each in run.ledger.read() if isinstance(each, Stop)]
    assert (stop.step, stop.reason, surgeries(run)) == (15, "SIGTERM", [])
    assert not list(run.checkpoints.glob(".operated_*"))
    assert read_interventions(run.path) is None
    assert ranks.run(2, train_with, values, nothing) == [0, 0]
    assert [(each.step, each.rollback_to) for each in surgeries(run)] == [(15, 5)]
    assert max(metrics(run.path)) == 16


@contextmanager
def slow(place: Path, lifeline: Lifeline) -> Iterator[None]:
    """Surgery takes twice as long as the lifeline allows without a word; each part of it is quick."""
    perform, before, operation.TURN = operation.perform, lifelines.SLOW, 0.25

    def slowly(*given: Any, tick: Callable[[], None], **named: Any) -> Any:
        left = iter(range(12))

        def ticking() -> None:
            if next(left, None) is not None:
                time.sleep(0.5)
            tick()

        try:
            return perform(*given, tick=ticking, **named)
        finally:
            trainer.SLOW = before  # type: ignore[misc]

    operation.perform = slowly
    trainer.SLOW = ALLOWED  # type: ignore[misc]
    lifeline.progress(ALLOWED)
    yield


ALLOWED = 3.0  # seconds


def test_the_others_know_that_surgery_gets_on(ranks: Ranks, tmp_path: Path) -> None:
    values = early(tmp_path)
    values["run"]["patience"] = 6
    began = time.monotonic()
    assert ranks.run(2, train_with, values, slow) == [0, 0]
    assert time.monotonic() - began > 2 * ALLOWED
    assert len(surgeries(RunDirectory(values["run"]["directory"]))) == 1


def damage(place: Path) -> None:
    path = place / "rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 255
    path.write_bytes(data)


@contextmanager
def damaged_once(place: Path, lifeline: Lifeline) -> Iterator[None]:
    if place.name == "step_00000005":
        damage(place)
    yield


@contextmanager
def unreadable_once(place: Path, lifeline: Lifeline) -> Iterator[None]:
    path = place / "rank_00000.safetensors"
    if place.name == "step_00000005":
        path.rename(path.with_name("elsewhere"))
        path.symlink_to("elsewhere")
    yield


@pytest.mark.parametrize(("act", "said"), [(damaged_once, "the file is damaged"), (unreadable_once, "a symbolic link")])
def test_where_a_checkpoint_is_damaged_an_older_one_is_operated_on(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str], act: Act, said: str
) -> None:
    values = early(tmp_path)
    assert ranks.run(1, train_with, values, act) == [0]
    printed = capsys.readouterr().out
    assert printed.count("warning: no surgery") == 1 and said in printed
    run = RunDirectory(values["run"]["directory"])
    assert [each.rollback_to for each in surgeries(run)] == [0]
    assert max(metrics(run.path)) == 16


@contextmanager
def damaged(place: Path, lifeline: Lifeline) -> Iterator[None]:
    damage(place)
    yield


@contextmanager
def full(place: Path, lifeline: Lifeline) -> Iterator[None]:
    """Of a file that is written, more than 200 kB has no room."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


@pytest.mark.parametrize(
    ("act", "said", "tried", "left_at"),
    [(damaged, "the file is damaged", 3, 15), (full, "File too large", 1, 5)],
)
def test_what_cannot_be_operated_on_ends_the_run_as_before(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str], act: Act, said: str, tried: int, left_at: int
) -> None:
    """No older checkpoint would help where the disk is full. The run is not left at one that is damaged."""
    values = early(tmp_path)
    assert ranks.run(1, train_with, values, act) == [3]
    printed = capsys.readouterr().out
    assert printed.count("warning: no surgery") == tried and said in printed
    run = RunDirectory(values["run"]["directory"])
    assert not list(run.checkpoints.glob(".operated_*")) and not surgeries(run)
    (end,) = [each for each in run.ledger.read() if isinstance(each, GaveUp)]
    assert end.rollback_to == left_at


def train_and_count(values: Values) -> list[int]:
    """On a rank: how many parameters of models before there still are when a trainer is made."""
    from megatron_stable.training.trainer import Trainer

    known: list[weakref.ref[Any]] = []
    found: list[int] = []
    construct = Trainer.__init__

    def constructing(self: Trainer, *given: Any) -> None:
        found.append(sum(each() is not None for each in known))
        construct(self, *given)
        known.extend(weakref.ref(each) for each in self.engine.module.parameters())

    Trainer.__init__ = constructing  # type: ignore[method-assign]
    gc.disable()  # or it may do by chance what is tested
    try:
        assert train_with(values, nothing) == 0
    finally:
        gc.enable()
        Trainer.__init__ = construct  # type: ignore[method-assign]
    assert len(known) > 20
    return found


def test_one_model_is_gone_before_the_next_is_made(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(1, train_and_count, early(tmp_path)) == [[0, 0]]
