"""What the runs of a screening say of each source: evidence with intervals, verdicts, and a record of it all.

Two lines of evidence, each with half of the error that is allowed (of the second's, half is for tails of losses), so
that all intervals hold together:

Windows. The control's states are asked about random windows of each source: how far each would move them, over the
median window of the blend (:mod:`megatron_stable.study.impact`), and how its loss lies to theirs, in robust standard
deviations, as means over all states. A window is odd that would move them ``FAR`` times as far, or whose loss is
``APART`` deviations off, to either side: what is far too easy, such as the same bytes again and again, is no text
either. Texts differ, so a source is suspect only if more than ``SHARE`` of its windows are odd, beyond doubt.

Arms. The tail of gradient norms of a run is the mean of its highest tenth, over a running median, in logarithms: a
level that differs between texts drops out. A source is suspect if it multiplies the tail by more than ``TAIL``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import inf, isfinite, log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_stable.analysis.inspection import SIGMA
from megatron_stable.data import Location, TokenDataset, repetition_filter
from megatron_stable.data.shards import open_tokens
from megatron_stable.errors import ConfigError
from megatron_stable.numbers import finite
from megatron_stable.persisted import package_version
from megatron_stable.records.directory import RunDirectory
from megatron_stable.records.metrics import latest, read_metrics
from megatron_stable.stability.collapse import RECENT, Collapse
from megatron_stable.stability.events import SecondOpinion, Spike
from megatron_stable.study.grid import Cell, Grid
from megatron_stable.study.impact import Impact, drawn, impact, states
from megatron_stable.study.outcome import read_ended
from megatron_stable.study.screened import Bounds, Events, Place, Screened, Screening, Verdict
from megatron_stable.study.screening import AXIS, CONTROL, LEAST, WINDOWS, Asked, warm_up, weights
from megatron_stable.study.screening_words import advice
from megatron_stable.study.simultaneous import Interval, against_control, share

ERROR = 0.05  # that any interval of a screening misses
FAR, APART, SHARE, TAIL = 3.0, 4.0, 0.1, 1.5
AROUND = 10  # steps to either side of a running median
MOST = 10.0  # times it, beyond which a gradient norm counts as that
MEASURE = 1e6  # of a window's step, which is beyond all measure where it is not finite
NAMED = 5  # windows of a suspect that are named
SEED = 20220502  # of the windows that are drawn


class Found(NamedTuple):
    """A screening, and by source, of each of its windows, how far it would move the model, over the median window, and
    how its loss lies to theirs, in robust standard deviations."""

    record: Screening
    steps: list[NDArray[np.float64]]
    losses: list[NDArray[np.float64]]


def judge(asked: Asked, grid: Grid, count: int = WINDOWS, tick: Callable[[int], None] = lambda total: None) -> Found:
    """What a screening has found, when its runs have ended.

    Args:
        count: Windows of each source that has so many.
        tick: Called after each window at each state, with how many there are in all.

    Raises:
        ConfigError: No control run has a checkpoint to ask.
        DataError: Data or checkpoints cannot be read.
    """
    cells: dict[str, list[Cell]] = {}
    for cell in grid.cells:
        cells.setdefault(cell.labels[AXIS], []).append(cell)
    names = [each.name for each in asked.sources]
    windows = _drawn(asked, count)
    at, told = zip(*_ask(cells[CONTROL], windows, tick), strict=True)
    logs = np.log(
        np.nan_to_num(np.stack([each.rms for each in told]), nan=MEASURE, posinf=MEASURE).clip(1 / MEASURE, MEASURE)
    )
    blend = np.array([asked.sources[i].weight / len(row) for i, row in enumerate(windows) for _ in row])
    # of each state the median window of the blend is the measure; over states, the geometric mean
    ends = np.cumsum([len(row) for row in windows])[:-1]
    steps = np.split(np.exp(np.mean([state - _median(state, blend) for state in logs], axis=0)), ends)
    deviations = np.stack([_deviations(each.loss, blend) for each in told])
    # what is learnt fast is too hard first and too easy then: sizes are averaged, not signs
    losses = np.split(np.copysign(np.abs(deviations).mean(0), deviations.mean(0)), ends)
    gaps = _gaps([each for step, each in zip(at, told, strict=True) if step == at[-1]], ends, asked)
    tails, excursions, no_tails = _excesses([cells[arm] for arm in (CONTROL, *names)])
    sign = 1 if asked.factor else -1
    before, each_error = weights(asked, CONTROL), ERROR / 2 / len(names)
    listed = []
    for i, source in enumerate(asked.sources):
        after = weights(asked, source.name)
        odd = (steps[i] > FAR) | (np.abs(losses[i]) > APART)
        out = share(int(odd.sum()), len(odd), each_error)
        tail, excursion = _signed(tails[i], sign), _signed(excursions[i], sign)
        factor = Interval(*(float(np.exp(bound)) for bound in tail))
        listed.append(
            Screened(
                name=source.name, paths=source.paths, weight=source.weight, windows=len(odd),
                share=(before[source.name] / sum(before.values()), after[source.name] / sum(after.values())),
                verdict=_verdict(out, factor), odd=_bounds(out), gap=gaps[i], tail=_bounds(factor),
                excursion=_bounds(excursion), events=_events(cells[source.name]),
                worst=_worst(steps[i], losses[i], windows[i]),
            )
        )  # fmt: skip
    record = Screening(
        written_by=package_version(),
        learning_rate=float(grid.cells[0].config.optimizer.learning_rate),
        factor=asked.factor,
        seeds=tuple(cell.config.run.seed for cell in cells[CONTROL]),
        steps=grid.cells[0].config.run.steps,
        windows=count,
        states=len(told),
        error=ERROR,
        far=FAR,
        apart=APART,
        least_share=SHARE,
        least_tail=TAIL,
        no_tails=no_tails,
        control=_events(cells[CONTROL]),
        sources=tuple(listed),
    )
    return Found(record.model_copy(update={"recommendation": tuple(advice(record))}), steps, losses)


def _verdict(out: Interval, tail: Interval) -> Verdict:
    if out.low > SHARE or tail.low > TAIL:
        return "suspect"
    return "clear" if out.high <= SHARE and tail.high <= TAIL else "open"


def _drawn(asked: Asked, count: int) -> list[list[Location]]:
    length = asked.config.model.sequence_length
    opened = [TokenDataset(open_tokens(each.paths, each.name), length, SEED) for each in asked.sources]
    return drawn(opened, count, repetition_filter(asked.config.data))


def _ask(
    control: Sequence[Cell], windows: Sequence[Sequence[Location]], tick: Callable[[int], None]
) -> list[tuple[int, Impact]]:
    """What the states of the control say, each with its step, the earliest first."""
    sound = {cell.directory: sound_until(cell) for cell in control}
    asked = sorted((step, run) for run, until in sound.items() for step in states(run) if step < until)
    total = len(asked) * sum(map(len, windows))
    told = [(step, impact(run, step, windows, lambda: tick(total))) for step, run in asked]
    told = [(step, each) for step, each in told if each.finite]
    if not told:
        raise ConfigError(
            "no control run has a checkpoint from before it diverged: the plain blend diverges at once; "
            "give a lower --lr"
        )
    return told


def sound_until(cell: Cell) -> float:
    """The step at which a run began to diverge, before which its states may be asked; infinite: it did not."""
    level, began = Collapse(), inf
    for record in latest(read_metrics(RunDirectory(cell.directory).metrics)):
        loss = finite(record.get("loss"))
        level = level.followed_by(record["step"], loss, cell.config.guard.collapse or 0.5)
        if loss is None:
            began = min(began, record["step"])
    if level.onset is not None:  # the level is a median of so many losses, and follows them
        return min(began, level.onset - RECENT)
    return began if _ended_by_divergence(cell) else inf


def _median(values: NDArray[np.float64], blend: NDArray[np.float64]) -> float:
    order = np.argsort(values)
    passed = np.cumsum(blend[order])
    return float(values[order][np.searchsorted(passed, passed[-1] / 2)])


def _deviations(values: NDArray[np.float64], blend: NDArray[np.float64]) -> NDArray[np.float64]:
    """Robust standard deviations from the median, none more than ``MEASURE``."""
    known = np.nan_to_num(values, nan=MEASURE, posinf=MEASURE)
    over = known - _median(known, blend)
    return (over / max(SIGMA * _median(np.abs(over), blend), 1e-12)).clip(-MEASURE, MEASURE)


def _gaps(last: Sequence[Impact], ends: NDArray[np.int64], asked: Asked) -> list[float]:
    means = np.mean([[_finite_mean(row) for row in np.split(each.loss, ends)] for each in last], axis=0)
    return [float(gap) for gap in means - np.average(means, weights=[each.weight for each in asked.sources])]


def _finite_mean(losses: NDArray[np.float64]) -> float:
    known = losses[np.isfinite(losses)]
    return float(known.mean()) if len(known) else MEASURE


def _excesses(arms: Sequence[Sequence[Cell]]) -> tuple[list[Interval], list[Interval], str | None]:
    """What each source does to the tail of gradient norms, in logarithms, and to that of losses; and why that cannot be
    known, if it cannot."""
    found = [[_excess(cell) for cell in runs] for runs in arms]
    lost = np.array([[_diverged(cell) for cell in runs] for runs in arms])
    if lost[0].any():
        why = (
            f"{int(lost[0].sum())} of {len(arms[0])} runs of the plain blend diverged, so that nothing can be compared "
            "with their tails; give a lower --lr"
        )
    elif any(each is None for runs in found for each in runs):
        why = f"runs have fewer than {LEAST} records behind the warm-up; give more run.steps, and logging.every=1"
    else:
        measured = np.array(found, float)
        norms, losses = (against_control(measured[..., i], ERROR / 4, lost) for i in (0, 1))
        return norms, losses, None
    unknown = [Interval(0.0, -inf, inf) for _ in arms[1:]]
    return unknown, unknown, why


def _diverged(cell: Cell) -> bool:
    """Whether a run ended so, or as it ended had lost what it had learnt, for less long than ends a run."""
    return _ended_by_divergence(cell) or sound_until(cell) < inf


def _ended_by_divergence(cell: Cell) -> bool:
    ended = read_ended(cell.directory)
    return ended is not None and ended.status == "diverged"


def _excess(cell: Cell) -> tuple[float, float] | None:
    """The highest tenth of a run's gradient norms and losses over their running median, in logarithms and in nats, of a
    diverged run log ``MOST``; ``None``: it has too few records."""
    if _diverged(cell):
        return log(MOST), log(MOST)
    records = latest(read_metrics(RunDirectory(cell.directory).metrics))
    kept = [record for record in records if record["step"] > warm_up(cell.config)]
    if len(kept) < LEAST:
        return None
    norms = np.array([inf if (x := finite(record.get("grad_norm"))) is None else x for record in kept])
    losses = np.array([inf if (x := finite(record.get("loss"))) is None else x for record in kept])
    return tail_of(np.log(np.maximum(norms, 1e-30))), tail_of(losses)


def tail_of(values: NDArray[np.float64]) -> float:
    """The mean of the highest tenth of a series over its running median, none of them above log ``MOST``."""
    padded = [values[max(0, i - AROUND) : i + AROUND + 1] for i in range(len(values))]
    usual = np.array([np.median(near[np.isfinite(near)]) if np.isfinite(near).any() else 0.0 for near in padded])
    over = np.sort(np.minimum(values - usual, log(MOST)))
    return float(over[-max(1, len(over) // 10) :].mean())


def _events(cells: Sequence[Cell]) -> Events:
    told = [event for cell in cells for event in RunDirectory(cell.directory).ledger.read()]
    opinions = Counter(event.verdict for event in told if isinstance(event, SecondOpinion))
    return Events(
        diverged=sum(map(_diverged, cells)),
        spikes=sum(isinstance(event, Spike) for event in told),
        data_blamed=opinions["data"],
        state_blamed=opinions["state"],
    )


def _worst(steps: NDArray[np.float64], losses: NDArray[np.float64], windows: Sequence[Location]) -> tuple[Place, ...]:
    badness = np.maximum(np.log(steps) / log(FAR), np.abs(losses) / APART)
    order = [int(i) for i in np.argsort(-badness)[:NAMED] if badness[i] > 1]
    found = ((i, windows[i].dataset.indexed, windows[i].start) for i in order)
    return tuple(
        Place(
            dataset=str(data.prefix), document=data.document_at(start), token=start, step=float(steps[i]),
            loss=float(losses[i]),
        )
        for i, data, start in found
    )  # fmt: skip


def _signed(found: Interval, sign: int) -> Interval:
    return found if sign > 0 else Interval(-found.value, -found.high, -found.low)


def _bounds(found: Interval) -> Bounds:
    low, high = (bound if isfinite(bound) else None for bound in (found.low, found.high))
    return Bounds(value=found.value, low=low, high=high)
