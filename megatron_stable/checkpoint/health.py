"""Which checkpoints are healthy, and so which may be deleted.

A checkpoint is not judged until the run has gone ``healthy_after`` steps past it without a spike verdict; then it
is healthy. Rotation never deletes the newest healthy one, nor the one a rollback would need: a spike may yet be
found right after the newest healthy checkpoint, and recovery then goes ``rollback_steps`` further back.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pydantic import StrictBool

from megatron_stable.errors import DataError
from megatron_stable.files import replace_file
from megatron_stable.persisted import Count, Persisted, read_as

HEALTH = "health.json"
WORDS = {True: "healthy", False: "unhealthy", None: "not judged yet"}


class Health(Persisted):
    """The verdict on a checkpoint, and the step at which it was passed."""

    healthy: StrictBool
    judged_at_step: Count


@dataclass(frozen=True)
class Retention:
    """What to keep.

    Attributes:
        keep: The newest so many checkpoints, healthy or not.
        keep_every: Those at multiples of this step for ever; ``None``: none.
        rollbacks: How far before a spike a rollback goes, at the first attempt and at further ones.
        healthy_after: Steps after which a checkpoint is judged, and until which it is kept: deleted before, none
            would ever be found healthy.
    """

    keep: int
    keep_every: int | None = None
    rollbacks: tuple[int, ...] = (100,)
    healthy_after: int = 0


def doomed(
    steps: Collection[int], healthy: Collection[int], rule: Retention, unhealthy: Collection[int] = ()
) -> list[int]:
    """Which of the checkpoints at ``steps`` to delete, oldest first, by those known to be healthy and not to be."""
    kept = set(sorted(steps)[-rule.keep :])
    kept |= {step for step in steps if step > max(steps) - rule.healthy_after} - set(unhealthy)
    if rule.keep_every is not None:
        kept |= {step for step in steps if step % rule.keep_every == 0}
    well = sorted(set(steps) & set(healthy))
    kept |= set(well[-1:])
    for distance in rule.rollbacks if well else ():
        far = [step for step in well if step <= well[-1] - distance]
        # and its successor, which is to be far enough in time; without one that is, the oldest is the best there is
        kept |= {*far[-1:], *well[len(far) : len(far) + 1]}
    return sorted(set(steps) - kept)


def judge(step: int, now: int, bad: Collection[int], healthy_after: int) -> bool | None:
    """Whether the checkpoint of ``step`` is healthy at step ``now``, ``None`` while that cannot be judged.

    Args:
        bad: Steps with a bad verdict: a spike, a dropped update, a loss that is no number.
        healthy_after: How many steps must have passed without one.
    """
    if any(step < other <= step + healthy_after for other in bad):
        return False
    return True if now >= step + healthy_after else None


def mark(directory: Path, healthy: bool, judged_at: int) -> None:
    """Record the verdict on a checkpoint, passed at step ``judged_at``."""
    health = Health(healthy=healthy, judged_at_step=judged_at)
    replace_file(directory / HEALTH, f"{health.model_dump_json()}\n".encode())


def verdict(directory: Path) -> bool | None:
    """The verdict on a checkpoint, ``None`` if none was passed."""
    try:
        return read_as(Health, directory / HEALTH).healthy
    except DataError:
        return None
