"""The spike detector: numbers in, one per step, verdicts out. It tells a spike from a divergence and from a shift.

What is usual is told by medians over recent accepted values (x: the value, or its logarithm for a norm, whose noise
multiplies):

    level = min(median of the last 15, median of the last `window`)      follows a fall fast and a rise slowly
    scale = median of the last `window` |x - level|                      the MAD, with a floor
    score = (x - level) / scale

A value is accepted two steps late, so that the first steps of a rise are not, and never while an excursion lasts or
when it is not finite. An excursion begins at a value that is not finite, or if

    score >= T tail single     at once, with T = `threshold`
    the last three scores, each taken as 0 to T tail, sum to 2.05 T tail, this one being at least T tail / 2

where `tail` is the 98th percentile of x - level over the last 4 `window` values, in units of 4.5 MADs, and `single` the
square of the highest of these in units of 5 MADs (about what Gaussian noise comes to), or `window` over the number of
those above 0 while they are few, at first and in a fall; both are at least 1, `single` at most 6. So where single steps
stand out now and then, or may, one step is no evidence, and three are. Each step above level + T tail / 2, level and
scale being those before the onset, then belongs to the excursion, and three in a row below end it. If it has not fallen
back after `patience` values, it is a shift if it has settled at a moderate height (a change of the data), or else a
divergence. A rise too slow to stand out is a divergence once it is a part `drift` of the lowest level. What the
defaults rest on: docs/benchmarks.md, from `benchmarks/detector.py`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from math import exp, inf, isfinite, isnan, log, nan
from typing import Any, Literal, NamedTuple

Kind = Literal["warmup", "normal", "spike", "divergence", "shift"]

SHORT = 15  # values behind the fast level
TAILS = 4  # windows that tell how heavy tails are
HELD = 2  # values that wait for what follows them
QUIET = 3  # values in a row below the limit, after which an excursion is over
HIGHEST, HIGH = 5.0, 4.5  # MADs: about the highest of so many Gaussian values; a 98th percentile, 3 for Gaussian ones
SINGLE = 6.0  # times T tail: one step of so many MADs is a spike however high others have been
SUM = 2.05  # times T tail: two steps that stand out need a third that is not quite usual either
RISING, NOISY = 7.0, 4.0  # of what has settled, at most: MADs from half to half, times sqrt(their length); MAD to MAD


@dataclass(frozen=True)
class DetectorSettings:
    """What the detector goes by.

    A part "of the level" is a difference of natural logarithms if ``log`` is set.

    Attributes:
        window: Accepted values behind level and scale.
        warmup: Values before the first verdict (a value that is not finite is a spike even then).
        threshold: Of the score, in MADs (of Gaussian noise: 1.48 MADs are a standard deviation).
        patience: Values after which an excursion is judged to be a shift or a divergence.
        log: Look at the logarithm, for gradient norms and the like. Values of 0 and less are passed over.
        floor: Least scale, as a part of the level.
        give_back: A shift gives back at most this part of the fall so far (from the highest level to the lowest) ...
        shift: ... or this part of the level, if that is more. What rises farther and stays there is a divergence.
        drift: A rise of the level above the lowest by this part of it is a divergence, however slow; infinite: none is.
    """

    window: int = 256
    warmup: int = 50
    threshold: float = 8.0
    patience: int = 50
    log: bool = False
    floor: float = 1e-3
    give_back: float = 0.2
    shift: float = 0.2
    drift: float = 0.2

    def __post_init__(self) -> None:
        if self.window < SHORT or not 1 <= self.warmup <= self.window or self.patience < 1:
            raise ValueError(f"window >= {SHORT}, 1 <= warmup <= window and patience >= 1 must hold: {self}")
        if not all(x > 0 for x in (self.threshold, self.floor, self.give_back, self.shift, self.drift)):
            raise ValueError(f"threshold, floor, give_back, shift and drift must be positive: {self}")


LOSS = DetectorSettings()
GRAD_NORM = DetectorSettings(log=True, floor=0.02, shift=1.1, drift=inf)  # a factor of 3; norms may grow slowly


class Verdict(NamedTuple):
    """On one step.

    Attributes:
        kind: What the step belongs to; "shift" is said once.
        score: How far above the level, in MADs; infinite for a value that is not finite.
        level: Median before this value, or before the excursion (NaN before the first value).
        scale: MAD, of the logarithm if the settings say so.
        onset: First step of the excursion this one belongs to: up to two steps before it was first called a spike,
            and for a slow divergence the step of the lowest level.
    """

    kind: Kind
    score: float
    level: float
    scale: float
    onset: int | None


@dataclass
class _Excursion:
    """What lasts since ``onset``; level, scale and limit are those before it, ``recent`` the last `window` values."""

    kind: Kind
    onset: int
    level: float
    scale: float
    limit: float
    wait: int  # values until it is first judged
    recent: deque[float]
    count: int = 0
    quiet: int = 0


class SpikeDetector:
    """Judges a series, value by value, in time and memory that do not grow with its length."""

    def __init__(self, settings: DetectorSettings = LOSS) -> None:
        self.settings = settings
        self._begin((), ())

    def _begin(self, values: Iterable[float], gaps: Iterable[float]) -> None:
        """Start from accepted values, and from what each had been above the level before it; oldest first."""
        window = self.settings.window
        self._values, self._gaps = deque(values, window), deque(gaps, TAILS * window)
        self._short = sorted(islice(self._values, max(len(self._values) - SHORT, 0), None))
        self._long = sorted(self._values)
        self._sizes = sorted(map(abs, islice(self._gaps, max(len(self._gaps) - window, 0), None)))
        self._held: list[tuple[int, float, float, float]] = []  # step, x, gap, score
        self._top, self._low, self._low_step = -inf, inf, 0
        self._excursion: _Excursion | None = None

    def update(self, step: int, value: float) -> Verdict:
        """Take the value of the next step and judge it."""
        x = float(value)
        if self.settings.log:
            x = log(x) if 0 < x < inf else (-inf if -inf < x <= 0 else nan)
        elif not isfinite(x):
            x = nan
        if self._excursion is not None:
            return self._during(self._excursion, step, x)
        level, scale = self._usual(x)
        if isnan(x):
            return self._during(self._open("spike", step, level, scale), step, x)
        gap = x - level
        score = gap / scale
        if x == -inf:
            return self._verdict("normal", score, level, scale)
        warm = len(self._gaps) >= self.settings.warmup
        if warm and score >= self.settings.threshold / 2 and self._stands_out(score, scale):
            return self._during(self._open("spike", step, level, scale), step, x)
        self._held.append((step, x, gap, score))
        if len(self._held) > HELD:
            _, x, gap, _ = self._held.pop(0)
            self._accept(x, gap)
        if len(self._short) == SHORT:
            self._top = max(self._top, level)
            if level < self._low:
                self._low, self._low_step = level, step
            elif warm and self._short[SHORT // 2] - self._low > self._drift(scale):
                return self._during(self._open("divergence", self._low_step, self._low, scale), step, x)
        return self._verdict("normal" if warm else "warmup", score, level, scale)

    def state(self) -> dict[str, Any]:
        """All of it but the settings, as values for strict JSON."""
        excursion = self._excursion and {
            **{name: _plain(value) for name, value in asdict(self._excursion).items() if name != "recent"},
            "recent": [_plain(value) for value in self._excursion.recent],
        }
        low = {"top": _plain(self._top), "low": _plain(self._low), "low_step": self._low_step}
        held = [list(entry) for entry in self._held]
        return {"values": list(self._values), "gaps": list(self._gaps), "held": held, **low, "excursion": excursion}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned. KeyError, TypeError or ValueError: unusable, and no change."""
        fresh = SpikeDetector(self.settings)
        values, gaps = ([_finite(x) for x in state[name]] for name in ("values", "gaps"))
        if len(values) > len(gaps):
            raise ValueError(f"{len(values)} values, but {len(gaps)} gaps")
        fresh._begin(values, gaps)
        fresh._held = [(int(step), _finite(x), _finite(gap), _finite(score)) for step, x, gap, score in state["held"]]
        if len(fresh._held) > HELD:
            raise ValueError(f"{len(fresh._held)} values held back, not {HELD}")
        fresh._top, fresh._low = (_number(state[name], other) for name, other in (("top", -inf), ("low", inf)))
        fresh._low_step = int(state["low_step"])
        if (kept := state["excursion"]) is not None:
            if kept["kind"] not in ("spike", "divergence"):
                raise ValueError(f"an excursion of the kind {kept['kind']!r}")
            fresh._excursion = _Excursion(
                kept["kind"],
                int(kept["onset"]),
                _number(kept["level"], nan),
                _number(kept["scale"], nan),
                _number(kept["limit"], inf),
                int(kept["wait"]),
                deque((_number(x, nan) for x in kept["recent"]), self.settings.window),
                int(kept["count"]),
                int(kept["quiet"]),
            )
        self.__dict__.update(fresh.__dict__)

    def _usual(self, x: float) -> tuple[float, float]:
        """Level and scale."""
        if not self._long:
            return (x if isfinite(x) else nan), self._part(self.settings.floor, x)
        level = min(self._short[len(self._short) // 2], self._long[len(self._long) // 2])
        return level, max(self._sizes[len(self._sizes) // 2], self._part(self.settings.floor, level))

    def _part(self, part: float, level: float) -> float:
        """A part of a level, in units of x."""
        return part if self.settings.log else max(part * abs(level), 1e-12)

    def _drift(self, scale: float) -> float:
        return max(self._part(self.settings.drift, self._low), self.settings.threshold * scale)

    def _tail(self, scale: float) -> tuple[float, float]:
        """``tail`` and ``single``: how heavy the upper tail is. Rarely called: only for what may stand out."""
        gaps = sorted(self._gaps)
        high, highest = gaps[len(gaps) * 98 // 100] / scale, gaps[-1] / scale
        above = len(gaps) - bisect_right(gaps, 0.0)
        single = max(1.0, (highest / HIGHEST) ** 2 if highest > 0 else 1.0, self.settings.window / max(above, 1))
        return max(1.0, high / HIGH), min(single, SINGLE)

    def _stands_out(self, score: float, scale: float) -> bool:
        tail, single = self._tail(scale)
        most = self.settings.threshold * tail
        if score >= most * single:
            return True
        scores = (*(held[3] for held in self._held), score)
        return score >= most / 2 and sum(min(max(s, 0.0), most) for s in scores) >= SUM * most

    def _accept(self, x: float, gap: float) -> None:
        """Let a value into the windows."""
        if len(self._values) >= SHORT:
            _remove(self._short, self._values[-SHORT])
        if len(self._values) == self.settings.window:
            _remove(self._long, self._values[0])
        if len(self._gaps) >= self.settings.window:
            _remove(self._sizes, abs(self._gaps[-self.settings.window]))
        self._values.append(x)
        self._gaps.append(gap)
        insort(self._short, x)
        insort(self._long, x)
        insort(self._sizes, abs(gap))

    def _open(self, kind: Kind, step: int, level: float, scale: float) -> _Excursion:
        """Begin an excursion at a step, or at one held back that is part of the rise."""
        warm = len(self._gaps) >= self.settings.warmup
        limit = level + self.settings.threshold / 2 * self._tail(scale)[0] * scale if warm else inf
        recent: deque[float] = deque(maxlen=self.settings.window)
        wait = self.settings.patience
        if kind == "divergence":  # a slow one: long past patience, and its windows are full of it
            wait = self.settings.window
        else:
            while self._held and self._held[0][1] < limit:
                _, x, gap, _ = self._held.pop(0)
                self._accept(x, gap)
            if self._held:
                step = self._held[0][0]
            recent.extend(x for _, x, _, _ in self._held)
        self._held.clear()
        self._excursion = _Excursion(kind, step, level, scale, limit, wait, recent, len(recent))
        return self._excursion

    def _during(self, this: _Excursion, step: int, x: float) -> Verdict:
        """Judge a value while an excursion lasts."""
        this.count += 1
        this.recent.append(x)
        score = inf if isnan(x) else (x - this.level) / this.scale if isfinite(this.level) else 0.0
        if x < this.limit:
            this.quiet += 1
            if isfinite(x):
                self._accept(x, x - this.level if isfinite(this.level) else 0.0)
            if this.quiet == QUIET:
                self._excursion = None
            warm = len(self._gaps) >= self.settings.warmup
            return self._verdict("normal" if warm else "warmup", score, this.level, this.scale)
        this.quiet = 0
        if this.count >= this.wait and (this.count - this.wait) % self.settings.patience == 0:
            this.kind = self._judge(this)
            if this.kind == "shift":
                self._settle(this, step)
        return self._verdict(this.kind, score, this.level, this.scale, this.onset)

    def _judge(self, this: _Excursion) -> Kind:
        """What an excursion that has not fallen back is."""
        half = len(this.recent) // 2
        early, late = (sorted(part) for part in (list(this.recent)[:half], list(this.recent)[half:]))
        if not all(map(isfinite, late)) or len(late) < SHORT // 2:
            return "divergence"
        middle = late[len(late) // 2]
        if middle < this.limit:
            return this.kind  # many spikes in a row
        noise = sorted(abs(x - middle) for x in late)[len(late) // 2]
        rises = not all(map(isfinite, early)) or middle - early[half // 2] > RISING / max(half, 1) ** 0.5 * this.scale
        fall = max(self._top - self._low, 0.0)
        most = max(self.settings.give_back * fall, self._part(self.settings.shift, this.level))
        moderate = middle - this.level <= most and noise <= NOISY * this.scale
        return "shift" if moderate and not rises else "divergence"

    def _settle(self, this: _Excursion, step: int) -> None:
        """Take the new level for the usual one. The noise is what it was."""
        top, gaps = self._top, self._gaps
        late = list(this.recent)[len(this.recent) // 2 :]
        self._begin(late, gaps)
        self._top, self._low, self._low_step = top, sorted(late)[len(late) // 2], step

    def _verdict(self, kind: Kind, score: float, level: float, scale: float, onset: int | None = None) -> Verdict:
        return Verdict(kind, score, exp(level) if self.settings.log else level, scale, onset)


@dataclass(frozen=True)
class Spike:
    """An excursion of a series.

    Attributes:
        kind: "spike", "divergence" or "shift": what it turned out to be.
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


def _remove(ordered: list[float], x: float) -> None:
    del ordered[bisect_left(ordered, x)]


def _plain(value: Any) -> Any:
    """A value for strict JSON."""
    return None if isinstance(value, float) and not isfinite(value) else value


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
        raise TypeError(f"not a finite number: {value!r}")
    return float(value)


def _number(value: Any, missing: float) -> float:
    return missing if value is None else _finite(value)
