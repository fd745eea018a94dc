"""Any layout resumes what any layout wrote: the tensors bit for bit, the next losses within rounding."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.stored import contents, equal, keep_only
from tests.harness.ranks import Ranks
from tests.training.runs import Values, curve, layout, settings, train

# each resumes what the one before it wrote, and the first what the last did; (world, parallel, micro batch size)
Layout = tuple[int, dict[str, Any], int]
CHAIN: dict[str, Layout] = {
    "one": (1, layout(), 1),
    "tp2": (2, layout(tensor=2), 2),
    "pp2": (2, layout(pipeline=2), 1),
    "dp2-zero3": (2, layout(zero_stage=3), 1),
    "tp4": (4, layout(tensor=4), 4),
    "pp4": (4, layout(pipeline=4), 2),
    "tp2-dp2-zero2": (4, layout(tensor=2, zero_stage=2), 1),
    "tp2-pp2-sp": (4, layout(tensor=2, pipeline=2, sequence=True), 2),
    "dp2-zero1": (2, layout(), 4),
    "pp2-dp2": (4, layout(pipeline=2), 1),
    "tp2-dp2-zero3": (4, layout(tensor=2, zero_stage=3), 1),
}
AHEAD = 5


def chain_settings(folder: Path, name: str, steps: int, place: Layout, **sections: Any) -> Values:
    _, parallel, micro = place
    return settings(
        folder, name, steps, parallel=parallel, batch={"micro_size": micro}, model={"tied_embeddings": True}, **sections
    )


@pytest.mark.full  # which the bits of each layout, below, and the equivalence of layouts imply
def test_each_layout_resumes_what_another_wrote(ranks: Ranks, folder: Path) -> None:
    """Every run trains ten steps: five that its predecessor has trained, too, and five that its successor will."""
    constant = {"kind": "constant", "warmup_steps": 0}  # so that the number of steps may differ
    before: Path | None = None
    for i, (name, place) in enumerate([*CHAIN.items(), ("one again", CHAIN["one"])]):
        steps = AHEAD * (i + 2)
        run = folder / name.replace(" ", "_")
        values = chain_settings(folder, run.name, steps, place, schedule=constant)
        if before is not None:
            shutil.copytree(before / "checkpoints", run / "checkpoints")
            keep_only(run / "checkpoints", AHEAD * i)
        assert ranks.run(place[0], train, values) == [0] * place[0], name
        if before is not None:
            expected, got = curve(before), curve(run)
            overlap = range(AHEAD * i + 1, AHEAD * (i + 1) + 1)
            for step in overlap:
                assert got[step] == pytest.approx(expected[step], rel=1e-6), f"{name}, step {step}"
            assert list(got) == list(range(AHEAD * i + 1, steps + 1))
        before = run


def save_again(values: Values, root: str) -> None:
    """On a rank: resume, and save what was loaded, by this layout, below ``root``."""
    from megatron_stable.checkpoint.health import Retention
    from megatron_stable.checkpoint.saver import Saver
    from megatron_stable.config.schema import Config
    from megatron_stable.parallel.topology import Topology
    from megatron_stable.records.callbacks import Callbacks
    from megatron_stable.records.directory import RunDirectory
    from megatron_stable.training.trainer import Trainer

    config = Config.model_validate(values)
    topology = Topology(config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence)
    trainer = Trainer(config, topology, RunDirectory(config.run.directory), Callbacks())
    trainer.resume()
    trainer.checkpoints.saver = Saver(Path(root), Retention(9), print)
    trainer.save()
    trainer.checkpoints.saver.finish()


@pytest.fixture(scope="module")
def sources(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two layouts that cut tensors in every way: TP x ZeRO-3, and PP."""
    from tests.training.runs import write_data

    folder = tmp_path_factory.mktemp("sources")
    write_data(folder / "data")
    for name in ("tp2-dp2-zero3", "pp2-dp2"):
        world = CHAIN[name][0]
        values = chain_settings(folder, name, 2, CHAIN[name], schedule={"kind": "constant", "warmup_steps": 0})
        assert ranks.run(world, train, values) == [0] * world
    return folder


TARGETS = {"tp4": ("tp2-dp2-zero3", "fp32"), "dp2-zero3": ("pp2-dp2", "bf16"), "tp2-pp2-sp": ("tp2-dp2-zero3", "bf16")}


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_loaded_is_what_was_saved_bit_for_bit(ranks: Ranks, sources: Path, target: str) -> None:
    source, dtype = TARGETS[target]
    values = chain_settings(sources, source, 2, CHAIN[target], precision={"dtype": dtype})
    again = sources / f"{target}-again"
    ranks.run(CHAIN[target][0], save_again, values, str(again))
    step = "step_00000002"
    loaded = contents(again / step)
    assert equal(loaded, contents(sources / source / "checkpoints" / step))
    assert all(float(tensor.abs().sum()) > 0 for key, tensor in loaded.items() if key.endswith("exp_avg_sq"))


def test_another_precision_goes_on_close_by(ranks: Ranks, folder: Path) -> None:
    place = CHAIN["tp2"]
    first = chain_settings(folder, "run", 10, place)
    assert ranks.run(2, train, first) == [0, 0]
    expected = curve(folder / "run")
    for dtype, bound in (("bf16", 2e-2), ("fp16", 2e-3)):
        values = chain_settings(folder, dtype, 10, place, precision={"dtype": dtype, "initial_scale_power": 8})
        shutil.copytree(folder / "run/checkpoints", folder / dtype / "checkpoints")
        keep_only(folder / dtype / "checkpoints", 5)
        assert ranks.run(2, train, values) == [0, 0]
        got = curve(folder / dtype)
        for step in range(6, 11):
            assert got[step][0] == pytest.approx(expected[step][0], rel=bound), (dtype, step)
            assert got[step][0] != expected[step][0]


def test_the_chain_covers_what_it_promises() -> None:
    seen: dict[str, set[int]] = {"tensor": set(), "pipeline": set(), "zero_stage": set(), "data": set()}
    for world, parallel, _ in CHAIN.values():
        for key in ("tensor", "pipeline", "zero_stage"):
            seen[key].add(parallel[key])
        seen["data"].add(world // (parallel["tensor"] * parallel["pipeline"]))
    assert seen == {"tensor": {1, 2, 4}, "pipeline": {1, 2, 4}, "zero_stage": {1, 2, 3}, "data": {1, 2}}
    changes = itertools.pairwise([*CHAIN.values(), CHAIN["one"]])
    assert all(a[1] != b[1] or a[0] != b[0] for a, b in changes)
