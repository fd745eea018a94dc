"""Screenings of sources, trained for real: a poisoned source is found, and what cannot be screened is refused."""

from __future__ import annotations

import json
from contextlib import nullcontext
from math import inf, log
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
import yaml

from megatron_stable.analysis.trained import open_run
from megatron_stable.checkpoint.catalog import newest_whole
from megatron_stable.commands.app import run_verb
from megatron_stable.config.load import replaced
from megatron_stable.data import IndexedWriter, RepetitionFilter, TokenDataset, open_dataset
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.records.directory import RunDirectory
from megatron_stable.study.grid import Cell
from megatron_stable.study.impact import Impact, drawn, impact
from megatron_stable.study.outcome import Ended, read_ended, write_ended
from megatron_stable.study.screening import CONTROL, arms, ask, edge, sources_of
from megatron_stable.study.suspects import _ask, _drawn, _excesses, _gaps, judge, sound_until, tail_of
from megatron_stable.study.worker import run
from tests.surgery.runs import rewritten, whole_of

VOCAB, SEQUENCE = 128, 32
NAMES = ("one", "two", "three", "bad")


def write_sources(folder: Path, spoiled: str | None = "bad") -> Path:
    """Sources that count up from a random token, each in steps of its own; of one, every second document is noise."""
    for number, name in enumerate(NAMES, 1):
        draw = np.random.default_rng(number)
        with IndexedWriter(folder / name, np.uint16) as writer:
            for i in range(40 if name == "three" else 120):
                tokens = (draw.integers(64) + number * np.arange(SEQUENCE + 8)) % 64
                if name == spoiled and i % 2:
                    tokens = draw.integers(0, VOCAB, SEQUENCE + 8)
                writer.add(tokens)
    path = folder / "blend.yaml"
    listed = {name: {"path": name, "weight": 2.0} for name in NAMES}
    path.write_text(yaml.safe_dump({"sources": listed}, sort_keys=False))
    return path


def write_proxy(folder: Path, **data: object) -> Path:
    config = {
        "run": {"steps": 60},
        "model": {"layers": 2, "hidden": 32, "heads": 2, "sequence_length": SEQUENCE, "vocab_size": VOCAB},
        "precision": {"dtype": "fp32"},
        "batch": {"global_size": 8, "micro_size": 8},
        "schedule": {"warmup_steps": 6, "kind": "constant"},
        "data": data or {"train": str(folder / "blend.yaml")},
    }
    path = folder / "proxy.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_poisoned_source_is_found_and_the_screening_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sources(tmp_path)
    out = tmp_path / "screen"
    command = [
        "screen", "--config", str(write_proxy(tmp_path)), "--output", str(out), "--lr", "1e-2", "--seeds", "2",
        "--windows", "64", "--jobs", "1",
    ]  # fmt: skip
    assert run_verb(command) == 0
    said = capsys.readouterr().out
    assert "10 runs, 1 at a time" in said and "Inspect bad, or remove it" in said
    record = json.loads((out / "screening.json").read_text())
    assert record["version"] == 1 and record["seeds"] == [1234, 1235] and record["learning_rate"] == 0.01
    by_name = {source["name"]: source for source in record["sources"]}
    assert [name for name, source in by_name.items() if source["verdict"] == "suspect"] == ["bad"]
    assert [source["windows"] for source in record["sources"]] == [64, 64, 49, 64]  # all that the smallest has
    bad = by_name["bad"]
    assert bad["share"] == [0.25, pytest.approx(4 / 7)] and bad["weight"] == 2.0
    assert 0.3 < bad["odd"]["low"] < bad["odd"]["value"] < bad["odd"]["high"] < 0.9
    assert bad["gap"] > 0.5 and all(
        3 * source["odd"]["value"] < bad["odd"]["value"] for source in record["sources"][:3]
    )
    # documents are numbered from 0, and every second one is noise; a window may begin in the one before
    assert sum(place["document"] % 2 for place in bad["worst"]) >= 3
    assert (out / "screening.png").stat().st_size > 10_000

    (out / "screening.json").unlink()
    assert run_verb([*command, "--json"]) == 0  # nothing is trained again
    again = capsys.readouterr().out
    assert json.loads(again)["sources"] == record["sources"]

    blend = yaml.safe_load((tmp_path / "blend.yaml").read_text())
    blend["sources"]["one"]["weight"] = 3.0
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump(blend))
    assert run_verb(command) == 2
    assert "is a screening of other sources or weights" in capsys.readouterr().err


