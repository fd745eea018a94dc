"""What a newer version of the program wrote is refused, by every verb, with a message that says what opens it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.format import VERSION as CHECKPOINT
from megatron_stable.checkpoint.format import read_manifest
from megatron_stable.commands.app import main
from megatron_stable.errors import DataError
from megatron_stable.persisted import FormatError, package_version
from megatron_stable.records.directory import FORMAT, VERSION, RunDirectory, require_known_format
from tests.checkpoint.stored import rewrite_manifest, write_checkpoints
from tests.harness.ranks import Ranks
from tests.training.runs import settings, train, write_data

VERBS = {
    "spikes": ["RUN"],
    "skip": ["RUN"],
    "inspect": ["RUN", "--step", "2"],
    "checkpoints": ["RUN"],
    "evaluate": ["RUN"],
    "generate": ["RUN", "--prompt", "a"],
    "convert": ["RUN", "--output", "RUN-new"],
}


def newer(known: int) -> str:
    """What is said of format 3 where formats up to ``known`` can be read."""
    return (
        f"was written in format 3 by megatron-stable 9.4.0; this is {package_version()}, which reads formats up to "
        f"{known}: use megatron-stable 9.4.0 or newer"
    )


@pytest.fixture(scope="module")
def trained(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one step."""
    folder = tmp_path_factory.mktemp("trained")
    write_data(folder / "data")
    assert ranks.run(1, train, _settings(folder)) == [0]
    return folder


def _settings(folder: Path) -> dict[str, dict[str, object]]:
    return settings(folder, steps=1, schedule={"kind": "constant", "warmup_steps": 0})


def refused(verb: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a verb says that ends with exit code 5 and prints no result."""
    words = [word.replace("RUN", str(run)) for word in VERBS[verb]]
    monkeypatch.setattr(sys, "argv", ["megatron-stable", verb, *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (DataError.exit_code, ""), err
    return " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_a_newer_run(
    verb: str, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained / "run"
    before = (run / FORMAT).read_text()
    assert json.loads(before) == {"version": VERSION, "written_by": package_version()}
    (run / FORMAT).write_text('{"version": 3, "written_by": "9.4.0", "more": []}')
    try:
        assert refused(verb, run, monkeypatch, capsys).endswith(f"{run} {newer(VERSION)}")
    finally:
        (run / FORMAT).write_text(before)
    assert not (trained / "run-new").exists()


def test_pretrain_refuses_a_newer_run_and_a_newer_checkpoint(
    ranks: Ranks, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained / "run"
    values = {**_settings(trained), "run": {"directory": str(run), "steps": 2, "seed": 1}}
    before, newest = (run / FORMAT).read_text(), run / "checkpoints/step_00000001"
    manifest = (newest / "manifest.json").read_text()
    (run / FORMAT).write_text('{"version": 3, "written_by": "9.4.0"}')
    assert ranks.run(1, train, values) == [5]
    assert f"{run} {newer(VERSION)}" in capsys.readouterr().out
    (run / FORMAT).write_text(before)
    rewrite_manifest(newest, lambda body: body.update(version=3, written_by="9.4.0"))
    assert ranks.run(1, train, values) == [5]
    assert f"{newest} {newer(CHECKPOINT)}" in capsys.readouterr().out
    (newest / "manifest.json").write_text(manifest)


def test_a_newer_checkpoint_is_not_passed_over_for_an_older_one(ranks: Ranks, tmp_path: Path) -> None:
    """Else a resume would go on from step 1, and abandon what a newer version of the program trained."""
    root = tmp_path / "checkpoints"
    ranks.run(1, write_checkpoints, str(root), [1, 2])
    manifest = read_manifest(root / "step_00000002")
    assert (manifest.version, manifest.written_by) == (CHECKPOINT, package_version())
    rewrite_manifest(root / "step_00000002", lambda body: body.update(version=3, written_by="9.4.0", unheard_of=1))
    with pytest.raises(FormatError, match="step_00000002 was written in format 3"):
        store.entries(root)
    assert not (root / "step_00000002/damaged.json").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "version: Field required"),
        ('{"version": "3", "written_by": "9.4.0"}', "version: .*integer"),
        ('{"version": 0, "written_by": "9.4.0"}', "version: .*greater"),
        ("[3]", "dictionary"),
        ("{", "not JSON"),
    ],
)
def test_a_directory_that_does_not_rightly_say_is_refused(tmp_path: Path, content: str, said: str) -> None:
    require_known_format(tmp_path)  # without the file it is of the first format
    (tmp_path / FORMAT).write_text(content)
    with pytest.raises(DataError, match=said):
        require_known_format(RunDirectory(tmp_path).path)
