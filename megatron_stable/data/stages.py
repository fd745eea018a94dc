"""Which source of a run each sample comes from, through all changes of the blend, planned or not.

A stage is a blend that holds from a sample on. Each source has a position, the number of its own samples that were
taken so far, and goes on from there in every stage, whether it was in the one before or not::

    sample            0            1000           3000
    web          0.7 │ 0 … 699    0.5 │ 700 … 1699    │ goes on at 1700 when it comes back
    code         0.3 │ 0 … 299    0.5 │ 300 … 1299  1 │ 1300 …

What was taken is a formula of the sample's number and the stages before, so that nothing is kept per sample or step.
What the stages are is kept by the run: a change of the configuration takes effect where the run is, and what lies
before stays as it was.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import Field, model_validator

from megatron_stable.data.interleave import Interleave
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.persisted import Count, Persisted, Positive

Paths: TypeAlias = str | tuple[str, ...]
"""A prefix or glob; or several whose data are one stream under a name."""


class Stream(Persisted):
    """A source, as the run knows it.

    Attributes:
        paths: Where it was last.
        tokens, documents: How much it holds, by which it is known again; `None`: nobody has noted that.
    """

    paths: Paths
    tokens: Positive | None = None
    documents: Count | None = None

    def holds_as(self, other: Stream) -> bool:
        """Whether both hold as much, as far as is known."""
        mine, others = (self.tokens, self.documents), (other.tokens, other.documents)
        return None in mine or None in others or mine == others

    def windows(self, sequence_length: int) -> int | None:
        """Samples per epoch, if that is known."""
        return None if self.tokens is None else (self.tokens - 1) // sequence_length

    def moved_from(self, other: Stream) -> bool:
        """Whether this is likely the other at another place: as much, under the same last name."""
        return self.holds_as(other) and _last_names(self.paths) == _last_names(other.paths)


class Stage(Persisted):
    """A blend that holds from a sample on: weights by source."""

    sample: Count
    weights: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]

    @cached_property
    def interleave(self) -> Interleave:
        """Whose turn it is, counted from the stage's first sample."""
        return Interleave(self.weights)

    @property
    def shares(self) -> dict[str, float]:
        """Parts of the samples by source."""
        return {name: float(share) for name, share in self.interleave.shares.items()}

    def words(self) -> str:
        """The blend, in words."""
        return in_words(self.shares)

    def like(self, other: Stage) -> bool:
        """Whether the blends are the same, in whatever units their weights are."""
        return self.interleave.shares == other.interleave.shares


