"""`megatron-stable surgery`, on runs that one rank and TP 2 x PP 2 trained; what is refused, with what code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_stable.checkpoint.catalog import newest_whole
from megatron_stable.commands.app import run_verb
from megatron_stable.config.load import load_config
from megatron_stable.records.directory import RunDirectory
from megatron_stable.stability.events import Blend, Surgery
from tests.harness.ranks import Ranks
from tests.surgery.runs import whole_of
from tests.training.runs import curve, layout, settings, train, write_data

MODEL = {"recipe": "baseline"}


def verb(*arguments: object) -> int:
    """Exit code of `surgery`."""
    return run_verb(["surgery", *map(str, arguments)])


def trained(ranks: Ranks, folder: Path, world: int, **sections: Any) -> Path:
    """A run of ten steps."""
    write_data(folder / "data")
    values = settings(folder, **sections)
    values["model"] = {**values["model"], **MODEL}
    assert ranks.run(world, train, values) == [0] * world
    return folder / "run"


def goes_on(ranks: Ranks, path: Path, steps: int, world: int, **sections: dict[str, Any]) -> None:
    """Train a run from its own configuration."""
    values = load_config(path / "config.yaml").model_dump(mode="json")
    values["run"]["steps"] = steps
    for section, fields in sections.items():
        values[section] |= fields
    assert ranks.run(world, train, values) == [0] * world


def test_a_run_of_tp_2_and_pp_2_is_operated_on_and_trains_on(ranks: Ranks, tmp_path: Path, capsys: Any) -> None:
    run = trained(ranks, tmp_path, 4, parallel=layout(tensor=2, pipeline=2))
    plain, new = tmp_path / "plain", tmp_path / "new"
    words = ["model.recipe=qkv_norm", "model.layers=6", "model.vocab_size=90", "--sequences", "8"]
    assert verb(run, *words, "--output", new, "--rewarm", "3") == 0
    said = capsys.readouterr().out
    assert "model.layers: 4 -> 6" in said
    assert "blocks.1" in said
    assert "against blocks.0" in said
    assert run_verb(["convert", str(run), "--output", str(plain)]) == 0
    assert verb(plain, *words, "--output", tmp_path / "same") == 0
    (first, second) = (whole_of(newest_whole(where)) for where in (new, tmp_path / "same"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    config = load_config(new / "config.yaml")
    assert config.schedule.rewarm == (10, 3)
    assert config.run.directory == str(new)
    (event,) = [each for each in RunDirectory(new).ledger.read() if isinstance(each, Surgery)]
    assert (event.by, event.rollback_to, event.changes["model.layers"]) == ("user", 10, (4, 6))
    report = json.loads((new / "surgery.json").read_text())
    assert report["before"] == pytest.approx(event.before)
    assert f"loss {event.before:.4g}" in event.words()

    shutil.copytree(new, tmp_path / "alone")
    goes_on(ranks, new, 14, 4)
    goes_on(ranks, tmp_path / "alone", 14, 1, parallel=layout(), run={"directory": str(tmp_path / "alone")})
    there, here = curve(new), curve(tmp_path / "alone")
    assert there.keys() == here.keys() == {11, 12, 13, 14}
    for step, (loss, norm) in there.items():
        assert here[step] == (pytest.approx(loss, rel=1e-4), pytest.approx(norm, rel=1e-3))
    assert there[11][0] == pytest.approx(event.after, abs=0.3)


def test_untouched_it_goes_on_as_if_nothing_had_been(ranks: Ranks, tmp_path: Path) -> None:
    """LayerScale's ones change neither loss nor gradients; only the learning rate rises from 0 again."""
    run = trained(ranks, tmp_path, 1)
    assert verb(run, "model.layer_scale=0.1", "--output", tmp_path / "new", "--rewarm", 2, "--sequences", 4) == 0
    goes_on(ranks, run, 12, 1)
    goes_on(ranks, tmp_path / "new", 12, 1)
    before, after = curve(run), curve(tmp_path / "new")
    assert after[11][0] == pytest.approx(before[11][0], rel=1e-6)
    rates = [
        json.loads(line)["learning_rate"] for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    ]
    whole = [json.loads(line)["learning_rate"] for line in (run / "metrics.jsonl").read_text().splitlines()][-2:]
    assert rates == [pytest.approx(whole[0] / 2), pytest.approx(whole[1])]


