"""The spike detector against other rules: spikes found, delay, false alarms, on a documented family of series.

    python benchmarks/detector.py                    # two to three minutes on one core
    python benchmarks/detector.py --full             # ten times the steps
    python benchmarks/detector.py --constant SUM     # what other values of a constant or setting do; half a minute

False alarms are alarms in series without a spike, one for all steps in a row that a rule calls abnormal with gaps of
less than 5. A spike is found if one of its first three steps is called abnormal. The rules, each with one setting for
all series:

- ours: ``LOSS``; ``GRAD_NORM`` for the series of norms.
- 6 sigma / 128: OLMo-core's SkipStep. Above the mean of the last 128 values by 6 of their standard deviations, spikes
  included in both; silent until there are 64.
- fixed: as done by hand for large runs. Above the mean of the last 100 values by 0.2; for norms, by a factor of 5.
- ZClip (arXiv 2504.02507): above an exponential mean (0.97, started on 25 values) by 2.5 of its standard deviations;
  what enters these is the clipped value. It is made to clip norms, not to alarm: hence its many alarms.

Noise has a MAD of 0.02 throughout, on a loss of about 3, so heights in MADs are times 0.02. Seeds are printed; nothing
is asserted.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import inf, sqrt

import numpy as np
import rises
from rules import NORM_RULES, RULES, Series, ours

from megatron_stable.stability import detector as detector_module
from megatron_stable.stability import excursion, level
from megatron_stable.stability.detector import GRAD_NORM, LOSS, DetectorSettings, find_spikes

MAD = 0.02


def gaussian(rng: np.random.Generator, n: int) -> Series:
    """Noise; MAD 1, as that of all the others."""
    return rng.normal(size=n) / 0.67449


def student(rng: np.random.Generator, n: int) -> Series:
    """Student's t with 3 degrees of freedom: one value in 440 is above 10 MADs."""
    return rng.standard_t(3, size=n) / 0.76489


def lognormal(rng: np.random.Generator, n: int, sigma: float = 0.5) -> Series:
    """Skewed; with sigma 0.5, one value in 500 is above 10 MADs, with 1.0, one in 37."""
    x = np.exp(sigma * rng.normal(size=n))
    sample = np.exp(sigma * np.random.default_rng(0).normal(size=10**6))
    return (x - 1) / float(np.median(np.abs(sample - 1)))


def skewed(rng: np.random.Generator, n: int) -> Series:
    """Lognormal with sigma 1."""
    return lognormal(rng, n, 1.0)


def autocorrelated(rng: np.random.Generator, n: int, phi: float = 0.7) -> Series:
    """Gaussian, first-order, correlation 0.7 from step to step."""
    return np.asarray(_filtered(gaussian(rng, n), phi))


def _filtered(noise: Series, phi: float) -> list[float]:
    x, values = 0.0, []
    for e in (noise * sqrt(1 - phi**2)).tolist():
        x = phi * x + e
        values.append(x)
    return values


def flat(n: int) -> Series:
    """A constant loss."""
    return np.full(n, 3.0)


def falling(n: int) -> Series:
    """A power law behind a warm-up: 10.8 at first, 4.2 after 1000 steps, 3.2 after 10,000."""
    return 1.7 + 9.1 / (1 + np.arange(n) / 30) ** 0.37


