"""The state of recipes, which is the vectors of sigmaReparam: resume bit for bit, other layouts, one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_stable.analysis.evaluation import evaluate, open_data
from megatron_stable.analysis.trained import Trained
from megatron_stable.checkpoint.format import read_manifest
from megatron_stable.checkpoint.model import load_model
from megatron_stable.checkpoint.reader import Reader
from megatron_stable.config.recipes import RECIPES
from megatron_stable.model import sigma
from tests.checkpoint.stored import keep_only
from tests.harness.ranks import Ranks
from tests.training.runs import Values, curve, layout, metrics, settings, train

STEPS, SAVED = 6, 3
MODEL = {"recipe": "sigma_reparam", "layers": 2, "activation": "swiglu"}
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "dp2-zero2-fp32": (layout(zero_stage=2), "fp32", "sigma_reparam"),
    "tp2-sp-bf16": (layout(tensor=2, sequence=True), "bf16", "sigma_reparam"),
    "pp2-fp32": (layout(pipeline=2), "fp32", "sigma_reparam"),
}
STATELESS = {name: (layout(tensor=2, sequence=True), "fp32", name) for name in RECIPES if name != "sigma_reparam"}


def sigma_settings(folder: Path, name: str, parallel: dict[str, Any], dtype: str, **sections: Any) -> Values:
    return settings(
        folder,
        name,
        STEPS,
        parallel=parallel,
        precision={"dtype": dtype},
        model=MODEL,
        batch={"micro_size": 4},
        checkpoint={"every": SAVED},
        **sections,
    )


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name) for name, case in CASES.items()]
    + [pytest.param(case, id=name, marks=pytest.mark.full) for name, case in STATELESS.items()],
)
def test_resumes_bit_for_bit(ranks: Ranks, folder: Path, case: tuple[dict[str, Any], str, str]) -> None:
    parallel, dtype, recipe = case
    values = sigma_settings(folder, "run", parallel, dtype)
    values["model"]["recipe"] = recipe
    run = folder / "run"
    assert ranks.run(2, train, values) == [0, 0]
    whole, files = curve(run), _files(run)
    (run / "metrics.jsonl").unlink()
    keep_only(run / "checkpoints", SAVED)
    assert ranks.run(2, train, values) == [0, 0]
    resumed = curve(run)
    assert list(resumed) == list(range(SAVED + 1, STEPS + 1))
    assert resumed == {step: whole[step] for step in resumed}
    assert _files(run) == files
    last = run / f"checkpoints/step_{STEPS:08d}"
    vectors = [name for name in Reader(last, read_manifest(last)).names() if name.endswith(("reparametrize.u", ".v"))]
    expected = 2 * 4 * 2 if recipe == "sigma_reparam" else 0
    assert len(vectors) == expected, "two vectors for each of four matrices in each of two blocks"


def _files(run: Path) -> Any:
    """Checksums of the tensors after the last step, and the state beside them."""
    last = run / f"checkpoints/step_{STEPS:08d}"
    index, manifest = (json.loads((last / name).read_text()) for name in ("index.json", "manifest.json"))
    return index, manifest["state"]


def test_another_layout_and_one_process_know_the_same_function(ranks: Ranks, folder: Path) -> None:
    shutil.copy(folder / "data.bin", folder / "held.bin")
    shutil.copy(folder / "data.idx", folder / "held.idx")
    data = {"train": str(folder / "data"), "validation": str(folder / "held")}
    # a rate so high that a spectral norm of before the last step would be another
    optimizer, schedule = {"learning_rate": 3e-2, "eps": 1e-3}, {"kind": "constant", "warmup_steps": 2}
    more = {"data": data, "evaluation": {"batches": 2}, "optimizer": optimizer, "schedule": schedule}
    one = sigma_settings(folder, "one", layout(), "fp32", **more)
    split = sigma_settings(folder, "split", layout(tensor=2), "fp32", **more)
    assert ranks.run(1, train, one) == [0]
    shutil.copytree(folder / "one/checkpoints", folder / "split/checkpoints")
    keep_only(folder / "split/checkpoints", SAVED)
    assert ranks.run(2, train, split) == [0, 0]
    for step in range(SAVED + 1, STEPS + 1):
        assert curve(folder / "split")[step] == pytest.approx(curve(folder / "one")[step], rel=1e-5)
    config, model, _ = load_model(folder / "split")
    trained = Trained(config, model, None, STEPS)
    loss = evaluate(trained, open_data(trained), batches=2).loss
    assert loss == pytest.approx(metrics(folder / "split")[STEPS]["validation_loss"], rel=1e-5)
    with torch.no_grad():  # the vectors matter: with others the function is another
        for _, vector in sigma.vectors(model):
            vector.copy_(torch.nn.functional.normalize(torch.randn(vector.numel()), dim=0).view_as(vector).abs())
    sigma.measure(model)
    assert evaluate(trained, open_data(trained), batches=2).loss != pytest.approx(loss, rel=1e-3)
