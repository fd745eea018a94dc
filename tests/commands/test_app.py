"""The program as a user starts it: help, version, exit codes, and never a traceback for what they can mend."""

import importlib
import inspect
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import megatron_stable.commands.app as application
from megatron_stable.commands.verbs import VERBS, unbroken
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


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command line that succeeds prints, run in this process."""
    assert application.run_verb(arguments) == 0
    return capsys.readouterr().out


def test_help_names_every_verb_with_the_first_paragraph_of_its_docstring(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    rows = re.findall(r"^│ (\w+) +(.*?) *│$", printed(capsys, "--help"), re.M)
    assert dict(rows) == VERBS
    for verb, line in VERBS.items():
        module = importlib.import_module(f"megatron_stable.commands.{verb}")
        assert unbroken(inspect.getdoc(getattr(module, verb))).split("\n\n")[0] == line, verb


def test_every_module_of_a_verb_is_in_the_list():
    modules = {path.stem for path in Path(application.__file__).parent.glob("*.py")}
    assert modules - {"__init__", "again", "app", "verbs"} == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example_and_neither_types_nor_ranges(monkeypatch, capsys, verb):
    monkeypatch.setenv("COLUMNS", "100")
    text = printed(capsys, verb, "--help")
    assert re.search(rf"^   megatron-stable {verb}\b", text.split("Example:")[1], re.M)  # indented below it
    assert not re.search(r"<\w+|range|[xX][<>]=", text.split("╭", 1)[1])


@pytest.mark.parametrize("columns", [80, 100])
def test_paragraphs_of_the_help_are_broken_by_the_terminal_alone(monkeypatch, capsys, columns):
    """A line of a paragraph ends where the next word does not fit."""
    monkeypatch.setenv("COLUMNS", str(columns))
    before_example = printed(capsys, "skip", "--help").split("Example:")[0]
    paragraphs = [part.splitlines() for part in re.split(r"\n *\n", before_example)[1:]]
    assert sum(len(lines) > 1 for lines in paragraphs) >= 2
    for lines in paragraphs:
        for line, after in itertools.pairwise(lines):
            assert len(line.rstrip()) + 1 + len(after.split()[0]) > columns - 2


def test_options_have_placeholders_and_flags_none(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    text = printed(capsys, "tokenizer", "--help")
    for row in (r"--vocab-size +N +", r"--sample-mb +X +", r"--output +PATH +", r"--kind +bpe\|unigram +"):
        assert re.search(row, text)
    assert re.search(r"--json +Print the summary", text)


def test_value_out_of_range_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    assert application.run_verb(["tokenizer", "--vocab-size", "0"]) == 2
    assert "greater than or equal to 1" in " ".join(capsys.readouterr().err.split())


def test_listing_the_verbs_loads_none_of_them():
    heavy = ["torch", "deepspeed", "numpy", "sentencepiece", "matplotlib", "pyarrow", "pydantic"]
    unwanted = [*heavy, *(f"megatron_stable.commands.{verb}" for verb in VERBS)]
    code = (
        "import sys; from megatron_stable.commands.app import run_verb; code = run_verb(['--help']); "
        f"print([name for name in {unwanted} if name in sys.modules], code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.splitlines()[-1] == "[] 0"


@pytest.mark.parametrize("verb", ["init", "pretrain"])
def test_a_wrong_command_line_does_not_wait_for_torch(verb):
    code = (
        f"import sys; from megatron_stable.commands.app import run_verb; code = run_verb(['{verb}', '--nonsense']); "
        "print([name for name in ('torch', 'deepspeed') if name in sys.modules], code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.splitlines()[-1] == "[] 2"


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
