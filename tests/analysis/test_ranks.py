"""A trained run on several ranks against the same in one process: the same texts and losses, whatever the layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_stable.analysis.evaluation import evaluate_each, open_data
from megatron_stable.analysis.generation import Sampling, generate_each
from megatron_stable.analysis.ranks import layout
from megatron_stable.analysis.trained import Trained, open_on_ranks, open_run
from megatron_stable.checkpoint.model import load_model
from megatron_stable.errors import ConfigError
from megatron_stable.parallel.lifeline import Lifeline
from tests.commands.conftest import SmallDemo, small
from tests.harness.ranks import Ranks, RankError

__all__ = ["small"]
PROMPTS = ["def ", "import os\n" * 60, "class A:\n    def __init__(self"]
SAMPLINGS = [Sampling(1.0, 0.9, 3), Sampling(0), Sampling(1.0, 0.9, 5)]


def texts(trained: Trained) -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in PROMPTS]
    for number, token in generate_each(trained, PROMPTS, 70, SAMPLINGS):  # past the window
        ids[number].append(token)
    return ids


def used(run: Path, given: list[str], generates: bool) -> Any:
    """On a rank: what it makes of prompts, and of the run's validation data."""
    lifeline = Lifeline(100.0)
    trained = open_on_ranks(run, None, None, lifeline, given, replicas=not generates)
    made = texts(trained) if generates else None
    found, whole = evaluate_each(trained, {"": open_data(trained)}, 2, micro_size=3)
    held = sum(weight.numel() for weight in trained.model.parameters())
    lifeline.leave()
    return made, whole, list(found), held


@pytest.mark.parametrize("tensor, pipeline, data", [(2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 2)])
def test_ranks_give_what_one_process_gives(
    ranks: Ranks, small: SmallDemo, tensor: int, pipeline: int, data: int
) -> None:
    given = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    results = ranks.run(tensor * pipeline * data, used, small.run, given, data == 1)
    trained = open_run(small.run)
    wanted = texts(trained) if data == 1 else None
    _, whole = evaluate_each(trained, {"": open_data(trained)}, 2)
    for made, found, names, _ in results:
        assert made == wanted
        assert (found.tokens, found.bytes, names) == (whole.tokens, whole.bytes, [""])
        assert found.loss == pytest.approx(whole.loss, rel=1e-5)
        assert found.standard_error == pytest.approx(whole.standard_error, rel=1e-4)
    # no rank holds more than its part: blocks are split evenly, and the embedding is at one end of two stages
    full = sum(weight.numel() for weight in trained.model.parameters())
    assert max(held for *_, held in results) < 0.75 * full
