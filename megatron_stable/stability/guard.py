"""The guard: one verdict on each update before it is made, and a call for recovery when updates will not do.

It sees what all ranks know alike, loss and gradient norm of the step, so its decision is the same on all ranks
without a word between them. What a curve cannot tell it asks: a rise of the loss that stays comes with a question
(:mod:`megatron_stable.stability.opinion`), which whoever holds model and data answers.

::

    judge(step, …)  ──> Judgement(take, events, trouble, question)
                                                            │ answered by a few forward passes
    hear(step, opinion) ──> Judgement(events, trouble) <────┘
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from math import inf, isfinite
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from megatron_stable.config.schema import GuardConfig
from megatron_stable.numbers import finite
from megatron_stable.stability import opinion as opinions
from megatron_stable.stability.collapse import Collapse
from megatron_stable.stability.detector import GRAD_NORM, LOSS, QUIET, DetectorState, SpikeDetector, Verdict
from megatron_stable.stability.drift import DriftState
from megatron_stable.stability.events import (
    Divergence,
    Drop,
    Event,
    Rise,
    SecondOpinion,
    Series,
    Shift,
    Spike,
    SpikeEnd,
)
from megatron_stable.stability.opinion import Opinion, Question, Recorded
from megatron_stable.stability.recovery import Trouble

RECENT = 1000  # steps over which `max_drops` counts
NORMAL = ("warmup", "normal")
STAYS = ("rise", "divergence")  # what a loss that does not fall back is called
CERTAIN = 3  # opinions in a row that blame the data, after which the new level is the usual one: bad data may pass, and
# leave damage behind
EVENTS: dict[str, type[Spike] | type[Rise] | type[Divergence]] = {
    "spike": Spike, "rise": Rise, "divergence": Divergence
}  # fmt: skip


class Judgement(NamedTuple):
    """On one step.

    Attributes:
        take: Whether the update may be made.
        bad: Whether a checkpoint from shortly before should not be called healthy.
        events: For the ledger.
        trouble: What asks for recovery, or for the end of a run that may not recover.
        question: What a second opinion is wanted on.
        scores: MADs above the usual level, by series; infinite where a value was not finite.
    """

    take: bool = True
    bad: bool = False
    events: tuple[Event, ...] = ()
    trouble: Trouble | None = None
    question: Question | None = None
    scores: dict[Series, float] = {}  # noqa: RUF012 - never changed


class _Watched(BaseModel):
    """What is known of a series.

    Attributes:
        kind: The last verdict.
        onset: Of the excursion in progress.
        calm: Normal values in a row.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    kind: str = "warmup"
    onset: int | None = None
    calm: int = 0


