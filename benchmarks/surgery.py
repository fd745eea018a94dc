"""What saves a run that operates on itself: the norm, or the second warm-up? The demo's baseline, with and without it.

    python benchmarks/surgery.py --seeds 1                 # two runs, minutes each
    python benchmarks/surgery.py                           # the table of docs/surgery.md; goes on where it stopped

operated   the demo's baseline, which diverges, with `guard.surgery=qk_norm` as the guard's last rung
control    from the very checkpoint that surgery took, with all that the guard had done before it (skipped data, factors
           of learning rate and clipping), the same second warm-up and attempts of its own, but without the norm

Each is the verb `pretrain` on one rank; what is told is read from ledgers and metrics.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from math import nan
from pathlib import Path
from statistics import fmean

from megatron_stable.commands.demo import AVERAGED, attempts, prepare
from megatron_stable.errors import DivergenceError
from megatron_stable.records.directory import RunDirectory
from megatron_stable.records.interventions import read_interventions, write_interventions
from megatron_stable.records.metrics import Record
from megatron_stable.stability.events import Rollback, Surgery
from megatron_stable.stability.interventions import Interventions

SEEDS = (1234, 1, 2, 3, 4, 5)
REWARM = 20  # steps
PLAIN = ("model.qk_norm=false", "guard.surgery=null")
RUNG = ("model.recipe=baseline", "batch.micro_size=64", "guard.surgery=qk_norm", f"guard.surgery_rewarm={REWARM}")


def pretrain(config: Path, run: Path, *overrides: str) -> int:
    """Train a run to its end, unless it is there; its exit code."""
    code = run / "exit_code"
    if not code.is_file():
        run.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "megatron_stable", "pretrain", "--config", str(config)]
        with (run / "output.log").open("ab") as log:
            done = subprocess.run([*command, f"run.directory={run}", *overrides], stdout=log, stderr=log)
        if done.returncode not in (0, DivergenceError.exit_code):
            raise SystemExit(f"exit code {done.returncode}: see {run / 'output.log'}")
        code.write_text(f"{done.returncode}\n")
    return int(code.read_text())


def prepare_control(operated: Path, control: Path) -> None:
    """Make the directory of a run that has the other's checkpoint from before surgery, and all that the guard had done
    by then."""
    made = read_interventions(operated)
    assert made is not None
    shutil.copytree(operated / "before_surgery", control / "checkpoints", dirs_exist_ok=True)
    upto = next(number for number, item in enumerate(made.items, 1) if item.changes)
    # surgery changes nothing here; with it attempts are counted anew, as they were there
    done = tuple(item.model_copy(update={"changes": {}}) for item in made.items[:upto])
    write_interventions(control, Interventions(done))


def ends(parts: Sequence[Sequence[Record]]) -> str:
    """The mean loss of the last steps of each attempt."""
    return ", ".join(f"{fmean(line['loss'] for line in part[-AVERAGED:]):.3f}" for part in parts)


def row(root: Path, seed: int) -> str:
    """Of the table: what became of a seed."""
    operated, control = root / f"operated-{seed}", root / f"control-{seed}"
    code = pretrain(root / "config.yaml", operated, *RUNG, f"run.seed={seed}")
    acts = [event for event in RunDirectory(operated).ledger.read() if isinstance(event, Rollback | Surgery)]
    number = next((i for i, event in enumerate(acts) if isinstance(event, Surgery)), None)
    if number is None:
        return f"| {seed} | without surgery, exit code {code} | | | | | | |"
    surgery, parts = acts[number], attempts(operated)
    assert isinstance(surgery, Surgery)
    if not control.exists():
        prepare_control(operated, control)
    lost = pretrain(operated / "config.yaml", control, *PLAIN)
    without = attempts(control)
    validation = next((line["validation_loss"] for line in reversed(parts[-1]) if "validation_loss" in line), None)
    before = ", ".join(str(event.rollback_to) for event in acts[:number])
    return (
        f"| {seed} | {before} | {surgery.rollback_to} | {surgery.before:.3f} → {surgery.after:.3f} "
        f"| {ends(parts[: number + 1])} | {ends(parts[number + 1 :])}, exit code {code} | {validation or nan:.3f} "
        f"| {ends(without)}, exit code {lost} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--output", type=Path, default=Path("runs/surgery"))
    given = parser.parse_args()
    prepare(given.output)
    print(
        "\n| seed | rolled back to | surgery at | loss there, before → after | last ten steps of the attempts "
        "| of those after surgery | validation | of the control's attempts |\n" + "|---" * 8 + "|"
    )
    for seed in given.seeds:
        print(row(given.output, seed), flush=True)


if __name__ == "__main__":
    main()
