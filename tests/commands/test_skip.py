"""`megatron-stable skip` on a real run with a spike from poisoned data, and for other trainers."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from megatron_stable.commands.app import main
from megatron_stable.config.load import dump_config, load_config
from megatron_stable.records.directory import RunDirectory
from megatron_stable.records.interventions import read_interventions, write_interventions
from megatron_stable.stability.events import Rollback, Undo
from megatron_stable.stability.interventions import Interventions
from tests.commands.test_spikes import curves, other_trainer
from tests.harness.ranks import Ranks
from tests.training.faults import RARE, poison, run_of, train_with_faults
from tests.training.runs import ROOT, VOCAB, metrics, train, write_data

STEPS, POISONED = 60, range(40, 44)


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def facts(self) -> dict[str, Any]:
        """What --json printed, strictly read."""

        def refuse(text: str) -> None:
            raise AssertionError(text)

        assert self.code == 0, self.err
        return json.loads(self.out, parse_constant=refuse)


class Verb:
    """`megatron-stable skip`, in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Done:
        self.monkeypatch.setattr(sys, "argv", ["megatron-stable", "skip", *map(str, arguments)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self.capsys.readouterr()
        assert "Traceback" not in err
        return Done(int(ended.value.code or 0), out, err)

    def fails(self, code: int, said: str, *arguments: object) -> None:
        """It ends with this code, says so on stderr, and prints nothing else."""
        done = self(*arguments)
        assert (done.code, done.out) == (code, ""), done
        assert said in " ".join(done.err.replace("│", " ").split())


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verb:
    return Verb(monkeypatch, capsys)


@pytest.fixture(scope="session")
def spiked(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A watched run that has trained through a poisoned stretch of data. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("spiked")
    write_data(folder / "data", tokens=20000, vocab=VOCAB - RARE)
    values = run_of(
        folder, "run", STEPS, guard={"mode": "watch", "skip_steps": 6}, model={"layers": 2, "hidden": 16, "heads": 2},
        optimizer={"learning_rate": 1e-2}, batch={"micro_size": 8},
    )  # fmt: skip
    poison(values, POISONED)
    assert ranks.run(1, train, values) == [0]
    return folder / "run"


@pytest.fixture
def run(spiked: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(spiked, tmp_path / "run"))


def listed(run: Path) -> dict[str, bytes]:
    """What of a run an intervention may change."""
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != ".lock"}


def change(run: Path, section: str, **fields: Any) -> None:
    """Change a run's configuration."""
    config = load_config(run / "config.yaml")
    changed = getattr(config, section).model_copy(update=fields)
    (run / "config.yaml").write_text(dump_config(config.model_copy(update={section: changed})))


def data_steps(run: Path) -> list[int]:
    return [record["data_step"] for record in metrics(run).values()]


def goes_on(ranks: Ranks, done: Done) -> None:
    """Train on as the printed command says."""
    *_, printed = done.out.splitlines()
    program, name, option, config, *overrides = shlex.split(printed)
    assert (program, name, option) == ("megatron-stable", "pretrain", "--config")
    values = load_config(Path(config), overrides).model_dump(mode="json")
    assert ranks.run(1, train, values) == [0]


def test_lists_and_proposes_and_changes_nothing(verb: Verb, run: Path) -> None:
    before = listed(run)
    done = verb(run)
    assert done.code == 0
    for words in (
        "1 event in 60 points of 'loss', steps 1 to 60",
        "1. spike, steps 40-43 (data steps 40-43): from 3.",
        "roll back to the checkpoint of step 35; 25 steps are trained again\n",
        "skip data steps 37-43",
        "learning rate x 1, optimizer.clip_grad x 1\n",
        "checkpoint 35: the newest healthy one 5 steps or more before the onset",
        "window: 6 data steps about data step 40, and on to the last of it, 43",
        "Nothing has been changed yet: the same command with --apply writes this into the run.",
    ):
        assert words in done.out
    facts = verb(run, "--json").facts
    (spike,) = facts["spikes"]
    assert (spike["kind"], spike["onset"], spike["duration"], spike["data_steps"]) == ("spike", 40, 4, [40, 43])
    assert spike["settled"] is None and not facts["applied"]
    proposal = facts["proposal"]
    assert (proposal["rollback_to"], proposal["windows"], proposal["by"]) == (35, [[37, 43]], "user")
    assert (proposal["learning_rate_factor"], proposal["clip_factor"], proposal["reset_loss_scale"]) == (1, 1, False)
    assert listed(run) == before


def test_apply_go_on_and_undo(verb: Verb, run: Path, ranks: Ranks) -> None:
    applied = verb(run, "--learning-rate-factor", 0.5, "--clip-factor", 0.25, "--apply")
    assert applied.code == 0
    assert f"Written into {run}. To undo it: megatron-stable skip {run} --undo" in applied.out
    assert "no longer resumed from: 40, 45, 50, 55, 60" in applied.out
    assert "learning rate x 0.5: named by the user" in applied.out
    (intervention,) = read_interventions(run).items  # type: ignore[union-attr]
    assert (intervention.rollback_to, intervention.windows) == (35, ((37, 43),))
    assert (intervention.learning_rate_factor, intervention.clip_factor) == (0.5, 0.25)
    event = RunDirectory(run).ledger.read()[-1]
    assert isinstance(event, Rollback) and (event.id, event.by, event.windows) == (intervention.id, "user", ((37, 43),))
    assert "skips data steps 37-43" in (run / "logbook.md").read_text()

    again = verb(run, "--apply")
    assert again.code == 0 and len(read_interventions(run).items) == 1  # type: ignore[union-attr]
    assert "its data is skipped already" in again.out and "Nothing to skip" in again.out
    verb.fails(2, "its data is skipped already; to choose anew, --undo that", run, "--spike", 1)

    goes_on(ranks, again)
    assert data_steps(run) == [*range(1, 37), *range(44, STEPS + 8)]
    rates = [record["learning_rate"] for record in metrics(run).values()]
    assert rates[35] == pytest.approx(rates[34] / 2)
    assert verb(run, "--json").facts["spikes"] == []

    undone = verb(run, "--undo")
    assert "Undid what the user did" in undone.out and "data steps 37-43 skipped" in undone.out
    assert "The run is at step 35." in undone.out
    assert "40, 45, 50, 55, 60 (trained with what was undone)" in undone.out
    assert read_interventions(run) == Interventions()
    undo = RunDirectory(run).ledger.read()[-1]
    assert undo.model_copy(update={"time": None}) == Undo(step=60, by="user", id=intervention.id)
    assert "Nothing to skip" in verb(run).out
    goes_on(ranks, undone)
    assert data_steps(run) == list(range(1, STEPS + 1))
    assert [spike["onset"] for spike in verb(run, "--json").facts["spikes"]] == [40]


def test_a_run_that_gave_up(verb: Verb, ranks: Ranks, tmp_path: Path) -> None:
    """The guard could not save it; told by hand to skip more, and to learn more slowly, it comes through."""
    write_data(tmp_path / "data", tokens=20000)
    guard = {"mode": "recover", "max_rollbacks": 1, "skip_steps": 2, "max_consecutive_drops": 3}
    values = run_of(tmp_path, "run", STEPS, guard=guard, model={"layers": 2, "hidden": 16, "heads": 2})
    faults = [{"kind": "inf_loss", "data_steps": (30, 39)}]
    assert ranks.run(1, train_with_faults, values, faults)[0][0] == 3
    run = tmp_path / "run"
    tried = read_interventions(run).items  # type: ignore[union-attr]
    assert [bool(item.windows) for item in tried] == [True, False], "one attempt, and the end"
    found = verb(run, "--json").facts["spikes"]
    assert [(spike["peak"], spike["settled"]) for spike in found] == [(None, None)]
    assert found[0]["data_steps"][0] == tried[0].windows[0][1] + 1, "after what was skipped already"
    assert verb(run, "--from-step", 30, "--to-step", 39, "--learning-rate-factor", 0.5, "--apply").code == 0
    assert ranks.run(1, train_with_faults, values, faults)[0][0] == 0
    out = {d for first, last in (*tried[0].windows, (30, 39)) for d in range(first, last + 1)}
    assert data_steps(run) == [d for d in range(1, STEPS + 40) if d not in out][:STEPS]
    assert len(read_interventions(run).items) == 3, "the guard had nothing left to do"  # type: ignore[union-attr]


def test_undone_at_once_later_checkpoints_are_back(verb: Verb, run: Path) -> None:
    assert verb(run, "--apply").code == 0
    undone = verb(run, "--undo", "--json").facts
    assert (undone["stands_at"], undone["abandoned"], undone["undone"]["rollback_to"]) == (60, [], 35)
    assert (run / "checkpoints" / "latest").read_text() == "step_00000060\n"
    assert verb(run, "--json").facts["spikes"][0]["settled"] is None
    verb.fails(2, "nothing to undo", run, "--undo")


def test_windows_of_ones_own(verb: Verb, run: Path) -> None:
    arguments = (run, "--from-step", 38, "--to-step", 44, "--from-step", 70, "--to-step", 71)
    facts = verb(*arguments, "--apply", "--json").facts
    assert facts["proposal"]["windows"] == [[38, 44], [70, 71]]
    assert (facts["proposal"]["rollback_to"], facts["proposal"]["rule"], facts["spikes"]) == (
        35,
        "named by the user",
        [],
    )
    assert (facts["applied"], facts["abandoned"]) == (True, [40, 45, 50, 55, 60])
    assert facts["command"][:4] == ["megatron-stable", "pretrain", "--config", str(run / "config.yaml")]
    verb.fails(2, "38-44, 70-71 are skipped already", *arguments)
    more = verb(run, "--from-step", 65, "--to-step", 66, "--json").facts["proposal"]
    assert more["rollback_to"] == 35 and "lies ahead of it" in more["reason"]


def test_a_checkpoint_of_ones_own(verb: Verb, run: Path) -> None:
    proposal = verb(run, "--checkpoint", 20, "--json").facts["proposal"]
    assert (proposal["rollback_to"], proposal["windows"]) == (20, [[37, 43]])
    assert "checkpoint 20: named by the user" in proposal["reason"]
    near = verb(run, "--checkpoint", 35, "--from-step", 39, "--to-step", 50, "--json").facts["proposal"]
    assert (near["rollback_to"], near["windows"]) == (35, [[39, 50]])


def test_the_ladder_after_the_guards_attempts(verb: Verb, run: Path) -> None:
    """What the guard has tried here already is not tried again."""
    change(run, "guard", learning_rate_factors=(1.0, 0.7, 0.1), clip_factors=(1.0, 0.5), widen=(1.0, 2.0))
    verb(run, "--apply")
    (intervention,) = read_interventions(run).items  # type: ignore[union-attr]
    guards = intervention.model_copy(
        update={"by": "guard", "windows": ((90, 91),), "samples": ((712, 728),), "rollback_to": 60, "onset": 41}
    )
    write_interventions(run, Interventions((guards,)))
    proposal = verb(run, "--json").facts["proposal"]
    assert (proposal["rollback_to"], proposal["windows"]) == (30, [[34, 45]])
    assert (proposal["learning_rate_factor"], proposal["clip_factor"]) == (0.7, 0.5)
    assert "learning rate x 0.7: attempt 2 here, guard.learning_rate_factors" in proposal["reason"]
    write_interventions(
        run, Interventions((guards, guards.model_copy(update={"id": "end", "windows": (), "samples": ()})))
    )
    assert verb(run, "--json").facts["proposal"]["learning_rate_factor"] == 0.7, "to give up is no attempt"
    named = verb(run, "--learning-rate-factor", 1, "--json").facts["proposal"]
    assert (named["learning_rate_factor"], named["clip_factor"]) == (1, 0.5)


def test_data_steps_are_those_of_the_records(verb: Verb, run: Path) -> None:
    """A spike after earlier data was skipped lies at a later data step; nothing is counted twice."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    change(run, "data", skip=((61, 70),))
    for step in range(61, 131):
        place = {"data_step": step + 10, "samples": [[8 * (step + 9), 8 * (step + 10)]]}
        lines.append({**lines[-20], "step": step, "loss": 9.0 if step in (121, 122, 123) else 3.8, **place})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = verb(run, "--json").facts
    assert [(s["onset"], s["data_steps"]) for s in facts["spikes"]] == [(40, [40, 43]), (121, [131, 133])]
    assert facts["proposal"]["onset"] == 121, "the last one"
    assert facts["proposal"]["windows"] == [[128, 133]]
    first = verb(run, "--spike", 1, "--json").facts["proposal"]
    assert (first["onset"], first["windows"]) == (40, [[37, 43]])
    from_events = verb(run, "--tensorboard", other_trainer(run.parent / "logs", *events(lines)), "--json").facts
    assert from_events["series"] == "lm loss"
    assert from_events["spikes"][-1]["data_steps"] == [131, 133], "as the run's own records say"
    assert from_events["proposal"]["windows"] == [[128, 133]]
    verb(run, "--spike", 1, "--apply")
    for source in ((), ("--tensorboard", run.parent / "logs")):
        after = verb(run, *source, "--json").facts
        assert [s["settled"] for s in after["spikes"]] == [
            "its data is skipped already",
            "the run takes other data there by now",
        ]
        assert after["proposal"] is None


def events(lines: list[dict[str, Any]]) -> tuple[np.ndarray, None]:
    return np.array([line["loss"] for line in lines]), None


def test_a_run_without_spikes(verb: Verb, run: Path) -> None:
    kept = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:39]
    (run / "metrics.jsonl").write_text("".join(kept))
    done = verb(run, "--apply")
    assert done.code == 0
    assert done.out == (
        "no spikes in 39 points of 'loss', steps 1 to 39\n"
        "Nothing to skip. To skip data anyway, name it with --from-step and --to-step.\n"
    )
    assert read_interventions(run) is None
    assert verb(run, "--json").facts["proposal"] is None


def test_values_that_are_not_finite_make_strict_json(verb: Verb, run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["loss"] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spike = verb(run, "--json").facts["spikes"][-1]
    assert (spike["onset"], spike["peak"], spike["score"]) == (60, None, None)
    assert "to not finite at step 60" in verb(run).out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from-step", 5], "go together"),
        (["--from-step", 5, "--to-step", 6, "--to-step", 7], "go together"),
        (["--from-step", 45, "--to-step", 44], "skip window [45, 44]: give [first, last]"),
        (["--from-step", 0, "--to-step", 4], "'--from-step'"),
        (["--from-step", 45, "--to-step", 46, "--spike", 1], "already say what to skip: leave out --spike"),
        (["--spike", 2], "--spike 2: there are only 1"),
        (["--spike", 0], "'--spike'"),
        (["--learning-rate-factor", 2], "learning-rate-factor 2: give a number above 0 and up to 1"),
        (["--learning-rate-factor", 0], "learning-rate-factor 0: give a number above 0 and up to 1"),
        (["--clip-factor", "nan"], "clip-factor nan: give a number above 0 and up to 1"),
        (["--checkpoint", 40], "the checkpoint of step 40 has trained on that data: name one before 40"),
        (["--undo"], "nothing to undo"),
        (["--undo", "--apply"], "leave out --apply"),
        (["--undo", "--clip-factor", 0.5], "leave out --clip-factor"),
        (["--tag", "los"], "did you mean 'loss'?"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_usage(verb: Verb, spiked: Path, arguments: list[object], said: str) -> None:
    before = listed(spiked)
    verb.fails(2, said, spiked, *arguments)
    assert listed(spiked) == before


def test_what_is_no_run_or_cannot_be_used(verb: Verb, run: Path, tmp_path: Path) -> None:
    verb.fails(2, "is no run's directory", tmp_path)
    verb.fails(2, "is no run's directory", tmp_path / "nowhere")
    verb.fails(5, "no usable checkpoint of step 12; it has 5, 10, 15", run, "--checkpoint", 12)
    verb.fails(5, "from before step 3", run, "--from-step", 3, "--to-step", 9, "--apply")
    verb.fails(5, "does not exist", run, "--tensorboard", tmp_path / "nowhere")
    (run / "interventions.json").write_text("{")
    verb.fails(5, "interventions.json: not JSON", run)
    (run / "interventions.json").unlink()
    (run / "metrics.jsonl").unlink()
    verb.fails(5, "holds neither metrics.jsonl nor event files", run)
    shutil.rmtree(run / "checkpoints")
    verb.fails(5, "it has none", run, "--from-step", 3, "--to-step", 9, "--apply")


def test_a_run_in_progress(verb: Verb, run: Path) -> None:
    """It may be looked at, not changed."""
    before, holder = listed(run), RunDirectory(run)
    with holder.held():
        assert verb(run, "--json").facts["proposal"]["rollback_to"] == 35
        verb.fails(2, "is in use by a run that has not ended", run, "--apply")
        verb.fails(2, "is in use by a run that has not ended", run, "--from-step", 70, "--to-step", 71, "--apply")
    assert listed(run) == before
    assert verb(run, "--apply").code == 0
    applied = listed(run)
    with holder.held():
        verb.fails(2, "is in use by a run that has not ended", run, "--undo")
    assert listed(run) == applied


def test_for_other_trainers(verb: Verb, tmp_path: Path) -> None:
    logs = other_trainer(tmp_path / "logs", *curves())
    said = verb("--tensorboard", logs, "--tag", "lm loss").out
    assert "1. spike, steps 400-407: from 2." in said
    assert "Roll back to a checkpoint at or shortly before step 300, and skip steps 301-500:" in said
    assert "Megatron-LM: --ckpt-step 300 --iterations-to-skip $(seq 301 500)" in said
    facts = verb("--tensorboard", logs, "--json").facts
    assert (facts["windows"], facts["rollback_to"]) == ([[301, 500]], 300)
    assert {entry["trainer"] for entry in facts["trainers"]} >= {"Megatron-LM", "OLMo-core", "GPT-NeoX"}
    calm = other_trainer(tmp_path / "calm", *curves(spikes=False))
    assert verb("--tensorboard", calm, "--json").facts["windows"] == []
    assert verb("--tensorboard", calm).out.endswith("Nothing to skip.\n")
    named = verb("--from-step", 9, "--to-step", 12, "--from-step", 5, "--to-step", 8, "--json").facts
    assert (named["windows"], named["rollback_to"]) == ([[5, 12]], 4)
    verb.fails(2, "give a RUN, or a --tensorboard directory")
    verb.fails(2, "leave out --apply", "--tensorboard", logs, "--apply")
    verb.fails(2, "leave out --checkpoint, --clip-factor", "--tensorboard", logs, "--checkpoint", 3, "--clip-factor", 1)
    verb.fails(2, "leave out --undo", "--undo")
    verb.fails(2, "--spike 2: there are only 1", "--tensorboard", logs, "--spike", 2)
    verb.fails(2, "give [first, last]", "--from-step", 9, "--to-step", 8)
    (tmp_path / "empty").mkdir()
    verb.fails(5, "holds neither", "--tensorboard", tmp_path / "empty")


@pytest.mark.full
def test_the_tool_is_the_verb(verb: Verb, run: Path) -> None:
    """And what it prints goes on for real."""
    arguments = [str(run), "--from-step", "56", "--to-step", "57"]
    tool = [sys.executable, str(ROOT / "tools" / "skip_data.py")]
    plain = subprocess.run([*tool, *arguments], capture_output=True, text=True, timeout=120)
    assert (plain.returncode, plain.stderr) == (0, "")
    assert plain.stdout == verb(*arguments).out
    wrong = subprocess.run([*tool, str(run), "--spike", "7"], capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2 and "--spike 7" in wrong.stderr
    command = verb(*arguments, "--apply", "--json").facts["command"]
    on = subprocess.run(
        [sys.executable, "-m", "megatron_stable", *command[1:]], capture_output=True, text=True, timeout=200
    )
    assert on.returncode == 0, on.stderr
    assert data_steps(run) == [*range(1, 56), *range(58, STEPS + 3)]
