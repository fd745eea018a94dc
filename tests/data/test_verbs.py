"""The verbs `tokenizer` and `preprocess`, run through typer as the command line runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megatron_stable.commands.preprocess import preprocess
from megatron_stable.commands.tokenizer import tokenizer
from megatron_stable.data import IndexedDataset
from megatron_stable.errors import ConfigError, DataError


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(tokenizer)
    app.command()(preprocess)
    return app


def test_text_to_dataset(app: typer.Typer, corpus: Path, tmp_path: Path) -> None:
    model, prefix = tmp_path / "tok.model", tmp_path / "data" / "corpus"
    files = sorted(map(str, corpus.iterdir()))
    invoke = CliRunner().invoke
    result = invoke(app, ["tokenizer", "--input", *files, "--vocab-size", "400", "--output", str(model)])
    assert result.exit_code == 0, result.output
    assert f"{model}: 400 tokens" in result.stdout
    assert "in 30 documents" in result.stdout
    arguments = [
        "preprocess",
        "--input",
        files[0],
        "--input",
        files[1],
        "--tokenizer",
        str(model),
        "--output",
        str(prefix),
    ]
    result = invoke(app, [*arguments, "--workers", "1"])
    assert result.exit_code == 0, result.output
    dataset = IndexedDataset(prefix)
    assert f"2 documents, {dataset.tokens:,} tokens" in result.stdout
    assert f"{prefix}.bin, {prefix}.idx" in result.stdout


def test_json(app: typer.Typer, corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    invoke, prefix = CliRunner().invoke, tmp_path / "a"
    result = invoke(
        app, ["tokenizer", "--input", str(corpus), "--vocab-size", "300", "--output", f"{prefix}.m", "--json"]
    )
    assert json.loads(result.stdout)["documents"] == 30
    arguments = ["--input", str(corpus), "--tokenizer", str(tokenizer_path), "--output", str(prefix), "--workers", "1"]
    result = invoke(app, ["preprocess", *arguments, "--validation-fraction", "0.2", "--json"])
    summary = json.loads(result.stdout)
    assert summary["documents"] == 30
    assert summary["validation_documents"] == IndexedDataset(f"{prefix}_validation").documents > 0
    assert summary["tokens_per_byte"] == pytest.approx(summary["tokens"] / summary["bytes"])


def test_skipped_documents_are_reported(app: typer.Typer, corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    arguments = ["--input", str(corpus), str(tmp_path / "bad.txt"), "--tokenizer", str(tokenizer_path)]
    arguments = ["preprocess", *arguments, "--output", str(tmp_path / "a"), "--workers", "1"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, DataError)
    result = CliRunner().invoke(app, [*arguments, "--skip-undecodable"])
    assert result.exit_code == 0, result.output
    assert "1 undecodable" in result.stdout
    assert "bad.txt: not UTF-8 at byte 0" in result.stderr


def test_no_input(app: typer.Typer, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["tokenizer", "--output", str(tmp_path / "m")])
    assert isinstance(result.exception, ConfigError)
    result = CliRunner().invoke(app, ["preprocess", "--tokenizer", "t", "--output", str(tmp_path / "a")])
    assert isinstance(result.exception, ConfigError)


def test_shards_by_the_command_line(app: typer.Typer, corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    arguments = ["preprocess", "--input", str(corpus), "--tokenizer", str(tokenizer_path), "--workers", "1"]
    arguments += ["--output", str(tmp_path / "a")]
    result = CliRunner().invoke(app, [*arguments, "--shard", "1/2"])
    assert result.exit_code == 0, result.output
    assert "wrote 1 shards" in result.stdout
    assert sorted(path.name for path in tmp_path.glob("*.idx")) == ["a-00001-of-00002.idx"]
    result = CliRunner().invoke(app, [*arguments, "--shards", "2"])
    assert "wrote 1 shards, kept 1 that were complete" in result.stdout
    for wrong in ("2/2", "1", "a/b", "-1/2"):
        result = CliRunner().invoke(app, [*arguments, f"--shard={wrong}"])
        assert isinstance(result.exception, ConfigError), wrong
