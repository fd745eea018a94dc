"""What a sweep of one's own says of a configuration: which recipe, which learning rate, which ε."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megatron_stable.config.notation import parse
from megatron_stable.config.schema import Config
from megatron_stable.errors import ConfigError
from megatron_stable.study.advice import ABOVE_EPS
from megatron_stable.study.evidence import At, Value
from megatron_stable.study.forecast import Forecast, forecast, largest_stable, one_sided, shown
from megatron_stable.study.known import ORDINARY_EPS, SMALL_EPS
from megatron_stable.study.observations import INDIFFERENT, SIZE, Group
from megatron_stable.study.published import two_digits_below
from megatron_stable.study.table import RATE

ALIKE = 0.01  # nats: losses of single seeds that differ by less are alike (arXiv 2601.02031, z-loss at its best rates)
# what a learning rate holds for; the rest of the optimizer is recommended by itself
MODEL = ("model.", "optimizer.name", "optimizer.parametrization", "optimizer.base_", "optimizer.muon_momentum")
SHAPE = (*SIZE, "model.sequence_length", "model.vocab_size", "model.recipe", *INDIFFERENT)
EPS = "optimizer.eps"


class Choice(NamedTuple):
    """The group of a sweep that is gone by.

    Attributes:
        why: In words.
        sure: A word of ``SURE``.
    """

    group: Group
    why: str
    sure: str


def choose(groups: Sequence[Group]) -> Choice:
    """The group with the lowest loss at the largest size; of those that are alike, the one stable the farthest.

    Raises:
        ConfigError: The groups have no size in common.
    """
    runs = f"your sweep, {sum(len(group.runs) for group in groups)} runs"
    if len(groups) == 1:
        return Choice(groups[0], f"all of {runs}, have it, and the learning rate is for it", "yours")
    common = set.intersection(*(set(group.sizes) for group in groups))
    if not common:
        names = "; ".join(group.name for group in groups)
        raise ConfigError(f"no size has runs of all of {names}: sweep them at the same sizes, so that they compare")
    size = max(common)
    scores = [(_lowest_loss(group, size), largest_stable(group)[size] or 0.0) for group in groups]
    least = min(loss for loss, _ in scores)
    alike = [i for i, (loss, _) in enumerate(scores) if loss <= least + ALIKE]
    best = max(alike, key=lambda i: (scores[i][1], -scores[i][0]))
    told = "; ".join(
        f"{group.name} {loss:.3f}, stable up to {rate:.3g}" for group, (loss, rate) in zip(groups, scores, strict=True)
    )
    why = (
        "the lowest loss" if len(alike) == 1 else f"of those within {ALIKE} of the lowest loss, the largest stable rate"
    )
    return Choice(groups[best], f"{runs}: {why} at {size:.3g} parameters ({told})", "strong")


def settings(choice: Choice, groups: Sequence[Group], config: Config) -> Iterator[Value]:
    """What the chosen runs have that the configuration has not: what tells groups apart, and what the model is."""
    keys, row = config.by_key(), choice.group.runs[0].row
    for key in keys:
        if key not in row or key in (RATE, *SHAPE) or not key.startswith(("model.", "optimizer.", "loss.")):
            continue
        if key.startswith(MODEL) or len({_text(run.row.get(key)) for group in groups for run in group.runs}) > 1:
            value = plain(row[key])
            if value != keys[key]:
                yield Value(key, value, choice.why, choice.sure, "other runs in the sweep")


def plain(value: Any) -> Any:
    """A value of a table, of which texts may be YAML."""
    return parse(value) if isinstance(value, str) else value


class Read(NamedTuple):
    """What a group says of a model.

    Attributes:
        values: By dotted key.
        notes: What it does not say, and why.
    """

    values: dict[str, Value]
    notes: list[str]


def read(group: Group, at: At, by_papers: float) -> Read:
    """Learning rate and ε of a model, with what is uncertain.

    Args:
        by_papers: The learning rate where the sweep does not carry so far, if it is safe.
    """
    made = forecast(group, at.parameters, eps=ORDINARY_EPS)
    runs = (
        f"your sweep, {len(group.runs)} runs of {len(group.sizes)} sizes, {group.sizes[0]:.3g} to {group.sizes[-1]:.3g}"
    )
    notes = list(made.notes)
    wanted = by_papers if made.optimal is None else made.optimal.median
    rate = two_digits_below(min(wanted, math.inf if made.safe is None else made.safe))
    (cell,) = forecast(group, at.parameters, [rate], ORDINARY_EPS).cells
    values = {}
    capped = made.safe is not None and made.safe < wanted
    if made.optimal is not None or capped:
        lowest = "not foretold" if made.optimal is None else f"at {shown(made.optimal)}"
        evidence = f"{runs}: the loss is lowest {lowest}; {_safe(made)}{', which bounds it' if capped else ''}"
        sure = "strong" if cell.verdict == "stable" else "at risk"
        values[RATE] = Value(RATE, rate, evidence, sure, "more sizes, nearer to this one; another batch, or more steps")
    if made.optimal_refused:
        notes.append(f"the learning rate of the lowest loss is not foretold: {made.optimal_refused}")
    if cell.verdict != "stable":
        notes.append(f"learning rate {rate:g} is {_verdict(cell.verdict)}: {'; '.join(cell.evidence)}")
    notes += [f"to change: {advice}" for advice in cell.advice if "optimizer.eps" not in advice.change]
    if (gradient := cell.values.get("grad_rms")) is None:
        notes.append(f"the gradient RMS is not foretold: {cell.refused['grad_rms']}")
    else:
        small = gradient.low < ABOVE_EPS * ORDINARY_EPS
        evidence = (
            f"{runs}: the gradient RMS is foretold as {shown(gradient)}, and ε of 1e-8 wants "
            f"{ABOVE_EPS * ORDINARY_EPS:g} or more (arXiv 2309.14322, §3.4)"
        )
        value = SMALL_EPS if small else ORDINARY_EPS
        values[EPS] = Value(EPS, value, evidence, "strong", "another learning rate: it falls with that, too")
    return Read(values, notes)


def _safe(made: Forecast) -> str:
    if made.safe is None:
        return f"up to where it is safe is not foretold, {made.frontier_refused or one_sided(made.group)}"
    return f"the largest safe rate is {made.safe:.2g}"


def _verdict(verdict: str) -> str:
    return "not known to be stable" if verdict == "unknown" else verdict


def _lowest_loss(group: Group, size: float) -> float:
    """Over learning rates, of the mean over seeds; infinite where no rate is stable with all of them."""
    losses: dict[float, list[float]] = defaultdict(list)
    for run in group.runs:
        if run.size == size:
            losses[run.rate].append(run.values.get("loss", math.inf))
    return min(sum(each) / len(each) for each in losses.values())


def _text(value: Any) -> str:
    return repr(plain(value))
