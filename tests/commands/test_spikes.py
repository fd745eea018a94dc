"""`megatron-stable spikes` on runs of our own and of others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from tests.commands.conftest import SmallDemo

ONSET, STEPS = 400, 600


def verb(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_stable", "spikes", *map(str, arguments)]
    environment = {"COLUMNS": "160", "PATH": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def curves(spikes: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """A loss with a spike of 8 steps, and a gradient norm that leads it by 3."""
    random, steps = np.random.default_rng(1), np.arange(1, STEPS + 1)
    loss = 2 + 5 * steps**-0.4 + 0.02 * random.standard_normal(STEPS)
    norm = 0.5 * np.exp(0.1 * random.standard_normal(STEPS))
    if spikes:
        loss[ONSET - 1 : ONSET + 7] += [1, 2, 3, 4, 3, 2, 1, 0.5]
        norm[ONSET - 4 : ONSET + 4] *= 30
    return loss, norm


def other_trainer(directory: Path, loss: np.ndarray, norm: np.ndarray | None) -> Path:
    """As Megatron-LM names them."""
    writer = SummaryWriter(str(directory))
    for i, value in enumerate(loss):
        writer.add_scalar("lm loss", value, i + 1)
        writer.add_scalar("lm loss vs samples", value, 512 * (i + 1))
        if norm is not None:
            writer.add_scalar("grad-norm", norm[i], i + 1)
    writer.close()
    return directory


def own_run(directory: Path, loss: np.ndarray, norm: np.ndarray) -> Path:
    """With data steps 200 to 299 skipped."""
    directory.mkdir()
    with (directory / "metrics.jsonl").open("w") as file:
        for i, (a, b) in enumerate(zip(loss.tolist(), norm.tolist(), strict=True)):
            step = i + 1
            record = {"step": step, "loss": a, "grad_norm": b, "data_step": step + 100 * (step >= 200)}
            file.write(json.dumps(record) + "\n")
    return directory


@pytest.mark.parametrize("figure", [False, True])
def test_of_another_trainer(tmp_path: Path, figure: bool) -> None:
    directory = other_trainer(tmp_path / "logs", *curves())
    drawn = tmp_path / "drawn.png"
    done = verb(directory, "--json", *(["--figure", drawn] if figure else []))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["series"], facts["gradient_norm"]) == ("lm loss", "grad-norm")
    assert facts["points"] == STEPS and facts["steps"] == [1, STEPS]
    (spike,) = facts["spikes"]
    assert spike["kind"] == "spike"
    assert spike["onset"] == ONSET
    assert spike["peak_step"] == ONSET + 3 and spike["peak"] == pytest.approx(6.4, abs=0.2)
    assert spike["duration"] == 8
    assert spike["gradient_norm_lead"] == 3
    assert spike["data_steps"] is None
    assert drawn.exists() == figure
    assert not figure or drawn.read_bytes().startswith(b"\x89PNG")


def test_of_our_own(tmp_path: Path) -> None:
    run = own_run(tmp_path / "run", *curves())
    (spike,) = json.loads(verb(run, "--json").stdout)["spikes"]
    assert spike["data_steps"] == [500, 507]
    table = verb(run)
    assert table.returncode == 0 and table.stderr == ""
    assert "1 event in 600 points of 'loss', steps 1 to 600" in table.stdout
    for word in ("400", "spike", "403", "led by 3", "500-507"):
        assert word in table.stdout


def test_of_our_own_as_its_guard_would(tmp_path: Path) -> None:
    run = own_run(tmp_path / "run", *curves())
    for patience, kind in ((3, "divergence"), (16, "spike")):  # it goes on rising for 4 steps, and falls for 4
        (run / "config.yaml").write_text(f"guard: {{patience: {patience}}}")
        assert [spike["kind"] for spike in json.loads(verb(run, "--json").stdout)["spikes"]] == [kind]


def test_none_is_no_error(tmp_path: Path) -> None:
    done = verb(own_run(tmp_path / "run", *curves(spikes=False)))
    assert done.returncode == 0
    assert done.stdout == "no spikes in 600 points of 'loss', steps 1 to 600\n"


def test_a_series_of_ones_choice(tmp_path: Path) -> None:
    run = own_run(tmp_path / "run", *curves())
    facts = json.loads(verb(run, "--tag", "grad_norm", "--json").stdout)
    assert facts["spikes"][0]["onset"] == ONSET - 3
    assert facts["gradient_norm"] is None


def test_values_that_are_not_finite_make_strict_json(tmp_path: Path) -> None:
    loss, _ = curves(spikes=False)
    loss[ONSET - 1 : ONSET + 2] = np.nan
    done = verb(other_trainer(tmp_path / "logs", loss, None), "--json")

    def refuse(text: str) -> None:
        raise AssertionError(text)

    facts = json.loads(done.stdout, parse_constant=refuse)
    (spike,) = facts["spikes"]
    assert (spike["onset"], spike["peak"], spike["score"], spike["gradient_norm_lead"]) == (ONSET, None, None, None)
    assert any("--grad-norm-tag" in note for note in facts["notes"])


def test_bad_input_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1").write_bytes(b"something else that is long enough")
    foreign = verb(tmp_path)
    assert foreign.returncode == 5
    assert "is no event file of TensorBoard" in foreign.stderr
    run = own_run(tmp_path / "run", *curves())
    for arguments in (("--tag", "los"), ("--grad-norm-tag", "gradnorm")):
        wrong = verb(run, *arguments, "--figure", tmp_path / "figure.png")
        assert wrong.returncode == 2
        assert "did you mean" in wrong.stderr
    assert not (tmp_path / "figure.png").exists()
    for each in (foreign, wrong):
        assert "Traceback" not in each.stderr and each.stdout == ""


def test_a_run_and_its_own_tensorboard_say_the_same(small: SmallDemo) -> None:
    ours, boards = (json.loads(verb(path, "--json").stdout) for path in (small.run, small.run / "tensorboard"))
    assert (ours["series"], boards["series"]) == ("loss", "train/loss")
    assert ours["points"] == boards["points"] == 12
    assert ours["spikes"] == boards["spikes"] == []
