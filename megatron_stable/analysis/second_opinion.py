"""Was a rise of the loss in the data, or in the state? The guard's second opinion, asked of a run that stands still.

The question is posed from ``metrics.jsonl``, and checkpoints answer it: see :mod:`megatron_stable.stability.opinion`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, isfinite, isnan, nan, sqrt
from statistics import fmean, stdev
from typing import Any, NamedTuple

from megatron_stable.numbers import finite
from megatron_stable.records.metrics import Record, batch_of, latest
from megatron_stable.stability.opinion import (
    APART,
    BATCHES,
    Answer,
    Question,
    Recorded,
    Verdict,
    decide,
    from_before,
    usual,
)

STANDS_OUT = 3.0  # standard errors by which the loss has to have risen before anybody is asked why


class Posed(NamedTuple):
    """A question, and where its batches are.

    Attributes:
        question: Its onset is the step in question.
        samples: Of each of its steps: [first, end) of each piece of its batch.
    """

    question: Question
    samples: dict[int, tuple[tuple[int, int], ...]]


class Heard(NamedTuple):
    """What the checkpoints of a run say to a question.

    Attributes:
        verdict: What is to blame.
        question: On what.
        answers: By the step of the checkpoint.
        now: The latest checkpoint that has trained on the step in question, if one was asked.
        healthy: The latest that has not.
    """

    verdict: Verdict
    question: Question
    answers: dict[int, Answer]
    now: int | None
    healthy: int | None

    @property
    def ignorant(self) -> bool:
        """Whether the healthy checkpoint was not heard, as it had not learnt the old batches yet."""
        return self.healthy is not None and from_before(self.question, self.answers[self.healthy]) is None

    def plain(self) -> dict[str, Any]:
        """For JSON; numbers that are not finite are null."""
        question = self.question
        return {
            "verdict": self.verdict,
            "onset": question.onset,
            "rise": finite(question.rise),
            "old": [{"step": step, "loss": loss} for step, loss in question.old],
            "recent": [{"step": step, "loss": finite(loss)} for step, loss in question.recent],
            "now": self.now,
            "healthy": self.healthy,
            "answers": [
                {"checkpoint": step, **{name: finite(value) for name, value in said._asdict().items()}}
                for step, said in self.answers.items()
            ],
        }


def pose(lines: Sequence[Record], record: Record | None) -> Posed | str:
    """The question about the loss of a step: its batch, and those after it that belong to the same rise, against usual
    batches from before it; or why there is none.

    Args:
        lines: ``metrics.jsonl``, in the order of writing.
        record: The line of the step; what was written before it counts as it stood then.
    """
    if record is None or isnan(_loss(record)):
        return "no loss is recorded of this step"
    at, onset = len(lines) - 1 - lines[::-1].index(record), record["step"]
    known = [line for line in latest(lines[:at]) if line["step"] < onset and isfinite(_loss(line))]
    before = [Recorded(line["step"], _loss(line)) for line in known][-APART * BATCHES :]
    old = usual(before)
    if len(old) < BATCHES:
        return f"too few losses are recorded before step {onset}: {len(before)}, and it takes {APART * BATCHES}"
    level, spread, loss = fmean(batch.loss for batch in old), stdev(batch.loss for batch in before), _loss(record)
    if not loss - level > STANDS_OUT * spread * sqrt(1 + 1 / len(old)):
        was = f"{fmean(batch.loss for batch in before):.4g} ± {spread:.2g} in the {len(before)} steps before"
        return f"the loss had not risen at step {onset}: it was {loss:.4g}, and {was}"
    recent = [Recorded(onset, loss)]
    for line in lines[at + 1 : at + BATCHES]:
        if line["step"] <= recent[-1].step or not (level + loss) / 2 <= _loss(line) < inf:
            break
        recent.append(Recorded(line["step"], _loss(line)))
    samples = {line["step"]: batch_of(line) or () for line in (*known, *lines[at : at + len(recent)])}
    question = Question(onset, old, tuple(recent))
    return Posed(question, {step: samples[step] for step in question.steps})


def hear(question: Question, answers: Mapping[int, Answer]) -> Heard:
    """The opinion, by what checkpoints said (at least one), each under its step."""
    now = max((step for step in answers if step >= question.onset), default=None)
    healthy = max((step for step in answers if step < question.onset), default=None)
    said = answers[healthy] if healthy is not None else None
    if now is not None:
        verdict = decide(question, answers[now], said, healthy).verdict
    else:
        assert said is not None
        verdict = from_before(question, said) or "undecided"
    return Heard(verdict, question, dict(answers), now, healthy)


def _loss(record: Record) -> float:
    """Infinite if it was not finite; NaN if it, or whose it was, is not recorded."""
    if "loss" not in record or batch_of(record) is None:
        return nan
    return inf if record["loss"] is None else float(record["loss"])