@pytest.fixture(scope="module")
def run(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, to be left as it is."""
    return trained(ranks, tmp_path_factory.mktemp("surgery"), 1, checkpoint={"every": 5})


REFUSED = {
    "hidden": (["model.hidden=64"], "model.hidden"),
    "sigma_reparam": (["model.sigma_reparam=true"], "model.sigma_reparam"),
    "fewer layers": (["model.layers=2"], "model.layers"),
    "smaller vocabulary": (["model.vocab_size=50"], "model.vocab_size"),
    "deepnorm": (["model.recipe=deepnorm"], "model.deepnorm"),
    "parametrization": (["optimizer.parametrization=mu_simple"], "optimizer.parametrization"),
    "cap below the logits": (["model.attention_cap=0.01"], "model.attention_cap=1"),
    "final cap below the logits": (["model.final_logit_cap=0.01"], "model.final_logit_cap="),
    "unknown key": (["model.layer=2"], "model.layers"),
    "nothing": (["model.layers=4"], "is that already"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_operated_is_refused_by_name(run: Path, tmp_path: Path, capsys: Any, name: str) -> None:
    words, said = REFUSED[name]
    assert verb(run, *words, "--output", tmp_path / "new") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_named_by_its_directory_or_its_step(run: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["model.qk_norm=true", "--sequences", "4", "--json"]
    assert verb(run / "checkpoints" / "step_00000005", *words, "--output", tmp_path / "a") == 0
    first = json.loads(capsys.readouterr().out)
    assert verb(run, *words, "--step", "5", "--output", tmp_path / "b") == 0
    second = json.loads(capsys.readouterr().out)
    assert first["step"] == second["step"] == newest_whole(tmp_path / "a").step == 5
    assert first["layers"] == second["layers"]
    assert verb(run / "checkpoints" / "step_00000005", *words, "--step", "10", "--output", tmp_path / "c") == 2
    assert verb(run, *words, "--output", tmp_path / "a") == 2
    assert "not empty" in capsys.readouterr().err


def test_bad_input_has_its_codes(run: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["model.qk_norm=true", "--output", tmp_path / "new"]
    assert verb(tmp_path / "nowhere", *words) == 5
    assert verb(run, *words, "--step", "7") == 5
    assert verb(run, *words, "--data", tmp_path / "nothing") == 5
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    path = broken / "checkpoints" / "step_00000010" / "rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 255
    path.write_bytes(data)
    assert verb(broken, *words) == 5
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_longer_sequence_goes_on_in_the_data(run: Path, ranks: Ranks, tmp_path: Path) -> None:
    words = ["model.sequence_length=32", "model.rope_theta=50000", "--output", tmp_path / "new", "--sequences", 4]
    assert verb(run, *words) == 0
    goes_on(ranks, tmp_path / "new", 12, 1)
    records = [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["samples"] == [[40, 48]], "80 samples of 16 tokens are 40 of 32"
    assert records[0]["tokens"] == 10 * 8 * 16 + 8 * 32


def test_a_longer_sequence_with_stages_of_its_own_samples(run: Path, ranks: Ranks, tmp_path: Path) -> None:
    """80 samples of 16 tokens are 40 of 32: the stage at 48 begins with the second step."""
    other, source = write_data(tmp_path / "other", seed=1), load_config(run / "config.yaml").data.train
    stages = json.dumps([[0, {source: 1}], [48, {other: 1}]])
    words = ["model.sequence_length=32", f"data.stages={stages}", "data.train=null"]
    words += ["--data", source, "--sequences", "4"]
    assert verb(run, *words, "--output", tmp_path / "new") == 0
    goes_on(ranks, tmp_path / "new", 12, 1)
    (entered,) = [each for each in RunDirectory(tmp_path / "new").ledger.read() if isinstance(each, Blend)]
    assert (entered.step, entered.sample) == (12, 48)
    assert list(entered.shares) == [other]
    assert verb(tmp_path / "new", "model.sequence_length=16", "--output", tmp_path / "back") == 2
