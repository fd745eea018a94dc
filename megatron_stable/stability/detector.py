"""The spike detector: numbers in, one per step, verdicts out. It tells what falls back from what stays.

With x the value, or its logarithm for a norm, whose noise multiplies, and level and MAD from `level.py`:

    score = (x - level) / scale,    scale = max(MAD, floor)

A value is accepted eight steps late, so that the first steps of a rise are not, and never while an excursion lasts or
when it is not finite. An excursion begins at a value that is not finite, or if

    score >= T tail single     at once, with T = `threshold`
    the last three scores, each taken as 0 to T tail, sum to 2.05 T tail, this one being at least T tail / 2

with `tail` and `single`, both at least 1, for the upper tail of the noise. So where single steps stand out now and
then, or may, one step is no evidence, and three are. Each step above level + T tail / 2, level and scale being those
before the onset, then belongs to the excursion (`excursion.py`), and three in a row below end it.

It is judged every `patience` values, by the medians of its two halves. At first it is a spike. It is a *rise* once it
has lasted `patience` values without being on its way back, which it may be for as long again; and a *divergence* if it
is not finite, is higher than a change of data explains, or goes on rising. A rise too slow to stand out is one once
the fast level is a part `drift` above the lowest. Whether a rise is the data's or the state's, no curve can tell: who
has found out that it is the data's says so by :meth:`SpikeDetector.settle`, and if nobody does, a rise that has stayed
for a whole window is taken for usual. What the constants rest on: docs/benchmarks.md, and
`benchmarks/detector.py --constant NAME`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, inf, isfinite, log, nan
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, model_validator

from megatron_stable.stability.excursion import QUIET, Excursion, Finite, Step
from megatron_stable.stability.level import SHORT, RobustLevel, median

__all__ = [
    "GRAD_NORM",
    "LOSS",
    "QUIET",
    "DetectorSettings",
    "DetectorState",
    "Spike",
    "SpikeDetector",
    "Verdict",
    "find_spikes",
]

Kind = Literal["warmup", "normal", "spike", "rise", "divergence"]

HELD = 8  # values that wait for what follows them: a slow rise is noticed about as late, and must not become usual
TOGETHER = 3  # values that are evidence together
SUM = 2.05  # times T tail: two steps that stand out need a third that is not quite usual either
TREND = 0.25  # of its height: an excursion whose later half is lower by it is on its way back, higher by it, rising


@dataclass(frozen=True)
class DetectorSettings:
    """What the detector goes by.

    A part "of a level" is a difference of natural logarithms if ``log`` is set.

    Attributes:
        window: Accepted values behind level and scale; a rise that lasts as long is the usual level from there on.
        warmup: Values before the first verdict (a value that is not finite is a spike even then).
        threshold: Of the score, in MADs (of Gaussian noise: 1.48 MADs are a standard deviation).
        patience: Values after which an excursion that is not on its way back is a rise.
        log: Look at the logarithm, for gradient norms and the like. Values of 0 and less are passed over.
        floor: Least scale, as a part of the level.
        explained: What a change of data may explain, as a part of the highest level so far: more is a divergence.
        drift: A rise of the fast level above the lowest by this part of it is a rise, however slow; infinite: none is.
    """

    window: int = 256
    warmup: int = 50
    threshold: float = 8.0
    patience: int = 50
    log: bool = False
    floor: float = 1e-3
    explained: float = 0.2
    drift: float = 0.2

    def __post_init__(self) -> None:
        if self.window < SHORT or not 1 <= self.warmup <= self.window or self.patience < 1:
            raise ValueError(f"window >= {SHORT}, 1 <= warmup <= window and patience >= 1 must hold: {self}")
        if not all(x > 0 for x in (self.threshold, self.floor, self.explained, self.drift)):
            raise ValueError(f"threshold, floor, explained and drift must be positive: {self}")

    def part(self, part: float, level: float) -> float:
        """A part of a level, in units of x; never 0."""
        return part if self.log else max(part * abs(level), 1e-12)


LOSS = DetectorSettings()
GRAD_NORM = DetectorSettings(log=True, floor=0.02, explained=1.1, drift=inf)  # a factor of 3; norms may grow slowly


class Verdict(NamedTuple):
    """On one step.

    Attributes:
        kind: What the step belongs to.
        score: How far above the level, in MADs; infinite for a value that is not finite.
        level: Median before this value, or before the excursion (NaN before the first value).
        scale: MAD, of the logarithm if the settings say so.
        onset: First step of the excursion this one belongs to: up to eight steps before it was first called a spike,
            and for a drift the step of the lowest level.
    """

    kind: Kind
    score: float
    level: float
    scale: float
    onset: int | None


class Held(NamedTuple):
    """A value that waits to be accepted."""

    step: Step
    x: Finite
    gap: Finite
    score: Finite


class DetectorState(BaseModel):
    """All of a detector but its settings, for strict JSON. ``None`` stands for what is not known yet."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    values: tuple[Finite, ...] = ()
    gaps: tuple[Finite, ...] = ()
    held: tuple[Held, ...] = ()
    top: Finite | None = None
    low: Finite | None = None
    low_step: Step = 0
    excursion: Excursion | None = None

    @model_validator(mode="after")
    def _fits(self) -> DetectorState:
        if len(self.values) > len(self.gaps) or len(self.held) > HELD:
            raise ValueError(f"{len(self.values)} values, {len(self.gaps)} gaps and {len(self.held)} values held back")
        return self


