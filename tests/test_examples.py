"""The examples: each configuration runs on as many ranks as it says, and each script starts that many."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_stable.config.checks import check
from megatron_stable.config.load import load_config

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = sorted(EXAMPLES.glob("*.yaml"))
SCRIPTS = sorted(EXAMPLES.glob("launch_*"))


def ranks(config: Path) -> int:
    """The world size that the file's first line names."""
    first = re.match(r"# ranks: (\d+)", config.read_text())
    assert first is not None, f"{config} does not begin with its number of ranks"
    return int(first[1])


def test_there_is_an_example_of_each_kind() -> None:
    assert {path.name for path in CONFIGS} == {"laptop.yaml", "830m.yaml", "10b.yaml", "30b.yaml"}
    assert {path.suffix for path in SCRIPTS} == {".sh", ".sbatch"} and len(SCRIPTS) == 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configuration_fits_the_ranks_it_names(path: Path) -> None:
    check(load_config(path), ranks(path))


def test_sizes_are_what_the_names_say() -> None:
    paper, large = (load_config(EXAMPLES / name) for name in ("830m.yaml", "10b.yaml"))
    assert (paper.model.layers, paper.model.hidden, paper.model.heads) == (24, 1024, 16)
    assert (paper.model.recipe, paper.precision.dtype) == ("qk_norm_cap", "bf16")
    assert paper.model.qk_norm and paper.model.attention_cap == 50
    parallel = large.parallel
    assert (
        parallel.tensor > 1
        and parallel.pipeline > 1
        and ranks(EXAMPLES / "10b.yaml") > (parallel.tensor * parallel.pipeline)
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_starts_the_module_on_the_ranks_of_its_configuration(path: Path, tmp_path: Path) -> None:
    for program in ("deepspeed", "torchrun", "srun"):  # says how it was called
        (tmp_path / program).write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@"\n')
        (tmp_path / program).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HEAD": "node1"}
    environment["SLURM_SUBMIT_DIR"] = str(EXAMPLES.parent)
    command = ["bash", str(path), "run.steps=7"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=30)
    program, *called = result.stdout.splitlines()
    assert "megatron_stable.pretrain" in called and called[-1] == "run.steps=7"
    config = EXAMPLES.parent / called[called.index("--config") + 1]
    started = {
        "deepspeed": lambda: sum(map(int, re.findall(r"^\S+ slots=(\d+)", (EXAMPLES / "hosts").read_text(), re.M))),
        "torchrun": lambda: (
            int(called[called.index("--nnodes") + 1]) * int(called[called.index("--nproc-per-node") + 1])
        ),
        "srun": lambda: slurm(path, "nodes") * slurm(path, "ntasks-per-node"),
    }
    assert started[Path(program).name]() == ranks(config)


def slurm(path: Path, option: str) -> int:
    """A number that the script asks Slurm for."""
    (value,) = re.findall(rf"^#SBATCH --{option}=(\d+)$", path.read_text(), re.M)
    return int(value)


def test_commands_in_the_comments_name_what_exists() -> None:
    for path in CONFIGS:
        for line in re.findall(r"^#   (megatron-stable .*)$", path.read_text(), re.M):
            words = shlex.split(line)
            if "--config" in words:
                assert (EXAMPLES.parent / words[words.index("--config") + 1]).is_file()
