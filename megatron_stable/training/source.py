"""The batches of a run: which micro batches this rank's replica trains and is validated on, step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_stable.config.schema import Config
from megatron_stable.data import (
    Batches,
    Samples,
    SkipWindows,
    Tokenizer,
    check_tokenizer,
    check_vocabulary,
    open_dataset,
)
from megatron_stable.errors import ConfigError
from megatron_stable.parallel.agreement import together
from megatron_stable.parallel.topology import Topology
from megatron_stable.stability.interventions import Interventions

GREW = 0.1  # share of the samples by which a source has to have grown to be named


class Source:
    """Training and validation data of a run. Collective to construct.

    Args:
        tokenizer: The data must have been made with it; ``None``: of unknown origin.

    Attributes:
        skip: Windows of data steps that are not trained on.

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
            for each in filter(None, (self._train, validation) if topology.rank == 0 else ()):
                if tokenizer:
                    check_tokenizer(each, tokenizer)
                check_vocabulary(each, vocab_size)
        self._validation = self._batches(validation, SkipWindows()) if validation is not None else None
        self.follow(SkipWindows(), 0, Interventions())

    def follow(self, trained: SkipWindows, position: int, interventions: Interventions) -> None:
        """Skip what was skipped up to data step ``position``, and what configuration and interventions say after it."""
        ahead = SkipWindows([*self.config.data.skip, *interventions.skip.windows])
        self.skip = trained.continued(position, ahead)
        self._batches_of_run = self._batches(self._train, self.skip)

    def data_step(self, step: int) -> int:
        """The position of a step in the data order; 0 before the first step."""
        return self.skip.data_step(step) if step else 0

    def step(self, step: int) -> Iterator[Tensor]:
        """This replica's micro batches ``[micro, s + 1]`` of a training step."""
        return self._micro_batches(self._batches_of_run, step)

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
        samples = (k for step in steps for k in self._batches_of_run.samples(step))
        found = Counter(str(self._train.locate(k).dataset.indexed.prefix) for k in samples)
        return {prefix: count / found.total() for prefix, count in found.items()}

    def _open(self, prefixes: str | dict[str, float]) -> Samples:
        return open_dataset(prefixes, self.config.model.sequence_length, self.config.run.seed)

    def _batches(self, dataset: Samples, skip: SkipWindows) -> Batches:
        batch = self.config.batch
        return Batches(dataset, batch.global_size, batch.micro_size, skip, self.config.model.vocab_size)

    def _micro_batches(self, batches: Batches, step: int) -> Iterator[Tensor]:
        topology = self.topology
        return map(torch.from_numpy, batches.micro_batches(step, topology.data_rank, topology.data_size))
