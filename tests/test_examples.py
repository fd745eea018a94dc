"""The examples: each configuration runs on the ranks it names, and each script starts as many, or says why not."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_stable.config.checks import check
from megatron_stable.config.load import load_config
from megatron_stable.config.sizes import SIZES

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = sorted(EXAMPLES.glob("*.yaml"))
SCRIPTS = sorted(EXAMPLES.glob("launch_*"))
CALLED = {"launch_deepspeed.sh": "deepspeed", "launch_torchrun.sh": "torchrun", "launch_slurm.sbatch": "srun"}
TELLS = '#!/bin/sh\nprintf "%s\\n" "$0" "$@"\n'  # a program that says how it was called


def ranks(config: Path) -> int:
    """The world size that the file's first line names."""
    first = re.match(r"# ranks: (\d+)", config.read_text())
    assert first is not None, f"{config} does not begin with its number of ranks"
    return int(first[1])


def head(config: Path) -> str:
    """The comment at the top, as one line."""
    lines = config.read_text().partition("\n\n")[0].splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines)


def test_there_is_an_example_of_each_kind() -> None:
    sizes = ["laptop", "830m", "1b", "3b", "7b", "10b", "13b", "30b"]
    assert {path.stem for path in CONFIGS} == set(sizes)
    for size in sizes[1:]:
        shape = load_config(EXAMPLES / f"{size}.yaml").model
        assert (shape.layers, shape.hidden, shape.heads) == tuple(SIZES[size][k] for k in ("layers", "hidden", "heads"))
    assert {path.name for path in SCRIPTS} == set(CALLED)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configuration_fits_all_the_ranks_it_names(path: Path) -> None:
    config, first = load_config(path), path.read_text().splitlines()[0]
    check(config, ranks(path))
    for other in re.findall(r"\d+", (re.findall(r"also ([^:;)]+)", first) or [""])[0]):
        check(config, int(other))
    gpus = re.search(r"\((\d+|one|two) nodes? of (?:8 )?", first)
    if gpus is not None:
        assert 8 * {"one": 1, "two": 2}.get(gpus[1], int(gpus[1]) if gpus[1].isdigit() else 0) == ranks(path)
    layout = re.findall(r"TP (\d+)|PP (\d+)|DP (\d+)", first)
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    named = {tensor: "TP", pipeline: "PP", ranks(path) // (tensor * pipeline): "DP"}
    for found in layout:
        (size,) = (int(number) for number in found if number)
        assert size in named
    assert bool(layout) == (tensor * pipeline > 1)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_head_says_after_whom_and_gives_a_reason_for_each_choice(path: Path) -> None:
    said, config = head(path), load_config(path)
    assert re.search(r"after: .+\(arXiv \d{4}\.\d{5}", said)
    for part in ("Layout:", "Stability", "Batch, learning rate, schedule:"):
        assert part in said
    assert config.model.recipe in said
    assert f"z_loss {config.loss.z_loss:.0e}".replace("e-0", "e-") in said
    if config.optimizer.eps != 1e-8 or re.search(r"\beps\b", said):
        assert f"eps {config.optimizer.eps:.0e}".replace("e-0", "e-") in said
    rate = f"{config.optimizer.learning_rate:.1e}".replace("e-0", "e-").replace(".0e", "e")
    assert rate in said
    assert ("fixed, 0.02" in said) == (config.model.init == "fixed")
    assert config.schedule.min_learning_rate == pytest.approx(config.optimizer.learning_rate / 10)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_steps_make_the_tokens_that_the_comment_names(path: Path) -> None:
    config = load_config(path)
    said = re.search(r"steps: \d+\}  # ([\d.]+)M tokens each, ([\d.]+)([BT]) in all", path.read_text())
    if path.stem == "laptop":
        return
    assert said is not None
    assert config.tokens_per_step / 1e6 == pytest.approx(float(said[1]), rel=0.01)
    total = config.run.steps * config.tokens_per_step / {"B": 1e9, "T": 1e12}[said[3]]
    assert total == pytest.approx(float(said[2]), rel=0.001)


def started(called: list[str], hostfile: Path) -> int:
    """How many ranks a launcher that was called so would start, Slurm aside."""
    if "--hostfile" in called:
        assert called[called.index("--hostfile") + 1] == str(hostfile)
        return sum(map(int, re.findall(r"^\S+ slots=(\d+)", hostfile.read_text(), re.M)))
    return int(called[called.index("--nnodes") + 1]) * int(called[called.index("--nproc-per-node") + 1])


def programs(folder: Path, **texts: str) -> Path:
    """A directory of executables."""
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def environment(folder: Path, config: Path) -> dict[str, str]:
    """Where a script finds programs that tell, and hosts for the example."""
    count = ranks(config)
    slots = min(count, 8)
    hosts = folder / "hosts"
    hosts.write_text("# the nodes\n" + "".join(f"node{i} slots={slots}\n" for i in range(count // slots)))
    bin = programs(folder / "bin", deepspeed=TELLS, torchrun=TELLS, srun=TELLS, python="")
    given = {"BIN": str(bin), "PATH": f"{bin}:{os.environ['PATH']}", "HEAD": "node1", "HOSTFILE": str(hosts)}
    given |= {"GPUS": str(slots), "SLURM_SUBMIT_DIR": str(EXAMPLES.parent), "SLURM_NTASKS": str(count)}
    return {**os.environ, **given}


def run(script: Path, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_starts_the_module_on_the_ranks_of_the_example(script: Path, config: Path, tmp_path: Path) -> None:
    env = environment(tmp_path, config)
    result = run(script, config.stem, "run.steps=7", env=env)
    assert result.returncode == 0, result.stderr
    program, *called = result.stdout.splitlines()
    assert Path(program).name == CALLED[script.name]
    assert "megatron_stable.pretrain" in called and called[-1] == "run.steps=7"
    assert EXAMPLES.parent / called[called.index("--config") + 1] == config
    if script.suffix == ".sbatch":
        assert called[2] == env["BIN"] + "/python", "other nodes do not have this shell's PATH"
    else:
        assert Path(program).parent == Path(env["BIN"])
        assert started(called, Path(env["HOSTFILE"])) == ranks(config)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_refuses_another_number_of_ranks_unless_told(script: Path, tmp_path: Path) -> None:
    env = environment(tmp_path, EXAMPLES / "10b.yaml")
    (tmp_path / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
    env |= {"NODES": "2", "SLURM_NTASKS": "16"}
    result = run(script, "10b", env=env)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and "is for 64 ranks" in result.stderr and "RANKS=16" in result.stderr
    assert run(script, "10b", env={**env, "RANKS": "16"}).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_names_the_examples(script: Path, tmp_path: Path) -> None:
    env = environment(tmp_path, EXAMPLES / "10b.yaml")
    for arguments in ((), ("11b",)):
        result = run(script, *arguments, env=env)
        assert (result.returncode, result.stdout) == (2, "")
        assert all(config.stem in result.stderr for config in CONFIGS)


# ends, as ranks do, with `code` once it is told to


def test_slurm_script_asks_for_what_the_docs_say() -> None:
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", (EXAMPLES / "launch_slurm.sbatch").read_text(), re.M))
    assert asked["signal"] == "B:TERM@600" and "requeue" in asked and asked["open-mode"] == "append"
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]


def test_commands_in_the_comments_name_what_exists() -> None:
    for path in CONFIGS:
        for line in re.findall(r"^#   (megatron-stable .*)$", path.read_text(), re.M):
            words = shlex.split(line)
            if "--config" in words:
                assert (EXAMPLES.parent / words[words.index("--config") + 1]).is_file()
