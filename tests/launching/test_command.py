"""The commands, and the environment that travels with them."""

from __future__ import annotations

import shlex
import subprocess
from argparse import Namespace
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner

from megatron_stable.errors import ConfigError
from megatron_stable.launching.command import Start, as_text, for_file, openmpi, pdsh, slurm, travelling
from megatron_stable.parallel.launcher import START

WORDS = ["--config", "/data/a run.yaml", "data.train={data/web: 0.7, data/code: 0.3}"]


def start(**slots: int) -> Start:
    return Start(slots or {"node1": 8, "node2": 8}, Path("/data/hosts"), "10.0.0.1", 29501, WORDS)


def test_what_decides_how_ranks_compute_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("OMP_NUM_THREADS", "DS_ENV_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth1\nEXTRA=a=b\n")
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=ib0\n")
    found = travelling(threads=12)
    assert found["NCCL_IB_HCA"] == "mlx5" and found["OMP_NUM_THREADS"] == "12"
    assert (found["GLOO_SOCKET_IFNAME"], found["EXTRA"]) == ("ib0", "a=b"), "this folder's wins over the home's"
    assert "CUDA_VISIBLE_DEVICES" not in found and "HOME" not in found
    assert found[START] != travelling(threads=12)[START], "each start has a name of its own"
    assert START not in travelling(threads=12, named=False)


def test_a_line_on_which_deepspeed_would_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n# a comment\n")
    with pytest.raises(ConfigError, match="line 2: '# a comment' is not NAME=VALUE"):
        travelling(threads=1)


@pytest.mark.parametrize("launcher", [pdsh, openmpi, slurm])
def test_the_run_is_named_word_by_word(launcher: object) -> None:
    command = launcher(start(), {"OMP_NUM_THREADS": "4"})  # type: ignore[operator]
    at = command.index("megatron_stable.pretrain")
    assert command[at - 1] in ("-m", "--module") and [*command[at + 1 :]] == WORDS
    text = as_text(command, {"OMP_NUM_THREADS": "4"}, "NCCL_DEBUG=INFO\n")
    assert shlex.split(text.splitlines()[-1]) == command
    assert "export OMP_NUM_THREADS=4\n" in text and "#   NCCL_DEBUG=INFO\n" in text


def test_shells_of_other_machines_leave_words_alone() -> None:
    blend = start()
    blend = replace(blend, arguments=["data.train={a:0.7,b:0.3}"])
    assert pdsh(blend, {})[-1] == "'data.train={a:0.7,b:0.3}'", "which bash would make two words of"


@pytest.mark.parametrize("word", ["a{b,c}", "it's", "a&b", "$HOME x", 'say "x" `y`', "50%", "a\\ b", "/d/r (2)/c.yaml"])
def test_words_come_through_deepspeeds_quoting(word: str, tmp_path: Path) -> None:
    """As DeepSpeed's pdsh runner quotes them, and a shell reads them; pdsh makes one % of two."""
    runner = object.__new__(PDSHRunner)
    runner.args = Namespace(user_args=[pdsh(replace(start(), arguments=[word]), {})[-1]])
    (sent,) = runner.parse_user_args()
    line = f"printf '%s' {sent}".replace("%%", "%")
    assert subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout == word


@pytest.mark.parametrize("value", ["a b", 'x="y" $z `w`', "back\\slash it's", "plain"])
def test_values_come_through_deepspeeds_quoting(value: str) -> None:
    (line,) = for_file({"NAME": value}).splitlines()
    runner = object.__new__(PDSHRunner)
    runner.exports = {}
    runner.add_export(*line.split("=", maxsplit=1))
    with pytest.raises(ConfigError, match="several lines"):
        for_file({"NAME": f"{value}\n{value}"})
    line = f"export NAME={runner.exports['NAME']}; printf '%s' \"$NAME\""
    assert subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout == value


def test_mpirun_is_told_what_it_does_not_know() -> None:
    command = openmpi(start(), {"NCCL_DEBUG": "INFO"})
    given = [word for before, word in pairwise(command) if before == "-x"]
    assert given == ["MASTER_ADDR=10.0.0.1", "MASTER_PORT=29501", "NCCL_DEBUG=INFO"]
    assert command[command.index("-n") + 1] == "16"


def test_srun_wants_as_many_ranks_on_each_machine() -> None:
    assert "--ntasks-per-node=8" in slurm(start(), {})
    with pytest.raises(ConfigError, match="the same slots"):
        slurm(start(node1=8, node2=4), {})
