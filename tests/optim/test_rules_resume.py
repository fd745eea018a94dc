"""What the rules remember is in the checkpoint: a run resumes bit for bit on its layout, and close by on others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.stored import keep_only
from tests.harness.ranks import Ranks
from tests.optim.test_rules_layouts import RULES
from tests.training.runs import Values, curve, layout, settings, train, write_data

STEPS, SAVED = 6, 3
STABLE_ADAGC = {
    "name": "stable_adamw", "clipping": "adagc", "clipping_warmup": 2, "clipping_threshold": 0.9, "mu_centering": True,
}  # fmt: skip
MUON_ZCLIP = {"name": "muon", "clipping": "zclip", "clipping_warmup": 2, "clipping_threshold": 0.01}
QK_CLIP = {**MUON_ZCLIP, "qk_clip": 1.0, "no_decay": ["embeddings"]}  # gives stages different groups of parameters
SPAM = {"momentum_reset_every": 5, "momentum_reset_warmup": 3, "spike_threshold": 10.0, "mu_centering": True}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "stable-adagc-pp2": (STABLE_ADAGC, layout(pipeline=2), {"tied_embeddings": True}, "bf16"),
    "muon-qk-clip-dp2-zero3": (
        QK_CLIP, layout(zero_stage=3), {"kv_heads": 2, "activation": "swiglu", "recipe": "soft_temp"}, "fp32"
    ),
    "muon-qk-clip-pp2": (QK_CLIP, layout(pipeline=2), {"recipe": "baseline"}, "fp16"),
    "spam-tp2": (SPAM, layout(tensor=2), {}, "fp16"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path / "data")
    return tmp_path


def run_of(folder: Path, name: str, optimizer: dict[str, Any], place: dict[str, Any], **sections: Any) -> Values:
    own = {"eps": 1e-3, "learning_rate": 3e-3, **optimizer}
    checkpoint = {"every": SAVED, "keep": 9}
    batch = {"micro_size": 4}
    return settings(folder, name, STEPS, optimizer=own, parallel=place, checkpoint=checkpoint, batch=batch, **sections)


def saved(run: Path, step: int = STEPS) -> Any:
    """Checksums of all tensors, and the state beside them."""
    folder = run / f"checkpoints/step_{step:08d}"
    index, manifest = (json.loads((folder / name).read_text()) for name in ("index.json", "manifest.json"))
    return index, manifest["state"]


@pytest.mark.parametrize("case", CASES)
def test_resumes_bit_for_bit(ranks: Ranks, folder: Path, case: str) -> None:
    optimizer, place, model, dtype = CASES[case]
    precision = {"dtype": dtype, "initial_scale_power": 10}
    values = run_of(folder, "run", optimizer, place, model=model, precision=precision)
    resumes(ranks, folder, values)
    if "clipping" in optimizer:
        before, after = (saved(folder / "run", step)[1]["optimizer"] for step in (SAVED, STEPS))
        assert before != after, "there is nothing to remember"


@pytest.mark.full
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("place", [layout(tensor=2), layout(pipeline=2)], ids=["tp2", "pp2"])
def test_every_rule_resumes_bit_for_bit(ranks: Ranks, folder: Path, place: dict[str, Any], rule: str) -> None:
    optimizer, model, sections = RULES[rule]
    resumes(ranks, folder, run_of(folder, "run", optimizer, place, model={"recipe": "baseline", **model}, **sections))


def resumes(ranks: Ranks, folder: Path, values: Values) -> None:
    assert ranks.run(2, train, values) == [0, 0]
    whole, losses = saved(folder / "run"), curve(folder / "run")
    (folder / "run/metrics.jsonl").unlink()
    keep_only(folder / "run/checkpoints", SAVED)
    assert ranks.run(2, train, values) == [0, 0]
    assert saved(folder / "run") == whole
    assert curve(folder / "run") == {step: losses[step] for step in range(SAVED + 1, STEPS + 1)}


@pytest.mark.parametrize("optimizer", [STABLE_ADAGC, MUON_ZCLIP], ids=["stable-adagc", "muon-zclip"])
def test_another_layout_goes_on_where_it_was(ranks: Ranks, folder: Path, optimizer: dict[str, Any]) -> None:
    """From TP 2 to PP 2: the statistics of each parameter find their way, too."""
    assert ranks.run(2, train, run_of(folder, "before", optimizer, layout(tensor=2))) == [0, 0]
    shutil.copytree(folder / "before/checkpoints", folder / "after/checkpoints")
    keep_only(folder / "after/checkpoints", SAVED)
    assert ranks.run(2, train, run_of(folder, "after", optimizer, layout(pipeline=2))) == [0, 0]
    expected, got = curve(folder / "before"), curve(folder / "after")
    for step in range(SAVED + 1, STEPS + 1):
        assert got[step] == pytest.approx(expected[step], rel=1e-5), step
    one, other = (saved(folder / name)[1]["optimizer"] for name in ("before", "after"))
    if "gamma" in one:
        assert other["gamma"] == pytest.approx(one["gamma"], rel=1e-3) and len(one["gamma"]) > 20
    else:
        assert other.pop("seen") == pytest.approx(one.pop("seen"), rel=1e-5)
        assert other.pop("rule") == one.pop("rule") == "zclip"
        assert other == pytest.approx(one, rel=1e-3)


def resume_with(values: Values) -> Any:
    """On a rank: what resuming says, and what the optimizer then has."""
    from megatron_stable.config.schema import Config
    from megatron_stable.parallel.topology import Topology
    from megatron_stable.records.callbacks import Callback, Callbacks
    from megatron_stable.records.directory import RunDirectory
    from megatron_stable.training.trainer import Trainer

    config, said = Config.model_validate(values), []
    parallel = config.parallel
    topology = Topology(parallel.tensor, parallel.pipeline, parallel.sequence)

    class Listener(Callback):
        def message(self, text: str) -> None:
            said.append(text)

    trainer = Trainer(config, topology, RunDirectory(config.run.directory), Callbacks(Listener()))
    trainer.resume()
    optimizer = trainer.engine.optimizer
    found = {
        state.shard.place.name: (
            {kind: float(tensor.abs().sum()) for kind, tensor in state.tensors.items()},
            float(optimizer.state[state.shard.flat].get("step", -1)),
        )
        for state in trainer.engine.shards()
    }
    return said, found, optimizer.updates


def test_another_rule_goes_on_with_what_there_is_and_says_so(ranks: Ranks, folder: Path) -> None:
    assert ranks.run(1, train, run_of(folder, "run", {}, layout())) == [0]
    muon = run_of(folder, "run", MUON_ZCLIP, layout())
    said, found, updates = ranks.run(1, resume_with, muon)[0]
    assert updates == STEPS
    assert any("moments start at zero" in text and "optimizer.name muon" in text for text in said), said
    assert any("optimizer.clipping zclip" in text and "has none" in text for text in said), said
    moments, step = found["blocks.0.mlp.fc1.weight"]
    assert moments["momentum"] == 0 < moments["weight"] and step == -1
    moments, step = found["head.weight"]
    assert moments["exp_avg_sq"] == 0 and step == 0
    # and back: Adam's bias correction starts anew, as its moments do, and goes on from there
    muon["run"]["steps"] = STEPS + 3
    assert ranks.run(1, train, muon) == [0]
    said, found, _ = ranks.run(1, resume_with, run_of(folder, "run", {}, layout()))[0]
    assert any("moments start at zero" in text for text in said), said
    moments, step = found["blocks.0.mlp.fc1.weight"]
    assert moments["exp_avg_sq"] == 0 and step == 0
    plain = run_of(folder, "run", {}, layout())
    plain["run"]["steps"] = STEPS + 5
    assert ranks.run(1, train, plain) == [0]
    _, found, updates = ranks.run(1, resume_with, plain)[0]
    assert updates == STEPS + 5
    moments, step = found["blocks.0.mlp.fc1.weight"]
    assert moments["exp_avg_sq"] > 0 and step == 2
