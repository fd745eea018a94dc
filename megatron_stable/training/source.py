"""The batches of a run: which micro batches this rank's replica trains and is validated on, step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_stable.config.schema import Config
from megatron_stable.data import (
    Batches,
    Course,
    RepetitionFilter,
    Samples,
    Tokenizer,
    check_boundaries,
    check_share,
    check_tokenizer,
    open_dataset,
    remember,
    repetition_filter,
    unchecked,
)
from megatron_stable.errors import ConfigError
from megatron_stable.parallel.agreement import decided, together
from megatron_stable.parallel.topology import Topology
from megatron_stable.stability.interventions import Interventions

GREW = 0.1  # share of the samples by which a source has to have grown to be named


class Source:
    """Training and validation data of a run. Collective to construct.

    Args:
        tokenizer: The data must have been made with it; ``None``: of unknown origin.

    Attributes:
        course: Which samples each step trains on.

    Raises:
        MegatronStableError: On all ranks alike: the data cannot be used.
    """

    def __init__(self, config: Config, topology: Topology, tokenizer: Tokenizer | None = None) -> None:
        self.config, self.topology = config, topology
        data, vocab_size = config.data, config.model.vocab_size
        assert vocab_size is not None
        with together():
            if data.train is None:
                raise ConfigError(
                    "data.train is not set: name the prefix of a .bin/.idx dataset; `megatron-stable preprocess` "
                    "makes one"
                )
            self._train = self._open(data.train)
            validation = self._open(data.validation) if data.validation else None
            opened = [each for each in (self._train, validation) if each is not None]
            if tokenizer and topology.rank == 0:
                for each in opened:
                    check_tokenizer(each, tokenizer)
            if data.document_mask and topology.rank == 0:
                assert data.end_of_document is not None
                for each in opened:
                    check_boundaries(each, data.end_of_document)
        self._check(opened, vocab_size)
        self.course = Course.begin(config.batch.global_size)
        self._validation = self._batches(validation, self.course) if validation is not None else None
        self._repetitive = repetition_filter(data)

    def _check(self, opened: list[Samples], vocab_size: int) -> None:
        """See that token ids are of the vocabulary, where nobody has yet: each rank reads its share. Collective."""
        parts = [part.indexed for each in opened for part in each.parts]
        new = decided(lambda: unchecked(parts, vocab_size))
        with together():
            check_share([parts[i] for i in new], vocab_size, self.topology.rank, self.topology.world)
        if self.topology.rank == 0:
            for i in new:
                remember(parts[i], vocab_size)

    def follow(self, course: Course, step: int, interventions: Interventions) -> None:
        """Go on behind a step of a course, in batches of today's size, skipping what configuration and interventions
        say. What windows of the configuration meant once they mean for good."""
        size, known = self.config.batch.global_size, self.course.configured
        self.course = course.resumed(step, size, self.config.data.skip, interventions.skip, known)

    def step(self, step: int) -> Iterator[Tensor]:
        """This replica's micro batches ``[micro, s + 1]`` of a training step."""
        return self._micro_batches(self._batches(self._train, self.course, self._repetitive), step)

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
        """The datasets of a blend that have more of the samples of some steps than of others, the most first."""
        old, new = self._shares(before), self._shares(since)
        grown = {prefix: share - old.get(prefix, 0.0) for prefix, share in new.items()}
        named = [prefix for prefix, more in grown.items() if more >= GREW]
        return tuple(sorted(named, key=lambda prefix: -grown[prefix]))

    def _shares(self, steps: Iterable[int]) -> dict[str, float]:
        samples = (k for step in steps for piece in self.course.samples(step) for k in piece)
        found = Counter(str(self._train.locate(k).dataset.indexed.prefix) for k in samples)
        return {prefix: count / found.total() for prefix, count in found.items()}

    def _open(self, prefixes: str | tuple[str, ...] | dict[str, float]) -> Samples:
        return open_dataset(prefixes, self.config.model.sequence_length, self.config.run.seed)

    def _batches(self, dataset: Samples, course: Course, repetitive: RepetitionFilter | None = None) -> Batches:
        return Batches(dataset, course, self.config.batch.micro_size, self.config.model.vocab_size, repetitive)

    def _micro_batches(self, batches: Batches, step: int) -> Iterator[Tensor]:
        topology = self.topology
        return map(torch.from_numpy, batches.micro_batches(step, topology.data_rank, topology.data_size))
