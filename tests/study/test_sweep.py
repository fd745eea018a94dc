"""Sweeps, trained for real: what runs end as, what is tried again, and that a killed sweep comes to the same table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from megatron_stable.study.table import RATE, TIMES, Row, read_table
from tests.training.runs import ROOT, SEQUENCE, VOCAB, metrics, write_data

STEPS = 24


def write_sweep(folder: Path, name: str = "sweep", config_of_runs: dict[str, Any] | None = None, **given: Any) -> Path:
    """A sweep of tiny runs, on ``folder``/data; each keyword is a key of the file."""
    if not (folder / "data.idx").exists():
        write_data(folder / "data", tokens=12000)
    config = {
        "run": {"steps": STEPS},
        "model": {"layers": 2, "hidden": 32, "heads": 2, "sequence_length": SEQUENCE, "vocab_size": VOCAB},
        "batch": {"global_size": 4, "micro_size": 4},
        "data": {"train": str(folder / "data"), "validation": str(folder / "data")},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"every": 8},
        "evaluation": {"every": 100, "batches": 2},
        "logging": {"probes_every": 4, "tensorboard": False},
        **(config_of_runs or {}),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"directory": str(folder / name), "config": config, **given}, sort_keys=False))
    return path


def start(path: Path, *arguments: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megatron_stable", "sweep", str(path), *arguments]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def sweep(path: Path, *arguments: str) -> tuple[int, str]:
    """(exit code, what it printed)."""
    process = start(path, *arguments)
    try:
        said, _ = process.communicate(timeout=240)
    finally:
        for each in [*family(process), process] if process.poll() is None else ():
            each.kill()
    return process.returncode, said


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def await_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Until a run has recorded a step."""
    end = time.monotonic() + 200
    while time.monotonic() < end and process.poll() is None:
        if (run / "metrics.jsonl").is_file() and max(metrics(run), default=0) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"{run} did not come to step {step}: {process.communicate()[0] if process.poll() else ''}")


def timeless(rows: list[Row]) -> list[Row]:
    return [{column: value for column, value in row.items() if column not in TIMES} for row in rows]


def test_runs_finish_diverge_and_fail_and_the_table_says_so(tmp_path: Path) -> None:
    path = write_sweep(
        tmp_path,
        axes={
            "case": {
                "fine": {RATE: 1e-2},
                "diverges": {RATE: 1e4, "guard.collapse": 0.2, "guard.collapse_steps": 4},
                "crashes": {RATE: 1e-2, "run.apex": "require"},
            }
        },
    )  # fmt: skip
    code, said = sweep(path, "--jobs", "1")
    assert code == 1, said
    rows = {row["case"]: row for row in read_table(tmp_path / "sweep")}
    fine, diverges, crashes = (rows[case] for case in ("fine", "diverges", "crashes"))
    assert [row["status"] for row in (fine, diverges, crashes)] == ["finished", "diverged", "failed"]

    records = metrics(tmp_path / "sweep" / "runs" / fine["name"])
    assert fine["steps"] == STEPS and fine["initial_loss"] == records[1]["loss"]
    assert fine["validation_loss"] == fine["loss"] == fine["score"] == records[STEPS]["validation_loss"]
    assert fine["train_loss"] == pytest.approx(sum(records[step]["loss"] for step in range(STEPS - 2, STEPS + 1)) / 3)
    assert fine["parameters_total"] - fine["parameters"] == 2 * VOCAB * 32
    tags = [f"attention/max_logit/layer_0{layer}" for layer in (0, 1)]
    assert fine["attention/max_logit"] == max(records[STEPS][tag] for tag in tags)
    assert fine["attention/entropy"] == min(records[STEPS][f"attention/entropy/layer_0{layer}"] for layer in (0, 1))

    assert 4 < diverges["steps"] < STEPS and diverges["rise"] > 0.2 and diverges["score"] == diverges["initial_loss"]
    assert "of what was learnt is lost" in diverges["reason"] and 0 < diverges["diverged_at"] < diverges["steps"]
    assert crashes["score"] is None and crashes["steps"] == 0 and "apex" in crashes["reason"]
    assert (
        "is tried again" in said
        and f"error: {crashes['name']}: " in said
        and "1 finished, 1 diverged, 1 failed" in said
    )

    measured = pq.read_table(tmp_path / "sweep" / "probes.parquet").to_pylist()
    series = {row["step"]: row["value"] for row in measured if row["run"] == fine["name"] and row["tag"] == tags[0]}
    assert series == {step: records[step][tags[0]] for step in range(4, STEPS + 1, 4)}

    # killed before it was noted how it ended, a run that diverged is not trained on
    run = tmp_path / "sweep" / "runs" / diverges["name"]
    (run / "ended.json").unlink()
    written = (run / "metrics.jsonl").read_bytes()
    code, said = sweep(path, "--jobs", "1")
    assert code == 1 and "3 runs, 2 of them ended before" in said
    assert timeless(read_table(tmp_path / "sweep"))[1] == timeless([diverges])[0]
    assert (run / "metrics.jsonl").read_bytes() == written

    # what failed is mended, in a directory that another setting may not have, and the rest is kept
    before = {
        name: (tmp_path / "sweep" / "runs" / row["name"] / "metrics.jsonl").stat()
        for name, row in rows.items()
        if name != "crashes"
    }
    code, said = sweep(write_sweep(tmp_path, axes={"case": {"fine": {RATE: 2e-2}}}))
    assert code == 2 and "was trained with other settings (optimizer.learning_rate: 0.01 there, 0.02 here)" in said
    code, said = sweep(
        write_sweep(tmp_path, axes={"case": {"fine": {RATE: 1e-2}, "crashes": {RATE: 1e-2, "run.seed": 5}}})
    )
    assert code == 0 and "2 runs, 1 of them ended before" in said, said
    rows = {row["case"]: row for row in read_table(tmp_path / "sweep")}
    assert rows.keys() == {"fine", "crashes"} and rows["crashes"]["status"] == "finished"
    run = tmp_path / "sweep" / "runs" / fine["name"]
    assert (run / "metrics.jsonl").stat().st_mtime_ns == before["fine"].st_mtime_ns


