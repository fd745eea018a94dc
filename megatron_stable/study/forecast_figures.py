"""Pictures of a forecast: attention logits and gradients against size, and the learning rates to use.

The first is as Wortsman et al., arXiv 2309.14322, §3.3, have it: a law for each learning rate, and the critical level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_stable.analysis.drawing import INK, MUTED, canvas, log_ticks, plain, style, tidy
from megatron_stable.study.forecast import Forecast
from megatron_stable.study.observations import QUANTITIES, Run
from megatron_stable.study.scaling import Law, Point, Prediction, fit_laws
from megatron_stable.study.threshold import Threshold

ALONG = 40  # points of a curve


def figures(forecast: Forecast, came: Sequence[Run] = ()) -> dict[str, Any]:
    """By name, those for which there are measurements.

    Args:
        came: Runs that were foretold, and were made after all.
    """
    found = {"learning_rates": _learning_rates(forecast, came)}
    for name, draw in (("max_logit", _max_logit), ("grad_rms", _grad_rms)):
        if forecast.laws[name]:
            found[name] = draw(forecast, came)
    return found


def _max_logit(forecast: Forecast, came: Sequence[Run]) -> Any:
    figure, axes = _scaling(forecast, "max_logit", came)
    if forecast.critical is not None:
        axes.axhspan(forecast.critical.low, forecast.critical.high, color=MUTED, alpha=0.15, linewidth=0)
        axes.axhline(forecast.critical.median, color=INK, linewidth=1.2, label="runs diverge beyond")
    return _finished(figure, axes)


def _grad_rms(forecast: Forecast, came: Sequence[Run]) -> Any:
    figure, axes = _scaling(forecast, "grad_rms", came)
    axes.axhline(forecast.eps, color=INK, linewidth=1.2, label=f"ε = {forecast.eps:g}")
    return _finished(figure, axes)


def _scaling(forecast: Forecast, name: str, came: Sequence[Run]) -> tuple[Any, Any]:
    """A quantity against size: runs, for each learning rate the law, and its interval; hollow: what came."""
    figure, axes = _axes(forecast, QUANTITIES[name].what)
    for number, (rate, law) in enumerate(forecast.laws[name].items()):
        look = style(number)
        for runs, face in ((forecast.group.runs, look["color"]), (came, "none")):
            known = [run for run in runs if run.rate == rate and name in run.values]
            for diverged, mark in ((False, "o"), (True, "x")):
                _mark(axes, [run for run in known if run.diverged == diverged], name, mark, look["color"], face)
        label = f"learning rate {rate:.3g}"
        if law.refusal(forecast.size) is None:
            _curve(axes, _along(forecast), law, look, label)
        else:
            axes.plot([], [], **look, label=f"{label}: refused")
    return figure, axes


def _learning_rates(forecast: Forecast, came: Sequence[Run]) -> Any:
    """The best learning rate and the one from which runs diverge, against size."""
    figure, axes = _axes(forecast, "learning rate")
    for diverged, mark, label in ((False, "o", "trained"), (True, "x", "diverged")):
        runs = [run for run in (*forecast.group.runs, *came) if run.diverged == diverged]
        spots = {"color": MUTED, "markersize": 4, "linestyle": "none", "alpha": 0.6}
        axes.plot([run.size for run in runs], [run.rate for run in runs], mark, label=label, **spots)
    if forecast.frontier is not None:
        _curve(axes, _along(forecast), forecast.threshold, style(1), "diverges at")
    law = fit_laws({0.0: forecast.best}).get(0.0)
    if law is not None and forecast.optimal is not None:
        _curve(axes, _along(forecast), law, style(0), "lowest loss")
    axes.plot(*_columns(forecast.best), "s", color=style(0)["color"], markersize=5)
    return _finished(figure, axes)


def _axes(forecast: Forecast, what: str) -> tuple[Any, Any]:
    figure = canvas(7.5, 4.6, layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel="parameters, without embedding and head", ylabel=what)
    axes.set_title(plain(forecast.group.name), loc="left", fontsize=10, color=MUTED)
    axes.axvline(forecast.size, color=MUTED, linewidth=0.8, linestyle=":")
    return figure, axes


def _along(forecast: Forecast) -> list[float]:
    ends = [*forecast.group.sizes, forecast.size]
    return [float(size) for size in np.geomspace(min(ends), max(ends), ALONG)]


def _curve(axes: Any, sizes: Sequence[float], law: Law | Threshold, look: dict[str, Any], label: str) -> None:
    """The median over sizes, and the interval as a band."""
    said = [Prediction.of(law.draws(size)) for size in sizes]
    axes.plot(sizes, [each.median for each in said], linewidth=1.4, label=label, **look)
    band = [each.low for each in said], [each.high for each in said]
    axes.fill_between(sizes, *band, color=look["color"], alpha=0.12, linewidth=0)


def _mark(axes: Any, runs: Sequence[Run], name: str, mark: str, color: str, face: str) -> None:
    values, look = [run.values[name] for run in runs], {"color": color, "markerfacecolor": face, "linestyle": "none"}
    axes.plot([run.size for run in runs], values, mark, markersize=4 if face == color else 6, **look)


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.size for point in points], [point.value for point in points]


def _finished(figure: Any, axes: Any) -> Any:
    tidy(axes)
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        at, labels = log_ticks(low, high, most=7)
        axis.set_ticks(at, labels)
        axis.set_ticks([], minor=True)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
