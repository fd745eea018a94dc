"""The batches of a run: which micro batches this rank's replica trains and is validated on, step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron_stable.config.schema import Config
from megatron_stable.data import (
    Batches,
    Blend,
    Course,
    Head,
    Listing,
    Paths,
    RepetitionFilter,
    Samples,
    Stage,
    Stages,
    TokenDataset,
    Tokenizer,
    check_boundaries,
    check_share,
    check_tokenizer,
    list_source,
    open_listed,
    read_heads,
    remember,
    repetition_filter,
    stream_of,
    unchecked,
    wanted,
)
from megatron_stable.errors import DataError
from megatron_stable.parallel.agreement import agreed, decided, everywhere, together
from megatron_stable.parallel.topology import Topology
from megatron_stable.stability.interventions import Interventions

GREW = 0.1  # share of the samples by which a source has to have grown to be named


class Source:
    """Training and validation data of a run. Collective to construct.

    Args:
        tokenizer: The data must have been made with it; ``None``: of unknown origin.

    Attributes:
        course: Which samples each step trains on.
        stages: Which source each sample comes from.

    Raises:
        MegatronStableError: On all ranks alike: the data cannot be used.
    """

    def __init__(self, config: Config, topology: Topology, tokenizer: Tokenizer | None = None) -> None:
        self.config, self.topology, self.tokenizer = config, topology, tokenizer
        data = config.data
        held_out = decided(lambda: wanted(data.validation)) if data.validation else None
        self._wanted = decided(lambda: wanted(data.train, data.stages))
        self._datasets, held = self._open(self._wanted.paths, held_out.paths if held_out is not None else {})
        validation: Samples | None = next(iter(held.values()), None)
        if held_out is not None and len(held) > 1:
            streams = {name: stream_of(held_out.paths[name], each) for name, each in held.items()}
            validation = Blend(held, Stages.begin(streams, held_out.stages))
        self.course = Course.begin(config.batch.global_size)
        self.stages: Stages | None = None
        self._validation = self._batches(validation, self.course) if validation is not None else None
        self._repetitive = repetition_filter(data)

    def arrange(self, before: Stages | None, step: int, interventions: Interventions) -> int | None:
        """Know which source each sample comes from. Collective.

        What the configuration has changed since holds from behind a step on, and behind what interventions skip, as
        that is of the order of before.

        Args:
            before: As it was known; ``None``: the run begins.
            step: The last one that was trained, of the course.

        Returns:
            The sample from which something has been changed; ``None``: nothing was.

        Raises:
            ConfigError, DataError: On all ranks alike: the sources are not what they have to be.
        """
        streams = {name: stream_of(paths, self._datasets[name]) for name, paths in self._wanted.paths.items()}
        sample = self.course.open(step, interventions.skip)

        def arranged() -> tuple[Stages, bool]:
            if before is None:
                return Stages.begin(streams, self._wanted.stages), False
            now = before.resumed(sample, streams, self._wanted.stages)
            return now, now.stages != before.renamed(streams).stages

        self.stages, edited = decided(arranged)
        self._require_datasets(self.course.position(step))
        return sample if edited else None

    def follow(self, course: Course, step: int, interventions: Interventions) -> None:
        """Go on behind a step of a course, in batches of today's size, skipping what configuration and interventions
        say. What windows of the configuration meant once they mean for good. Collective."""
        size, known = self.config.batch.global_size, self.course.configured
        self.course = course.resumed(step, size, self.config.data.skip, interventions.skip, known)
        self._require_datasets(self.course.position(step))

    def step(self, step: int) -> Iterator[Tensor]:
        """This replica's micro batches ``[micro, s + 1]`` of a training step."""
        return self._micro_batches(self._batches(self._train, self.course, self._repetitive), step)

    def looks_back(self, step: int) -> bool:
        """Whether all that is trained on behind a step is open, and may be asked about."""
        return self.stages is None or set(self.stages.ahead(self.course.position(step))) <= self._datasets.keys()

    def entered(self, step: int) -> tuple[Stage, ...]:
        """The stages that begin in the batch of a step, or in what is skipped before it."""
        assert self.stages is not None
        first = step == self.course.eras[0].step + 1
        before = 0 if first else self.stages.number(self.course.position(step - 1) - 1)
        now = self.stages.number(self.course.position(step) - 1)
        return self.stages.stages[before + 1 : now + 1]

    def unreached(self, steps: int) -> tuple[Stage, ...]:
        """The stages that begin when the run has ended, after so many steps."""
        assert self.stages is not None
        end = self.course.position(steps)
        return tuple(stage for stage in self.stages.stages if stage.sample >= end)

    def epochs(self, sample: int) -> dict[str, float]:
        """How often each source has been read before a sample, what was skipped of it included."""
        assert self.stages is not None
        length, streams = self.config.model.sequence_length, self.stages.streams
        counts = self.stages.counts(sample).items()
        return {name: count / windows for name, count in counts if (windows := streams[name].windows(length))}

    @property
    def validates(self) -> bool:
        """Whether there is validation data."""
        return self._validation is not None

    def validation(self) -> Iterator[Iterator[Tensor]]:
        """This replica's micro batches of each batch of an evaluation."""
        assert self._validation is not None
        for number in range(1, self.config.evaluation.batches + 1):
            yield self._micro_batches(self._validation, number)

    def grown(self, before: Iterable[int], since: Iterable[int]) -> tuple[str, ...]:
        """The sources of a blend that have more of the samples of some steps than of others, the most first."""
        old, new = self._shares(before), self._shares(since)
        grown = {name: share - old.get(name, 0.0) for name, share in new.items()}
        named = [name for name, more in grown.items() if more >= GREW]
        return tuple(sorted(named, key=lambda name: -grown[name]))

    def _shares(self, steps: Iterable[int]) -> dict[str, float]:
        samples = (k for step in steps for piece in self.course.samples(step) for k in piece)
        found = Counter(str(self._train.locate(k).dataset.indexed.prefix) for k in samples)
        return {name: count / found.total() for name, count in found.items()}

    @property
    def _train(self) -> Blend:
        assert self.stages is not None
        return Blend(self._datasets, self.stages)

    def _require_datasets(self, sample: int) -> None:
        """Have open what samples from this one on come from, as it was: a source that was removed or changed further
        on is read once more after going back. Collective."""
        if self.stages is None:
            return
        ahead = {name: self.stages.streams[name].paths for name in self.stages.ahead(sample)}
        closed = {name: paths for name, paths in ahead.items() if name not in self._datasets}
        if closed:
            try:
                self._datasets |= self._open(closed)[0]
            except DataError as error:
                what = f"{', '.join(closed)}, which data.train names no more: put it back where it was"
                raise agreed(DataError, f"{error}; from sample {sample} on this run still reads {what}") from None
        with together():
            for name, paths in ahead.items():
                self.stages.require_same(name, stream_of(paths, self._datasets[name]))

    def _open(self, *groups: Mapping[str, Paths]) -> list[dict[str, TokenDataset]]:
        """Open sources, and see that they are of this vocabulary and tokenizer, and have boundaries where they are
        asked for. Collective."""
        data, vocab_size, rank = self.config.data, self.config.model.vocab_size, self.topology.rank
        assert vocab_size is not None
        listings = decided(
            lambda: [{name: list_source(name, each) for name, each in group.items()} for group in groups]
        )
        heads = self._heads([listing for group in listings for listing in group.values()])
        with together():
            opened = [
                {name: TokenDataset(open_listed(listing, next(heads)), *self._cut) for name, listing in group.items()}
                for group in listings
            ]
            checked = [each for group in opened for each in group.values()]
            if self.tokenizer and rank == 0:
                for each in checked:
                    check_tokenizer(each, self.tokenizer)
            if data.document_mask and rank == 0:
                assert data.end_of_document is not None
                for each in checked:
                    check_boundaries(each, data.end_of_document)
        parts = [part.indexed for each in checked for part in each.parts]
        new = decided(lambda: unchecked(parts, vocab_size))  # each rank reads its share
        with together():
            check_share([parts[i] for i in new], vocab_size, rank, self.topology.world)
        if rank == 0:
            for i in new:
                remember(parts[i], vocab_size)
        return opened

    def _heads(self, listings: Sequence[Listing]) -> Iterator[Sequence[Head] | None]:
        """Of each dataset the heads of its shards; ``None``: it has none. Each rank reads its share, so that the
        thousands of ranks of a run do not each open thousands of files. Collective."""
        prefixes = [prefix for each in listings if each.name is not None for prefix in each.prefixes]
        rank, world = self.topology.rank, self.topology.world
        with together():  # where there are fewer than ranks, each looks whether it has one of them
            mine = read_heads(prefixes[rank::world] or prefixes[rank % len(prefixes) :][:1] if prefixes else [])
        parts = everywhere(mine)
        heads = (parts[i % world][i // world] for i in range(len(prefixes)))
        return iter([None if each.name is None else [next(heads) for _ in each.prefixes] for each in listings])

    @property
    def _cut(self) -> tuple[int, int]:
        """What decides on the samples of a dataset: their length, and the seed of their order."""
        return self.config.model.sequence_length, self.config.run.seed

    def _batches(self, dataset: Samples, course: Course, repetitive: RepetitionFilter | None = None) -> Batches:
        return Batches(dataset, course, self.config.batch.micro_size, self.config.model.vocab_size, repetitive)

    def _micro_batches(self, batches: Batches, step: int) -> Iterator[Tensor]:
        topology = self.topology
        return map(torch.from_numpy, batches.micro_batches(step, topology.data_rank, topology.data_size))
