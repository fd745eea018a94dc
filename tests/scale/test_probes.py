"""What probes cost a rank of many, counted: bytes held, collectives and bytes sent, host reads."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_stable.config.schema import Config
from tests.engine.layouts import make_config
from tests.harness.ranks import Ranks
from tests.scale.counting import Sent

WORLD = 1024
MODEL = {"layers": 48, "hidden": 64, "heads": 8, "recipe": "qk_norm", "norm": "rmsnorm", "sequence_length": 64}


def count_on_rank(values: dict[str, Any]) -> dict[str, Any]:
    """On a rank that imagines the others: what a measured step sends beside one that is not, and what a record does."""
    import torch

    from megatron_stable.engine.engine import Engine
    from megatron_stable.engine.outcome import Refused
    from megatron_stable.parallel.topology import Topology
    from tests.engine.test_host_reads import Reads

    config = Config.model_validate(values)
    topology = Topology(config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence)
    engine = Engine(config, topology)
    tokens = torch.randint(0, config.model.vocab_size or 2, (1, config.model.sequence_length + 1))
    steps = {}
    for step, measured in enumerate((False, True, False, True), start=1):
        with Sent() as sent, Reads() as reads:
            engine.train_step(step, [tokens] * engine.accumulation, 1e-3, lambda m: Refused(True), measured=measured)
        steps[measured] = (dict(sent.calls), dict(sent.bytes), sum(reads.where.values()))
    with Sent() as sent:
        engine.probes.last()
    tensors = [engine.probes._sums, engine.probes._tops, engine.probes.activations.sums, engine.probes.parameters.sums]
    return {
        "steps": steps,
        "record": (dict(sent.calls), sum(sent.bytes.values())),
        "held": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }


@pytest.mark.parametrize("tensor", [1, 8])
def test_a_measured_step_sends_and_reads_nothing_more_and_a_record_two_small_reductions(
    ranks: Ranks, tensor: int
) -> None:
    config = make_config(
        MODEL,
        parallel={"tensor": tensor, "sequence": tensor > 1},
        precision={"dtype": "bf16"},
        batch={"global_size": 2 * WORLD // tensor, "micro_size": 1},
    )
    (found,) = ranks.run(WORLD, count_on_rank, config.model_dump(mode="json"), only=(WORLD - 1,))
    assert found["steps"][True] == found["steps"][False]
    calls, size = found["record"]
    assert calls == {("reduce_", WORLD): 2}
    assert size < 50_000, "bytes of 48 layers"
    assert found["held"] < 2_500_000, "bytes of fifty steps of 48 layers"
