"""The verb `plan`, as a user starts it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_stable.commands.app import run_verb
from megatron_stable.commands.plan import size

EXAMPLES = Path(__file__).parents[2] / "examples"


def planned(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert run_verb(["plan", *arguments]) == code
    return capsys.readouterr().out


def test_every_example_is_planned_without_its_data(capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted(EXAMPLES.glob("*.yaml")):
        first = re.match(r"# ranks: (\d+)", path.read_text())
        assert first is not None
        text = planned(capsys, "--config", str(path), "--ranks", first[1], "--vocab-size", "64000")
        assert "FITS: stage" in text and f"{int(first[1]):,} GPUs of h100" in text


def test_text_and_json_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--config", str(EXAMPLES / "10b.yaml"), "--nodes", "8", "--vocab-size", "64000", "--tokens", "300B")
    text, found = planned(capsys, *arguments), json.loads(planned(capsys, *arguments, "--json"))
    assert found["ranks"] == 64 and found["run"]["tokens"] == 300e9
    assert f"({found['parameters']['total']:,}; " in text
    fullest = found["stages"][found["fullest_stage"]]
    assert fullest["total"] == max(stage["total"] for stage in found["stages"])
    kinds = ("weights", "gradients", "optimizer", "buckets", "activations", "logits", "working", "reserve")
    assert fullest["total"] == pytest.approx(sum(fullest[kind] for kind in kinds))
    assert f"stage {found['fullest_stage']} needs {size(fullest['total'])} of" in text
    assert f"{found['speed']['tokens_per_second']:,.0f} tokens/s" in text
    assert f"limited by {found['speed']['limited_by']}" in text
    seconds = 300e9 / found["speed"]["tokens_per_second"] * (1 + found["checkpoints"]["overhead"])
    assert found["run"]["days"] == pytest.approx(seconds / 86400)
    assert found["run"]["cost"] == pytest.approx(seconds / 3600 * 64 * 3.0)
    for name, value in found["machine"]["efficiency"].items():
        assert f"{name} {value:g}" in text, "an assumption that is not printed"


def test_what_does_not_fit_says_where_how_much_and_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--config", str(EXAMPLES / "30b.yaml"), "--ranks", "32", "--vocab-size", "64000", "--machine", "a100")
    wrong = ("parallel.pipeline=1", "batch.micro_size=8")
    text = planned(capsys, *arguments, *wrong, code=2)
    found = re.search(r"DOES NOT FIT: stage 0 needs ([\d.]+) GB of 75.2 GB usable, ([\d.]+) GB too much", text)
    assert found is not None and float(found[1]) - 75.2 == pytest.approx(float(found[2]), abs=0.11)
    remedy = re.search(r"  fits with (\S.*): [\d.]+ GB, [\d,]+ tokens/s", text)
    assert remedy is not None
    assert "FITS: " in planned(capsys, *arguments, *wrong, *remedy[1].split())


def test_search_prints_a_table_and_why_others_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--config", str(EXAMPLES / "laptop.yaml"), "--ranks", "4", "--vocab-size", "64000", "--search")
    text, found = planned(capsys, *arguments), json.loads(planned(capsys, *arguments, "--json"))
    assert re.search(rf"that fit: {len(found['fitting'])}\.", text)
    assert "not TP 1 x PP 4: model.layers 3 cannot fill parallel.pipeline 4" in text
    best = found["fitting"][0]
    assert f"{best['tokens_per_second']:,.0f}" in text
    first = best["changes"]
    assert f"the first: parallel.tensor={first['parallel.tensor']} parallel.pipeline=" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("model.vocab_size=null",),
            "model.vocab_size is null, and plan does not read the tokenizer: give --vocab-size N",
        ),
        (("--vocab-size", "64000", "--tokens", "many"), "--tokens many is not a number of tokens: write one as 300B"),
        (("--vocab-size", "64000", "--tokens", "0"), "--tokens 0 is not a number of tokens"),
        (("--vocab-size", "64000", "--ranks", "8", "--nodes", "1"), "--ranks 8 and --nodes 1 are both set"),
        (("--vocab-size", "64000", "--machine", "tpu"), "--machine tpu is neither one of a100, h100, h200, b200 nor a"),
        (
            ("--vocab-size", "64000", "--ranks", "9"),
            "9 ranks cannot be split by parallel.tensor 4",
        ),
    ],
)
def test_wrong_usage_is_one_line(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    assert run_verb(["plan", "--config", str(EXAMPLES / "10b.yaml"), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