def test_arms_differ_in_the_weight_of_one_source_alone(tmp_path: Path) -> None:
    write_sources(tmp_path)
    grid = arms(ask(tmp_path / "screen", write_proxy(tmp_path), [], factor=4.0, seeds=2), 1e-2)
    by_arm = {cell.labels["source"]: cell.config for cell in grid.cells if cell.config.run.seed == 1234}
    assert list(by_arm) == [CONTROL, *NAMES] and len(grid.cells) == 10
    opened = {arm: open_dataset(config.data.train, SEQUENCE, 1234) for arm, config in by_arm.items()}
    many = {
        arm: np.array([sum(blend.locate(k).dataset is part for k in range(700)) for part in blend.parts])
        for arm, blend in opened.items()
    }
    assert many[CONTROL].tolist() == [175] * 4 and many["two"].tolist() == [100, 400, 100, 100]
    # the k-th sample of a source is the same window everywhere
    for k in range(20):
        starts = {blend.parts[0].locate(k).start for blend in opened.values()}
        assert len(starts) == 1
    out = arms(ask(tmp_path / "without", tmp_path / "proxy.yaml", [], factor=0.0, seeds=1), 1e-2)
    (without,) = (cell.config.data.train for cell in out.cells if cell.labels["source"] == "two")
    assert [source.name for source in sources_of(without)] == ["one", "three", "bad"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--lr", "1e-2", "--sweep", "x"], 2, "--lr and --sweep do not go together"),
        (["--lr", "-1"], 2, "--lr -1 is not a positive number"),
        (["--lr", "1e-2", "--factor", "0.5"], 2, "give more than 1 to up-weight a source, or 0"),
        (["--lr", "1e-2", "run.steps=20"], 2, "says nothing"),
        (["--lr", "1e-2", "schedule.warmup_steps=45"], 2, "leave 15 behind the warm-up"),
        (["--lr", "1e-2", "data.train=one"], 2, "is no blend of two sources"),
        (["--lr", "1e-2", "data.train=nowhere.yaml"], 5, "nowhere.yaml"),
        (["--sweep", "nowhere"], 2, "nowhere is no table of a sweep"),
    ],
)
def test_what_cannot_be_is_a_message(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sources(tmp_path)
    proxy = write_proxy(tmp_path)
    assert run_verb(["screen", *arguments, "--config", str(proxy), "--output", str(tmp_path / "out")]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "runs").exists()


def test_a_missing_dataset_is_said_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sources(tmp_path)
    (tmp_path / "two.bin").unlink()
    proxy = write_proxy(tmp_path)
    assert run_verb(["screen", "--lr", "1e-2", "--config", str(proxy), "--output", str(tmp_path / "out")]) == 2
    assert "two.bin does not exist" in capsys.readouterr().err


def test_the_edge_is_the_largest_rate_up_to_which_nothing_diverged() -> None:
    def row(rate: float, loss: float, status: str = "finished") -> dict[str, object]:
        score = 7.0 if status == "diverged" else loss
        return {
            "optimizer.learning_rate": rate, "status": status, "loss": loss, "score": score, "initial_loss": 7.0,
            "rise": 0.0,
        }  # fmt: skip

    assert edge([row(0.1, 4.2), row(0.01, 4.0), row(1.0, 7.0, "diverged"), row(10.0, 4.1)]) == 0.1
    with pytest.raises(ConfigError, match=r"rate 0\.01 already"):
        edge([row(0.01, 7.0, "diverged")])


def test_a_tail_is_the_highest_tenth_over_a_running_median() -> None:
    values = np.linspace(5.0, 1.0, 100)  # a trend is no tail
    plain = tail_of(values)
    values[[30, 60]] += 2.0
    assert plain < 0.25 and 0.4 < tail_of(values) < 0.6
    values[70] = np.inf
    assert tail_of(values) == pytest.approx(tail_of(np.where(np.isinf(values), 50.0, values)), abs=0.02)


def test_impact_is_the_rms_of_adams_step(tmp_path: Path) -> None:
    """Against the definition in float64, from the files of a checkpoint."""
    from megatron_stable.checkpoint.model import load_model
    from megatron_stable.checkpoint.reader import Reader
    from megatron_stable.parallel.parameters import place

    write_sources(tmp_path)
    grid = arms(ask(tmp_path / "screen", write_proxy(tmp_path), ["run.steps=60"], seeds=1), 1e-2)
    config = grid.cells[0].config
    ended = run(config, 1)
    assert ended is not None and ended.status == "finished", ended
    blend = open_dataset(config.data.train, SEQUENCE, 5)
    windows = drawn(blend.parts, 3)
    found = impact(Path(config.run.directory), 30, windows, lambda: None)
    assert found.rms.shape == found.loss.shape == (12,)

    _, model, _ = load_model(config.run.directory, 30)
    whole = newest_whole(config.run.directory, 30)
    reader = Reader(whole.directory, whole.manifest)
    model, beta, eps = model.double(), config.optimizer.betas[1], config.optimizer.eps
    tokens = torch.from_numpy(windows[3][1].read())[None]
    nll = torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0, :, :VOCAB].double(), tokens[0, 1:])
    nll.backward()
    total, count = 0.0, 0
    for weight in model.parameters():
        assert weight.grad is not None
        g = weight.grad / config.batch.global_size
        v = reader.full(place(weight).name, "exp_avg_sq", tuple(weight.shape)).double() / (1 - beta**30)
        total += float((g / ((beta * v + (1 - beta) * g**2).sqrt() + eps)).square().sum())
        count += weight.numel()
    assert found.loss[10] == pytest.approx(nll.item(), rel=1e-4)
    assert found.rms[10] == pytest.approx((total / count) ** 0.5, rel=1e-3)