def test_a_sweep_that_is_killed_ends_with_the_same_table(tmp_path: Path) -> None:
    axes = {RATE: [1e-2, 2e-2, 3e-2]}
    waits = {"checkpoint": {"every": 8, "max_failed_saves": 1}}  # training does, for each checkpoint to be whole
    whole = write_sweep(tmp_path, "whole", waits, axes=axes)
    assert sweep(whole, "--jobs", "1")[0] == 0

    killed = write_sweep(tmp_path, "killed", waits, axes=axes)
    second = tmp_path / "killed" / "runs" / "learning_rate=0.02"
    process = start(killed, "--jobs", "1")
    await_step(process, second, 13)
    worker = family(process)
    for each in (process, *worker):
        each.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (second / "ended.json").exists()

    process = start(killed, "--jobs", "1")  # and the next is stopped, in order
    third = tmp_path / "killed" / "runs" / "learning_rate=0.03"
    await_step(process, third, 5)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=100)[0]
    assert process.returncode == 130, said
    stopped = {row["name"]: row for row in read_table(tmp_path / "killed")}
    assert stopped[third.name]["status"] == "unfinished" and 5 <= stopped[third.name]["steps"] < STEPS
    assert stopped[second.name]["status"] == "finished"

    code, said = sweep(killed, "--jobs", "1")
    assert code == 0 and "3 runs, 2 of them ended before" in said
    assert timeless(read_table(tmp_path / "killed")) == timeless(read_table(tmp_path / "whole"))
    same = [(tmp_path / name / "probes.parquet").read_bytes() for name in ("whole", "killed")]
    assert same[0] == same[1]
    lines = [
        line for line in (second / "ledger.jsonl").read_text().splitlines() if json.loads(line)["event"] == "resume"
    ]
    assert len(lines) == 1 and json.loads(lines[0])["step"] in (8, 16), "it went on from its checkpoint"


def test_a_worker_that_is_killed_is_replaced_and_parts_share_the_work(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, axes={RATE: [1e-2, 3e-2, 1e-1]})
    run = tmp_path / "sweep" / "runs" / "learning_rate=0.03"
    assert sweep(path, "--commands", "2") == (
        0,
        f"megatron-stable sweep {path} --part 1/2\nmegatron-stable sweep {path} --part 2/2\n",
    )
    process = start(path, "--part", "2/2")
    await_step(process, run, 2)
    workers = family(process)
    for worker in workers:
        worker.suspend()
    code, said = sweep(path, "--part", "2/2")
    for worker in workers:
        worker.kill()
    assert code == 2 and "is being trained by another process" in said
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 0, said
    assert "learning_rate=0.03 failed, and is tried again: its process was killed by SIGKILL" in said
    statuses = {row["name"]: row["status"] for row in read_table(tmp_path / "sweep")}
    assert statuses == {
        "learning_rate=0.01": "unfinished",
        "learning_rate=0.03": "finished",
        "learning_rate=0.1": "unfinished",
    }


def test_runs_of_several_ranks(tmp_path: Path) -> None:
    collapse = {RATE: 1e4, "guard.collapse": 0.2, "guard.collapse_steps": 4}
    path = write_sweep(
        tmp_path,
        axes={"case": {"fine": {RATE: 1e-2}, "diverges": collapse}, "parallel.tensor": [2]},
        ranks=2,
    )  # fmt: skip
    code, said = sweep(path, "--jobs", "1")
    assert code == 0, said
    fine, diverges = read_table(tmp_path / "sweep")
    assert (fine["status"], fine["steps"], fine["parallel.tensor"]) == ("finished", STEPS, 2)
    assert diverges["status"] == "diverged" and "of what was learnt is lost" in diverges["reason"]
    told = json.loads((tmp_path / "sweep" / "runs" / fine["name"] / "ranks.json").read_text())
    assert len(told["ranks"]) == 2


def test_a_worker_whose_sweep_is_killed_stops_also_under_nohup(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, config_of_runs={"run": {"steps": 100000}}, axes={RATE: [1e-2]})
    run = tmp_path / "sweep" / "runs" / "learning_rate=0.01"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start(path)
    finally:
        signal.signal(signal.SIGHUP, before)
    await_step(process, run, 2)
    workers = family(process)
    process.kill()
    _, alive = psutil.wait_procs(workers, timeout=60)
    for worker in alive:
        worker.kill()
    process.communicate()
    assert not alive and not (run / "ended.json").exists()
    stops = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert stops[-1]["event"] == "stop" and stops[-1]["exit_code"] == 0, "in order, with a checkpoint"