class Stages(Persisted):
    """All stages of a run. Questions take O(log stages + sources).

    Attributes:
        streams: All sources that any stage names, or has named, as they were when they were begun.
        stages: Those that hold, by rising samples, from 0 on.
        configured: What the configuration asked for when it was last looked at; unless that changes, nothing does.
    """

    streams: dict[str, Stream]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    configured: Annotated[tuple[Stage, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _require_order(self) -> Stages:
        for stages in (self.stages, self.configured):
            if stages[0].sample != 0 or any(first.sample >= then.sample for first, then in pairwise(stages)):
                raise ValueError("stages must begin at sample 0 and rise")
        unknown = {name for stage in self.stages for name in stage.weights} - set(self.streams)
        if unknown:
            raise ValueError(f"stages name {', '.join(sorted(unknown))}, which is no source")
        return self

    @classmethod
    def begin(cls, streams: Mapping[str, Stream], wanted: Sequence[Stage]) -> Stages:
        """From the first sample on what the configuration says; ConfigError: it names a source that is none."""
        _require_known(wanted, streams, ())
        return cls(streams=dict(streams), stages=tuple(_merged(wanted)), configured=tuple(wanted))

    def locate(self, k: int) -> tuple[str, int]:
        """Which source sample k (from 0) comes from, and which of that source's samples it is, both from 0."""
        i = self.number(k)
        name, own = self.stages[i].interleave.assign(k - self.stages[i].sample)
        return name, self._begun[i].get(name, 0) + own

    def counts(self, k: int) -> dict[str, int]:
        """How many of the first k samples come from each source: where it stands."""
        i = self.number(max(0, k - 1))
        return _added(self._begun[i], self.stages[i].interleave.counts(k - self.stages[i].sample))

    def blend(self, k: int) -> Stage:
        """The stage that sample k is in."""
        return self.stages[self.number(k)]

    def number(self, k: int) -> int:
        """The stage, from 0, that sample k is in."""
        return bisect_right(self.stages, k, key=_sample) - 1

    def ahead(self, sample: int) -> tuple[str, ...]:
        """The sources of all stages that hold at a sample or later."""
        return tuple(dict.fromkeys(name for stage in self.stages[self.number(sample) :] for name in stage.weights))

    def resumed(self, sample: int, streams: Mapping[str, Stream], wanted: Sequence[Stage]) -> Stages:
        """These stages up to a sample, and from there on what the configuration says, if it has changed.

        Args:
            sample: The first one that a change applies to.
            streams: The sources that there are now.
            wanted: The stages that the configuration asks for.

        Raises:
            ConfigError: A stage that holds from the sample on names a source that there is not.
            DataError: A source that has been begun, and goes on, holds something else now.
        """
        before, rest = self.renamed(streams), _from(sample, wanted)
        _require_known(rest, streams, before.streams)
        stages = before.stages
        if not _alike(wanted, before.configured):
            stages = tuple(_merged([*(stage for stage in stages if stage.sample < sample), *rest]))
        known, begun = dict(before.streams), before.counts(sample)
        for name, stream in streams.items():
            if not begun.get(name) or stream.holds_as(known[name]):  # else it has to be what it was, if it goes on
                known[name] = stream
        result = Stages(streams=known, stages=stages, configured=tuple(wanted))
        for name in result.ahead(sample):
            result.require_same(name, streams.get(name, known[name]))
        return result

    def come_again(self, sample: int) -> dict[str, str]:
        """Sources to come from a sample on that begin anew though they hold what is being read, or was, under another
        name, which is the value."""
        begun = [name for name, count in self.counts(sample).items() if count]
        holds = {path: name for name in begun for path in _listed(self.streams[name].paths)}
        new = (name for name in self.ahead(sample) if name not in begun)
        return {name: holds[path] for name in new for path in _listed(self.streams[name].paths) if path in holds}

    def require_same(self, name: str, now: Stream) -> None:
        """DataError: a source holds something else than when it was begun."""
        before = self.streams[name]
        if not now.holds_as(before):
            raise DataError(
                f"source {name} holds {now.tokens:,} tokens in {now.documents:,} documents, and held "
                f"{before.tokens:,} in {before.documents:,} when this run began to read it: its samples would be "
                "others, and some come again. Put it back as it was, and give what is new as another source"
            )

    def renamed(self, streams: Mapping[str, Stream]) -> Stages:
        """These with the names that sources have now which are at another place than before."""
        names: dict[str, str] = {}
        for name, stream in streams.items():
            gone = [old for old in self.streams if old not in streams and stream.moved_from(self.streams[old])]
            if name not in self.streams and len(gone) == 1 and gone[0] not in names:
                names[gone[0]] = name
        if not names:
            return self
        stages, configured = ([_rename(stage, names) for stage in part] for part in (self.stages, self.configured))
        known = {names.get(name, name): stream for name, stream in self.streams.items()}
        return Stages(streams=known, stages=tuple(stages), configured=tuple(configured))

    @cached_property
    def _begun(self) -> list[dict[str, int]]:
        """[i]: samples that were taken of each source before stage i."""
        begun: list[dict[str, int]] = [{}]
        for stage, then in pairwise(self.stages):
            begun.append(_added(begun[-1], stage.interleave.counts(then.sample - stage.sample)))
        return begun


def in_words(shares: Mapping[str, float], notes: Mapping[str, str] | None = None) -> str:
    """Parts by source, the largest first, each with a note behind its name if there is one."""
    largest = sorted(shares.items(), key=lambda each: -each[1])
    return ", ".join(f"{100 * share:.3g} % {name}{(notes or {}).get(name, '')}" for name, share in largest)


def _sample(stage: Stage) -> int:
    return stage.sample


def _added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {**one, **{name: one.get(name, 0) + count for name, count in other.items()}}


def _from(sample: int, stages: Sequence[Stage]) -> list[Stage]:
    """What holds from a sample on, the first of it beginning there."""
    i = bisect_right(stages, sample, key=_sample) - 1
    return [stages[i].model_copy(update={"sample": sample}), *stages[i + 1 :]]


def _merged(stages: Iterable[Stage]) -> list[Stage]:
    """Without those that go on with the same blend, so that it goes on undisturbed."""
    found: list[Stage] = []
    for stage in stages:
        if not found or not stage.like(found[-1]):
            found.append(stage)
    return found


def _alike(one: Sequence[Stage], other: Sequence[Stage]) -> bool:
    return [each.sample for each in one] == [each.sample for each in other] and all(map(Stage.like, one, other))


def _rename(stage: Stage, names: Mapping[str, str]) -> Stage:
    return Stage(sample=stage.sample, weights={names.get(name, name): each for name, each in stage.weights.items()})


def _listed(paths: Paths) -> Sequence[str]:
    return [paths] if isinstance(paths, str) else paths


def _last_names(paths: Paths) -> list[str]:
    return [Path(path).name for path in _listed(paths)]


def _require_known(stages: Sequence[Stage], streams: Collection[str], before: Collection[str]) -> None:
    """ConfigError: a stage names a source that there is not."""
    for stage in stages:
        for name in stage.weights:
            if name not in streams:
                removed = name in before
                why = "does not name any more" if removed else "does not name"
                remedy = "put it back, or take it out of the stages to come" if removed else "mend the name"
                raise ConfigError(
                    f"data.stages: from sample {stage.sample} on there is a part of {name!r}, which data.train {why}; "
                    f"it names {', '.join(streams)}: {remedy}"
                )
