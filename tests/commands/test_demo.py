"""`megatron-stable demo`: what it makes, what it says, and what a second call does; and the figure."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_stable.analysis.figure import draw, read_metrics
from megatron_stable.data.preprocess import preprocess
from megatron_stable.data.standard_library import write_standard_library
from megatron_stable.engine.faults import VARIABLE as FAULTS
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.records.directory import RunDirectory
from megatron_stable.records.ledger import read_lines
from megatron_stable.training.callbacks import Record
from megatron_stable.training.demo import PROMPT, RECIPES, Demo, attempts, marks, newest_step, outcome
from tests.commands.conftest import SmallDemo, small_demo

PNG = b"\x89PNG\r\n\x1a\n"


def command(small: SmallDemo, verb: str) -> list[str]:
    """The arguments of a verb's command as the demo printed it."""
    lines = [line.strip() for text in small.said for line in text.splitlines()]
    return next(shlex.split(line)[2:] for line in lines if line.startswith("$ ") and f" {verb} " in line)


def verb(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_stable", *arguments], capture_output=True, text=True, timeout=200
    )


def test_makes_a_trained_model_its_curves_and_a_sample(small: SmallDemo) -> None:
    assert small.code == 0
    assert newest_step(small.run) == 12
    losses = [record.get("validation_loss") for record in read_metrics(small.run / "metrics.jsonl")]
    measured = [loss for loss in losses if loss is not None]
    assert len(measured) == 3 and measured[-1] < measured[0]
    assert (small.directory / "training.png").read_bytes().startswith(PNG)
    said = "\n".join(small.said)
    assert f"| {PROMPT}" in said
    assert f"tensorboard --logdir {small.directory}" in said
    baseline = read_metrics(small.directory / "baseline" / "metrics.jsonl")
    for recipe, records in (("baseline", baseline), ("qk_norm_cap", read_metrics(small.run / "metrics.jsonl"))):
        end = sum(record["loss"] for record in records[-10:]) / 10  # and of the 2 before them
        assert f"{recipe}: training loss {end:.2f} at its lowest, {end:.2f} at the end" in said
        assert f"{recipe} trained through: 12 steps, no spike of the loss" in said
    logbook = small.directory / "baseline" / "logbook.md"
    assert str(logbook) in said and logbook.is_file()
    assert list((small.run / "tensorboard").glob("events.*"))
    manifest = next(small.run.glob("checkpoints/step_00000012/*.json")).read_text()
    assert json.loads(manifest)["layout"]["tensor"] == 2


def test_the_commands_that_it_prints_do_the_same(small: SmallDemo, tmp_path: Path) -> None:
    tokenizer = command(small, "tokenizer")
    tokenizer[-1] = str(tmp_path / "again.model")
    assert verb(tokenizer).returncode == 0
    assert (tmp_path / "again.model").read_bytes() == (small.directory / "tokenizer.model").read_bytes()

    data = command(small, "preprocess")
    data[data.index("--output") + 1] = str(tmp_path / "again")
    assert verb([*data, "--workers", "2"]).returncode == 0
    for name in ("train.bin", "train.idx", "train_validation.bin", "train_validation.idx"):
        again = tmp_path / name.replace("train", "again")
        assert again.read_bytes() == (small.directory / name).read_bytes()

    sample = verb(command(small, "generate"))
    text = next(text for text in small.said if text.startswith("   | "))
    assert sample.stdout == "\n".join(line.removeprefix("   | ") for line in text.split("\n")) + "\n"


def test_a_second_call_uses_what_is_there(small: SmallDemo) -> None:
    kept = [small.directory / name for name in ("text.jsonl", "tokenizer.model", "train.bin", "qk_norm_cap.yaml")]
    before = [path.stat().st_mtime_ns for path in kept]
    said: list[str] = []
    assert small_demo(small.directory, said)() == 0
    assert sum("is there already" in text for text in said) == 5
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert next(t for t in said if t.startswith("   | ")) == next(t for t in small.said if t.startswith("   | "))


def copied(small: SmallDemo, tmp_path: Path, said: list[str]) -> Demo:
    """The small demo, moved to a directory where a test may change it."""
    directory = tmp_path / "demo"
    shutil.copytree(small.directory, directory)
    for recipe in RECIPES:
        config = directory / f"{recipe}.yaml"
        config.write_text(config.read_text().replace(str(small.directory), str(directory)))
    return replace(small_demo(directory, said))