def warmup_fall(n: int) -> Series:
    """A warm-up fall, anew every 1000 steps (each is a series of its own): 11 to 7 and a shelf, then 3.5."""
    t = np.arange(1000)
    one = 3.3 + 3.5 / (1 + np.exp((t - 250) / 60)) + 4.2 * np.exp(-t / 35)
    return np.tile(one, -(-n // 1000))[:n]


NOISE: dict[str, Callable[[np.random.Generator, int], Series]] = {
    "Gaussian": gaussian,
    "autocorrelated 0.7": autocorrelated,
    "Student t, 3": student,
    "lognormal 0.5": lognormal,
    "lognormal 1.0": skewed,
}


def pieces(name: str, n: int, rng: np.random.Generator) -> Iterator[Series]:
    """Series without a spike, n steps in all."""
    if name.startswith("warm-up fall"):
        noise = student if name.endswith("t, 3") else gaussian
        for _ in range(n // 1000):
            yield warmup_fall(1000) + MAD * noise(rng, 1000)
    elif name == "falling curve":
        for _ in range(n // 10_000):
            yield falling(10_000) + MAD * gaussian(rng, 10_000)
    elif name == "norm, lognormal 0.3":
        yield 0.2 * np.exp(0.3 * rng.normal(size=n))
    else:
        yield flat(n) + MAD * NOISE[name](rng, n)


def events(alarms: list[bool], gap: int = 5) -> int:
    """Alarms, those that follow each other closely counted once."""
    count, last = 0, -gap
    for i in np.flatnonzero(alarms).tolist():
        count += i - last >= gap
        last = i
    return count


def false_alarms(seed: int, n: int) -> None:
    """Print the table of false alarms."""
    print(f"\nFalse alarms per 10,000 steps, {n} steps each (ours in brackets: their number); seed {seed}\n")
    print(f"| series | {' | '.join(RULES)} |\n|{'---|' * (len(RULES) + 1)}")
    names = [*NOISE, "falling curve", "warm-up fall", "warm-up fall, t, 3", "norm, lognormal 0.3"]
    for name in names:
        cells = []
        for rule, judge in (NORM_RULES if name.startswith("norm") else RULES).items():
            rng = np.random.default_rng(seed)
            count = sum(events(judge(series)) for series in pieces(name, n if rule == "ours" else n // 5, rng))
            rate = count / n * 10_000 * (1 if rule == "ours" else 5)
            cells.append(f"{rate:.2f} ({count})" if rule == "ours" else f"{rate:.1f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def with_spikes(base: Series, height: float | None, length: int, rng: np.random.Generator) -> tuple[Series, list[int]]:
    """Add spikes every 400 +- 50 steps, MADs high (``None``: 10 to 100, log-uniform), for ``length`` steps."""
    series, onsets = base.copy(), list(range(600, len(base) - 200, 400))
    onsets = [onset + int(rng.integers(-50, 51)) for onset in onsets]
    for onset in onsets:
        series[onset : onset + length] += MAD * (10 ** rng.uniform(1, 2) if height is None else height)
    return series, onsets


def found(alarms: list[bool], onsets: list[int], within: int = 3) -> tuple[float, float]:
    """The part of spikes that is found in their first steps, and the mean delay of those in steps."""
    delays = [next((j for j in range(within) if alarms[onset + j]), None) for onset in onsets]
    hits = [delay for delay in delays if delay is not None]
    return len(hits) / len(onsets), sum(hits) / len(hits) if hits else inf


def spikes(seed: int, n: int) -> None:
    """Print the table of spikes found."""
    print(f"\nSpikes found within 3 steps, % (mean delay in steps); {n // 400} spikes a cell; seed {seed}\n")
    print(f"| series | height in MADs, steps | {' | '.join(RULES)} |\n|{'---|' * (len(RULES) + 2)}")
    cases: list[tuple[str, float | None, int]] = [
        *((name, height, 5) for name in ("Gaussian", "Student t, 3") for height in (10, None)),
        ("Gaussian", 10, 3),
        ("Student t, 3", 10, 3),
        ("Gaussian", 10, 1),
        ("Student t, 3", None, 1),
        ("Gaussian", None, 1),
        ("Gaussian", 7, 5),
        ("autocorrelated 0.7", 10, 5),
        ("lognormal 0.5", 10, 5),
        ("lognormal 1.0", None, 5),
        ("falling curve", 10, 5),
        ("falling curve", None, 30),
    ]
    for name, height, length in cases:
        rng = np.random.default_rng(seed)
        noise = NOISE.get(name, gaussian)
        base = (falling(n) if name == "falling curve" else flat(n)) + MAD * noise(rng, n)
        series, onsets = with_spikes(base, height, length, rng)
        cells = []
        for judge in RULES.values():
            part, delay = found(judge(series), onsets, min(length, 3))
            cells.append(f"{100 * part:.1f} ({delay:.1f})" if part else "0")
        print(f"| {name} | {height or '10–100'}, {length} | {' | '.join(cells)} |", flush=True)


def kinds(seed: int, repeats: int) -> None:
    """Print what shapes are taken for, and after how many steps the first alarm and the verdict come."""
    print(f"\nWhat a shape is taken for: part of {repeats} series each, median steps to the first alarm; seed {seed}\n")
    print(f"| shape | verdict | first alarm | {' | '.join(list(RULES)[1:])}: found, first alarm |")
    print(f"|{'---|' * (len(RULES) + 2)}")
    for name, (shape, at, norm) in SHAPES.items():
        outcome: Counter[str] = Counter()
        delays: dict[str, list[int]] = {rule: [] for rule in RULES}
        rng = np.random.default_rng(seed)
        for _ in range(repeats):
            series = shape(rng)
            listed = find_spikes(range(len(series)), series.tolist(), GRAD_NORM if norm else LOSS)
            after = [spike for spike in listed if spike.onset + spike.duration > at]
            outcome[
                " + ".join(f"{k} {s}" if k > 1 else s for s, k in Counter(s.kind for s in after).items()) or "-"
            ] += 1
            for rule, judge in (NORM_RULES if norm else RULES).items():
                alarms = np.flatnonzero(judge(series))
                delays[rule] += (alarms[alarms >= at] - at)[:1].tolist()
        verdict = ", ".join(f"{what} {100 * count / repeats:.0f}%" for what, count in outcome.most_common(3))
        cells = [f"{len(d)}/{repeats}, {np.median(d):.0f}" if d else f"0/{repeats}" for d in delays.values()]
        print(f"| {name} | {verdict} | {' | '.join(cells)} |", flush=True)


def _loss(rng: np.random.Generator, n: int = 3000, start: int = 0) -> Series:
    return falling(n + start)[start:] + MAD * gaussian(rng, n)


def jump(height: float, slope: float = 0.0, noise: float = 1.0) -> Callable[[np.random.Generator], Series]:
    """At step 2000 the loss rises at once by ``height`` and then by ``slope`` a step; its noise is multiplied."""

    def shape(rng: np.random.Generator) -> Series:
        series = falling(3000) + MAD * gaussian(rng, 3000) * np.where(np.arange(3000) < 2000, 1, noise)
        series[2000:] += height + slope * np.arange(1000)
        return series

    return shape


def drift(slope: float, n: int = 4000) -> Callable[[np.random.Generator], Series]:
    """From step 2000 the loss rises by ``slope`` MADs a step, up to that of a model that has learned nothing."""

    def shape(rng: np.random.Generator) -> Series:
        rise = slope * MAD * np.maximum(np.arange(n) - 2000, 0)
        return np.minimum(falling(n)[np.minimum(np.arange(n), 2000)] + rise, 10.8) + MAD * gaussian(rng, n)

    return shape


BLOOM_LOSS = [2.2, 2.2, 2.6, 2.2, 2.3, 5.1]  # iterations 31214 to 31219
BLOOM_NORM = [0.24, 0.95, 2.4, 16.0, 145.0, 960.0]


def bloom(rng: np.random.Generator) -> Series:
    """BLOOM-176B's one spike: 2.199 to 5.098 in five steps, back to 2.216 after 36; in between an exponential."""
    back = 2.2 + 2.9 * np.exp(-np.arange(1, 32) / 6)
    series = np.full(3000, 2.2)
    series[2000:2006], series[2006:2037] = BLOOM_LOSS, back
    return series + 0.015 / 0.02 * MAD * gaussian(rng, 3000)


def bloom_norm(rng: np.random.Generator) -> Series:
    """Its gradient norm: 0.24 to 960 in five steps, back within 30."""
    series = np.full(3000, 0.24)
    series[2000:2006], series[2006:2037] = BLOOM_NORM, 0.24 * (960 / 0.24) ** np.linspace(1, 0, 31)
    return series * np.exp(0.1 * rng.normal(size=3000))


def glm_norm(rng: np.random.Generator) -> Series:
    """GLM-130B: the norm spikes for 3 steps; the loss collapses 4 steps after its start (the next shape)."""
    series = np.full(3000, 0.3)
    series[2000:2003] = [1.5, 6.0, 3.0]
    series[2004:] = 8.0
    return series * np.exp(0.2 * rng.normal(size=3000))


def glm_loss(rng: np.random.Generator) -> Series:
    """The collapse: to 7.5 over 40 steps, where it stays."""
    series = _loss(rng)
    series[2004:] += np.minimum(np.arange(996) / 40, 1) * (7.5 - 3.2)
    return series


def periodic(rng: np.random.Generator) -> Series:
    """Eight spikes of 30 MADs and 5 steps, 25 steps apart."""
    series = _loss(rng)
    for onset in range(2000, 2200, 25):
        series[onset : onset + 5] += 30 * MAD
    return series


def alternating(rng: np.random.Generator) -> Series:
    """Every other step of a hundred is 20 MADs high."""
    series = _loss(rng)
    series[2000:2100:2] += 20 * MAD
    return series


def single(height: float) -> Callable[[np.random.Generator], Series]:
    """From step 2000 on, one step of 40 is so many MADs high, 20 times."""

    def shape(rng: np.random.Generator) -> Series:
        series = _loss(rng)
        series[2000:2800:40] += height * MAD
        return series

    return shape


def nans(rng: np.random.Generator) -> Series:
    """Ten steps that are not finite."""
    series = _loss(rng)
    series[2000:2010] = np.where(np.arange(10) % 2, np.nan, np.inf)
    return series


def after_nans(rng: np.random.Generator) -> Series:
    """Ten steps that are not finite, and 30 steps later, at step 2040, a spike of 20 MADs."""
    series = nans(rng)
    series[2040:2045] += 20 * MAD
    return series


def in_the_fall(step: int, height: float) -> Callable[[np.random.Generator], Series]:
    """A spike of so many MADs and 5 steps in a warm-up fall."""

    def shape(rng: np.random.Generator) -> Series:
        series = warmup_fall(1000) + MAD * gaussian(rng, 1000)
        series[step : step + 5] += height * MAD
        return series

    return shape


SHAPES: dict[str, tuple[Callable[[np.random.Generator], Series], int, bool]] = {
    "BLOOM, loss": (bloom, 2002, False),
    "BLOOM, gradient norm": (bloom_norm, 2001, True),
    "GLM, gradient norm": (glm_norm, 2000, True),
    "GLM, loss": (glm_loss, 2004, False),
    "data mix, +0.15": (jump(0.15), 2000, False),
    "data mix, +0.3": (jump(0.3), 2000, False),
    "data mix, +0.3, noise x 2": (jump(0.3, noise=2), 2000, False),
    "data mix, +0.8": (jump(0.8), 2000, False),
    "data mix, −0.3": (jump(-0.3), 2000, False),
    "jump to 7, stays": (jump(3.2), 2000, False),
    "jump by 0.5, rises by 0.005 a step": (jump(0.5, 0.005), 2000, False),
    "jump by 0.5, noise x 10": (jump(0.5, noise=10), 2000, False),
    "rises by 1 MAD a step": (drift(1.0), 2000, False),
    "rises by 0.1 MAD a step": (drift(0.1), 2000, False),
    "rises by 0.01 MAD a step": (drift(0.01), 2000, False),
    "8 spikes in a row": (periodic, 2000, False),
    "every other step, 20 MADs": (alternating, 2000, False),
    "20 single steps, 20 MADs": (single(20), 2000, False),
    "20 single steps, 12 MADs": (single(12), 2000, False),
    "NaN and infinity": (nans, 2000, False),
    "20 MADs, 30 steps after these": (after_nans, 2040, False),
    "warm-up fall, 100 MADs at step 100": (in_the_fall(100, 100), 100, False),
    "warm-up fall, 50 MADs at step 250": (in_the_fall(250, 50), 250, False),
    "warm-up fall, 100 MADs at step 250": (in_the_fall(250, 100), 250, False),
    "warm-up fall, 20 MADs at step 500": (in_the_fall(500, 20), 500, False),
    "warm-up fall, 10 MADs at step 700": (in_the_fall(700, 10), 700, False),
}


FACTORS = (1 / 2, 2 / 3, 1, 3 / 2, 2)
EXPECTED = {  # by shape: what it should be called first of all
    "BLOOM, loss": "spike",
    "data mix, +0.3": "rise",
    "data mix, +0.8": "rise",
    "jump to 7, stays": "divergence",
    "GLM, loss": "divergence",
    "jump by 0.5, rises by 0.005 a step": "divergence",
    "rises by 0.1 MAD a step": "divergence",
}


def sensitivity(name: str, seed: int) -> None:
    """Print what a constant or a field of the settings does at other values, to rises on real curves too."""
    modules = [module for module in (level, excursion, detector_module) if hasattr(module, name)]
    usual = getattr(modules[0] if modules else LOSS, name)
    print(f"\n{name}; seed {seed}\n\n| value | false alarms in 100,000 steps, real (heavy tails, falls) | ", end="")
    print("spikes missed: 5 steps (1 step), % | rises missed or late, % | kind wrong, % |\n|---|---|---|---|---|")
    for factor in FACTORS:
        value = usual * factor if isinstance(usual, float) else max(round(usual * factor), 1)
        for module in modules:
            setattr(module, name, value)
        cells = _measured(LOSS if modules else replace(LOSS, **{name: value}), seed)
        print(f"| {value:.4g} | {' | '.join(cells)} |", flush=True)
    for module in modules:
        setattr(module, name, usual)


def _measured(settings: DetectorSettings, seed: int) -> list[str]:
    curves = rises.curves().values()
    real = len(rises.false_alarms(settings)) / sum(map(len, curves)) * 1e5
    rng, n, count = np.random.default_rng(seed), 25_000, 0
    for kind in ("Student t, 3", "lognormal 1.0", "autocorrelated 0.7", "warm-up fall, t, 3"):
        count += sum(events(ours(series, settings)) for series in pieces(kind, n, rng))
    missed = []
    for length, cases in ((5, (("Gaussian", 10), ("Gaussian", 7), ("Student t, 3", 10))), (1, (("Gaussian", None),))):
        parts = []
        for kind, height in cases:
            series, onsets = with_spikes(flat(20_000) + MAD * NOISE[kind](rng, 20_000), height, length, rng)
            parts.append(100 - 100 * found(ours(series, settings), onsets, min(length, 3))[0])
        missed.append(sum(parts) / len(parts))
    early = replace(settings, patience=max(settings.patience * 16 // LOSS.patience, 1))  # as where somebody is asked
    told = [outcome for curve in curves for outcome in rises.outcomes(curve, [(0.6, 60), (1.0, 20)], early)]
    late = np.mean([outcome.after_threshold > early.patience for outcome in told])
    wrong = []
    for shape, kind in EXPECTED.items():
        make = SHAPES[shape][0]
        for _ in range(10):
            series = make(rng)
            last = [spike.kind for spike in find_spikes(range(len(series)), series.tolist(), settings)][-1:]
            wrong.append(last != [kind])
    return [
        f"{real:.1f} ({count / (4 * n) * 1e5:.1f})",
        f"{missed[0]:.1f} ({missed[1]:.1f})",
        f"{100 * late:.1f}",
        f"{100 * np.mean(wrong):.0f}",
    ]


def targets(seed: int, n: int) -> None:
    """Print the figures that the project holds itself to."""
    print(f"\nTargets; seed {seed}\n\n| what | target | result |\n|---|---|---|")
    rng = np.random.default_rng(seed)
    series, onsets = with_spikes(flat(n) + MAD * gaussian(rng, n), None, 3, rng)
    part, _ = found(ours(series), onsets)
    print(f"| spikes of 10–100 MADs, 3 steps, found within 3 steps | ≥ 99% | {100 * part:.2f}% of {len(onsets)} |")
    series, onsets = with_spikes(flat(n) + MAD * gaussian(rng, n), 10, 3, rng)
    part, _ = found(ours(series), onsets)
    print(f"| the same, of 10 MADs | ≥ 99% | {100 * part:.2f}% of {len(onsets)} |")
    for name, most in (
        ("Gaussian", 0.1),
        ("Student t, 3", 1),
        ("lognormal 0.5", 1),
        ("lognormal 1.0", 1),
        ("warm-up fall", 1),
        ("warm-up fall, t, 3", 1),
    ):
        count = sum(events(ours(series)) for series in pieces(name, n, rng))
        print(f"| false alarms per 10,000, {name} | ≤ {most} | {count / n * 10_000:.2f} ({count} in {n}) |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="ten times the steps")
    parser.add_argument("--constant", metavar="NAME", help="of the modules of the detector, or of DetectorSettings")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.constant is not None:
        sensitivity(args.constant, args.seed)
        return
    began, factor = time.perf_counter(), 10 if args.full else 1
    targets(args.seed, 400_000 * factor)
    false_alarms(args.seed + 1, 200_000 * factor)
    spikes(args.seed + 2, 100_000 * factor)
    kinds(args.seed + 3, 20 * factor)
    n = 200_000
    series = (falling(n) + MAD * gaussian(np.random.default_rng(args.seed), n)).tolist()
    start = time.perf_counter()
    find_spikes(range(n), series)
    seconds = time.perf_counter() - start
    print(f"\nfind_spikes on {n} points: {seconds:.1f} s; all of this: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