class GuardState(BaseModel):
    """All that a guard has come to know; belongs into the checkpoint.

    Attributes:
        detectors: By series.
        watched: By series.
        drift: For rises too slow to stand out.
        collapse: For what was learnt and lost again.
        memory: Losses of the latest steps, for second opinions.
        drops: Recent steps without an update.
        consecutive: Of these, in a row.
        overflows: In a row, of fp16.
        asked: Second opinions on the rise in progress that were decided.
        ask: The step from which on another one is wanted.
        data_blamed: Of these, how many in a row blamed the data.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    detectors: dict[Series, DetectorState] = {}
    watched: dict[Series, _Watched] = {}
    drift: DriftState = DriftState()
    collapse: Collapse = Collapse()
    memory: tuple[Recorded, ...] = ()
    drops: tuple[int, ...] = ()
    consecutive: int = 0
    overflows: int = 0
    asked: int = 0
    ask: int = 0
    data_blamed: int = 0


class Guard:
    """Judges step after step.

    Args:
        config: What it may do.
        fp16: An overflow with a finite loss is then the loss scale's business, and no drop of the guard's.
        state: Go on from there.
    """

    def __init__(self, config: GuardConfig, fp16: bool = False, state: GuardState | None = None) -> None:
        self.config, self.fp16 = config, fp16
        own = config.model_dump(include={"window", "warmup", "threshold", "patience"})
        self.detectors: dict[Series, SpikeDetector] = {
            "loss": SpikeDetector(replace(LOSS, drift=inf, **own)),  # slow rises are asked about, see `drift`
            "grad_norm": SpikeDetector(replace(GRAD_NORM, **own)),
        }
        self.restore(state or GuardState())

    def restore(self, state: GuardState) -> None:
        """Go on from a state."""
        for name, detector in self.detectors.items():
            detector.load(state.detectors.get(name, DetectorState()))
        self.watched = {name: state.watched.get(name, _Watched()).model_copy() for name in self.detectors}
        self.drift, self.collapse = state.drift, state.collapse
        self.memory = deque(state.memory, opinions.REMEMBERED)
        self.drops = list(state.drops)
        self.consecutive, self.overflows = state.consecutive, state.overflows
        self.asked, self.ask, self.data_blamed = state.asked, state.ask, state.data_blamed

    def state(self) -> GuardState:
        """What :meth:`restore` takes."""
        return GuardState(
            detectors={name: detector.state() for name, detector in self.detectors.items()},
            watched={name: series.model_copy() for name, series in self.watched.items()},
            drift=self.drift,
            collapse=self.collapse,
            memory=tuple(self.memory),
            drops=tuple(self.drops),
            consecutive=self.consecutive,
            overflows=self.overflows,
            asked=self.asked,
            ask=self.ask,
            data_blamed=self.data_blamed,
        )

    def forget_batches(self) -> None:
        """The batches of earlier steps cannot be had any more: ask no questions about them."""
        self.memory.clear()

    def judge(self, step: int, loss: float, grad_norm: float, overflow: bool = False) -> Judgement:
        """Judge a step before its update is made.

        Args:
            step: Steps attempted, this one included.
            loss: Over all ranks.
            grad_norm: Global, before clipping.
            overflow: Whether gradients were not finite, so that the engine makes no update whatever the guard says.
        """
        routine = overflow and self.fp16 and isfinite(loss)
        if self.config.mode == "off":
            return Judgement(take=isfinite(grad_norm), bad=not (routine or isfinite(loss + grad_norm)))
        self.overflows = self.overflows + 1 if overflow else 0
        rule = None if routine else self._not_finite(loss, grad_norm, overflow)
        seen: dict[Series, float] = {"loss": loss, "grad_norm": grad_norm}
        if routine or rule is not None:  # what is known to be wrong, and told as such, is no news to the detectors
            seen = {name: value for name, value in seen.items() if isfinite(value)}
        if isfinite(loss):
            self.memory.append(Recorded(step, loss))
        verdicts = {name: self.detectors[name].update(step, value) for name, value in seen.items()}
        if isfinite(loss) and verdicts["loss"].kind != "spike":
            self.drift = self.drift.followed_by(step, loss, self.config.patience)
        if self.config.collapse is not None:
            self.collapse = self.collapse.followed_by(step, loss, self.config.collapse)
        events = [event for name, value in seen.items() for event in self._turn(name, step, value, verdicts[name])]
        if rule is None and self.config.drop_spikes and any(verdict.kind == "spike" for verdict in verdicts.values()):
            rule = "spike"
        if rule is not None:
            self.drops = [earlier for earlier in self.drops if earlier > step - RECENT] + [step]
            self.consecutive += 1
            events.append(
                Drop(
                    step=step, rule=rule, loss=finite(loss), grad_norm=finite(grad_norm), by="guard",
                    consecutive=self.consecutive, total=len(self.drops),
                )
            )  # fmt: skip
        elif not routine:
            self.consecutive = 0
        of_loss = verdicts.get("loss")
        question = self._question(step, of_loss)
        return Judgement(
            take=rule is None,
            bad=rule is not None or (of_loss is not None and of_loss.kind in ("spike", *STAYS)),
            events=tuple(events),
            trouble=self._dropped_too_many(step, rule)
            or self._collapsed(step)
            or self._diverged(step, of_loss, question),
            question=question,
            scores={name: verdicts[name].score if name in verdicts else inf for name in self.detectors},
        )

    def hear(self, step: int, opinion: Opinion, sources: Sequence[str] = ()) -> Judgement:
        """What follows from a second opinion on the question of the judgement of this step.

        Args:
            sources: Where the recent data come from, if that is known.
        """
        question, rise = opinion.question, opinion.question.rise
        asked = SecondOpinion(
            step=step,
            onset=question.onset,
            verdict=opinion.verdict,
            batches=len(question.old),
            rise=rise,
            gap=opinion.now.gap,
            error=opinion.now.error,
            healthy_gap=opinion.healthy and opinion.healthy.gap,
            checkpoint=opinion.checkpoint,
        )
        if opinion.verdict == "undecided":  # a rise that goes on soon decides it
            self.ask = step + max(self.config.patience // 2, 1)
            return Judgement(bad=True, events=(asked,))
        self.ask = step + (self.config.patience << self.asked)
        self.asked += 1
        if opinion.verdict == "data":
            self.data_blamed += 1
            first = self.data_blamed == 1
            if self.data_blamed == CERTAIN:
                self._settle()
            shift = Shift(step=step, onset=question.onset, rise=rise, sources=tuple(sources))
            return Judgement(events=(asked, shift) if first else (asked,))
        self.data_blamed = 0
        trouble = None
        if opinion.verdict == "state" and self.config.mode == "recover" and self._recent(step, question.onset):
            words = f"the loss rose by {rise:.3g} nats since step {question.onset}, and the state is to blame"
            trouble = Trouble("divergence", question.onset, step, words)
        return Judgement(bad=True, events=(asked,), trouble=trouble)

    def _settle(self) -> None:
        """The loss of today is the usual one."""
        self.detectors["loss"].settle()
        self.watched["loss"] = _Watched(kind="normal")
        self.drift = self.drift.settled()
        self.asked = self.ask = self.data_blamed = 0

    def _question(self, step: int, loss: Verdict | None) -> Question | None:
        """What to ask, if anything: of a rise that stays at once, and again after longer and longer."""
        onset, least, every = None, 0.0, opinions.APART
        if loss is not None and loss.kind in STAYS:
            onset = loss.onset
        elif loss is not None and loss.kind in NORMAL and step > self.config.warmup:  # a spike may yet fall back
            onset, least = self.drift.onset(self.config.drift), self.config.drift * (self.drift.lowest or 0.0)
            every = 1  # about the lowest level: farther back, the loss was higher
        if step < self.ask:
            return None
        if onset is None:
            self.asked = self.data_blamed = 0
            return None
        return opinions.pose(self.memory, onset, least, every)

    def _not_finite(self, loss: float, grad_norm: float, overflow: bool) -> str | None:
        """Why the update must not be made; of an overflow, why it was not."""
        if overflow or not isfinite(grad_norm):
            return "non-finite gradient"
        return "non-finite loss" if not isfinite(loss) and self.config.mode != "watch" else None

    def _turn(self, name: Series, step: int, value: float, verdict: Verdict) -> list[Event]:
        """The event of a series: what begins, changes its kind, or is over."""
        series = self.watched[name]
        if verdict.kind in NORMAL:
            series.calm += 1
            if series.onset is None or series.calm < QUIET:
                return []
            duration = step - QUIET + 1 - series.onset
            ended = SpikeEnd(step=step, series=name, onset=series.onset, duration=duration)
            series.onset, series.kind = None, verdict.kind
            return [ended]
        series.calm, onset = 0, verdict.onset or step
        if (verdict.kind, onset) == (series.kind, series.onset):
            return []
        series.kind, series.onset = verdict.kind, onset
        return [
            EVENTS[verdict.kind](
                step=step, series=name, value=finite(value), level=finite(verdict.level), scale=finite(verdict.scale),
                score=finite(verdict.score), onset=onset,
            )
        ]  # fmt: skip

    def _dropped_too_many(self, step: int, rule: str | None) -> Trouble | None:
        config = self.config
        if rule is None or config.mode == "watch":
            return None
        if self.consecutive >= config.max_consecutive_drops:
            reason = f"{self.consecutive} updates in a row were dropped ({rule})"
            return Trouble("consecutive drops", self._onset(self.drops[-self.consecutive :][0]), step, reason)
        if len(self.drops) >= config.max_drops:
            reason = f"{len(self.drops)} updates were dropped within {RECENT} steps, the last for a {rule}"
            return Trouble("total drops", self._onset(step), step, reason)
        return None

    def _collapsed(self, step: int) -> Trouble | None:
        onset = self.collapse.onset
        if onset is None or step - onset + 1 < self.config.collapse_steps:
            return None
        part = f"{self.collapse.rise:.0%}" if self.collapse.rise < 1 else "all"
        reason = f"{part} of what was learnt is lost, and has been since step {onset} (guard.collapse)"
        return Trouble("collapse", onset, step, reason)

    def _diverged(self, step: int, loss: Verdict | None, question: Question | None) -> Trouble | None:
        """A divergence by the curve alone, where there is nothing to ask about."""
        if self.config.mode != "recover" or question is not None or loss is None or loss.kind != "divergence":
            return None
        if step < self.ask or not self._recent(step, onset := self._onset(step)):
            return None
        reason = f"the loss rose from {loss.level:.4g} at step {onset} and has not fallen back by step {step}"
        return Trouble("divergence", onset, step, reason)

    def _recent(self, step: int, onset: int) -> bool:
        """Whether data may be to blame for a rise: one that began longer ago is the user's to judge."""
        return step - onset <= max(self.config.patience, self.config.near_steps)

    def _onset(self, step: int) -> int:
        """Where trouble that is noticed in ``step`` began: with the rise of the loss that it is part of, if any."""
        onset = self.watched["loss"].onset
        return step if onset is None else min(step, onset)
