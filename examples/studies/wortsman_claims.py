"""The claims of Wortsman et al., arXiv 2309.14322, that can be looked into at this size, each with what we found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import log10
from operator import truediv
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
from claims import (
    Claim,
    Spread,
    beyond,
    by,
    each_in_words,
    in_words,
    largest,
    last_stable,
    lows,
    not_below,
    paired,
    sensitivities,
    spread,
    together,
    within,
)
from common import series

from megatron_stable.data.indexed import IndexedDataset
from megatron_stable.study.backtest import BackTest
from megatron_stable.study.backtest import score as score_of
from megatron_stable.study.forecast import vertex
from megatron_stable.study.reading import Sweep
from megatron_stable.study.sensitivity import Group, score, verdicts_of

BOTH, NO_Z, NO_NORM = "qk_norm, z-loss", "qk_norm", "z-loss"  # methods
ALIKE = 0.05  # nats: curves that are no farther apart coincide
UNCHANGED = 1.25  # times: an LR sensitivity that is no farther off has not changed
CRITICAL, FORCED = 1e4, (1e3, 1e4)  # the paper's attention logit; its kappa where harm begins, where it is complete
PSEUDO = 0.1  # count of each pair of tokens before any was seen


class Study(NamedTuple):
    """The sweeps of the study, and what belongs to them.

    Attributes:
        tests: How the largest size was foretold, by method.
        bigram: Loss of a table of bigrams, nats per token.
    """

    sizes: Sweep
    knobs: Sweep
    forced: Sweep
    drift: Sweep
    tests: Sequence[BackTest]
    bigram: float

    def method(self, name: str) -> dict[str, Group]:
        """The sizes of a method, by name, rising."""
        groups = [group for group in self.sizes.groups if group.values["method"] == name]
        return by(sorted(groups, key=lambda group: group.parameters or 0), "size")


def claims(study: Study) -> Iterator[Claim]:
    """All of them, in the order of their numbers in docs/studies."""
    knobs = by(study.knobs.groups, "variant")
    yield from _coincide(study, knobs)
    yield from _critical(study)
    yield from _foretold(study)
    yield _forced(study)
    yield from _drift(study)
    yield from _sensitivity(study)
    yield from _knobs(knobs)
    yield from _parametrization(study, knobs)
    yield from _gradients(study, knobs)


def _coincide(study: Study, knobs: Mapping[str, Group]) -> Iterator[Claim]:
    """#7: below the critical learning rate, curves lie on each other."""
    with_both = study.method(BOTH)
    pairs = {
        "QK-norm": [(study.method(NO_NORM)[size], group) for size, group in with_both.items()],
        "z-loss": [(study.method(NO_Z)[size], group) for size, group in with_both.items()],
        "a longer warm-up": [(knobs["warm-up 67"], knobs["reference"])],
    }
    for what, groups in pairs.items():
        apart = [found for one, other in groups if (found := _apart(one, other)) is not None]
        said = f"below the critical learning rate, {what} makes no difference (to within {ALIKE} nats)"
        if not apart:
            yield Claim("#7, §3.1", said, "no learning rate is so far below", "untested")
            continue
        found = max(apart, key=lambda each: abs(each[0]))
        yield Claim(
            "#7, §3.1",
            said,
            f"{in_words(found, '+.3f')} nats, the largest difference over sizes and learning rates that are at most a "
            "third of the largest stable one",
            within(found, -ALIKE, ALIKE),
        )


def _apart(one: Group, other: Group) -> Spread | None:
    """The largest difference of losses at learning rates a step or more below the largest that is stable for both."""
    last = min(*last_stable(one).values(), *last_stable(other).values())
    found = []
    for place in range(last):
        here, there = (_scores(group, place) for group in (one, other))
        found.append(paired(here, there))
    return max(found, key=lambda each: abs(each[0]), default=None)


