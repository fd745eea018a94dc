"""Whether a model of a size will be stable at a learning rate, as small ones tell, and which learning rate to use.

Two kinds of evidence each give a probability that the run diverges:

logits      The largest attention logit is extrapolated (`scaling.Law`), against the level beyond which runs diverge:
            10⁴ in Wortsman et al., arXiv 2309.14322, §3.3, to within a factor of ten, and from there on what the runs
            of the sweep show. A recipe that bounds the logits leaves this out.
frontier    The learning rate from which runs of a size diverge is extrapolated (`threshold.Threshold`).

Their verdict: stable, if the frontier's is below 0.1 and the logits' below one half; for low logits do not make a run
stable that diverges for another reason. Unstable, if both are above one half, and one above 0.9. At risk in between,
and where they contradict each other. Unknown, where the frontier cannot be extrapolated; logits alone do not decide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

import numpy as np

from megatron_stable.study.advice import ABOVE_EPS, CRITICAL, Advice, Signs, Verdict, advise
from megatron_stable.study.observations import QUANTITIES, Group, Run
from megatron_stable.study.scaling import Array, Law, Point, Prediction, fit_laws, refusal
from megatron_stable.study.threshold import Normal, Threshold, Trial, fit_threshold

SURE = 0.9  # from which probability on a verdict is firm
CHECKED = 4.0  # times the largest size: as far as the paper extrapolated, from 1.2B to 4.8B


@dataclass(frozen=True)
class Cell:
    """A learning rate at the target's size.

    Attributes:
        values: What is foretold of a run, of `QUANTITIES`, and ``loss``.
        refused: Why the others are not.
        logit_risk, frontier_risk: That it diverges, by either evidence; ``None``: that says nothing.
        evidence: Sentences with numbers.
    """

    rate: float
    values: dict[str, Prediction]
    refused: dict[str, str]
    logit_risk: float | None
    frontier_risk: float | None
    verdict: Verdict
    evidence: tuple[str, ...]
    advice: tuple[Advice, ...]

    @property
    def risk(self) -> float | None:
        """That it diverges: the mean of both; ``None``: the verdict is unknown."""
        if self.frontier_risk is None or self.logit_risk is None:
            return self.frontier_risk
        return (self.frontier_risk + self.logit_risk) / 2


@dataclass(frozen=True)
class Forecast:
    """What the runs of a group say of a size.

    Attributes:
        frontier: The learning rate at which a run of the size diverges; ``None`` with ``frontier_refused``, or where
            none diverged, or all: then it is only known to lie above the grid, or below.
        safe: The largest learning rate that is safe: the frontier's lower end, and no more than was tried.
        critical: The attention logit beyond which runs diverge; ``None``: the recipe bounds it, or none was measured.
        optimal: The learning rate of the lowest loss; ``None`` with ``optimal_refused``.
        laws: By quantity and learning rate.
        threshold: The frontier at all sizes.
        best: The learning rate of the lowest loss at each size, as measured.
    """

    group: Group
    size: float
    eps: float
    cells: tuple[Cell, ...]
    frontier: Prediction | None
    frontier_refused: str | None
    safe: float | None
    critical: Prediction | None
    optimal: Prediction | None
    optimal_refused: str | None
    notes: list[str]
    laws: dict[str, dict[float, Law]]
    threshold: Threshold
    best: tuple[Point, ...]


def forecast(group: Group, size: float, rates: Sequence[float] | None = None, eps: float | None = None) -> Forecast:
    """What a group of runs says of so many parameters (in the blocks) at learning rates.

    Args:
        rates: Default: the grid of the sweep.
        eps: Adam's, of the target; default: the sweep's.
    """
    eps = float(group.runs[0].row.get("optimizer.eps") or 1e-8) if eps is None else eps
    laws = {name: fit_laws(_points(group, name)) for name in (*QUANTITIES, "loss")}
    frontier = fit_threshold(_trials(group.runs))
    frontier_refused = refusal(group.sizes, size)
    critical = None if group.bounded else _critical(group.runs)
    at = _Target(group, size, eps, laws, None if frontier_refused else frontier, frontier_refused, critical)
    cells = tuple(at.cell(rate) for rate in (rates or group.rates))
    best, edges = _best_rates(group)
    optimal, optimal_refused = _optimal(best, edges, size)
    where = None if frontier_refused else Prediction.of(frontier.draws(size))
    beyond = one_sided(group)
    notes = [] if beyond is None else [f"{beyond}: from where on runs diverge is not known any closer"]
    if size > CHECKED * group.sizes[-1]:
        notes.append(
            f"{size / group.sizes[-1]:.3g} times the largest size of the sweep: farther than the {CHECKED:g} times at "
            "which arXiv 2309.14322 checked its forecast"
        )
    return Forecast(
        group=group,
        size=size,
        eps=eps,
        cells=cells,
        frontier=where if beyond is None else None,
        frontier_refused=frontier_refused,
        safe=None if where is None or all(run.diverged for run in group.runs) else min(where.low, group.rates[-1]),
        critical=None if critical is None else Prediction.of(critical.draws(size)),
        optimal=optimal,
        optimal_refused=optimal_refused,
        notes=notes,
        laws=laws,
        threshold=frontier,
        best=tuple(best),
    )


@dataclass(frozen=True)
class _Target:
    """A size, and what has been fitted to tell about it."""

    group: Group
    size: float
    eps: float
    laws: dict[str, dict[float, Law]]
    frontier: Threshold | None
    frontier_refused: str | None
    critical: Threshold | None

    def cell(self, rate: float) -> Cell:
        draws, refused = {}, {}
        for name in self.laws:
            found = self.draws(name, rate)
            if isinstance(found, str):
                refused[name] = found
            else:
                draws[name] = found
        values = {name: Prediction.of(each) for name, each in draws.items()}
        logit_risk, logit_says = self._by_logits(draws.get("max_logit"), refused.get("max_logit"))
        frontier_risk, frontier_says = self._by_frontier(rate)
        verdict = judge(logit_risk, frontier_risk)
        evidence = [logit_says, frontier_says]
        if (gradient := values.get("grad_rms")) is not None:
            times, few = gradient.median / self.eps, gradient.low < ABOVE_EPS * self.eps
            text = f"gradient RMS: {shown(gradient)}, {times:.2g} times ε = {self.eps:g}"
            evidence.append(text + (": ε is too large" if times < ABOVE_EPS else ": ε may be too large" if few else ""))
        signs = Signs(verdict, values, logit_risk, self.eps, self.group.runs[0].row)
        return Cell(rate, values, refused, logit_risk, frontier_risk, verdict, tuple(evidence), advise(signs))

    def draws(self, name: str, rate: float) -> Array | str:
        """log10 of a quantity, or why it is not foretold; between learning rates of the grid, interpolated."""
        grid = self.group.rates
        if not grid[0] <= rate <= grid[-1]:
            return f"learning rate {rate:g} is outside of the grid, {grid[0]:g} to {grid[-1]:g}"
        below, above = max(each for each in grid if each <= rate), min(each for each in grid if each >= rate)
        found = []
        for each in (below, above):
            law = self.laws[name].get(each)
            reason = refusal(_sizes(self.group, name, each), self.size) if law is None else law.refusal(self.size)
            if reason or law is None:
                return f"{reason}{_missing(self.group, name, each)}"
            found.append(law.draws(self.size))
        if below == above:
            return found[0]
        share = math.log(rate / below) / math.log(above / below)
        return np.asarray((1 - share) * found[0] + share * found[1])

    def _by_logits(self, draws: Array | None, refused: str | None) -> tuple[float | None, str]:
        if self.group.bounded:
            return None, "logits: the recipe bounds them, so that their size says nothing"
        if draws is None or self.critical is None:
            return None, f"logits: not foretold, {refused}"
        risk, level = self.critical.probability(self.size, draws), Prediction.of(self.critical.draws(self.size))
        return risk, (
            f"logits: the largest reaches {shown(Prediction.of(draws))}, and runs diverge beyond {shown(level)}: "
            f"{percent(risk)} likely to diverge"
        )

    def _by_frontier(self, rate: float) -> tuple[float | None, str]:
        if self.frontier is None:
            return None, f"frontier: not foretold, {self.frontier_refused}"
        risk = self.frontier.probability(self.size, rate)
        where = f"runs of this size diverge at about {shown(Prediction.of(self.frontier.draws(self.size)))}"
        return risk, f"frontier: {one_sided(self.group) or where}: {percent(risk)} likely to diverge"


def judge(logit_risk: float | None, frontier_risk: float | None) -> Verdict:
    """The verdict of two probabilities to diverge, as said at the top."""
    if frontier_risk is None:
        return "unknown"
    risks = [frontier_risk, frontier_risk if logit_risk is None else logit_risk]
    if max(risks) < 0.5 and frontier_risk < 1 - SURE:
        return "stable"
    return "unstable" if min(risks) > 0.5 and max(risks) > SURE else "at risk"


def shown(prediction: Prediction) -> str:
    """As people read it: the median and its interval."""
    return f"{prediction.median:.3g} ({prediction.low:.3g} to {prediction.high:.3g})"


def percent(share: float) -> str:
    """A share, never called certain."""
    return "under 1 %" if share < 0.01 else "over 99 %" if share > 0.99 else f"{100 * share:.0f} %"


def _points(group: Group, name: str) -> dict[float, list[Point]]:
    found: dict[float, list[Point]] = {}
    for run in group.runs:
        if name in run.values:
            found.setdefault(run.rate, []).append(Point(run.size, run.seed, run.values[name]))
    return found


def _sizes(group: Group, name: str, rate: float) -> list[float]:
    return sorted({run.size for run in group.runs if run.rate == rate and name in run.values})


def _missing(group: Group, name: str, rate: float) -> str:
    """Why sizes lack a value, each reason once."""
    reasons: dict[str, list[str]] = {}
    for run in group.runs:
        if run.rate == rate and name in run.missing:
            reasons.setdefault(run.missing[name], []).append(f"{run.size:.3g}")
    return "".join(f"; at {', '.join(dict.fromkeys(sizes))} {reason}" for reason, sizes in reasons.items())


def _trials(runs: Iterable[Run], value: str | None = None) -> list[Trial]:
    """Seeds of a size and learning rate as one trial, at the learning rate or at the mean of a value's logarithm."""
    found = []
    cells = attrgetter("rate", "size")
    for (rate, size), group in groupby(sorted(runs, key=cells), cells):
        cell = list(group)
        level = rate if value is None else 10 ** float(np.mean([math.log10(run.values[value]) for run in cell]))
        found.append(Trial(size, level, sum(run.diverged for run in cell) / len(cell)))
    return found


