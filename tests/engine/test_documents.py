"""Documents stay apart and samples are left out on every layout as in the plain model, which runs each document alone;
and that costs the step neither a collective nor a read from the device."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache, partial
from typing import Any

import pytest
import torch

from megatron_stable.config.schema import Config
from megatron_stable.engine.outcome import Refused
from tests.engine.layouts import (
    VOCAB,
    assemble,
    global_batches,
    initial_parameters,
    make_config,
    train_on_ranks,
    unpadded,
    update_error,
)
from tests.harness.ranks import Ranks
from tests.reference import documents, optimizer
from tests.reference.optimizer import Trained

TRAINED, RATE, END, LEFT_OUT = 3, 3e-3, 0, (2, 5)
Case = dict[str, Any]
MODELS: dict[str, Case] = {
    "capped": {"recipe": "qk_norm_cap", "kv_heads": 2},
    "learned": {"positions": "learned", "bias": True},
    "sigma_clip": {"recipe": "sigma_reparam", "attention_clip": (-0.05, 1.1), "attention_temperature": 2.0},
}
# (ranks, model, what else of it, layout, samples left out)
CASES: dict[str, tuple[int, str, Case, Case, bool]] = {
    "alone": (1, "capped", {}, {}, True),
    "tp2-sp-learned": (2, "learned", {}, {"tensor": 2, "sequence": True}, True),
    "tp4-pp2-sp": (8, "learned", {}, {"tensor": 4, "pipeline": 2, "sequence": True}, False),
    "pp4-recomputed": (4, "capped", {"activation_checkpointing": "full"}, {"pipeline": 4}, False),
    "pp2-dp2-left-out": (4, "capped", {"activation_checkpointing": 2}, {"pipeline": 2}, True),
    "tp2-pp2-sigma": (4, "sigma_clip", {}, {"tensor": 2, "pipeline": 2}, True),
    "dp2-zero2": (2, "sigma_clip", {}, {"zero_stage": 2}, True),
    "dp2-zero3-recomputed": (2, "learned", {"activation_checkpointing": "full"}, {"zero_stage": 3}, False),
    "compiled": (1, "capped", {"compile": True}, {}, False),
}


def to_config(model: Case, parallel: Case, filtered: bool, mask: bool = True) -> Config:
    data = {"document_mask": mask, "end_of_document": END if mask else None}
    if filtered:
        data["repetition_filter"] = 4  # the rows are marked already
    return make_config(model, parallel=parallel, data=data)


@lru_cache(maxsize=8)
def _reference(model: str, filtered: bool, mask: bool = True) -> Trained:
    config = to_config(MODELS[model], {}, filtered)
    batches = global_batches(TRAINED)
    for tokens in batches if filtered else ():
        tokens[LEFT_OUT, :] = ~tokens[LEFT_OUT, :]
    pairs = [(tokens[:, :-1], tokens[:, 1:]) for tokens in batches]
    parameters = {name: value.double() for name, value in initial_parameters(config).items()}
    each_alone = partial(documents.loss, end=END if mask else VOCAB)
    return optimizer.train(parameters, pairs, config, TRAINED, loss_of=each_alone)


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.full] if name == "compiled" else []) for name in CASES]
)
def test_training_equals_that_on_each_document_alone(ranks: Ranks, case: str) -> None:
    world, model, more, parallel, filtered = CASES[case]
    config = to_config({**MODELS[model], **more}, parallel, filtered)
    values = config.model_dump(mode="json")
    results = ranks.run(world, train_on_ranks, values, TRAINED, LEFT_OUT if filtered else (), timeout=200)
    expected = _reference(model, filtered)
    assert all(result["metrics"] == results[0]["metrics"] for result in results), "ranks disagree about the metrics"
    metrics, share = results[0]["metrics"], len(LEFT_OUT) / 8 if filtered else 0.0
    assert [m["left_out"] for m in metrics] == pytest.approx([share] * TRAINED)
    # the gradient is of a mean over all tokens, what is told of one over those that are predicted
    losses = [(m["loss"] + m["z_loss"]) * (1 - share) for m in metrics]
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    assert [m["grad_norm"] for m in metrics] == pytest.approx(expected.grad_norms, rel=1e-5)
    final = {key: unpadded(key, value).double() for key, value in assemble(results).items()}
    start = initial_parameters(config)
    for key, value in final.items():
        error = update_error(value, expected.parameters[key], start[key], RATE)
        assert error < 1e-3, f"the update of {key} is off by {error:.2e}"
    (held_out,) = global_batches(1, seed=9)
    inputs, targets = held_out[:, :-1], held_out[:, 1:]
    wanted = documents.loss(expected.parameters, inputs, targets, config.model, 0, 0, config.optimizer, END)
    assert results[0]["evaluation"] == pytest.approx(float(wanted), rel=1e-4)


def test_the_mask_and_the_filter_each_make_a_difference() -> None:
    kept, crossed, filtered = (_reference("capped", *how).losses for how in ((False,), (False, False), (True,)))
    assert kept != pytest.approx(crossed, rel=1e-4) and kept != pytest.approx(filtered, rel=1e-4)


def test_left_out_samples_have_no_gradient(ranks: Ranks) -> None:
    """Whatever their targets: a batch of them alone changes no weight but by decay."""
    config = to_config({}, {}, True)
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"weight_decay": 0.0})})
    values = config.model_dump(mode="json")
    (result,) = ranks.run(1, train_on_ranks, values, 1, tuple(range(8)), only=[0])
    assert result["metrics"][0]["loss"] == 0 and result["metrics"][0]["grad_norm"] == 0
    assert result["metrics"][0]["left_out"] == 1 and result["evaluation"] > 1
    assert ranks.run(1, loss_of_none, values) == [0.0], "a second opinion hears of them what was recorded"
    start = initial_parameters(config)
    for name, value in assemble([result]).items():
        assert torch.equal(unpadded(name, value), start[name])


def loss_of_none(values: dict[str, Any]) -> float:
    """On a rank: of a batch of which nothing is predicted."""
    from tests.engine.layouts import engine_on_rank, micro_batches

    with engine_on_rank(values) as engine:
        (loss,) = engine.evaluate([micro_batches(~global_batches(1)[0], engine.config, engine.topology)])
    return loss


def counted(configs: list[dict[str, Any]]) -> list[tuple[int, Counter[Any]]]:
    """On a rank, of each configuration: reads from the device, and collectives, in a step."""
    from tests.engine.layouts import engine_on_rank, micro_batches
    from tests.engine.test_host_reads import Reads
    from tests.scale.counting import Sent

    found = []
    for values in configs:
        with engine_on_rank(values) as engine:
            batch = micro_batches(global_batches(1)[0], engine.config, engine.topology)
            engine.train_step(1, batch, 1e-3)
            with Reads() as reads, Sent() as sent:
                engine.train_step(2, batch, 1e-3, lambda metrics: Refused(True))
            found.append((reads.where.total(), sent.calls))
    return found


@pytest.mark.parametrize("parallel", [{"pipeline": 2}, {"tensor": 2, "sequence": True}], ids=["pp2", "tp2-sp"])
def test_the_mask_adds_no_read_and_no_collective(ranks: Ranks, parallel: Case) -> None:
    configs = [
        make_config(
            {"recipe": "qk_norm"},
            parallel=parallel,
            precision={"dtype": "bf16"},
            data={"document_mask": mask, "end_of_document": END if mask else None},
        ).model_dump(mode="json")
        for mask in (False, True)
    ]
    for (reads, sent), (masked_reads, masked_sent) in ranks.run(2, counted, configs, timeout=200):
        assert reads == masked_reads
        assert sent == masked_sent and sent