def _scores(group: Group, place: int) -> dict[Any, float]:
    """Scores at a learning rate, by seed."""
    found = {seed: score(curve[place]) for seed, curve in group.curves.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def _critical(study: Study) -> Iterator[Claim]:
    """#8: without QK-norm the critical learning rate falls with size; beyond a logit, runs diverge."""
    rates = study.sizes.rates
    for method, words, falls in ((NO_NORM, "without", True), (BOTH, "with", False)):
        found = study.method(method)
        ends = [largest(group, rates) for group in found.values()]
        moved = paired(ends[-1], ends[0], truediv)
        told = ", ".join(f"{size} {median(end.values()):g}" for size, end in zip(found, ends, strict=True))
        yield Claim(
            "#8, §3.1",
            f"{words} QK-norm, the largest stable learning rate {'falls' if falls else 'does not fall'} as models grow",
            f"{told}; largest size over smallest {in_words(moved)} ×",
            beyond(moved, 1.0, above=False) if falls else not_below(moved, 1.0),
        )
    logits = series(study.sizes.probes.parent, "attention/max_logit/layer_00")
    bad: list[float] = []
    good: list[float] = []
    for group in study.method(NO_NORM).values():
        for curve, verdicts in zip(group.curves.values(), verdicts_of(group), strict=True):
            for row, diverged in zip(curve, verdicts, strict=True):
                if row is not None:
                    (bad if diverged else good).append(max(logits[row["name"]].values()))
    above, trained = (sum(most > CRITICAL for most in runs) for runs in (bad, good))
    yield Claim(
        "#8, §3.1",
        f"every run whose largest attention logit exceeds {CRITICAL:g} diverges",
        f"{above} of {above + trained} runs without QK-norm that exceed it at some step diverge, {len(bad) - above} "
        f"others diverge below it; the highest logit of a run that trains is {max(good):.2g}",
        "untested: no run exceeds it" if not above + trained else "disagrees" if trained else "agrees",
    )


def _foretold(study: Study) -> Iterator[Claim]:
    """§3.3: the largest size, foretold from the others before it was trained."""
    total = score_of(study.tests)
    yield Claim(
        "§3.3",
        "from smaller sizes, it can be foretold at which learning rates a larger one diverges",
        f"{total.right} of {total.cells} (learning rate, method) cells of the largest size are called right; of those "
        f"with a firm verdict, {total.firm_right} of {total.firm}",
        "agrees" if total.right >= 0.9 * total.cells else "disagrees",
    )
    yield Claim(
        "§3.3",
        "and how large its attention logits will be",
        f"{total.held} of {total.logits} largest logits lie within their 90 % interval",
        "agrees" if total.held >= 0.8 * total.logits else "disagrees",
    )


def _forced(study: Study) -> Claim:
    """#9: attention logits that are large by force."""
    kappas = by(study.forced.groups, "model.attention_temperature")
    harm, told = [], []
    for place, rate in enumerate(study.forced.rates):
        base = _scores(kappas["1"], place)
        worse = {float(kappa): paired(_scores(group, place), base) for kappa, group in kappas.items()}
        harm.append(min((kappa for kappa, found in worse.items() if found[1] > ALIKE), default=float("inf")))
        told.append(f"at {rate:g}: " + ", ".join(f"{kappa:.0e} {found[0]:+.2f}" for kappa, found in worse.items()))
    last = {
        f"at {rate:g}": spread([*_scores(kappas[f"{FORCED[1]:g}"], place).values()])
        for place, rate in enumerate(study.forced.rates)
    }
    begins = all(FORCED[0] / 10 <= kappa <= FORCED[0] * 10 for kappa in harm)
    complete = all(found[1] > study.bigram for found in last.values())
    return Claim(
        "#9, §3.1",
        f"logits forced up by κ harm from κ ≈ {FORCED[0]:g} on, and at {FORCED[1]:g} a model is worse than bigrams",
        f"loss over that of κ = 1, median: {'; '.join(told)}. Loss at κ = {FORCED[1]:g} "
        f"{each_in_words(last, '.2f', '')}; bigrams {study.bigram:.2f}",
        together("agrees" if each else "disagrees" for each in (begins, complete)),
    )


def _drift(study: Study) -> Iterator[Claim]:
    """#10 to #13: output logits without weight decay, and what z-loss does to them."""
    without, with_z = (by(study.drift.groups, "loss.z_loss")[value] for value in ("0", "0.0001"))
    means = series(study.drift.probes.parent, "logits/mean")
    place = study.drift.rates.index(0.1)
    ends, halves = {}, {}
    for seed, curve in without.curves.items():
        row = curve[place]
        assert row is not None
        steps = means[row["name"]]
        ends[seed], halves[seed] = steps[max(steps)], steps[min(steps, key=lambda step: abs(step - max(steps) / 2))]
    there = {seed: (curve[place] or {})["logits/mean"] for seed, curve in with_z.curves.items()}
    fallen, lower = paired(ends, halves), paired(ends, there)
    yield Claim(
        "#10, §3.1",
        "without z-loss and weight decay, at learning rate 0.1, output logits become very negative late in training",
        f"mean logit at the end {in_words(spread([*ends.values()]), '.3g')}, {in_words(fallen, '+.2g')} since halfway; "
        f"with z-loss {in_words(spread([*there.values()]), '.3g')}",
        "agrees" if fallen[2] < 0 and lower[2] < 0 else beyond(lower, 0.0, above=False),
    )
    less = paired(sensitivities(with_z), sensitivities(without), truediv)
    yield Claim(
        "#11 (arXiv 2601.02031)",
        "without weight decay, z-loss lowers LR sensitivity",
        f"{in_words(less)} × over {study.drift.rates[0]:g} to {study.drift.rates[-1]:g}",
        beyond(less, 1.0, above=False),
    )
    best = paired(lows(with_z), lows(without))
    yield Claim(
        "#13 (arXiv 2601.02031)", "z-loss leaves the best loss as it is, to within 0.01 nats",
        f"{in_words(best, '+.3f')} nats", within(best, -0.01, 0.01),
    )  # fmt: skip


def _sensitivity(study: Study) -> Iterator[Claim]:
    """LR sensitivity against size, with and without QK-norm."""
    both, no_norm = study.method(BOTH), study.method(NO_NORM)
    gains = {size: paired(sensitivities(both[size]), sensitivities(no_norm[size]), truediv) for size in both}
    verdict = together(beyond(found, 1.0, above=False) for found in gains.values())
    yield Claim("§3.1", "QK-norm lowers LR sensitivity at every size", each_in_words(gains), verdict)
    for words, groups in (("with", both), ("without", no_norm)):
        each = [*map(sensitivities, groups.values())]
        grown = paired(each[-1], each[0], truediv)
        told = ", ".join(f"{size} {fmean(values.values()):.2g}" for size, values in zip(groups, each, strict=True))
        measured = f"{told}; largest over smallest {in_words(grown)} ×"
        yield Claim("§3.1", f"LR sensitivity grows with size {words} QK-norm", measured, beyond(grown, 1.0, above=True))


def _knobs(knobs: Mapping[str, Group]) -> Iterator[Claim]:
    """§3.2 and #14: warm-up, weight decay, depth and width, length and batch, by their LR sensitivity."""
    found = {name: sensitivities(group) for name, group in knobs.items()}
    for source, said, one, other, above in (
        ("§3.2.1", "a longer warm-up lowers LR sensitivity", "warm-up 67", "warm-up 2", False),
        ("§3.2.2", "independent weight decay lowers LR sensitivity", "decay", "coupled decay", False),
        (
            "§3.2.3",
            "depth raises LR sensitivity more than width, at equal parameters",
            "4 x as deep",
            "twice as wide",
            True,
        ),
    ):
        ratio = paired(found[one], found[other], truediv)
        yield Claim(source, said, f"{one} over {other}: {in_words(ratio)} ×", beyond(ratio, 1.0, above))
    for what, names in (
        ("length", ("twice as long",)), ("batch size, at equal data,", ("batch 8", "batch 32"))
    ):  # fmt: skip
        ratios = {name: paired(found[name], found["reference"], truediv) for name in names}
        said = f"{what} leaves LR sensitivity as it is (to within {UNCHANGED:g} ×)"
        verdict = together(within(each, 1 / UNCHANGED, UNCHANGED) for each in ratios.values())
        yield Claim("#14, App. E", said, each_in_words(ratios), verdict)


def _parametrization(study: Study, knobs: Mapping[str, Group]) -> Iterator[Claim]:
    """#15: muParam."""
    source, rates, large = "#15, §3.2.4", study.knobs.rates, knobs["twice as wide"]
    wide = {name: knobs[f"{name}, twice as wide"] for name in ("mu_simple", "mu_full")}
    small = _best_rates(study.method(BOTH)["smallest"], study.sizes.rates)  # at the base width mu_simple is standard
    bases = {"standard": small, "mu_simple": small, "mu_full": _best_rates(knobs["mu_full, half as wide"], rates)}
    moved = {
        name: paired(_best_rates(group, rates), bases[name], truediv)
        for name, group in {"standard": large, **wide}.items()
    }
    away = {name: abs(log10(found[0])) for name, found in moved.items()}
    yield Claim(
        source,
        "muParam holds the best learning rate where it is as width grows",
        f"best learning rate when 4 x as wide, over the narrow model's: {each_in_words(moved)}",
        together("agrees" if away[name] < away["standard"] else "disagrees" for name in wide),
    )
    gains = {name: paired(lows(group), lows(large)) for name, group in wide.items()}
    verdict = together("disagrees" if found[2] < 0 else "agrees" for found in gains.values())
    measured = f"{each_in_words(gains, '+.3f', ' nats')}"
    yield Claim(source, "muParam does not lower the best loss", measured, verdict)
    ratios = {name: paired(sensitivities(group), sensitivities(large), truediv) for name, group in wide.items()}
    verdict = together("agrees" if found[2] >= 1 / UNCHANGED else "disagrees" for found in ratios.values())
    yield Claim(source, "muParam does not lower LR sensitivity", f"{each_in_words(ratios)}", verdict)
    seeds = last_stable(wide["mu_full"]).values()
    trained = sum(place == len(rates) - 1 for place in seeds)
    yield Claim(
        "#15, App. E",
        "mu_full with QK-norm trains at learning rate 1",
        f"{trained} of {len(seeds)} seeds do",
        together("agrees" if place == len(rates) - 1 else "disagrees" for place in seeds),
    )


def _best_rates(group: Group, rates: Sequence[float]) -> dict[Any, float]:
    """The best learning rate by seed: where a parabola through the best of the grid and its neighbours is lowest."""
    found = {}
    for seed, curve in group.curves.items():
        losses = [score(row) for row in curve]
        known = [float("inf") if loss is None else loss for loss in losses]
        at = min(range(1, len(known) - 1), key=known.__getitem__)
        found[seed] = vertex(rates[at - 1 : at + 2], known[at - 1 : at + 2])
    return found


def _gradients(study: Study, knobs: Mapping[str, Group]) -> Iterator[Claim]:
    """#16: gradient RMS falls with size and learning rate; ε near it harms."""
    source, both, rates = "#16, §3.4", study.method(BOTH), study.sizes.rates
    first, *_, last = both.values()
    falls = {f"at {rate:g}": paired(_rms(last, place), _rms(first, place), truediv) for place, rate in enumerate(rates)}
    verdict = together(beyond(found, 1.0, above=False) for found in falls.values())
    measured = f"largest size over smallest: {each_in_words(falls)}"
    yield Claim(source, "the gradient RMS of the first FC1 falls as models grow", measured, verdict)
    falls = {
        size: paired(_rms(group, place), _rms(group, 0), truediv)
        for size, group in both.items()
        if (place := min(last_stable(group).values())) > 0
    }
    verdict = together(beyond(found, 1.0, above=False) for found in falls.values())
    measured = f"at the largest stable one over that at {rates[0]:g}: {each_in_words(falls)}"
    yield Claim(source, "and as the learning rate grows", measured, verdict)
    reference, place = knobs["reference"], study.knobs.rates.index(0.03)
    worse = {name: paired(_scores(knobs[name], place), _scores(reference, place)) for name in ("eps 1e-4", "eps 1e-2")}
    rms = spread([*_rms(reference, place).values()])
    yield Claim(
        source,
        "an ε above the gradient RMS harms, the more the higher it is",
        f"at 0.03, where the gradient RMS is {in_words(rms)}: {each_in_words(worse, '+.3f', ' nats')}",
        "agrees" if worse["eps 1e-2"][1] > max(ALIKE, worse["eps 1e-4"][2]) else "disagrees",
    )


def _rms(group: Group, place: int) -> dict[Any, float]:
    """Gradient RMS of FC1 at the end of runs at a learning rate, by seed."""
    found = {seed: (curve[place] or {}).get("grad_rms/fc1") for seed, curve in group.curves.items()}
    return {seed: value for seed, value in found.items() if value}


def bigram_loss(data: Path) -> float:
    """Loss on the validation text of a table of bigrams that was counted on the training text, nats per token."""
    sets = [IndexedDataset(data / name) for name in ("train", "train_validation")]
    seen, held_out = (each.read(0, each.tokens).astype(np.int64) for each in sets)
    count = int(max(seen.max(), held_out.max())) + 1
    pairs = np.bincount(seen[:-1] * count + seen[1:], minlength=count**2).reshape(count, count) + PSEUDO
    logs = np.log(pairs / pairs.sum(1, keepdims=True))
    return -float(logs[held_out[:-1], held_out[1:]].mean())
