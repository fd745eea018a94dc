"""A run for the verbs that use one: the demo, made very small."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_stable.training.demo import SETTINGS, Demo

SMALL = (
    *SETTINGS,
    "model.layers=2",
    "model.hidden=64",
    "optimizer.learning_rate=4.0e-3",
    "schedule.warmup_steps=2",
    "run.steps=12",
    "evaluation.every=4",
    "evaluation.batches=2",
)


class SmallDemo(NamedTuple):
    """The demo, where it is, what it said, and with what exit code."""

    demo: Demo
    said: list[str]
    code: int

    @property
    def directory(self) -> Path:
        """Its directory."""
        return self.demo.directory

    @property
    def run(self) -> Path:
        """The directory of its second run, the one that trains through."""
        return self.demo.directory / "qk_norm_cap"


def small_demo(directory: Path, said: list[str], ranks: int = 2) -> Demo:
    """A demo of seconds."""
    return Demo(directory, ranks, SMALL, batch=8, vocab_size=400, text_bytes=1_500_000, say=said.append)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallDemo:
    """A finished demo, trained on two real ranks. Tests leave it as it is."""
    said: list[str] = []
    demo = small_demo(tmp_path_factory.mktemp("small") / "demo", said)
    return SmallDemo(demo, said, demo())
