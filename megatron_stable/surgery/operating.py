"""An operation from beginning to end: what is allowed, what is measured, the new checkpoint, and the check of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_stable.checkpoint.catalog import Whole
from megatron_stable.checkpoint.format import Index, Manifest, StoredShard, parameters_of, rank_file, write_contents
from megatron_stable.checkpoint.reader import Reader
from megatron_stable.checkpoint.state import Layout, RunState
from megatron_stable.checkpoint.tensors import CHUNK, write_tensors
from megatron_stable.config.problems import fail
from megatron_stable.config.schema import Config
from megatron_stable.config.surgery import changes, refusals
from megatron_stable.data import Samples, Stages, check_vocabulary, open_dataset, open_stages
from megatron_stable.data.check import check_ids
from megatron_stable.data.course import Course, Era
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.files import sync_directory
from megatron_stable.parallel.shards import Shard
from megatron_stable.persisted import package_version
from megatron_stable.stability.interventions import Intervention, Interventions
from megatron_stable.surgery.continuity import Continuity, compare
from megatron_stable.surgery.measuring import Measured, measure
from megatron_stable.surgery.operations import operate
from megatron_stable.surgery.parameters import Parameters, stored
from megatron_stable.surgery.streaming import places

TOKENS, FEWEST = 16384, 4  # that are looked at by default, and sequences at least
STRETCH = 4 * CHUNK  # elements that are written at a time
ROOM = 2.0  # times the largest logit measured: a cap there takes 8 % off such a logit, tanh(1/2) = 0.46


class Operated(NamedTuple):
    """What was done.

    Attributes:
        config: Of the new checkpoint.
        changes: In the configuration, by key: (before, after).
        parameters: Before and after, as they are stored.
    """

    whole: Whole
    config: Config
    changes: dict[str, tuple[Any, Any]]
    continuity: Continuity
    parameters: tuple[int, int]


def planned(before: Config, after: Config, rewarm: tuple[int, int] | None) -> Config:
    """The configuration after an operation.

    Args:
        rewarm: The step that it is made behind, and the steps of the re-warm-up; what ``after`` says itself stands.

    Raises:
        ConfigError: Something cannot be operated.
    """
    fail("surgery", refusals(before, after))
    if after.data.document_mask and after.data.end_of_document is None:
        raise ConfigError(
            "data.document_mask true needs to know what stands between documents: set data.end_of_document=ID"
        )
    if rewarm is None or before.schedule.rewarm != after.schedule.rewarm:
        return after
    return after.model_copy(update={"schedule": after.schedule.model_copy(update={"rewarm": rewarm})})


def samples(
    before: Config,
    after: Config,
    course: Course,
    stages: Stages | None,
    step: int,
    prefix: str | None = None,
    number: int | None = None,
) -> Tensor:
    """Samples ``[n, s + 1]`` that both models can take: of ``prefix``, else of validation data, else the training data
    that come next.

    Args:
        stages: Of the run, as far as it has noted them.

    Raises:
        ConfigError: There are none, or they are not of the vocabulary.
        DataError: They are not there, or not what they were.
    """
    length = min(before.model.sequence_length, after.model.sequence_length)
    source, seed, first = prefix or before.data.validation, before.run.seed, 0
    if source is None:
        first = course.position(step)
    chosen = range(first, first + (number or max(FEWEST, -(-TOKENS // length))))
    if source is not None:
        dataset: Samples = open_dataset(source, length, seed)
    elif stages is not None:
        dataset = open_stages(stages, chosen, length, seed)
    elif before.data.train is not None or before.data.stages:
        dataset = open_dataset(before.data.train, length, seed, before.data.stages)
    else:
        raise ConfigError("the run names no data: name a .bin/.idx dataset with --data PREFIX")
    assert before.model.vocab_size is not None
    check_vocabulary(dataset, before.model.vocab_size)
    found = []
    for k in chosen:
        where = dataset.locate(k)
        ids = where.read()
        check_ids(ids, before.model.vocab_size, where.dataset.indexed, where.start)
        found.append(torch.from_numpy(ids.astype("int64")))
    return torch.stack(found)


def perform(
    whole: Whole,
    before: Config,
    after: Config,
    looked_at: Tensor,
    directory: Path,
    raise_caps: bool = False,
    decision: tuple[Interventions, Intervention] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Operated:
    """Write the checkpoint of ``after`` into ``directory``, which is not there yet, and compare the two.

    Args:
        whole: The checkpoint, of ``before``.
        looked_at: What :func:`samples` returns.
        raise_caps: Put a new cap above what was measured, where it is not; else that is an error.
        decision: Where the run itself decided: the interventions in force, and the one to come.
        on_progress: Called with (elements written, elements in all).
        tick: Called after each batch at each layer, and each stretch that is written; what it raises ends it all.

    Raises:
        ConfigError: A cap would cut off logits that there are.
        DataError: The checkpoint is damaged.
    """
    batches = [part[:, :-1] for part in looked_at.split(before.batch.micro_size)]
    measured = measure(whole, before, after, batches, tick)
    after = _with_factors(before, _caps(before, after, measured, raise_caps), whole)
    old, new = places(before), places(after)
    reader = Reader(whole.directory, whole.manifest)
    if missing := sorted(old.keys() - reader.parameters.keys()):
        raise DataError(f"{whole.directory}: no parameter {missing[0]}; it was written by a model without it")
    parameters = {name: stored(reader, name, place.full_shape) for name, place in old.items()}
    made = operate(parameters, before, after, measured)
    if made.keys() != new.keys() or any(made[name].shape != new[name].full_shape for name in new):
        raise AssertionError(f"not the model that was wanted: {sorted(made.keys() ^ new.keys())[:5]}")
    manifest = Manifest(
        step=whole.step,
        layout=Layout(dtype=after.precision.dtype),
        config=after.model_dump(mode="json"),
        state=_state(whole, before, after, decision),
        written_by=package_version(),
    )
    try:
        directory.mkdir(parents=True)
        entry = write_tensors(directory / rank_file(0), *_pieces(made, on_progress, tick))
        held = {name: StoredShard.of(Shard(new[name], 0, new[name].numel), each.kinds) for name, each in made.items()}
        index = Index(files={rank_file(0): entry}, parameters=parameters_of({0: held}))
        written = Whole(directory, whole.step, write_contents(directory, index, manifest))
        continuity = compare(whole, before, written, after, looked_at, tick)
        sync_directory(directory.parent)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        reader.close()
    counts = sum(each.numel for each in parameters.values()), sum(each.numel for each in made.values())
    return Operated(written, after, changes(before, after), continuity, counts)


def _pieces(
    made: Parameters, on_progress: Callable[[int, int], None] | None, tick: Callable[[], None]
) -> tuple[dict[str, int], Callable[[str], Iterator[Tensor]]]:
    """What :func:`write_tensors` takes: sizes by key, and the pieces of each."""
    by_key = {f"{name}:{kind}": (each, kind) for name, each in sorted(made.items()) for kind in each.kinds}
    total, done = sum(each.numel for each, _ in by_key.values()), 0

    def pieces(key: str) -> Iterator[Tensor]:
        nonlocal done
        each, kind = by_key[key]
        for low in range(0, each.numel, STRETCH):
            piece = each.read(kind, low, min(low + STRETCH, each.numel))
            yield piece
            done += len(piece)
            tick()
            if on_progress:
                on_progress(done, total)

    return {key: each.numel for key, (each, _) in by_key.items()}, pieces


def _caps(before: Config, after: Config, measured: Measured, raise_caps: bool) -> Config:
    """See that caps that are set lie above the logits that there are."""
    largest = {"attention_cap": max(measured.attention, default=0.0), "final_logit_cap": measured.logits}
    raised = {}
    for name, most in largest.items():
        cap, had = getattr(after.model, name), getattr(before.model, name)
        if cap is None or cap == had or (had is not None and cap > had) or cap > most:
            continue
        better = float(f"{ROOM * most:.3g}")
        if not raise_caps:
            raise ConfigError(
                f"surgery: model.{name} {cap:g} is not above the largest logit measured, {most:.4g}, which it would "
                f"cut off: set model.{name}={better:g} or more"
            )
        raised[name] = better
    return after.model_copy(update={"model": after.model.model_copy(update=raised)}) if raised else after


def _with_factors(before: Config, after: Config, whole: Whole) -> Config:
    """With a new sequence length, samples are others, and interventions, which name some, end: their factors become
    the configuration's."""
    if before.model.sequence_length == after.model.sequence_length:
        return after
    force = Interventions(whole.manifest.state.interventions)
    rate, clip = force.learning_rate_factor, force.clip_factor
    optimizer = after.optimizer.model_copy(
        update={"learning_rate": after.optimizer.learning_rate * rate, "clip_grad": after.optimizer.clip_grad * clip}
    )
    low = after.schedule.min_learning_rate * rate
    return after.model_copy(
        update={
            "optimizer": optimizer,
            "schedule": after.schedule.model_copy(update={"min_learning_rate": low}),
            "data": after.data.model_copy(update={"skip": ()}),  # all of it lies behind
        }
    )