def test_a_run_that_gives_up_is_what_the_demo_shows(
    small: SmallDemo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with training that is not finished, too."""
    said: list[str] = []
    demo = copied(small, tmp_path, said)
    config = demo.directory / "baseline.yaml"
    text = config.read_text()
    for key, before, now in (("steps", 12, 20), ("max_consecutive_drops", 10, 2), ("max_rollbacks", 2, 1)):
        assert text.count(f"  {key}: {before}\n") == 1
        text = text.replace(f"  {key}: {before}\n", f"  {key}: {now}\n")
    config.write_text(text)
    monkeypatch.setenv(FAULTS, json.dumps([{"kind": "inf_loss", "data_steps": [15, 500]}]))
    assert demo() == 0
    run = demo.directory / "baseline"
    assert "baseline diverged, and after 1 rollback with other data the guard gave up: exit code 3" in "\n".join(said)
    assert "Done in" in said[-1]
    parts = attempts(read_lines(run / "metrics.jsonl"))
    assert [record["step"] for record in parts[0]] == list(range(1, 17))
    assert [record["step"] for record in parts[1]] == [1, 2], "back to the checkpoint of step 0"
    assert len(parts) == 2
    events = RunDirectory(run).ledger.read()
    assert marks(events) == [
        (16, 16, "rollback"), (15, 15, "onset of a rise"), (2, 2, "gave up"), (1, 1, "onset of a rise"),
    ]  # fmt: skip
    drawn = (demo.directory / "training.png").read_bytes()
    assert drawn.startswith(PNG) and drawn != (small.directory / "training.png").read_bytes()

    said.clear()
    assert demo() == 0  # nothing is trained again
    assert "the guard gave up" in "\n".join(said)
    assert RunDirectory(run).ledger.read() == events


def test_the_exit_code_of_failed_training_is_passed_on(
    small: SmallDemo, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    demo = copied(small, tmp_path, [])
    shutil.rmtree(demo.directory / "baseline")
    config = demo.directory / "baseline.yaml"
    config.write_text(config.read_text().replace("demo/train_validation", "demo/nowhere"))
    assert demo() == 5
    captured = capfd.readouterr().err
    assert "nowhere.idx does not exist" in captured and "Traceback" not in captured
    assert not (demo.directory / "baseline" / "checkpoints" / "step_00000012").exists()


def test_data_of_another_tokenizer_are_made_anew(small: SmallDemo, tmp_path: Path) -> None:
    said: list[str] = []
    demo = copied(small, tmp_path, said)
    assert demo._tokens_there() > 0
    (demo.directory / "train.idx").write_bytes(b"broken")
    assert demo._tokens_there() == 0
    preprocess([demo.directory / "text.jsonl"], demo.directory / "tokenizer.model", demo.directory / "train")
    (demo.directory / "tokenizer.model").unlink()
    replace(demo, vocab_size=390)._train_tokenizer()
    assert demo._tokens_there() == 0


def test_fresh_removes_what_the_demo_made_and_nothing_else(small: SmallDemo, tmp_path: Path) -> None:
    demo = copied(small, tmp_path, [])
    (demo.directory / "notes.txt").write_text("mine")
    demo._remove()
    assert [path.name for path in demo.directory.iterdir()] == ["notes.txt"]
    (demo.directory / "baseline").mkdir()  # of something else: there is no text of a demo beside it
    (demo.directory / "baseline.yaml").write_text("mine")
    demo._remove()
    assert sorted(path.name for path in demo.directory.iterdir()) == ["baseline", "baseline.yaml", "notes.txt"]


def test_ranks_that_cannot_share_the_batch(small: SmallDemo, tmp_path: Path) -> None:
    demo = replace(copied(small, tmp_path, []), ranks=3)
    (demo.directory / "baseline.yaml").unlink()
    with pytest.raises(ConfigError, match=r"batch\.global_size 8 is not divisible"):
        demo()
    assert not (demo.directory / "baseline.yaml").exists()


@pytest.mark.parametrize(("ranks", "tensor", "micro"), [(1, 1, 8), (2, 2, 8), (4, 2, 4), (8, 2, 2)])
def test_any_number_of_ranks_that_divides_the_batch(tmp_path: Path, ranks: int, tensor: int, micro: int) -> None:
    config = small_demo(tmp_path, [], ranks)._configure(RECIPES[0])
    assert (config.parallel.tensor, config.batch.micro_size) == (tensor, micro)


def test_both_runs_are_the_same_but_for_the_recipe(tmp_path: Path) -> None:
    runs = [Demo(tmp_path)._configure(recipe) for recipe in RECIPES]
    without = [config.model_dump(exclude={"run": {"directory"}, "model": True}) for config in runs]
    assert without[0] == without[1]
    assert [config.model.recipe for config in runs] == ["baseline", "qk_norm_cap"]
    sizes = [(config.model.layers, config.model.hidden, config.model.heads) for config in runs]
    assert sizes[0] == sizes[1] == (4, 128, 4)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], "x trained through: 9 steps, no spike of the loss"),
        ([{"event": "spike", "series": "grad_norm"}], "no spike of the loss"),
        ([{"event": "spike", "series": "loss"}], "1 spike of the loss, which fell back"),
        ([{"event": "shift", "series": "loss"}], "x reached step 9; its loss moved"),
        ([{"event": "divergence", "series": "loss"}], "x diverged, but came back by itself"),
        ([{"event": "rollback", "by": "guard"}] * 2, "x diverged; after 2 rollbacks with other data it held on"),
        ([{"event": "gave_up", "by": "guard"}, {"event": "stop"}], "with nothing tried the guard gave up"),
        ([{"event": "gave_up", "by": "guard"}, {"event": "undo", "by": "user"}], "x trained through"),
    ],
)
def test_the_end_of_a_run_is_told_by_its_ledger(tmp_path: Path, events: list[Record], expected: str) -> None:
    for event in events:
        RunDirectory(tmp_path).ledger.write(step=5, **event)
    assert expected in outcome("x", tmp_path, 9)


def test_a_rise_that_the_guard_did_not_find_is_told(tmp_path: Path) -> None:
    losses = [*[4.0] * 10, *[3.0] * 10, *[3.5] * 10]
    lines = [json.dumps({"step": n, "loss": loss}) for n, loss in enumerate(losses, 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    rose = "reached step 30 with a loss that has risen from 3.00 to 3.50"
    assert outcome("x", tmp_path, 30) == f"x was never found to diverge, yet {rose}"
    RunDirectory(tmp_path).ledger.write("rollback", 25, by="guard")
    assert outcome("x", tmp_path, 30) == f"x diverged; after 1 rollback with other data it {rose}"


def test_text_of_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "lib"
    files = {
        "b.py": b"b = 1\n",
        "a.py": "a = 'é'\n".encode(),
        "empty.py": b"",
        "package/__init__.py": b"c = 3\n",
        "latin.py": b"# -*- coding: latin-1 -*-\n'\xe9'\n",
        "package/tests/x.py": b"no",
        "site-packages/y.py": b"no",
        "test/z.py": b"no",
        "notes.txt": b"no",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    assert write_standard_library(tmp_path / "text.jsonl") == (3, 9 + 6 + 6)
    lines = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == ["a.py", "b.py", "package/__init__.py"]
    assert lines[0]["text"] == "a = 'é'\n"
    assert write_standard_library(tmp_path / "text.jsonl", most_bytes=16) == (2, 15)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "nothing")})
    with pytest.raises(DataError, match="carries no source"):
        write_standard_library(tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def test_of_several_records_of_a_step_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 9}\n{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 2}]
    assert read_metrics(tmp_path / "nothing") == []


def test_figure_of_one_and_of_several_runs(tmp_path: Path) -> None:
    records = [{"step": n, "loss": 8 / n, "grad_norm": 1 / n} for n in range(1, 30)]
    records[4]["loss"] = None  # was not finite
    records[9]["validation_loss"] = 1.0
    draw({"one": records}, tmp_path / "one.png", "title")
    draw({"one": records, "two": records[:7]}, tmp_path / "two.png")
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert one.startswith(PNG) and two.startswith(PNG) and one != two
    with pytest.raises(DataError, match="no step yet"):
        draw({"none": []}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
