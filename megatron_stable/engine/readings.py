"""From what ranks have added up to what the probes say: one formula for each entry of the table of probes."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan, sqrt

import numpy as np
from numpy.typing import NDArray

from megatron_stable.config.schema import Config
from megatron_stable.model.probes import LOGITS, POINTS, stride_of
from megatron_stable.numbers import finite
from megatron_stable.optim.probes import ROWS, columns
from megatron_stable.stability.probes import PROBES, Where, places

Values = dict[str, float | None]  # by tag; None where the value is not finite
DIGITS = 5  # significant ones that are kept


class Readings:
    """Reads the rows of a run.

    Attributes:
        sums, tops: How many sums and largest values a row has.
    """

    def __init__(self, config: Config) -> None:
        model, logging = config.model, config.logging
        assert model.vocab_size is not None
        self.config, self.hidden, self.vocabulary = config, model.hidden, model.vocab_size
        self.columns = {where: i for i, where in enumerate(columns(model.layers))}
        self.shapes = [(model.layers, len(POINTS) + model.heads), (len(LOGITS),), (len(ROWS), len(self.columns) + 1)]
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        self.sums, self.tops = sum(sizes), sizes[0] + 1
        self.cuts = [*np.cumsum(sizes), self.sums + sizes[0]]
        self.sampled = model.sequence_length // stride_of(model.sequence_length, logging.probe_positions)
        queries, keys = model.heads * model.head_dim, model.groups * model.head_dim
        fc1 = model.ffn * (2 if model.gated else 1)
        self.widths = {"qkv": queries + 2 * keys, "q": queries, "k": keys, "v": keys, "fc1": fc1}
        self.wanted = [
            (where.tag, where, FORMULAS[where.probe.name])
            for probe in PROBES.values()
            if probe.group in logging.probes
            for where in places(probe, model.layers, model.heads if logging.probe_heads else 0)
        ]

    def of(self, row: NDArray[np.float64], updates: int) -> Values:
        """What the probes say, by tag, without those that do not apply.

        Args:
            row: fp64 ``[sums + tops]``, over all ranks.
            updates: That the moments have seen.
        """
        reading = Reading(self, row, updates)
        found = ((tag, formula(reading, where)) for tag, where, formula in self.wanted)
        return {tag: finite(float(f"{value:.{DIGITS}g}")) for tag, value in found if value is not None}


class Reading:
    """One row, taken apart."""

    def __init__(self, all_: Readings, row: NDArray[np.float64], updates: int) -> None:
        config = all_.config
        blocks, logits, parameters, tops, (self.top_logit,) = (part.tolist() for part in np.split(row, all_.cuts))
        width, columns = all_.shapes[0][1], all_.shapes[2][1]
        points = len(POINTS)
        self.outputs = [dict(zip(POINTS, blocks[i : i + points], strict=True)) for i in range(0, len(blocks), width)]
        self.entropies = [blocks[i + points : i + width] for i in range(0, len(blocks), width)]
        self.largest = [dict(zip(POINTS, tops[i : i + points], strict=True)) for i in range(0, len(tops), width)]
        self.max_logits = [tops[i + points : i + width] for i in range(0, len(tops), width)]
        self.logits = dict(zip(LOGITS, logits, strict=True))
        rows = (parameters[i : i + columns] for i in range(0, len(parameters), columns))
        self.parameters = dict(zip(ROWS, rows, strict=True))
        self.all, self.updates = all_, updates
        self.sequences, self.tokens = config.batch.global_size, config.tokens_per_step
        self.samples = self.sequences * all_.sampled

    def parameter(self, row: str, where: Where) -> float:
        """The sum of a statistic over a parameter, or over those of a block."""
        value: float = self.parameters[row][self.all.columns[where.point or "", where.layer]]
        return value

    def mean(self, row: str, where: Where, over: str = "numel") -> float | None:
        """Its mean over elements; ``None``: there are none."""
        count = self.parameter(over, where)
        return None if count == 0 else self.parameter(row, where) / count


Formula = Callable[[Reading, Where], float | None]


def _squares(r: Reading, w: Where) -> float:
    """Sum of squares of an output; what QKV gives is queries, keys and values."""
    of = r.outputs[w.layer or 0]
    return of["q"] + of["k"] + of["v"] if w.point == "qkv" else of[w.point or ""]


def _largest(r: Reading, w: Where) -> float:
    of = r.largest[w.layer or 0]
    return max(of["q"], of["k"], of["v"]) if w.point == "qkv" else of[w.point or ""]


def _of_heads(values: list[float], w: Where) -> list[float]:
    return values if w.head is None else [values[w.head]]


def _entropy(r: Reading, w: Where) -> float:
    entropies = _of_heads(r.entropies[w.layer or 0], w)
    return sum(entropies) / (len(entropies) * r.samples)


def _root(value: float | None) -> float | None:
    return None if value is None else sqrt(value) if value >= 0 else nan


def _weights(row: str) -> Formula:
    return lambda r, w: _root(r.mean(row, w))


def _norm(row: str) -> Formula:
    return lambda r, w: _root(r.parameter(row, w)) if r.parameter("numel", w) else None


def _adam(row: str) -> Formula:
    return lambda r, w: r.mean(row, w, "adam")


def _update_ratio(r: Reading, w: Where) -> float | None:
    weight, update = _root(r.mean("weights", w)), _root(r.mean("updates", w))
    return None if weight is None or update is None else update / weight if weight else nan


def _noise_scale(r: Reading, w: Where) -> float | None:
    """Simple noise scale tr(Sigma)/|G|^2 (arXiv 1812.06162, App. A) in sequences, from Adam's moments.

    A step's gradient is G and noise of variance tr(Sigma)/B. Of the bias-corrected moments, v sums to |G|^2 +
    tr(Sigma)/B over all elements, and m^2 to |G|^2 + a tr(Sigma)/B, with a = (1 - b)(1 + b^t) / ((1 + b)(1 - b^t)) the
    variance that averaging with beta1 = b leaves after t updates. So two sums give both, on every layout alike, as far
    as G stays what it was for some 1 / (1 - b) steps; one that turns in that time counts as noise.
    """
    b, t = r.all.config.optimizer.betas[0], r.updates
    if not any(r.parameters["adam"]):
        return None
    outside = [i for (point, _), i in r.all.columns.items() if point != "block"]
    second, first = (sum(r.parameters[row][i] for i in outside) for row in ("second", "first"))
    a = (1 - b) * (1 + b**t) / ((1 + b) * (1 - b**t)) if t and b else 1.0
    if a >= 1 or not first > a * second:
        return inf  # the first update has no average yet; or all of it is noise
    return r.sequences * (second - first) / (first - a * second)


FORMULAS: dict[str, Formula] = {
    "output_norm": lambda r, w: sqrt(_squares(r, w) / r.tokens),
    "output_rms": lambda r, w: sqrt(_squares(r, w) / r.tokens / r.all.widths.get(w.point or "", r.all.hidden)),
    "output_max": _largest,
    "attention/max_logit": lambda r, w: max(_of_heads(r.max_logits[w.layer or 0], w)),
    "attention/entropy": _entropy,
    "logits/mean": lambda r, w: r.logits["logits"] / r.samples / r.all.vocabulary,
    "logits/max": lambda r, w: r.top_logit,
    "logits/logsumexp": lambda r, w: r.logits["log_z"] / r.tokens,
    "logits/entropy": lambda r, w: (r.logits["sampled_log_z"] - r.logits["weighted"]) / r.samples,
    "weight_norm": _norm("weights"),
    "weight_rms": _weights("weights"),
    "grad_norm": _norm("gradients"),
    "grad_rms": _weights("gradients"),
    "grad_under_eps": _adam("under_eps"),
    "update_rms": _weights("updates"),
    "update_ratio": _update_ratio,
    "moment_rms": lambda r, w: _root(r.mean("second", w, "adam")),
    "moment_under_eps": _adam("second_under_eps"),
    "moment_surprise": lambda r, w: _root(r.mean("surprise", w, "adam")),
    "noise_scale": _noise_scale,
}
