"""Ranks on two machines that do not come together: bounded, told by somebody, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_stable.parallel.launcher import PORT
from tests.hosts.launches import ENVIRONMENT, Launch
from tests.hosts.machines import Machines
from tests.training.runs import layout, settings

SYSTEM_PYTHON = "/usr/bin/python3"


def begin(two: Machines, folder: Path, launcher: str, **run: object) -> Launch:
    values = settings(folder, "run", 5, parallel=layout(tensor=1))
    values["run"] |= run
    return Launch(two, launcher, folder, values, each=1)


def listener(two: Machines, folder: Path) -> subprocess.Popen[bytes]:
    """Somebody who has the port on the first machine."""
    code = f"import socket, time; s = socket.create_server(('', {PORT})); print('here', flush=True); time.sleep(600)"
    process = two[0].start([sys.executable, "-c", code], folder, folder / "listener.out")
    while not (folder / "listener.out").read_text():
        time.sleep(0.05)
    return process


def test_launch_says_what_is_wrong_with_the_machines(two: Machines, folder: Path) -> None:
    """Before anything is started: a port that is taken, then a machine that is down."""
    process = listener(two, folder)
    launch = begin(two, folder, "launch")
    assert launch.end(60) == [1]
    assert f"error: port {PORT} of node1 is taken" in launch.printed
    process.kill()
    two.tidy()
    two.network.cut()
    launch = begin(two, folder, "launch")
    assert launch.end(60) == [1]
    assert "error: node2: ssh: connect to host node2 port 22: " in launch.printed
    assert "is it up" in launch.printed and "nothing was started" in launch.printed
    assert "Traceback" not in launch.printed


@pytest.mark.full
def test_a_machine_that_is_down_is_named(two: Machines, folder: Path) -> None:
    two.network.cut()
    launch = begin(two, folder, "pdsh", join_timeout=22)
    assert launch.end(120) == [255], "ssh's, which pdsh passes on as the greater one"
    assert "node1: ssh exited with exit code 2\n" in launch.printed
    assert f"node1: waiting for rank 1 (node2) of 2 at 10.213.7.1:{PORT}\n" in launch.printed
    assert f"rank 1 (node2) of 2 did not come to 10.213.7.1:{PORT} within run.join_timeout, 22 s" in launch.printed
    assert "Traceback" not in launch.printed


@pytest.mark.full
def test_a_port_that_is_taken_ends_both_sides(two: Machines, folder: Path) -> None:
    process = listener(two, folder)
    launch = begin(two, folder, "pdsh", join_timeout=10)
    (code,) = launch.end(120)
    assert code == 2, launch.printed
    assert f"port {PORT} of node1, where the ranks would meet, cannot be had: Address already in use" in launch.printed
    assert "Traceback" not in launch.printed
    process.kill()


@pytest.mark.full
@pytest.mark.skipif(not Path(SYSTEM_PYTHON).exists(), reason=f"needs {SYSTEM_PYTHON}")
def test_another_python_says_so_in_one_line(two: Machines, folder: Path) -> None:
    """As "mpirun … python -m megatron_stable.pretrain" finds it on a machine whose PATH leads elsewhere."""
    output = folder / "out"
    (folder / "run.yaml").write_text("{}")
    command = [SYSTEM_PYTHON, "-m", "megatron_stable.pretrain", "--config", "run.yaml"]
    process = two[1].start(command, folder, output, ENVIRONMENT)
    assert process.wait(30) == 2
    (line,) = output.read_text().splitlines()
    assert line.startswith("error: node2: No module named ")
    assert f"is {SYSTEM_PYTHON} the Python that megatron-stable is installed in?" in line


@pytest.mark.full
def test_different_configurations_are_told_apart(two: Machines, folder: Path) -> None:
    """The second machine sees another file under the same name."""
    values = settings(folder, "run", 5, parallel=layout(tensor=1))
    config, other = folder / "run.yaml", folder / "other.yaml"
    config.touch()
    other.write_text(yaml.safe_dump({**values, "optimizer": {**values["optimizer"], "learning_rate": 1.0}}))
    subprocess.run(two[1].command(["mount", "--bind", other, config]), check=True)
    try:
        launch = Launch(two, "no_ssh", folder, values, each=1)
        codes = launch.end(120)
    finally:
        subprocess.run(two[1].command(["umount", config]), check=True)
    assert codes == [2, 2], launch.printed
    assert "optimizer.learning_rate is 1.0 there and 0.003 on rank 0" in launch.printed