def _state(
    whole: Whole, before: Config, after: Config, decision: tuple[Interventions, Intervention] | None
) -> RunState:
    """The state of the run, as far as it means the same for the other model."""
    state, updates = whole.manifest.state, dict[str, Any]()
    # what the run changed by itself is in its configuration, from where the new run takes it
    updates["interventions"] = tuple(item for item in state.interventions if not item.changes)
    if decision is not None:
        made, new = decision
        updates["interventions"] = made.add(new.model_copy(update={"changes": changes(before, after)})).items
        if new.reset_loss_scale:
            updates["loss_scaler"] = None
    updates["guard"] = state.guard.model_copy(update={"memory": ()})  # losses by the other model
    if after.model.layers != before.model.layers:
        updates["optimizer"] = None  # a clipping rule may know parameters by name
    old, length = before.model.sequence_length, after.model.sequence_length
    if old != length:
        position = state.course.position(whole.step)
        if any(end > position for _, end in state.course.skip):
            raise ConfigError(
                f"surgery: model.sequence_length {old} cannot become {length}: data are skipped that lie ahead, in "
                f"samples of {old} tokens; train past them first, or undo them with `megatron-stable skip RUN --undo`"
            )
        staged = len(state.stages.stages) > 1 if state.stages is not None else before.data.stages
        if staged:
            raise ConfigError(
                f"surgery: model.sequence_length {old} cannot become {length}: "
                f"data.stages, or a blend that was changed, count samples of {old} tokens"
            )
        sample, data_step = -(-position * old // length), state.course.behind(whole.step)
        era = Era(step=whole.step, data_step=data_step, sample=sample, size=after.batch.global_size)
        updates["course"] = Course(eras=(era,))
        updates["interventions"] = ()
    return state.model_copy(update=updates)
