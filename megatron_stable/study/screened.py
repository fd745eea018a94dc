"""The record of a screening, ``screening.json``."""

from __future__ import annotations

from typing import Literal

from megatron_stable.persisted import Persisted

VERSION = 1

Verdict = Literal["suspect", "clear", "open"]


class Bounds(Persisted):
    """An estimate and its simultaneous interval; ``null``: nothing is known."""

    value: float
    low: float | None
    high: float | None


class Events(Persisted):
    """Of the runs of an arm together."""

    diverged: int
    spikes: int
    """Of loss and gradient norm, as the guard's detectors saw them."""
    data_blamed: int
    """Second opinions on a rise of the loss that blamed the data."""
    state_blamed: int


class Place(Persisted):
    """An odd window."""

    dataset: str
    document: int
    """In which it begins."""
    token: int
    """Of the dataset, at which it begins."""
    step: float
    """Over the median window's."""
    loss: float
    """Robust standard deviations above the median window's."""


class Screened(Persisted):
    """What is known of a source.

    Attributes:
        weight: In the blend.
        windows: That were looked at.
        share: Of the samples, there and in its own arm.
        odd: Share of its windows.
        gap: Mean loss of its windows over that of the blend's, nats per token, by the control's last states.
        tail: Factor on the tail of gradient norms.
        excursion: What it adds to the highest tenth of losses over their running median, nats per token.
        events: In its arm.
        worst: Its oddest windows.
    """

    name: str
    paths: tuple[str, ...]
    weight: float
    windows: int
    share: tuple[float, float]
    verdict: Verdict
    odd: Bounds
    gap: float
    tail: Bounds
    excursion: Bounds
    events: Events
    worst: tuple[Place, ...]


class Screening(Persisted):
    """A screening; ``screening.json`` of its directory.

    Attributes:
        factor: On the weight of an arm's source; 0: it was left out.
        windows: Of each source that has so many.
        states: Of the control, that were asked.
        error: Probability that any of the intervals misses.
        far, apart: Step of a window over the median's, and robust standard deviations of its loss, beyond which it is
            odd.
        least_share, least_tail: A source is suspect whose interval lies above one of these.
        no_tails: Why tails of the runs say nothing, and what would mend it; ``null``: they do say something.
        recommendation: In sentences.
    """

    version: int = VERSION
    written_by: str
    learning_rate: float
    factor: float
    seeds: tuple[int, ...]
    steps: int
    windows: int
    states: int
    error: float
    far: float
    apart: float
    least_share: float
    least_tail: float
    no_tails: str | None = None
    control: Events
    sources: tuple[Screened, ...]
    recommendation: tuple[str, ...] = ()
