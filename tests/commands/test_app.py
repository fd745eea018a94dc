"""The program as a user starts it: help, version, exit codes, and never a traceback for what they can mend."""

import subprocess
import sys

import pytest
import typer

import megatron_stable.commands.app as application
from megatron_stable.errors import ConfigError, DataError, DivergenceError, LossScaleError, MegatronStableError


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_stable", *arguments], capture_output=True, text=True, timeout=120
    )


def raising(monkeypatch, error: BaseException) -> None:
    """Let the program have one verb, which raises `error`."""
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def verb() -> None:
        raise error

    monkeypatch.setattr(application, "app", app)
    monkeypatch.setattr(sys, "argv", ["megatron-stable"])


def test_help_names_every_verb():
    result = run("--help")
    assert result.returncode == 0
    for verb in ["demo", "init", "tokenizer", "preprocess", "pretrain", "evaluate", "generate"]:
        assert f" {verb} " in result.stdout
    assert "5 data or checkpoint unusable" in " ".join(result.stdout.split())


@pytest.mark.parametrize("verb", application.VERBS)
def test_help_of_each_verb_has_an_example(verb):
    result = run(verb, "--help")
    assert result.returncode == 0
    assert f"megatron-stable {verb}" in result.stdout.split("Example")[1]


def test_help_starts_without_the_heavy_libraries():
    heavy = ["torch", "deepspeed", "numpy", "sentencepiece", "matplotlib", "pyarrow"]
    code = f"import sys, megatron_stable.commands.app; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "[]"


def test_version():
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, "megatron-stable 0.1.0\n")


@pytest.mark.parametrize("arguments", [["frobnicate"], ["init", "--sise", "tiny"], ["--nonsense"], []])
def test_bad_usage_exits_2_without_traceback(arguments):
    result = run(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stdout + result.stderr
    assert "Usage: " in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MegatronStableError("what"), 1),
        (ConfigError("what"), 2),
        (DivergenceError("what"), 3),
        (LossScaleError("what"), 4),
        (DataError("what"), 5),
    ],
)
def test_each_error_has_its_exit_code(monkeypatch, capsys, error, code):
    raising(monkeypatch, error)
    with pytest.raises(SystemExit) as exit:
        application.main()
    captured = capsys.readouterr()
    assert exit.value.code == code
    assert (captured.out, captured.err) == ("", "error: what\n")


def test_interrupt_exits_130_quietly(monkeypatch, capsys):
    raising(monkeypatch, KeyboardInterrupt())
    with pytest.raises(SystemExit) as exit:
        application.main()
    assert exit.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


def test_unexpected_error_keeps_its_traceback(monkeypatch):
    raising(monkeypatch, ZeroDivisionError("surprise"))
    with pytest.raises(ZeroDivisionError, match="surprise"):
        application.main()
