"""Rules that call steps of a series abnormal: ours, and those that benchmarks/detector.py compares it with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf, isfinite, sqrt

import numpy as np
from numpy.typing import NDArray

from megatron_stable.stability.detector import GRAD_NORM, LOSS, DetectorSettings, SpikeDetector

Series = NDArray[np.float64]
Rule = Callable[[Series], list[bool]]


def ours(series: Series, settings: DetectorSettings = LOSS) -> list[bool]:
    """Our verdicts on a loss."""
    detector = SpikeDetector(settings)
    return [detector.update(i, x).onset is not None for i, x in enumerate(series.tolist())]


def ours_norm(series: Series) -> list[bool]:
    """Our verdicts on a norm."""
    return ours(series, GRAD_NORM)


def six_sigma(series: Series) -> list[bool]:
    """OLMo-core's rule: mean and standard deviation (torch.std's, over n - 1) of the last 128, whatever they were."""
    recent: deque[float] = deque(maxlen=128)
    total = square = 0.0
    offset = float(series[0])  # keeps the running sums exact enough
    alarms = []
    for x in series.tolist():
        n = len(recent)
        if n < 64:
            alarms.append(False)
        elif not isfinite(total):  # one value that is not finite makes mean or deviation NaN: every comparison fails
            alarms.append(True)
        else:
            variance = max(square - total * total / n, 0.0) / (n - 1)
            alarms.append(not x - offset - total / n <= 6 * sqrt(variance))
        recent.append(x - offset)
        if n == 128 or not isfinite(x) or not isfinite(total):
            total, square = sum(recent), sum(y * y for y in recent)
        else:
            total, square = total + (x - offset), square + (x - offset) ** 2
    return alarms


def fixed(series: Series, most: float = 0.2, factor: float = inf) -> list[bool]:
    """A fixed distance, or factor, above the mean of the last 100 values; those called abnormal are left out."""
    recent: deque[float] = deque(maxlen=100)
    total, alarms = 0.0, []
    for x in series.tolist():
        mean = total / len(recent) if recent else x
        alarms.append(not x <= min(mean + most, mean * factor))
        if not alarms[-1]:
            total += x - (recent[0] if len(recent) == 100 else 0.0)
            recent.append(x)
    return alarms


def fixed_norm(series: Series) -> list[bool]:
    """Five times the mean."""
    return fixed(series, inf, 5.0)


def zclip(series: Series) -> list[bool]:
    """ZClip's z-score above 2.5."""
    seen: list[float] = []
    mean = variance = 0.0
    alarms = []
    for x in series.tolist():
        alarm = not isfinite(x)
        if not alarm and len(seen) < 25:
            seen.append(x)
            mean, variance = float(np.mean(seen)), float(np.var(seen))
        elif not alarm:
            std = sqrt(variance)
            z = (x - mean) / (std + 1e-6)
            if alarm := z > 2.5:
                x = mean + 2.5**2 * std / z
            mean = 0.97 * mean + 0.03 * x
            variance = 0.97 * variance + 0.03 * (x - mean) ** 2
        alarms.append(alarm)
    return alarms


RULES: dict[str, Rule] = {"ours": ours, "6 sigma / 128": six_sigma, "fixed": fixed, "ZClip": zclip}
NORM_RULES: dict[str, Rule] = {**RULES, "ours": ours_norm, "fixed": fixed_norm}
