"""Runs in which something goes wrong on purpose, and what each rank decided."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from megatron_stable.config.schema import Config
from megatron_stable.data import Batches, Course, open_dataset
from megatron_stable.data.indexed import dataset_paths
from tests.training.runs import VOCAB, Values, settings, train

RARE = 6  # tokens
QUICK = {
    "mode": "recover", "window": 64, "warmup": 20, "patience": 6, "rollback_steps": 5, "skip_steps": 10,
    "max_consecutive_drops": 4, "near_steps": 50, "learning_rate_factors": [1.0], "clip_factors": [1.0],
}  # fmt: skip


def run_of(folder: Path, name: str, steps: int, **sections: Any) -> Values:
    """Settings of a run that is guarded closely."""
    guard = {**QUICK, **sections.pop("guard", {})}
    # steps are so fast that one which is still being written would put off the next
    checkpoint = {"every": 5, "keep": 30, "healthy_after": 3, "max_failed_saves": 1}
    constant = {"kind": "constant", "warmup_steps": 2}
    return settings(folder, name, steps, guard=guard, checkpoint=checkpoint, schedule=constant, **sections)


def train_with_faults(values: Values, faults: list[dict[str, Any]]) -> tuple[int, list[Any]]:
    """On a rank: the exit code, and what the guard said there, in order: (step, taken, trouble, scores) of each step,
    (step, None, trouble, opinion) of each second opinion."""
    from megatron_stable.engine.faults import VARIABLE
    from megatron_stable.stability.guard import Guard

    os.environ[VARIABLE] = json.dumps(faults)
    said: list[Any] = []
    judge, hear = Guard.judge, Guard.hear

    def judging(self: Guard, step: int, *seen: Any) -> Any:
        found = judge(self, step, *seen)
        said.append((step, found.take, found.trouble, found.scores))
        return found

    def hearing(self: Guard, step: int, opinion: Any, sources: Any) -> Any:
        found = hear(self, step, opinion, sources)
        said.append((step, None, found.trouble, opinion))
        return found

    Guard.judge, Guard.hear = judging, hearing  # type: ignore[method-assign]
    try:
        return train(values), said
    finally:
        Guard.judge, Guard.hear = judge, hear  # type: ignore[method-assign]


def poison(values: Values, data_steps: range) -> None:
    """Overwrite the samples of some data steps with the ``RARE`` last tokens, which occur nowhere else."""
    config = Config.model_validate(values)
    assert isinstance(config.data.train, str)
    dataset = open_dataset(config.data.train, config.model.sequence_length, config.run.seed)
    batches = Batches(dataset, Course.begin(config.batch.global_size), config.batch.micro_size)
    tokens = np.memmap(dataset_paths(Path(config.data.train))[0], dtype=np.uint16, mode="r+")
    length, drawn = config.model.sequence_length, np.random.default_rng(0)
    for step in data_steps:
        for k in batches.samples(step):
            start = dataset.locate(k).start
            tokens[start : start + length] = VOCAB - 1 - drawn.integers(0, RARE, length)
    tokens.flush()