class SpikeDetector:
    """Judges a series, value by value, in time and memory that do not grow with its length."""

    def __init__(self, settings: DetectorSettings = LOSS) -> None:
        self.settings = settings
        self.load(DetectorState())

    def state(self) -> DetectorState:
        """All of it but the settings."""
        return DetectorState(
            values=tuple(self._usual.values),
            gaps=tuple(self._usual.gaps),
            held=tuple(self._held),
            top=self._top,
            low=self._low,
            low_step=self._low_step,
            excursion=self._excursion,
        )

    def load(self, state: DetectorState) -> None:
        """Go on from what :meth:`state` returned."""
        self._usual = RobustLevel(self.settings.window, state.values, state.gaps)
        self._held = list(state.held)
        self._top, self._low, self._low_step = state.top, state.low, state.low_step
        self._excursion = state.excursion

    def update(self, step: int, value: float) -> Verdict:
        """Take the value of the next step and judge it."""
        x: float | None = float(value) if isfinite(value) else None
        if self.settings.log:
            if -inf < value <= 0:
                return Verdict("normal", -inf, self._shown(self._level()), self._scale(self._level()), None)
            x = log(x) if x is not None else None
        if self._excursion is not None:
            return self._during(self._excursion, step, x)
        level = self._level()
        scale = self._scale(x if level is None else level)
        if x is None:
            return self._during(self._open(step, level, scale), step, x)
        gap = x - level if level is not None else 0.0
        score = gap / scale
        if self._warm and self._stands_out(score, scale):
            return self._during(self._open(step, level, scale), step, x)
        self._held.append(Held(step, x, gap, score))
        if len(self._held) > HELD:
            self._accept_held()
        if self._drifted(step, level, scale):
            return self._during(self._open_drift(scale), step, x)
        return Verdict(
            "normal" if self._warm else "warmup", score, self._shown(x if level is None else level), scale, None
        )

    def settle(self) -> None:
        """The rise is the data's: its later half is the usual level from here on, and the noise is what it was."""
        if (this := self._excursion) is None:
            return
        late = [x for x in this.recent[len(this.recent) // 2 :] if x is not None]
        self._usual = RobustLevel(self.settings.window, late or self._usual.values, self._usual.gaps)
        self._low, self._low_step = (median(sorted(late)) if late else self._low), this.onset + this.count - 1
        self._excursion = None

    @property
    def _warm(self) -> bool:
        return len(self._usual.gaps) >= self.settings.warmup

    def _level(self) -> float | None:
        return self._usual.level([held.x for held in self._held])

    def _scale(self, level: float | None) -> float:
        return max(self._usual.spread, self.settings.part(self.settings.floor, level or 0.0))

    def _shown(self, level: float | None) -> float:
        """A level in units of the series."""
        return nan if level is None else exp(level) if self.settings.log else level

    def _stands_out(self, score: float, scale: float) -> bool:
        if score < self.settings.threshold / 2:
            return False
        tail, single = self._usual.tail(scale)
        most = self.settings.threshold * tail
        if score >= most * single:
            return True
        scores = (*(held.score for held in self._held[1 - TOGETHER :]), score)
        return score >= most / 2 and sum(min(max(s, 0.0), most) for s in scores) >= SUM * most

    def _drifted(self, step: int, level: float | None, scale: float) -> bool:
        """Whether the fast level is far above the lowest; both are kept here."""
        if level is None or len(self._usual.values) < SHORT:
            return False
        self._top = level if self._top is None else max(self._top, level)
        if self._low is None or level < self._low:
            self._low, self._low_step = level, step
        least = max(self.settings.part(self.settings.drift, self._low), self.settings.threshold * scale)
        return self._warm and self._usual.fast - self._low > least

    def _accept_held(self) -> None:
        held = self._held.pop(0)
        self._usual.accept(held.x, held.gap)

    def _open(self, step: int, level: float | None, scale: float) -> Excursion:
        """Begin an excursion at a step, or at one held back that is part of it."""
        this = self._begin("spike", step, level, scale)
        first = len(self._held)
        for i in reversed(range(first)):  # back over what is quiet for no longer than within an excursion
            if not this.is_quiet(self._held[i].x):
                first = i
            elif first - i >= QUIET:
                break
        for _ in range(first):
            self._accept_held()
        if self._held:
            this = this.model_copy(update={"onset": self._held[0].step})
        for held in self._held:
            this = this.followed_by(held.x, self.settings.window)
        self._held.clear()
        return this

    def _open_drift(self, scale: float) -> Excursion:
        """Begin the excursion of a slow rise, whose last values are usual already."""
        this = self._begin("rise", self._low_step, self._low, scale)
        while self._held:
            self._accept_held()
        for x in list(self._usual.values)[-SHORT:]:
            this = this.followed_by(x, self.settings.window)
        return this

    def _begin(self, kind: Literal["spike", "rise"], onset: int, level: float | None, scale: float) -> Excursion:
        limit = None
        if level is not None and self._warm:
            limit = level + self.settings.threshold / 2 * self._usual.tail(scale)[0] * scale
        return Excursion(kind=kind, onset=onset, level=level, scale=scale, limit=limit)

    def _during(self, this: Excursion, step: int, x: float | None) -> Verdict:
        """Judge a value while an excursion lasts."""
        this = this.followed_by(x, self.settings.window)
        if this.count % self.settings.patience == 0:
            this = this.model_copy(update={"kind": self._judge(this)})
        self._excursion = None if this.over else this
        score = inf if x is None else (x - this.level) / this.scale if this.level is not None else 0.0
        if x is not None and this.is_quiet(x):
            self._usual.accept(x, x - this.level if this.level is not None else 0.0)
            return Verdict("normal" if self._warm else "warmup", score, self._shown(this.level), this.scale, None)
        if this.kind == "rise" and this.count >= self.settings.window:
            self.settle()
        return Verdict(this.kind, score, self._shown(this.level), this.scale, this.onset)

    def _judge(self, this: Excursion) -> Literal["spike", "rise", "divergence"]:
        """What an excursion is that has lasted `patience` values, or a multiple."""
        early, late = this.heights()
        most = self.settings.part(self.settings.explained, self._top or this.level or 0.0)
        if late == inf:
            return "divergence"
        if this.limit is None or late < this.limit - (this.level or 0.0):
            return this.kind  # spikes in a row, between which it falls back
        if this.kind == "spike" and late <= (1 - TREND) * early and this.count < 2 * self.settings.patience:
            return "spike"
        if late > most:
            return "divergence"
        rises = late - early >= TREND * max(late, self.settings.threshold * this.scale)
        return "divergence" if rises and this.kind != "spike" else "rise"


@dataclass(frozen=True)
class Spike:
    """An excursion of a series.

    Attributes:
        kind: "spike", "rise" or "divergence": what it turned out to be.
        onset: Its first step.
        peak_step: The step of its highest value, or of the first that is not finite.
        peak: That value; ``None`` if it is not finite.
        duration: Steps from the onset to the last that is part of it, both included.
        level: The median before it.
        score: The highest score, in MADs.
    """

    kind: Kind
    onset: int
    peak_step: int
    peak: float | None
    duration: int
    level: float
    score: float


def find_spikes(steps: Sequence[int], values: Sequence[float], settings: DetectorSettings = LOSS) -> list[Spike]:
    """All excursions of a series, in order. ValueError if the lengths differ.

    Args:
        steps: Rising.
        values: One per step.
        settings: What to go by.
    """
    detector = SpikeDetector(settings)
    spikes: list[Spike] = []
    for i, (step, value) in enumerate(zip(steps, values, strict=True)):
        verdict = detector.update(step, value)
        if (onset := verdict.onset) is None:
            continue
        if not spikes or spikes[-1].onset != onset:
            spikes.append(Spike(verdict.kind, onset, onset, -inf, 1, verdict.level, verdict.score))
            earlier = range(max(i - HELD, 0), i)
        else:
            earlier = range(0)
        spike = spikes[-1]
        for j in (*(j for j in earlier if steps[j] >= onset), i):
            if spike.peak is not None and not (isfinite(values[j]) and values[j] <= spike.peak):
                peak = values[j] if isfinite(values[j]) else None
                spike = replace(spike, peak=peak, peak_step=steps[j])
        score = max(spike.score, verdict.score)
        spikes[-1] = replace(spike, kind=verdict.kind, duration=step - onset + 1, score=score)
    return spikes
