"""Tiny runs for the tests of training and checkpoints: their data, their settings, and three ways to start them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from megatron_stable.config.schema import Config
from megatron_stable.data import IndexedWriter
from tests.harness.fp16 import fp16_on_cpu

VOCAB, SEQUENCE = 61, 16
ROOT = Path(__file__).resolve().parents[2]
Values = dict[str, dict[str, Any]]


def write_data(prefix: Path, tokens: int = 4000, vocab: int = VOCAB, seed: int = 0) -> str:
    """A dataset of skewed random tokens; returns its prefix."""
    drawn = np.random.default_rng(seed).random(tokens) ** 2 * vocab
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add(drawn.astype(np.int64))
    return str(prefix)


def settings(folder: Path, name: str = "run", steps: int = 10, **sections: dict[str, Any]) -> Values:
    """Settings of a run in ``folder``/``name`` on the dataset ``folder``/data; keyword arguments are sections."""
    values: Values = {
        "run": {"directory": str(folder / name), "steps": steps, "seed": 3},
        "model": {
            "size": None, "layers": 4, "hidden": 32, "heads": 4, "sequence_length": SEQUENCE, "vocab_size": VOCAB,
            "recipe": "qk_norm",
        },
        "batch": {"global_size": 8, "micro_size": 1},
        "data": {"train": str(folder / "data")},
        # a small eps would blow rounding up where gradients are near zero
        "optimizer": {"eps": 1e-3, "learning_rate": 3e-3},
        "schedule": {"warmup_steps": 2},
        "loss": {"z_loss": 1e-3},
        "checkpoint": {"every": 5, "keep": 9},
        "logging": {"tensorboard": False, "warnings": False},  # of gradients near this eps
        "guard": {"mode": "drop"},  # recover would begin each run with a checkpoint
    }  # fmt: skip
    for section, fields in sections.items():
        values[section] = {**values.get(section, {}), **fields}
    return values


def metrics(run: str | Path) -> dict[int, dict[str, Any]]:
    """What ``metrics.jsonl`` holds, by step; later lines supersede earlier ones, and torn ones are no lines."""
    records = {}
    for line in (Path(run) / "metrics.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records[record["step"]] = record
    return records


def curve(run: str | Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step."""
    return {step: (record["loss"], record["grad_norm"]) for step, record in metrics(run).items()}


def train(values: Values) -> int:
    """On a rank of the harness: what ``megatron-stable pretrain`` does there; returns its exit code."""
    from megatron_stable.training.pretrain import run_to_exit_code

    config = Config.model_validate(values)
    with ExitStack() as stack:
        if config.precision.dtype == "fp16":
            stack.enter_context(fp16_on_cpu())
        return run_to_exit_code(config)


def pretrain(values: Values, ranks: int = 2, **environment: str) -> subprocess.Popen[str]:
    """The command itself, in a process of its own; stdout and stderr in one pipe."""
    path = Path(values["run"]["directory"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "megatron_stable", "pretrain", "--config", str(path), "--ranks", str(ranks)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env={**variables, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], timeout: float = 200.0) -> tuple[int, str]:
    """(exit code, output)."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        for child in [*rank_processes(process.pid).values(), process] if process.poll() is None else ():
            child.kill()
    return process.returncode, output


def rank_processes(pid: int) -> dict[int, psutil.Process]:
    """The ranks that a process with ``--ranks`` has started."""
    found = {}
    try:
        for child in psutil.Process(pid).children(recursive=True):
            try:
                ours = any(each in child.cmdline() for each in ("megatron_stable", "megatron_stable.pretrain"))
                if ours and "RANK" in child.environ():
                    found[int(child.environ()["RANK"])] = child
            except psutil.Error:
                continue
    except psutil.NoSuchProcess:
        pass
    return found


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def layout(**parallel: Any) -> dict[str, Any]:
    """A section ``parallel``."""
    return {"tensor": 1, "pipeline": 1, "zero_stage": 1, **parallel}


def error_lines(printed: str, mark: str = "error: ") -> Sequence[str]:
    """The lines that hold a user's error."""
    return [line for line in printed.splitlines() if mark in line]