def _critical(runs: Sequence[Run]) -> Threshold | None:
    """The logit beyond which runs diverge: before any is seen, the paper's to within a factor of ten."""
    runs = [run for run in runs if "max_logit" in run.values]
    return fit_threshold(_trials(runs, "max_logit"), Normal(math.log10(CRITICAL), 1.0)) if runs else None


def one_sided(group: Group) -> str | None:
    """What the runs say of the frontier, if they are all on one side of it."""
    if not any(run.diverged for run in group.runs):
        return f"no run of the sweep diverged, up to {group.rates[-1]:g}"
    if all(run.diverged for run in group.runs):
        return f"all runs of the sweep diverged, down to {group.rates[0]:g}"
    return None


def largest_stable(group: Group) -> dict[float, float | None]:
    """For each size the largest learning rate up to which no run diverged, as the papers read their tables."""
    found = {}
    for size in group.sizes:
        bad = min((run.rate for run in group.runs if run.size == size and run.diverged), default=math.inf)
        found[size] = max((run.rate for run in group.runs if run.size == size and run.rate < bad), default=None)
    return found


def _best_rates(group: Group) -> tuple[list[Point], list[str]]:
    """The learning rate of the lowest loss, of each size and seed; where it lies at the grid's edge, that in words."""
    found, edges = [], []
    models = attrgetter("size", "seed")
    for (size, seed), of_seed in groupby(sorted(group.runs, key=models), models):
        losses = {run.rate: run.values.get("loss", math.inf) for run in of_seed}
        rates, y = sorted(losses), [losses[rate] for rate in sorted(losses)]
        i = int(np.argmin(y))
        if not math.isfinite(y[i]):
            edges.append(f"none of {size:.3g} parameters was stable")
        elif i in (0, len(y) - 1):
            edges.append(f"at {size:.3g} it is {rates[i]:g} or {'less' if i == 0 else 'more'}")
        else:
            found.append(Point(size, seed, vertex(rates[i - 1 : i + 2], y[i - 1 : i + 2])))
    return found, list(dict.fromkeys(edges))


def vertex(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Of the parabola through three losses over log10 of the rate; the middle, next to a run that diverged."""
    if not all(map(math.isfinite, losses)):
        return rates[1]
    x = np.log10(rates) - math.log10(rates[1])
    square, slope, _ = np.polyfit(x, losses, 2)
    return rates[1] * 10 ** float(-slope / (2 * square)) if square > 0 else rates[1]


def _optimal(best: Sequence[Point], edges: Sequence[str], size: float) -> tuple[Prediction | None, str | None]:
    law = fit_laws({0.0: best}).get(0.0)
    known = sorted({point.size for point in best})
    reason = refusal(known, size) if law is None else law.refusal(size)
    if law is None or reason:
        return None, "; ".join([f"{reason}", *edges])
    return Prediction.of(law.draws(size)), None
