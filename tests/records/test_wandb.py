"""Weights & Biases without a network: what the run would be there is read back from the library's own file."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_stable.config.schema import Config
from megatron_stable.errors import ConfigError
from megatron_stable.records.callbacks import Callbacks
from megatron_stable.records.wandb import WeightsAndBiases, require_wandb
from megatron_stable.stability.events import Rollback
from megatron_stable.training.progress import ProgressLine
from tests.harness.ranks import Ranks
from tests.training.runs import settings, train, write_data

pytest.importorskip("wandb")

CONFIG = Config.model_validate({"logging": {"wandb": "stable"}, "optimizer": {"learning_rate": 2e-3}})
ROLLBACK = Rollback(step=3, id="a", by="guard", rule="divergence", rollback_to=1, windows=((2, 3),))
BLOCK = 32768  # of the file, LevelDB's log format: chunks of (checksum, length, whole or which part)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No account and no network; afterwards the library's process is gone, so that no other test inherits it."""
    import wandb

    for name, value in {"WANDB_MODE": "offline", "HOME": str(tmp_path), "WANDB_ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    with suppress(Exception):  # where a test has killed it
        wandb.teardown()


def records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, held = path.read_bytes(), 7, b""  # behind the file's own header
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        held += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(held)
            held = b""


def history(record: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def test_a_run_that_went_back_and_was_resumed_is_one_run(tmp_path: Path) -> None:
    for first in (1, 4):
        writer = WeightsAndBiases(CONFIG, tmp_path)
        writer.record({"step": first, "loss": 2.5, "output_norm/qkv/layer_00": 7.0, "grad_norm": None})
        if first == 1:
            writer.event(ROLLBACK)
            writer.rewind(1)
        for step in (2, 3):
            writer.record({"step": step, "loss": 2.0})
        writer.close()
        time.sleep(1.1)  # the library names its folders by the second
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    begun, resumed = ([*records(file)] for file in files)
    ids = {record.run.run_id for written in (begun, resumed) for record in written if record.HasField("run")}
    assert ids == {(tmp_path / "wandb" / "id").read_text()}
    (run,) = (record.run for record in begun if record.HasField("run"))
    assert (run.project, run.display_name) == ("stable", tmp_path.name)
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["optimizer"]["learning_rate"] == 2e-3
    rows = [
        {key: value for key, value in history(record).items() if key[0] != "_"}
        for record in begun
        if record.HasField("history")
    ]
    assert rows == [
        {"step": 1, "train/loss": 2.5, "output_norm/qkv/layer_00": 7.0},
        {"step": 2, "train/loss": 2.0, "events/rollback": 1, "events/skip_window": 1},
        {"step": 3, "train/loss": 2.0, "events/rollback": 0, "events/skip_window": 0},
    ]
    defined = {record.metric.glob_name: record.metric.step_metric for record in begun if record.HasField("metric")}
    assert defined["*"] == "step"
    (alert,) = (record.alert for record in begun if record.HasField("alert"))
    assert alert.text == ROLLBACK.sentence() and alert.title.endswith(": rollback")
    assert any(ROLLBACK.sentence() in str(record) for record in begun if not record.HasField("alert"))


@pytest.mark.parametrize("way", ["dies", "refuses"])
def test_a_library_that_fails_is_told_once_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    writer = WeightsAndBiases(CONFIG, tmp_path)
    callbacks = Callbacks(ProgressLine(Config()), writer)
    before = {"loss": 2.5, "grad_norm": 1.0, "tokens_per_second": None, "skipped": False}
    if way == "refuses":
        writer.run.finish()  # what is logged to it raises an error of the library's own
    for child in psutil.Process().children(recursive=True):
        if way == "dies" and "wandb-core" in " ".join(child.cmdline()):
            child.kill()
            child.wait(10)
    for step in range(1, 4):
        callbacks.record({"step": step, **before})
        time.sleep(0.2)
    callbacks.event(ROLLBACK)
    callbacks.close()
    said = capsys.readouterr()
    assert said.out.count("WeightsAndBiases cannot write, training goes on") == 1


def test_without_an_account_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    callbacks = Callbacks(ProgressLine(Config()), WeightsAndBiases(CONFIG, tmp_path))
    for step in (1, 2):
        callbacks.record({"step": step, "loss": 2.5, "grad_norm": 1.0, "tokens_per_second": None, "skipped": False})
    callbacks.close()
    said = capsys.readouterr()
    assert said.out.count("training goes on: no account is known here: `wandb login`, or WANDB_MODE=offline") == 1
    assert said.err == ""


def test_a_folder_that_the_library_leaves_behind_is_not_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_wandb()
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb")
    with pytest.raises(ConfigError, match=r"pip install 'megatron-stable\[wandb\]'"):
        require_wandb()


def train_without(values: dict[str, Any]) -> int:
    sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        return train(values)
    finally:
        del sys.modules["wandb"]


def test_a_run_that_cannot_log_as_it_should_does_not_begin(ranks: Ranks, tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    assert ranks.run(2, train_without, settings(tmp_path, logging={"wandb": "stable"})) == [2, 2]
    assert not (tmp_path / "run").exists()
