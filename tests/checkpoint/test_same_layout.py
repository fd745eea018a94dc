"""The same layout goes on bit for bit: weights, moments, step, loss scale, data position."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.stored import keep_only
from tests.harness.ranks import Ranks
from tests.training.runs import Values, layout, metrics, settings, train

STEPS, SAVED = 7, 3
# a loss scale so large that the steps before and after the save overflow: the first used up the hysteresis
OVERFLOWS = {"dtype": "fp16", "initial_scale_power": 22, "scale_window": 2, "hysteresis": 2}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "dp2-zero1-fp32": (2, layout(), {"dtype": "fp32"}),
    "dp2-zero2-bf16": (2, layout(zero_stage=2), {"dtype": "bf16"}),
    "dp2-zero3-fp32": (2, layout(zero_stage=3), {"dtype": "fp32"}),
    "dp2-zero3-bf16": (2, layout(zero_stage=3), {"dtype": "bf16"}),
    "tp2-bf16": (2, layout(tensor=2, sequence=True), {"dtype": "bf16"}),
    "pp2-bf16": (2, layout(pipeline=2), {"dtype": "bf16"}),
    "tp2-fp16": (2, layout(tensor=2), OVERFLOWS),
    "dp2-zero2-fp16": (2, layout(zero_stage=2), OVERFLOWS),
    "dp2-zero3-fp16": (2, layout(zero_stage=3), OVERFLOWS),
    "pp2-fp16": (2, layout(pipeline=2), OVERFLOWS),
}


QUICK = ("dp2-zero1-fp32", "dp2-zero3-bf16", "tp2-bf16", "pp2-bf16", "dp2-zero2-fp16", "dp2-zero3-fp16")
PARAMETERS = [
    pytest.param(case, id=name, marks=[] if name in QUICK else pytest.mark.full) for name, case in CASES.items()
]


@pytest.mark.parametrize("case", PARAMETERS)
def test_resumes_bit_for_bit(ranks: Ranks, folder: Path, case: tuple[int, dict[str, Any], dict[str, Any]]) -> None:
    world, parallel, precision = case
    values: Values = settings(
        folder,
        steps=STEPS,
        parallel=parallel,
        precision=precision,
        model={"tied_embeddings": True, "dropout": 0.1},
        batch={"micro_size": 2},
        checkpoint={"every": SAVED},
    )
    run = folder / "run"
    assert ranks.run(world, train, values) == [0] * world
    whole, files = metrics(run), _files(run)
    (run / "metrics.jsonl").unlink()
    keep_only(run / "checkpoints", SAVED)
    if precision["dtype"] == "fp16":
        _check_that_it_was_in_the_middle_of_overflows(run, whole)
    assert ranks.run(world, train, values) == [0] * world
    resumed = metrics(run)
    assert list(resumed) == list(range(SAVED + 1, STEPS + 1))
    for step, record in resumed.items():
        for key in ("loss", "z_loss", "grad_norm", "loss_scale", "skipped", "learning_rate", "data_step"):
            assert record[key] == whole[step][key], (step, key)
    assert _files(run) == files


def _files(run: Path) -> Any:
    """Checksums of the tensors after the last step, and the state beside them."""
    last = run / f"checkpoints/step_{STEPS:08d}"
    index, manifest = (json.loads((last / name).read_text()) for name in ("index.json", "manifest.json"))
    return index, manifest["state"]


def _check_that_it_was_in_the_middle_of_overflows(run: Path, whole: dict[int, dict[str, Any]]) -> None:
    state = json.loads((run / f"checkpoints/step_{SAVED:08d}/manifest.json").read_text())["state"]
    skipped = [record["skipped"] for record in whole.values()]
    assert all(skipped[: SAVED + 1]) and not skipped[-1], skipped
    assert state["loss_scaler"]["cur_hysteresis"] == 1
