"""The spike detector on real loss curves: false alarms, and rises that stay, injected at many places.

    python benchmarks/rises.py               # a quarter of a minute

`gpt2_curves.json` holds the loss, step by step and rounded to 0.001, of three public runs of GPT-2 124M on FineWeb, of
half a million tokens a step: two with AdamW (of `llmc` the first 15,000 of 19,560 steps) and one with Muon, taken from
the logs in KellerJordan/modded-nanogpt (MIT). None diverged. At step 3715 of their data a batch is hard for every one.

A rise is added to the curve, abruptly or linearly over so many steps, and stays. It stands out from the step on which
it, without noise, has reached the detector's threshold, T tail MADs; and, earlier, its limit, half of that. It is found
if the detector calls it a rise or a divergence within `patience` steps of that.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_stable.stability.detector import LOSS, DetectorSettings, SpikeDetector, find_spikes
from megatron_stable.stability.level import RobustLevel

FILE = Path(__file__).with_name("gpt2_curves.json")
FIRST, PLACES, LAST = (
    1000,
    40,
    400,
)  # where rises are injected: from this step on, so many, up to so many before the end


class Outcome(NamedTuple):
    """Of one rise: what it was first called, and how many steps after it had reached the limit and the threshold."""

    kind: str | None
    after_limit: float
    after_threshold: float


def curves() -> dict[str, NDArray[np.float64]]:
    """The real curves."""
    return {name: np.array(values) for name, values in json.loads(FILE.read_text()).items()}


def false_alarms(settings: DetectorSettings = LOSS) -> list[str]:
    """What is found where nothing was injected."""
    found = {name: find_spikes(range(len(curve)), curve.tolist(), settings) for name, curve in curves().items()}
    return [f"{spike.kind} at {spike.onset} of {name}" for name, each in found.items() for spike in each]


def outcomes(curve: NDArray[np.float64], cases: list[tuple[float, int]], settings: DetectorSettings) -> list[Outcome]:
    """What becomes of each rise (height, steps), injected at each place."""
    before, told = SpikeDetector(settings), []
    places = np.linspace(FIRST, len(curve) - LAST, PLACES, dtype=int).tolist()
    for step in range(places[-1] + 1):
        if step in places:
            state = before.state()
            for height, steps in cases:
                detector = SpikeDetector(settings)
                detector.load(state)
                told.append(_one(curve, step, height * np.minimum(np.arange(1, LAST + 1) / steps, 1), detector))
        before.update(step, float(curve[step]))
    return told


def _one(curve: NDArray[np.float64], step: int, rise: NDArray[np.float64], detector: SpikeDetector) -> Outcome:
    state = detector.state()
    usual = RobustLevel(detector.settings.window, state.values, state.gaps)
    most = detector.settings.threshold * usual.spread * usual.tail(usual.spread)[0]
    limit, threshold = (int(np.argmax(rise >= x)) if rise[-1] >= x else LAST for x in (most / 2, most))
    for i, x in enumerate((curve[step : step + LAST] + rise).tolist()):
        kind = detector.update(step + i, x).kind
        if kind in ("rise", "divergence"):
            return Outcome(kind, i - limit, i - threshold)
    return Outcome(None, np.inf, np.inf)


def main() -> None:
    began = time.perf_counter()
    real = curves()
    alarms = false_alarms()
    print(f"Alarms in {sum(map(len, real.values()))} steps without an injected rise: {', '.join(alarms) or 'none'}\n")
    print(f"Rises found within patience of reaching the threshold (the limit), %; {PLACES} places a curve\n")
    print("| nats, over steps, patience | " + " | ".join(real) + " | all | called | steps after the threshold, 95% |")
    print("|" + "---|" * (len(real) + 4))
    for patience in (16, 50):
        settings = replace(LOSS, patience=patience)
        cases = [(height, steps) for height in (0.6, 1.0) for steps in (1, 20, 60)]
        told = [outcomes(curve, cases, settings) for curve in real.values()]
        for i, (height, steps) in enumerate(cases):
            each = [curve[i :: len(cases)] for curve in told]
            every = [outcome for curve in each for outcome in curve]
            cells = [
                f"{100 * np.mean([o.after_threshold <= patience for o in part]):.1f}"
                f" ({100 * np.mean([o.after_limit <= patience for o in part]):.1f})"
                for part in (*each, every)
            ]
            called = ", ".join(f"{kind or 'nothing'} {n}" for kind, n in Counter(o.kind for o in every).most_common())
            late = np.quantile([o.after_threshold for o in every], 0.95, method="lower")
            print(f"| {height}, {steps}, {patience} | {' | '.join(cells)} | {called} | {late:.0f} |", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
