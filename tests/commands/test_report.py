"""`megatron-stable report`: the page, the figures, and the page of a run in progress."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from megatron_stable.commands.app import run_verb
from tests.analysis.report.made import make_run, record
from tests.harness.browser import Browser
from tests.study.made import sweep, write_sweep

RECORDS = [record(step) | {"logits/mean": 0.1 * step} for step in range(1, 9)]


def test_a_page_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", RECORDS)
    assert run_verb(["report", str(run), "--figures", str(tmp_path / "figures")]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and page.count("<figure>") == 5
    files = sorted(path.name for path in (tmp_path / "figures").iterdir())
    names = ("data", "gradient", "logits_mean", "loss", "throughput")
    assert files == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    for name in names:
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "figures" / f"{name}.svg").read_text(encoding="utf-8").count("<text") > 4
    said = capsys.readouterr().out
    assert f"{run / 'report.html'}: 0." in said and "10 files" in said


def test_what_cannot_be_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, empty = make_run(tmp_path / "run", RECORDS), make_run(tmp_path / "empty", [])
    for arguments, code, message in (
        ([tmp_path], 2, "is no run's directory"),
        ([empty], 5, "has recorded no step yet"),
        ([run, empty], 2, "name the page of several runs with --output"),
        ([run, "--watch", "--output", tmp_path / "page.html"], 2, "writes no file"),
        ([run, "--output", run / "metrics.jsonl" / "page.html"], 5, "cannot write"),
        ([run, "--output", tmp_path / "page.png"], 2, "name it FILE.html"),
    ):
        assert run_verb(["report", *map(str, arguments)]) == code
        assert message in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, run = write_sweep(tmp_path / "sweep", sweep(sizes=["d64"], seeds=[1])), make_run(tmp_path / "run", RECORDS)
    assert run_verb(["report", str(path), "--figures", str(tmp_path / "figures")]) == 0
    assert (path / "report.html").read_text(encoding="utf-8").count("<figure>") == 3
    assert (tmp_path / "figures" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert run_verb(["report", str(path / "table.csv"), "--output", str(tmp_path / "page.html")]) == 0
    assert "<title>sweep · report" in (tmp_path / "page.html").read_text(encoding="utf-8")
    for arguments, message in (
        ([path, path], "one sweep"),
        ([run, path], "one sweep"),
        ([path, "--watch"], "for runs"),
    ):
        assert run_verb(["report", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err


def test_a_run_in_progress_is_served_until_ctrl_c(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    command = [sys.executable, "-m", "megatron_stable", "report", str(run), "--watch", "--port", "0"]
    watched = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert watched.stdout is not None
        address = watched.stdout.readline().split()[0]
        with browser.visit(address) as visit:
            assert "No step has been read and drawn yet: run" in visit.page.inner_text("main")
            with (run / "metrics.jsonl").open("a") as file:
                file.writelines(json.dumps(each) + "\n" for each in RECORDS)
            visit.page.wait_for_selector("figure svg", timeout=60_000)
            visit.page.locator("summary", has_text="All fields").click()
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record(9)) + "\n")
            visit.page.get_by_text("9 of 1,000").wait_for(timeout=60_000)
            assert visit.page.locator("section[aria-labelledby=configuration] details").get_attribute("open") == ""
            assert visit.problems == []
        with pytest.raises(OSError, match="404"):
            urlopen(f"{address}elsewhere", timeout=10)
        with pytest.raises(OSError, match="403"):
            urlopen(Request(address, headers={"Host": "elsewhere.example"}), timeout=10)
        assert run_verb(["report", str(run), "--watch", "--port", address.rstrip("/").rpartition(":")[2]]) == 2
        watched.send_signal(signal.SIGINT)
        said, errors = watched.communicate(timeout=30)
        assert (watched.returncode, errors) == (0, "") and said.endswith("ended\n")
    finally:
        watched.kill()
        watched.wait()
