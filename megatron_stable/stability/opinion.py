"""A second opinion on a rise of the loss: is it in the data, or in the state of the model?

A curve cannot tell; a trainer can, for it holds both. It asks one and the same state of the model what it makes,
forward only, of batches from before the rise and of recent ones. With the losses as they were recorded in training,

    rise   = recorded(recent) - recorded(old)      what is to be explained
    gap(s) = loss(recent; s) - loss(old; s)        what a state s finds of it in the data, by the same weights

all as means over batches, nats per token. If the data changed, any state sees it, and gap = rise; if the state changed,
old batches have become as bad as recent ones, and gap = 0. So the data are to blame where gap >= 3/4 rise, and where
the gap is less there is damage, whether or not the data have changed as well. Dropout, the schedule, and that the model
has trained on these batches since change both losses of a gap alike, and drop out.

The state at hand is asked first, which costs a few forward passes. What speaks against the data is not believed from it
alone: a model that learns a new kind of text fast forgets the old one as fast, and then finds both equally hard. A
healthy checkpoint from before the rise has forgotten nothing, so its gap decides. Only where it had not learnt the old
batches yet (it is worse on them than the state at hand), that it finds no gap says nothing.

    rise - gap(s) = mean over recent (recorded - loss now) - mean over old (recorded - loss now)

is a difference of paired differences, in which how hard a batch is drops out: a few batches are enough, and the spread
of the pairs gives the standard error. docs/benchmarks.md has error rates (`benchmarks/second_opinion.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite, sqrt
from statistics import fmean, variance
from typing import Literal, NamedTuple

BATCHES = 4  # of each kind
APART = 4  # steps between old batches: neighbours of the onset may belong to the rise already
# of the rise: in runs of benchmarks/second_opinion.py a healthy checkpoint's gap was 1.4 to 6.2 times a rise that was
# the data's (the model had learnt some of them by then), and at most 0.70 of one that damage had a part in
PART = 0.75
SURE = 2.0  # standard errors between a finding and what it is compared with
REMEMBERED = 512  # steps whose losses are kept

Verdict = Literal["data", "state", "undecided"]


class Recorded(NamedTuple):
    """A batch: the step that trained on it, and its loss then, nats per token."""

    step: int
    loss: float


class Question(NamedTuple):
    """What is to be explained: a rise that began at step ``onset``, from ``old`` batches to ``recent`` ones. Damage of
    less than ``least``, nats per token, is not worth a verdict."""

    onset: int
    old: tuple[Recorded, ...]
    recent: tuple[Recorded, ...]
    least: float = 0.0

    @property
    def rise(self) -> float:
        """Nats per token."""
        return fmean(batch.loss for batch in self.recent) - fmean(batch.loss for batch in self.old)

    @property
    def steps(self) -> tuple[int, ...]:
        """Of the batches to be asked about, old ones first."""
        return tuple(batch.step for batch in (*self.old, *self.recent))


class Answer(NamedTuple):
    """What one state says.

    Attributes:
        gap: Its loss on recent batches over that on old ones, nats per token.
        error: Standard error of ``rise - gap``.
        behind: Its loss on old batches over the recorded one.
        chance: Standard error of ``gap`` by how hard batches happen to be; a gap within it is no change of the data.
    """

    gap: float
    error: float
    behind: float
    chance: float = 0.0


class Opinion(NamedTuple):
    """The second opinion.

    Attributes:
        verdict: What is to blame.
        question: On what.
        now: What the state at hand said.
        healthy: What the checkpoint of step ``checkpoint`` said, if it was asked and had something to say.
        checkpoint: Its step.
    """

    verdict: Verdict
    question: Question
    now: Answer
    healthy: Answer | None = None
    checkpoint: int | None = None


def pose(memory: Iterable[Recorded], onset: int, least: float = 0.0, every: int = APART) -> Question | None:
    """The question to ask about a rise that began at ``onset``; ``None`` where too little is remembered.

    Args:
        memory: Steps in order, the latest last, with finite losses.
        onset: The first step of the rise, or of a slow one the step of the lowest level.
        least: Damage, nats per token, that is worth a verdict.
        every: Steps between old batches.
    """
    known = list(memory)
    since = next((i for i, batch in enumerate(known) if batch.step >= onset), len(known))
    if since == 0:  # it began before what is remembered: take the oldest
        since = APART * BATCHES
    old, recent = usual(known[:since], every), known[since:][-BATCHES:]
    question = Question(onset, old, tuple(recent), least)
    return question if len(old) == len(recent) == BATCHES and question.rise > 0 else None


def usual(before: Sequence[Recorded], every: int = APART) -> tuple[Recorded, ...]:
    """Of the batches before a rise those to ask about, the latest first."""
    return tuple(before[-APART::-every][:BATCHES])


def answer(question: Question, losses: Sequence[float]) -> Answer:
    """What a state says, by its losses on the batches of ``question.steps``; not finite where it is broken."""
    count = len(question.old)
    old, recent = losses[:count], losses[count:]
    if not all(map(isfinite, losses)):
        return Answer(gap=0.0, error=0.0, behind=float("inf"))
    # what the batches have become worse by, each
    of_old = [now - then.loss for now, then in zip(old, question.old, strict=True)]
    of_recent = [now - then.loss for now, then in zip(recent, question.recent, strict=True)]
    error, chance = (sqrt(_of_mean(a) + _of_mean(b)) for a, b in ((of_old, of_recent), (old, recent)))
    return Answer(gap=fmean(recent) - fmean(old), error=error, behind=fmean(of_old), chance=chance)


def _of_mean(values: Sequence[float]) -> float:
    """The variance of a mean; 0 of a single value, whose spread nobody knows."""
    return variance(values) / len(values) if len(values) > 1 else 0.0


def explains(question: Question, said: Answer) -> bool:
    """Whether a state finds the rise in the data, beyond doubt."""
    return _harder(said) and said.gap - PART * question.rise > SURE * said.error


def from_before(question: Question, healthy: Answer, now: Answer | None = None) -> Verdict | None:
    """What a healthy checkpoint from before the rise decides; ``None``: it finds no gap in data that it cannot know, as
    it is worse on the old batches than the state at hand or, where that was not asked, by more than the rise."""
    if healthy.gap >= PART * question.rise and _harder(healthy):
        return "data"
    damaged = question.rise - healthy.gap > SURE * healthy.error
    return "state" if damaged and healthy.behind < (question.rise if now is None else now.behind) else None


def _harder(said: Answer) -> bool:
    return said.gap > SURE * said.chance


def decide(question: Question, now: Answer, healthy: Answer | None = None, checkpoint: int | None = None) -> Opinion:
    """The opinion, by what the state at hand and, if it was asked, a healthy checkpoint said."""
    if explains(question, now):
        return Opinion("data", question, now)
    worth = question.rise - now.gap >= question.least
    if healthy is not None and (verdict := from_before(question, healthy, now)):
        return Opinion(verdict if worth or verdict == "data" else "undecided", question, now, healthy, checkpoint)
    # a gap below 0 is not damage, which spares no batch, but forgetting
    sure = question.rise / 2 - abs(now.gap) > SURE * now.error
    return Opinion("state" if sure and worth else "undecided", question, now)
