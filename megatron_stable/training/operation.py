"""A run that operates on itself: the guard's last rung.

Rank 0 writes the operated checkpoint beside the run's own, under a name of its own; with the intervention in
interventions.json it is decided, and the checkpoint takes its place, now or at the next start::

    checkpoints/.operated_ID      complete      ──>  checkpoints/step_00000100
    checkpoints/step_00000100     of the model before  ──>  before_surgery/step_00000100
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megatron_stable.checkpoint.catalog import Whole
from megatron_stable.checkpoint.format import directory_name, read_manifest
from megatron_stable.checkpoint.store import remove
from megatron_stable.config.load import replaced
from megatron_stable.config.schema import Config
from megatron_stable.config.surgery import recipe_values
from megatron_stable.data import Course, Stages
from megatron_stable.errors import MegatronStableError
from megatron_stable.files import explain_os_errors, sync_directory
from megatron_stable.parallel.agreement import decided, everywhere
from megatron_stable.records.directory import RunDirectory
from megatron_stable.stability.events import Surgery
from megatron_stable.stability.interventions import Intervention, Interventions
from megatron_stable.surgery.operating import perform, planned, samples
from megatron_stable.surgery.report import write_report

T = TypeVar("T")
TURN = 1.0  # seconds, at most, from one question whether rank 0 is done to the next
PREFIX, KEPT = ".operated_", "before_surgery"


def operate(
    config: Config,
    directory: RunDirectory,
    intervention: Intervention,
    made: Interventions,
    course: Course,
    stages: Stages | None,
    step: int,
    progress: Callable[[], None],
    wished: Callable[[], bool],
) -> tuple[Intervention, Surgery] | None:
    """Write the operated checkpoint. Collective; the work is rank 0's.

    Args:
        intervention: Says to which checkpoint.
        made: Those in force.
        course, stages: Of the run so far.
        step: At which this was decided.
        progress: Called on all ranks whenever rank 0 has got further: hours may pass until it is done.
        wished: Whether this rank has a reason to stop, upon which nothing is operated.

    Returns:
        The intervention with all that it changes, and what is to be put on record when it is the run's; ``None``: a
        rank had a reason to stop, and nothing is left of it.

    Raises:
        DataError: On all ranks alike: the checkpoint, or data, cannot be used.
        MegatronStableError: On all ranks alike: it cannot be done.
    """

    def work(tick: Callable[[], None]) -> tuple[Intervention, Surgery]:
        source = directory.checkpoints / directory_name(intervention.rollback_to)
        whole = Whole(source, intervention.rollback_to, read_manifest(source))
        assert config.guard.surgery is not None
        wanted = replaced(config, recipe_values(config.guard.surgery, config))
        after = planned(config, wanted, (whole.step, config.guard.surgery_rewarm))
        looked_at = samples(config, after, course, stages, whole.step)
        target = directory.checkpoints / f"{PREFIX}{intervention.id}"
        done = perform(
            whole, config, after, looked_at, target, raise_caps=True, decision=(made, intervention), tick=tick
        )
        try:
            write_report(directory.path, kept(directory, intervention), done)
        except BaseException:
            remove(target)
            raise
        final = intervention.model_copy(update={"changes": done.changes})
        event = Surgery.of(final, step, str(kept(directory, final)))
        check = {"before": done.continuity.before, "after": done.continuity.after, "verdict": done.continuity.verdict}
        return final, event.model_copy(update=check)

    return _on_rank_0(work, progress, wished)


def kept(directory: RunDirectory, intervention: Intervention) -> Path:
    """Where the checkpoint that was operated on stays."""
    return directory.path / KEPT / directory_name(intervention.rollback_to)


def settle(directory: RunDirectory, made: Interventions | None) -> None:
    """Let checkpoints of operations that were decided take their places, and remove those of others; on rank 0."""
    decided_on = {f"{PREFIX}{item.id}": item for item in (made.items if made else ()) if item.changes}
    for path in sorted(directory.checkpoints.glob(f"{PREFIX}*")):
        item = decided_on.get(path.name)
        with explain_os_errors("move" if item else "remove", path):
            if item is None:
                remove(path)
                continue
            place, before = directory.checkpoints / directory_name(item.rollback_to), kept(directory, item)
            if place.exists():
                before.parent.mkdir(exist_ok=True)
                remove(before)
                place.rename(before)
                sync_directory(before.parent)
            path.rename(place)
            sync_directory(directory.checkpoints)


def _on_rank_0(
    work: Callable[[Callable[[], None]], T], progress: Callable[[], None], wished: Callable[[], bool]
) -> T | None:
    """What ``work`` makes there, in a thread: the others ask again and again, as no collective waits for so long.

    ``None``: it was called off at a tick, as a rank wished.
    """
    found: list[T] = []
    errors: list[BaseException] = []
    got, over = 0, False

    def tick() -> None:
        nonlocal got
        got += 1
        if over:
            raise _CalledOff

    def run() -> None:
        try:
            found.append(work(tick))
        except _CalledOff:
            return
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="surgery") if dist.get_rank() == 0 else None
    if thread is not None:
        thread.start()
    busy, ticks = True, 0
    while busy:
        if thread is not None:
            thread.join(TURN)
        before, said = ticks, everywhere((thread is not None and thread.is_alive(), got, wished()))
        busy, ticks, _ = said[0]
        over = any(wish for *_, wish in said)
        if ticks != before:
            progress()

    def result() -> T | None:
        if errors and isinstance(errors[0], MegatronStableError):
            raise errors[0]
        if errors:  # whatever it is, of memory or of a disk: the run ends as it would have without
            raise MegatronStableError(f"{type(errors[0]).__name__}: {errors[0]}") from errors[0]
        return found[0] if found else None

    return decided(result)


class _CalledOff(Exception):
    """Somebody wishes the run to stop."""
