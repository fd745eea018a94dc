"""`megatron-stable checkpoints` and `convert` on a run that two ranks trained."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from megatron_stable.checkpoint.catalog import newest_whole
from megatron_stable.checkpoint.format import read_index, read_manifest
from megatron_stable.checkpoint.state import Layout
from megatron_stable.checkpoint.store import damage, entries
from megatron_stable.config.load import load_config
from megatron_stable.convert.reshard import reshard
from megatron_stable.errors import ConfigError, DataError
from tests.checkpoint.stored import contents, equal
from tests.commands.conftest import SmallDemo


def verb(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_stable", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_list_says_step_health_size_layout(small: SmallDemo) -> None:
    listed = json.loads(verb("checkpoints", small.run, "--verify", "--json").stdout)
    (newest,) = listed[-1:]
    files = sum(path.stat().st_size for path in Path(newest["directory"]).iterdir())
    assert newest["step"] == 12
    assert newest["health"] == "not judged yet"
    assert newest["complete"] is newest["verified"] is True
    assert newest["bytes"] == files
    assert newest["layout"] == {"tensor": 2, "pipeline": 1, "data": 1, "zero_stage": 1, "dtype": "fp32"}
    table = verb("checkpoints", small.run)
    assert table.returncode == 0
    assert "12" in table.stdout
    assert "not judged yet" in table.stdout


def test_damage_is_found_named_and_the_exit_code(small: SmallDemo, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(small.run, run)
    file = sorted((run / "checkpoints").glob("step_*/rank_00001.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert verb("checkpoints", run).returncode == 0, "sizes are right"
    verified = verb("checkpoints", run, "--verify", "--json")
    assert verified.returncode == 5
    assert "rank_00001.safetensors" in json.loads(verified.stdout)[-1]["problem"]
    file.unlink()
    listed = verb("checkpoints", run, "--json")
    assert listed.returncode == 5
    assert "missing" in json.loads(listed.stdout)[-1]["problem"]
    none = verb("checkpoints", tmp_path)
    assert none.returncode == 5
    assert "Traceback" not in none.stderr


@pytest.mark.parametrize("ranks", [(1, 1, 1), (4, 2, 3), (1, 2, 1), (2, 1, 5)], ids=str)
def test_another_layout_holds_the_same(small: SmallDemo, tmp_path: Path, ranks: tuple[int, int, int]) -> None:
    layout = Layout(**dict(zip(("tensor", "pipeline", "data"), ranks, strict=True)))
    source = newest_whole(small.run)
    final = reshard(source.directory, source.manifest, tmp_path / "checkpoints", layout)
    (entry,) = entries(tmp_path / "checkpoints")
    assert damage(entry) is None
    assert equal(contents(source.directory), contents(final))
    manifest = read_manifest(final)
    assert manifest.state == source.manifest.state
    files = read_index(final, manifest).files
    assert len(files) == layout.ranks
    assert not list((tmp_path / "checkpoints").glob(".step*"))
    for name in files:  # as the library reads them, without our reader
        with safe_open(str(final / name), "pt") as file:
            assert all(file.get_slice(key).get_dtype() == "F32" for key in file.keys())  # noqa: SIM118


@pytest.mark.full
def test_a_converted_run_goes_on(small: SmallDemo, tmp_path: Path) -> None:
    done = verb("convert", small.run, "--output", tmp_path / "new", "--pipeline", 2)
    assert done.returncode == 0, done.stderr
    config = load_config(tmp_path / "new" / "config.yaml")
    assert (config.parallel.tensor, config.parallel.pipeline) == (1, 2)
    assert config.run.directory == str(tmp_path / "new")
    went_on = subprocess.run(
        [sys.executable, "-m", "megatron_stable", "pretrain", "--config", str(tmp_path / "new" / "config.yaml"),
         "--ranks", "2", "run.steps=14"],
        capture_output=True, text=True, timeout=200, cwd=small.directory.parent,
    )  # fmt: skip
    assert went_on.returncode == 0, went_on.stdout + went_on.stderr
    assert "(step 12)" in went_on.stdout
    again = verb("convert", small.run, "--output", tmp_path / "new")
    assert again.returncode == 2
    assert "already there" in again.stderr


def test_what_cannot_be_split_is_refused_and_leaves_nothing(small: SmallDemo, tmp_path: Path) -> None:
    source = newest_whole(small.run)
    with pytest.raises(ConfigError, match="3 tensor-parallel ranks"):
        reshard(source.directory, source.manifest, tmp_path / "a", Layout(tensor=3))
    with pytest.raises(ConfigError, match="pipeline stages"):
        reshard(source.directory, source.manifest, tmp_path / "b", Layout(pipeline=64))
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(DataError, match="no checkpoint of step 7"):
        newest_whole(small.run, 7)