def test_a_dry_run_says_what_would_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sources(tmp_path)
    command = ["screen", "--config", str(write_proxy(tmp_path)), "--output", str(tmp_path / "out"), "--dry-run"]
    assert run_verb(command) == 0
    said = capsys.readouterr().out
    assert "7 runs to find the largest stable learning rate" in said and "15 runs at a fifth of it" in said
    assert run_verb([*command, "--lr", "1e-2", "--seeds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0] == "source=control,seed=1234" and lines[-1] == "source=bad,seed=1235"
    assert not (tmp_path / "out" / "runs").exists()


def write_run(cell: Cell, status: str = "finished", steps: int = 60) -> None:
    """What a run of a sweep leaves of itself, with a little noise."""
    folder, draw = cell.directory, np.random.default_rng(crc32(cell.name.encode()))
    rows = ({"step": k, "loss": 3 + 0.01 * draw.normal(), "grad_norm": draw.uniform(1, 1.05)} for k in range(1, steps))
    folder.mkdir(parents=True, exist_ok=True)
    RunDirectory(folder).metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    write_ended(folder, Ended(status=status))  # type: ignore[arg-type]


def by_arm(folder: Path, seeds: int) -> list[list[Cell]]:
    write_sources(folder)
    cells = arms(ask(folder / "screen", write_proxy(folder), [], seeds=seeds), 1e-2).cells
    return [[cell for cell in cells if cell.labels["source"] == arm] for arm in (CONTROL, *NAMES)]


def test_a_diverged_control_or_short_runs_leave_tails_open(tmp_path: Path) -> None:
    runs = by_arm(tmp_path, 3)
    for cell in (each for arm in runs for each in arm):
        write_run(cell, "diverged")
    tails, _, why = _excesses(runs)
    assert why is not None and "3 of 3 runs of the plain blend diverged" in why and "lower --lr" in why
    assert all((tail.low, tail.high) == (-inf, inf) for tail in tails)
    for arm in runs[:-1]:
        for cell in arm:
            write_run(cell)
    tails, _, why = _excesses(runs)  # beside healthy controls, runs that diverge are evidence
    assert why is None and tails[-1].low > log(1.5) and all(tail.high < log(1.5) for tail in tails[:-1])
    write_run(runs[1][0], steps=20)
    tails, _, why = _excesses(runs)
    assert why is not None and "more run.steps" in why and tails[-1].low == -inf


def test_a_diverged_run_of_the_control_is_asked_only_before(tmp_path: Path) -> None:
    (cell, *_), *_ = by_arm(tmp_path, 1)
    write_run(cell)
    assert sound_until(cell) == inf
    losses = [4.0 - 0.02 * k for k in range(30)] + [4.1] * 30
    rows = [{"step": k, "loss": loss} for k, loss in enumerate(losses, 1)]
    RunDirectory(cell.directory).metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for status in ("diverged", "finished"):  # if it was too late for the run to end by it
        write_ended(cell.directory, Ended(status=status))  # type: ignore[arg-type]
        assert 20 <= sound_until(cell) <= 30
    wild, tame = Impact(np.full(8, np.nan), np.full(8, np.nan)), Impact(np.ones(8), np.ones(8))
    assert not wild.finite and tame.finite
    assert Impact(np.array([1.0] * 7 + [np.inf]), np.ones(8)).finite  # a window that blows up is what is looked for


def test_of_a_control_that_diverges_only_sound_states_are_asked(tmp_path: Path) -> None:
    """Trained for real, beside one that does well: it loses what it had learnt too late for the run to end by it."""
    write_sources(tmp_path)
    asked = ask(tmp_path / "screen", write_proxy(tmp_path), [], seeds=3)
    well, late, never = (cell for cell in arms(asked, 1e-2).cells if cell.labels["source"] == CONTROL)
    rising = {"optimizer.learning_rate": 3.0, "schedule.warmup_steps": 58}
    for cell, values in ((well, {}), (late, rising), (never, {"optimizer.learning_rate": 30.0})):
        ended = run(replaced(cell.config, values), 1)
        assert ended is not None
        write_ended(cell.directory, ended)
    assert read_ended(late.directory) == Ended(status="finished")
    until = sound_until(late)
    assert 15 < until < 60 and sound_until(well) == inf and sound_until(never) < 15
    windows = _drawn(asked, 8)
    told = _ask([late, well, never], windows, lambda total: None)
    steps = (15, 30, 45, 60)
    assert [step for step, _ in told] == sorted([*steps, *(step for step in steps if step < until)])
    whole = newest_whole(well.directory, 45)  # which then finds nothing finite
    rewritten(whole, {key: value.fill_(torch.nan) for key, value in whole_of(whole).items()})
    assert [step for step, _ in _ask([well], windows, lambda total: None)] == [15, 30, 60]
    with pytest.raises(ConfigError, match="the plain blend diverges at once; give a lower --lr"):
        _ask([never], windows, lambda total: None)

    for cell in (each for each in arms(asked, 1e-2).cells if each.labels["source"] != CONTROL):
        write_run(cell)
    found = judge(asked, arms(asked, 1e-2), 8).record
    assert found.control.diverged == 2 and found.states == len(told) - 1
    assert found.no_tails is not None and "2 of 3 runs of the plain blend diverged" in found.no_tails
    last = impact(well.directory, 60, windows, lambda: None).loss.reshape(len(NAMES), 8).mean(1)
    assert [source.gap for source in found.sources] == pytest.approx(last - last.mean())


def test_a_window_that_is_not_finite_leaves_the_others_their_gap(tmp_path: Path) -> None:
    write_sources(tmp_path)
    asked = ask(tmp_path / "screen", write_proxy(tmp_path), [])
    losses = np.array([1.0, 3.0, np.inf, 2.0, 4.0, 6.0, np.nan, np.nan])
    one, two, three, bad = _gaps([Impact(np.ones(8), losses)], np.array([2, 4, 6]), asked)
    assert two - one == pytest.approx(0.0) and three - one == pytest.approx(3.0)
    assert bad > 1e5


def test_a_small_source_takes_no_windows_from_others(tmp_path: Path) -> None:
    write_sources(tmp_path)
    with IndexedWriter(tmp_path / "few", np.uint16) as writer:
        writer.add(np.arange(3 * SEQUENCE + 1) % 64)
    parts = [TokenDataset(str(tmp_path / name), SEQUENCE, 1) for name in ("one", "few")]
    assert [len(row) for row in drawn(parts, 64)] == [64, 3]


def test_windows_that_training_leaves_out_are_not_asked_about(tmp_path: Path) -> None:
    for name, pages in (("half", (0, 1)), ("all", (0,))):
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            for i in range(40):
                writer.add(np.arange(4 * SEQUENCE) % 50 if pages[i % len(pages)] else np.full(4 * SEQUENCE, 7))
    half, every = (TokenDataset(str(tmp_path / name), SEQUENCE, 1) for name in ("half", "all"))
    (kept,) = drawn([half], 100, RepetitionFilter(16))
    assert 30 < len(kept) < 70 and all(len(set(each.read())) > 8 for each in kept)
    with pytest.raises(DataError, match="leaves out all 100 windows"):
        drawn([every], 100, RepetitionFilter(16))


def test_impact_keeps_documents_apart_as_training_does(tmp_path: Path) -> None:
    """What stands in another document of a window changes the loss of its rest by nothing."""
    write_sources(tmp_path)
    end = 0
    overrides = ["data.document_mask=true", f"data.end_of_document={end}"]
    for name in NAMES:  # documents that end with the token that stands between them
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            draw = np.random.default_rng(len(name))
            for _ in range(120):
                writer.add(np.append(draw.integers(1, 64, SEQUENCE + 7), end))
    asked = ask(tmp_path / "screen", write_proxy(tmp_path), overrides, seeds=1)
    config = arms(asked, 1e-2).cells[0].config
    ended = run(config, 1)
    assert ended is not None and ended.status == "finished", ended
    windows = drawn(open_dataset(config.data.train, SEQUENCE, 5).parts, 8)
    told = impact(Path(config.run.directory), 60, windows, lambda: None)
    trained = open_run(config.run.directory, 60)
    apart, across = [], []
    for location in (each for row in windows for each in row):
        rows = torch.from_numpy(location.read())[None]
        for losses, context in ((apart, trained.reading(rows[:, :-1])), (across, nullcontext())):
            with context, torch.no_grad():
                logits = trained.model(rows[:, :-1])[0, :, :VOCAB]
            losses.append(float(torch.nn.functional.cross_entropy(logits.double(), rows[0, 1:])))
    assert told.loss == pytest.approx(apart, rel=1e-4)
    assert np.abs(np.array(apart) - across).max() > 1e-3
