"""`megatron-stable init`: a commented configuration that loads."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_stable.config.load import load_config


def init(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_stable", "init", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120)


def test_writes_a_commented_file_and_says_what_is_next(tmp_path):
    result = init(tmp_path, "--size", "85m", "--recipe", "qk_norm_cap", "--output", "new/config.yaml", "run.steps=500")
    assert result.returncode == 0, result.stderr
    path = tmp_path / "new" / "config.yaml"
    config = load_config(path)
    assert (config.model.size, config.model.recipe, config.model.hidden) == ("85m", "qk_norm_cap", 768)
    assert config.run.steps == 500
    assert "# Peak learning rate." in path.read_text()
    assert "megatron-stable pretrain --config new/config.yaml" in result.stdout
    assert f"--output {config.data.tokenizer}" in result.stdout and f"--output {config.data.train}" in result.stdout
    assert "--validation-fraction" in result.stdout and config.data.validation == f"{config.data.train}_validation"
    assert [p.name for p in path.parent.iterdir()] == ["config.yaml"]


PRE = "  megatron-stable preprocess --input"
WITH = "--tokenizer data/tokenizer.model --output"


@pytest.mark.parametrize(
    ("given", "commands"),
    [
        ([], [f"{PRE} TEXT {WITH} data/train --validation-fraction 0.01"]),
        (
            ["data.train=[data/web-*,data/code,data/code]", "data.validation=data/code_validation"],
            [
                f"{PRE} TEXT {WITH} data/code --validation-fraction 0.01",
                f"{PRE} TEXT {WITH} PREFIX  # each that data/web-* names",
            ],
        ),
        (
            ["data.train=sources.yaml"],
            [
                f"{PRE} TEXT {WITH} PREFIX  # each that sources.yaml names",
                f"{PRE} HELD_OUT_TEXT {WITH} data/train_validation",
            ],
        ),
        (
            ["data.train={data/web: 0.7, data/code: 0.3}", "data.validation=null"],
            [f"{PRE} TEXT {WITH} data/web", f"{PRE} TEXT {WITH} data/code"],
        ),
    ],
)
def test_what_is_next_makes_each_dataset_that_the_configuration_names(tmp_path, given, commands):
    said = init(tmp_path, *given)
    assert said.returncode == 0, said.stderr
    assert [line for line in said.stdout.splitlines() if line.startswith(PRE)] == commands


def test_a_file_that_is_there_is_replaced_only_by_force(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("mine")
    refused = init(tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == "error: config.yaml already exists: choose another --output, or --force to overwrite it\n"
    assert path.read_text() == "mine"
    assert init(tmp_path, "--force").returncode == 0
    assert load_config(path).model.size == "tiny"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "86m"], ["model.size", '"86m"', "85m"]),
        (["--recipe", "qk-norm"], ["model.recipe", '"qk-norm"', "qk_norm_cap"]),
        (["model.hidden=250", "lr=1"], ["2 problems", "model.heads 4", "optimizer.learning_rate"]),
    ],
)
def test_bad_values_write_nothing(tmp_path, arguments, words):
    result = init(tmp_path, *arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    result = init(tmp_path, "--output", "file/config.yaml")
    assert result.returncode == 5
    assert result.stderr.startswith("error: cannot write file/config.yaml: ")
    assert "Traceback" not in result.stderr
