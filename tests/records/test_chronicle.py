"""What happens to a run is told: to the user, to the ledger, to the logbook, to TensorBoard."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_stable.checkpoint.store import Shelf
from megatron_stable.config.schema import Config
from megatron_stable.records.callbacks import Callbacks
from megatron_stable.records.chronicle import Chronicle
from megatron_stable.records.directory import RunDirectory
from megatron_stable.stability.events import Rollback, Spike, Undo
from megatron_stable.stability.interventions import Intervention, Interventions
from megatron_stable.training.progress import ProgressLine
from megatron_stable.training.recovery import Recovery


def test_the_ledger_is_told_of_an_intervention_that_a_crash_kept_out_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = RunDirectory(tmp_path)
    callbacks = Callbacks(ProgressLine(Config()), Chronicle(directory))
    recovery = Recovery(Config(), directory, Shelf(directory.checkpoints), callbacks)
    intervention = Intervention(
        id="a",
        time="2026-01-01T00:00:00+00:00",
        by="guard",
        rule="divergence",
        rollback_to=3,
        windows=((4, 9),),
        samples=((24, 72),),
    )
    recovery.interventions = Interventions((intervention,))
    for _ in range(2):
        recovery.catch_up(3)
    (event,) = directory.ledger.read()
    assert isinstance(event, Rollback) and (event.id, event.windows) == ("a", ((4, 9),))
    assert capsys.readouterr().out.count("4-9") == 1 and "4-9" in directory.logbook.read_text()


def test_a_storm_of_spikes_does_not_write_the_logbook_anew_each_time(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    chronicle = Chronicle(directory)
    chronicle.event(Spike(step=3, series="loss", value=9, level=2, scale=0.1, score=70, onset=3))
    assert len(directory.ledger.read()) == 1 and not directory.logbook.exists()
    chronicle.event(Undo(step=4, by="user", id="a"))
    assert "spike of the loss" in directory.logbook.read_text()


def test_what_cannot_be_written_does_not_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = Callbacks(ProgressLine(Config()), Chronicle(RunDirectory(tmp_path / "missing")))
    callbacks.event(Undo(step=4, by="user", id="a"))
    said = capsys.readouterr().out
    assert "took back rollback a" in said and "Chronicle cannot write, training goes on" in said
