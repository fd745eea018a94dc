"""Plan a recovery: which checkpoint to go back to, which data to skip, what to change.

What large runs did by hand: PaLM went back about 100 steps before a spike and skipped 200 to 500 batches
(arXiv 2204.02311, section 5.1), WeLM 100 and 200 with a lower learning rate and a new loss scale (arXiv 2209.10372),
OPT-175B lowered learning rate and clipping (arXiv 2205.01068).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

from megatron_stable.config.schema import GuardConfig
from megatron_stable.data.course import Course
from megatron_stable.stability.event import count
from megatron_stable.stability.interventions import Intervention, Interventions

T = TypeVar("T")


class Trouble(NamedTuple):
    """What a recovery answers.

    Attributes:
        rule: What found it.
        onset: The step at which it began.
        step: The step at which it was found.
        reason: In words, with numbers.
    """

    rule: str
    onset: int
    step: int
    reason: str


class Candidate(NamedTuple):
    """A checkpoint that a run can go back to: its step, the data steps that lie behind it, its health (None: not
    judged)."""

    step: int
    data_step: int
    healthy: bool | None


def choose(candidates: Sequence[Candidate], onset: int, rollback_steps: int) -> tuple[Candidate, str] | None:
    """The checkpoint to go back to from trouble that began at step ``onset``, and why; ``None`` if there is none.

    The newest healthy one that is ``rollback_steps`` or more before the onset; where there is none, the next best.
    """
    before = sorted((c for c in candidates if c.step < onset), key=lambda c: c.step)
    far = [c for c in before if c.step <= onset - rollback_steps]
    distance = f"{rollback_steps} steps or more " if rollback_steps else ""
    healthy, unjudged = [c for c in before if c.healthy], [c for c in before if c.healthy is None]
    choices = (
        ([c for c in far if c.healthy][-1:], f"the newest healthy one {distance}before the onset"),
        (healthy[:1], f"the farthest back that is healthy, though less than {rollback_steps} steps before the onset"),
        ([c for c in far if c.healthy is None][-1:], "the newest before the onset; none has been found healthy yet"),
        (unjudged[:1], "the farthest back; none has been found healthy yet"),
        (before[:1], "the farthest back; none is healthy"),
        (sorted(candidates, key=lambda c: c.step)[:1], "the farthest back; none is from before the onset"),
    )
    return next(((found[0], why) for found, why in choices if found), None)


def window(position: int, onset: int, found: int, length: int) -> tuple[int, int]:
    """The data steps to skip: ``length`` of them about the onset, and all up to where the trouble was found.

    Args:
        position: Data step of the checkpoint; what lies before it is not seen again.
        onset, found: Data steps at which the trouble began and was found.

    Returns:
        First and last, inclusive.
    """
    first = max(position + 1, onset - length // 2)
    return first, max(first + length - 1, found)


def attempt(done: Interventions, onset: int, near: int) -> int:
    """Which attempt at one place this would be, from 1; attempts less than ``near`` steps apart are at one place.

    The count begins anew after the user did something, and after a run was given up and started again.
    """
    number = 1
    for earlier in reversed(done.items):
        if earlier.by != "guard" or not earlier.windows or earlier.onset is None or onset - earlier.onset >= near:
            break
        number, onset = number + 1, earlier.onset
    return number


def plan(
    trouble: Trouble,
    candidates: Sequence[Candidate],
    course: Course,
    done: Interventions,
    settings: GuardConfig,
    fp16: bool = False,
    surgery: Mapping[str, tuple[Any, Any]] | None = None,
) -> Intervention | None:
    """The guard's next intervention; ``None`` when it has to give up.

    Args:
        trouble: What happened.
        candidates: The run's checkpoints.
        course: The run's, up to ``trouble.step``.
        done: Earlier interventions.
        settings: The ladder: each further attempt at one place takes the next rung, the last one again and again.
        fp16: Whether there is a loss scale to reset.
        surgery: What an operation would change in the configuration, the last rung, taken once; empty: there is none.
    """
    number = attempt(done, trouble.onset, settings.near_steps)
    operates = number > settings.max_rollbacks
    if operates and (not surgery or done.changes):
        return None
    widen = rung(settings.widen, number)
    chosen = choose(candidates, trouble.onset, round(settings.rollback_steps * widen))
    if chosen is None:
        return None
    checkpoint, why = chosen
    if operates:
        return _intervention(
            trouble,
            rollback_to=checkpoint.step,
            changes=surgery,
            reset_loss_scale=fp16,
            reason=f"{count(settings.max_rollbacks, 'attempt')} did not help: {trouble.reason}; checkpoint "
            f"{checkpoint.step}: {why}",
        )
    onset, found = course.data_step(trouble.onset), course.data_steps(0, course.position(trouble.step))[1]
    skipped = window(checkpoint.data_step, onset, found, round(settings.skip_steps * widen))
    return _intervention(
        trouble,
        rollback_to=checkpoint.step,
        windows=(skipped,),
        samples=(course.stretch(*skipped),),
        learning_rate_factor=rung(settings.learning_rate_factors, number),
        clip_factor=rung(settings.clip_factors, number),
        reset_loss_scale=fp16,
        reason=f"attempt {number} of {settings.max_rollbacks}: {trouble.reason}; checkpoint {checkpoint.step}: {why}",
    )


def last_resort(trouble: Trouble, candidates: Sequence[Candidate], settings: GuardConfig) -> Intervention | None:
    """Where to leave a run that ends, so that it can go on from there: a checkpoint, and no change."""
    chosen = choose(candidates, trouble.onset, settings.rollback_steps)
    if chosen is None:
        return None
    return _intervention(trouble, rollback_to=chosen[0].step, reason=trouble.reason)


def _intervention(trouble: Trouble, **values: Any) -> Intervention:
    return Intervention(id=new_id(), time=now(), by="guard", rule=trouble.rule, onset=trouble.onset, **values)


def rung(ladder: Sequence[T], number: int) -> T:
    """The entry for the ``number``-th attempt (from 1); the last one holds for all further."""
    return ladder[min(number, len(ladder)) - 1]


def new_id() -> str:
    """A name for an intervention."""
    return uuid4().hex[:12]


def now() -> str:
    """The time, as interventions and the ledger write it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
