"""Ask the model, and if need be an earlier state of it, about batches of a run; see stability/opinion.py."""

from __future__ import annotations

from megatron_stable.engine.engine import Engine
from megatron_stable.stability.opinion import Opinion, Question, answer, decide, explains
from megatron_stable.training.checkpoints import Checkpoints
from megatron_stable.training.source import Source


def second_opinion(question: Question, engine: Engine, source: Source, checkpoints: Checkpoints) -> Opinion:
    """The same on all ranks, and nothing has changed after it. Collective.

    Costs a forward pass over each batch of the question; where the state at hand does not find the rise in the data,
    also the reading of a healthy checkpoint's weights, and the same again.
    """

    def ask() -> list[float]:
        return engine.evaluate(source.step(step) for step in question.steps)

    now = answer(question, ask())
    if explains(question, now):
        return decide(question, now)
    with checkpoints.weights_before(question.onset) as step:
        return decide(question, now) if step is None else decide(question, now, answer(question, ask()), step)
