"""`megatron-stable recommend`: what it prints, writes, and refuses; and that docs/recommend.md shows what it prints."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_stable.commands.app import run_verb
from megatron_stable.config.load import load_config
from tests.study.sweeps import sweep, write

PAGE = (Path(__file__).parents[2] / "docs" / "recommend.md").read_text(encoding="utf-8")


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = run_verb(["recommend", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def test_the_page_shows_what_it_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    command, shown = re.findall(r"```console\n\$ megatron-stable recommend ([^\n]*)\n(.*?)```", PAGE, re.S)[0]
    lines = [line.rstrip() for line in printed(capsys, *shlex.split(command)).splitlines()]
    assert "\n".join(lines) == shown.rstrip()


def test_writes_a_file_that_loads_and_is_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("--size", "830m", "--tokens", "200B", "--batch-tokens", "2e6")
    said = printed(capsys, *arguments, "--output", "config.yaml", "--proxy", "proxies.yaml")
    facts = json.loads(printed(capsys, *arguments, "--json"))
    config, text = load_config("config.yaml"), (tmp_path / "config.yaml").read_text()
    assert config.model_dump(mode="json") == facts["config"] and config.batch.global_size == 512
    for value in facts["values"]:
        assert config.by_key()[value["key"]] == value["value"]
        assert f"# Recommended ({value['sure']}): {value['evidence'][:40]}" in text
    assert "megatron-stable pretrain --config config.yaml" in said and config.data.train == "data/train"
    assert "Wrote proxies.yaml: 112 small runs, with " in said and "--sweep sweeps/proxies" in said
    assert run_verb(["plan", "--config", "config.yaml", "--tokens", "200B"]) == 0
    assert "FITS: stage 0" in capsys.readouterr().out
    assert run_verb(["recommend", *arguments, "--output", "config.yaml"]) == 2
    assert "config.yaml already exists" in capsys.readouterr().err


def test_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    directory = write(tmp_path / "sweep", *sweep(seeds=1))
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {size: 302m, vocab_size: 32000, activation: swiglu}\n")
    said = printed(capsys, "--config", mine, "--tokens", "200B", "--sweep", directory)
    assert "evidence: your sweep, 70 runs: " in said and "Note: they have 1,000 steps" in said
    assert "the loss is lowest at 0.00" in said and "A sweep of small models" not in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tokens", "1B"), "name one model: --size, one of tiny"),
        (("--tokens", "1B", "--size", "1b", "--config", "config.yaml"), "name one model"),
        (("--tokens", "1B", "--size", "86m"), '"86m" is not allowed; it takes one of tiny'),
        (("--tokens", "many", "--size", "1b"), "--tokens many is not a number of tokens: write one as 300B"),
        (("--tokens", "0", "--size", "1b"), "--tokens 0 is not a number"),
        (("--tokens", "1e999", "--size", "1b"), "--tokens 1e999 is not a number"),
        (("--tokens", "1M", "--size", "1b"), "give 104,857,600 or more"),
        (("--tokens", "1B", "--size", "1b", "--batch-tokens", "0"), "--batch-tokens 0 is not a number"),
        (("--tokens", "1B", "--size", "1b", "--proxy", "proxies.yaml"), "give --output FILE, too"),
        (("--tokens", "9B", "--size", "10m", "--output", "a.yaml", "--proxy", "b.yaml"), "8 heads is too small"),
        (("--tokens", "1B", "--config", "nothing.yaml"), "nothing.yaml: no such file"),
        (("--tokens", "1B", "--size", "1b", "--sweep", "nothing"), "nothing is no table of a sweep"),
    ],
)
def test_what_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_verb(["recommend", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and list(tmp_path.iterdir()) == []
