"""The course of a run through its data: which samples each step trains on, whatever the batch size was on the way.

The data order is an endless series of samples, and a step takes the next `size` of them that are in no skip window.
What a run persists of its place in it is in samples, so a later change of the batch size moves nothing::

    step               1    2    3         4    5        6
    samples          0    8    16   ====  32   40      48              ====: skipped
    data step          1    2    3    4    5    6        7        8
                     └─ era: 8 samples a step ────────┘└─ era: 16 samples a step

A data step is how people name a place in the data order: a stretch as long as a batch, counted from 1. Where the batch
size changes, the next data step begins right behind the last batch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from functools import cached_property
from typing import Annotated

from pydantic import Field

from megatron_stable.data.skip import SkipWindows, Stretch
from megatron_stable.persisted import LARGEST, Count, Persisted, Positive


class Era(Persisted):
    """The steps of a run behind `step`, in batches of `size` samples, until the next era.

    Attributes:
        data_step: The last data step before it.
        sample: Its first one.
    """

    step: Count
    data_step: Count
    sample: Count
    size: Positive


class Course(Persisted):
    """Where a run has been in its data, and where it will go. All questions take O(log(eras + windows)).

    Attributes:
        eras: The first one begins where the run did; each later one where the batch size was changed.
        skip: Samples that were and will be left out.
        configured: Windows of data steps of the configuration, and the samples that these mean for good.
    """

    eras: Annotated[tuple[Era, ...], Field(min_length=1)]
    skip: tuple[Stretch, ...] = ()
    configured: tuple[tuple[tuple[int, int], Stretch], ...] = ()

    @classmethod
    def begin(cls, size: int, skip: Iterable[tuple[int, int]] = ()) -> Course:
        """From the first sample on in batches of `size`, but for windows of data steps [first, last]."""
        start = cls(eras=(Era(step=0, data_step=0, sample=0, size=size),))
        return start.resumed(0, size, skip, SkipWindows())

    @cached_property
    def windows(self) -> SkipWindows:
        """The samples that are left out."""
        return SkipWindows(self.skip)

    def samples(self, step: int) -> tuple[range, ...]:
        """What a step trains on: its batch, in order, in as many pieces as windows cut it into."""
        if step <= self.eras[0].step:
            raise ValueError(f"the first step is {self.eras[0].step + 1}, got {step}")
        era = self.eras[bisect_left(self.eras, step, key=lambda era: era.step) - 1]
        return self.windows.take(self.windows.kept(era.sample) + (step - era.step - 1) * era.size, era.size)

    def position(self, step: int) -> int:
        """The sample behind the last one of a step; where the run began, its first."""
        return self.samples(step)[-1].stop if step > self.eras[0].step else self.eras[0].sample

    def open(self, step: int, ahead: SkipWindows) -> int:
        """The first sample behind a step from which the order of the data may be another: that is what is trained on
        next, but for windows that lie ahead, which mean samples of the order that there was."""
        position = self.position(step)
        behind = [end for _, end in ahead.stretches if end > position]
        return self.windows.sample(self.windows.kept(max([position, *behind])))

    def trained(self, step: int) -> int:
        """Samples that were trained on up to a step."""
        return self.windows.kept(self.position(step))

    def step(self, sample: int) -> int | None:
        """The step that trains on a sample; `None`: it is left out."""
        if sample in self.windows:
            return None
        era, kept = self._era(sample), self.windows.kept
        return era.step + (kept(sample) - kept(era.sample)) // era.size + 1

    def data_step(self, step: int) -> int:
        """The data step in which a step's batch begins; at step 0, before the first, 0."""
        return self._data_step(self.samples(step)[0].start) if step else 0

    def data_steps(self, first: int, end: int) -> tuple[int, int]:
        """First and last data step that some of the samples [first, end) lie in."""
        return self._data_step(first), self._data_step(end - 1)

    def behind(self, step: int) -> int:
        """The last data step of which nothing is left to train on after a step."""
        return self._data_step(self.position(step)) - 1

    def stretch(self, first: int, last: int) -> tuple[int, int]:
        """The samples of data steps, inclusive, as [first, end)."""
        begin, end = self._begin(first), self._begin(last + 1)
        return min(begin, LARGEST - 2), min(end, LARGEST - 1)  # as far as anything is persisted

    def resumed(
        self,
        step: int,
        size: int,
        configured: Iterable[tuple[int, int]],
        interventions: SkipWindows,
        known: Iterable[tuple[tuple[int, int], Stretch]] = (),
    ) -> Course:
        """This course up to a step, and from there on in batches of `size`, leaving out what these windows say.

        Args:
            configured: Windows of data steps. One that was there before means the samples that it meant then.
            interventions: What interventions leave out.
            known: What windows of the configuration were taken to mean elsewhere, if not here.
        """
        position, first = self.position(step), self.eras[0]
        eras = tuple(era for era in self.eras if era.step < step)
        if not eras or eras[-1].size != size:
            data_step = self._data_step(position - 1) if step > first.step else first.data_step
            eras = (*eras, Era(step=step, data_step=data_step, sample=position, size=size))
        course, meant = self.model_copy(update={"eras": eras}), {**dict(known), **dict(self.configured)}
        named = {window: meant.get(window) or course.stretch(*window) for window in configured}
        ahead = SkipWindows([*named.values(), *interventions.stretches])
        skip = self.windows.continued(position, ahead).stretches
        return Course(eras=eras, skip=skip, configured=tuple(named.items()))

    def _era(self, sample: int) -> Era:
        return self.eras[max(0, bisect_right(self.eras, sample, key=lambda era: era.sample) - 1)]

    def _data_step(self, sample: int) -> int:
        era = self._era(sample)
        return era.data_step + (sample - era.sample) // era.size + 1

    def _begin(self, data_step: int) -> int:
        """The first sample of a data step."""
        era = self.eras[max(0, bisect_left(self.eras, data_step, key=lambda era: era.data_step) - 1)]
        return max(0, era.sample + (data_step - 1 - era.data_step) * era.size)
