"""Each thing that can be wrong with a run's input: a message from one rank, an exit code, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_stable.data import preprocess, train_tokenizer
from tests.harness.ranks import Ranks
from tests.training.runs import Values, error_lines, finish, layout, pretrain, settings, train, write_data

Outcome = tuple[list[int], str]


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def start(request: pytest.FixtureRequest, ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> Callable[[Values], str]:
    """Start a run that must be refused; returns the message, which rank 0 alone has printed."""

    def refused(values: Values, code: int) -> str:
        began = time.monotonic()
        values["parallel"] = layout(tensor=request.param)
        assert ranks.run(request.param, train, values) == [code] * request.param
        assert time.monotonic() - began < 30
        printed = capsys.readouterr().out
        (line,) = error_lines(printed)
        assert line.startswith("[rank 0] error: ") and "Traceback" not in printed
        return printed

    return refused


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


@pytest.fixture
def tokenizer(folder: Path) -> Path:
    (folder / "text").write_text("the loss of the norm is the value of the gradient\n" * 50)
    train_tokenizer([folder / "text"], 300, folder / "tok.model")
    return folder / "tok.model"


def test_data_is_not_set(start: Any, folder: Path) -> None:
    message = start(settings(folder, data={"train": None}), 2)
    assert "data.train is not set" in message and "preprocess" in message
    assert not (folder / "run").exists()


def test_data_is_missing(start: Any, folder: Path) -> None:
    assert "nowhere.idx does not exist" in start(settings(folder, data={"train": str(folder / "nowhere")}), 5)
    assert not (folder / "run").exists()


def test_data_is_truncated(start: Any, folder: Path) -> None:
    os.truncate(folder / "data.bin", 1001)
    assert "data.bin" in start(settings(folder), 5)
    assert not (folder / "run").exists()


def test_data_is_shorter_than_a_sample(start: Any, folder: Path) -> None:
    write_data(folder / "data", tokens=10)
    message = start(settings(folder), 5)
    assert "10 tokens" in message
    assert not (folder / "run").exists()


def test_token_ids_are_out_of_range(start: Any, folder: Path) -> None:
    write_data(folder / "data", vocab=90)
    message = start(settings(folder), 5)
    assert "not in the vocabulary 0 .. 60" in message and "tokenizer and data do not match" in message
    assert not (folder / "run").exists()


def test_tokenizer_is_missing(start: Any, folder: Path) -> None:
    message = start(settings(folder, data={"train": str(folder / "data"), "tokenizer": str(folder / "no.model")}), 5)
    assert "no.model" in message
    assert not (folder / "run").exists()


def test_tokenizer_is_another_than_that_of_the_data(start: Any, folder: Path, tokenizer: Path) -> None:
    preprocess([folder / "text"], tokenizer, folder / "data")
    train_tokenizer([folder / "text"], 280, folder / "other.model")
    data = {"train": str(folder / "data"), "tokenizer": str(folder / "other.model")}
    message = start(settings(folder, model={"vocab_size": None}, data=data), 5)
    assert "made with another tokenizer" in message
    assert not (folder / "run").exists()


def test_run_directory_cannot_be_written(start: Any, folder: Path) -> None:
    (folder / "file").write_text("")
    message = start(settings(folder, "file/run"), 2)
    assert "run.directory" in message and "cannot be written: Not a directory" in message


def test_run_directory_is_that_of_another_model(start: Any, ranks: Ranks, folder: Path, capsys: Any) -> None:
    assert ranks.run(1, train, settings(folder, steps=1, schedule={"kind": "constant", "warmup_steps": 0})) == [0]
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    message = start(settings(folder, model={"hidden": 64}), 2)
    assert "model.hidden: 32 there, 64 here" in message
    assert {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()} == before


def test_checkpoints_are_those_of_another_model(start: Any, ranks: Ranks, folder: Path, capsys: Any) -> None:
    assert ranks.run(1, train, settings(folder, steps=1, schedule={"kind": "constant", "warmup_steps": 0})) == [0]
    (folder / "run/config.yaml").unlink()
    capsys.readouterr()
    message = start(settings(folder, model={"sequence_length": 32}), 2)
    assert "step_00000001 is of another model" in message and "model.sequence_length: 16 there, 32 here" in message
    assert not (folder / "run/config.yaml").exists()


def test_run_directory_is_in_use(start: Any, folder: Path) -> None:
    (folder / "run").mkdir()
    holder = subprocess.Popen(["flock", str(folder / "run/.lock"), "sleep", "60"])
    try:
        while not (folder / "run/.lock").exists():
            time.sleep(0.01)
        time.sleep(0.1)
        assert "is in use by a run that has not ended" in start(settings(folder), 2)
    finally:
        holder.kill()
        holder.wait()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB with room for 4 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.name != "posix" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root on Linux")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_output_directory_is_full(start: Any, folder: Path, small_disk: Path) -> None:
    with pytest.raises(OSError), (small_disk / "fill").open("wb", buffering=0) as fill:
        while True:
            fill.write(bytes(4096))
    message = start(settings(folder, "disk/run"), 2)
    assert "cannot be written: No space left on device" in message
    assert left(small_disk) == {"fill"}


BAD_LAYOUTS = {
    "batch": (
        {"batch": {"global_size": 9, "micro_size": 1}},
        "batch.global_size 9 is not divisible by batch.micro_size 1 x 2",
    ),
    "world": ({"parallel": layout(tensor=2, pipeline=2)}, "2 ranks cannot be split by parallel.tensor 2 x"),
}


@pytest.mark.parametrize("case", BAD_LAYOUTS.values(), ids=BAD_LAYOUTS)
def test_layout_that_cannot_be(
    case: tuple[dict[str, Any], str], ranks: Ranks, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections, message = case
    values = settings(folder, **sections)
    assert ranks.run(2, train, values) == [2, 2]  # under any launcher
    (line,) = [line for line in capsys.readouterr().out.splitlines() if message in line]
    assert line.startswith("[rank 0] ")
    code, output = finish(pretrain(values))  # and before one is started
    assert code == 2 and message in output and "Traceback" not in output
    assert not (folder / "run").exists()


def test_the_command_gives_the_message_and_the_exit_code(folder: Path) -> None:
    np.zeros(1).tofile(folder / "data.idx")
    code, output = finish(pretrain(settings(folder)))
    assert code == 5, output
    assert len(error_lines(output)) == 1 and "Traceback" not in output and "[INFO]" not in output
    line = output.splitlines()[-1]
    assert line.startswith("error: ") and "data.idx" in line
    assert not (folder / "run").exists()


def test_nobody_says_where_documents_end(start: Any, folder: Path) -> None:
    message = start(settings(folder, data={"document_mask": True}), 2)
    assert "data.document_mask true does not know where documents end" in message
    assert not (folder / "run").exists()


def test_data_has_no_end_of_documents(start: Any, folder: Path) -> None:
    message = start(settings(folder, data={"document_mask": True, "end_of_document": 60}), 5)
    assert "document 0 does not end with token 60" in message and "data.document_mask=false" in message
    assert not (folder / "run" / "checkpoints").exists() or not list((folder / "run" / "checkpoints").iterdir())
