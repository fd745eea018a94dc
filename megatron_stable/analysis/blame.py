"""Whether the data of a step or the state of the model is to blame for a spike.

PaLM (arXiv 2204.02311, section 5.1) trained on the batches of a spike again, from another checkpoint, and saw no
spike: bad data alone was not the cause. The same question is asked here of one batch: what do two checkpoints make of
it, sample by sample, and what had the run recorded?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal, NamedTuple

import numpy as np

SIGMA = 1.4826  # standard deviation of a normal distribution over its MAD
FAR, NEAR = 6.0, 3.0  # robust standard deviations: stands out; does not
FLOOR = 0.01  # of the median: the least standard deviation, so that samples that are alike do not all stand out
RISE = 0.1  # a loss is another one if it differs by so much of itself: beyond rounding, and most dropout
FEWEST = 8  # values of which a MAD says something


class Level(NamedTuple):
    """What a run recorded about a step: the median loss of the steps around it, and their robust deviation (nats)."""

    median: float
    deviation: float


@dataclass(frozen=True)
class Measured:
    """What a checkpoint makes of a batch.

    Attributes:
        step: Of the checkpoint.
        losses: Of each sample, nats per token ``[n]``; may hold NaN and infinities.
        level: The run's loss on other batches about then; ``None``: not recorded.
    """

    step: int
    losses: np.ndarray
    level: Level | None = None

    @property
    def mean(self) -> float:
        """Over the batch; not finite if a sample's is not."""
        return float(self.losses.mean())

    @property
    def scores(self) -> np.ndarray:
        """See :func:`scores`."""
        return scores(self.losses)

    @property
    def height(self) -> float | None:
        """Robust standard deviations of the batch's mean above the level; ``None``: there is no level."""
        if self.level is None:
            return None
        median, deviation = self.level
        return (self.mean - median) / max(deviation, FLOOR * median) if isfinite(self.mean) else float("inf")


@dataclass(frozen=True)
class Finding:
    """One observation, and what it blames; ``None``: it does not say."""

    blames: Literal["data", "state"] | None
    text: str


@dataclass(frozen=True)
class Blame:
    """The answer.

    Attributes:
        kind: "undecided" where there is too little to go by.
        findings: What it rests on.
        text: In words.
        caveat: What it cannot tell.
    """

    kind: Literal["data", "state", "both", "neither", "undecided"]
    findings: tuple[Finding, ...]
    text: str
    caveat: str


def level(losses: Sequence[float | None]) -> Level | None:
    """The level of recorded losses (``None``: not finite), or ``None`` if they are too few."""
    values = np.array([loss for loss in losses if loss is not None and isfinite(loss)])
    return Level(*_robust(values)) if len(values) >= FEWEST else None


def scores(losses: np.ndarray) -> np.ndarray:
    """Robust standard deviations above the batch's median ``[n]``: (loss - median) / (1.4826 MAD); infinite for what is
    not finite, 0 where there are too few samples to tell."""
    finite = np.isfinite(losses)
    if finite.sum() < FEWEST:
        return np.where(finite, 0.0, np.inf)
    median, deviation = _robust(losses[finite])
    return np.where(finite, (np.where(finite, losses, median) - median) / max(deviation, FLOOR * median, 1e-12), np.inf)


def blame(
    suspect: Measured, healthy: Measured | None = None, step: int | None = None, recorded: float | None = None
) -> Blame:
    """Data or state?

    Args:
        suspect: The checkpoint that is doubted, best the last one before the step.
        healthy: Another one to compare it with, best a much earlier one.
        step: The optimizer step that trained on the batch, if any did.
        recorded: The loss that it recorded, NaN if that was not finite; ``None``: nothing was recorded.
    """
    if not np.isfinite(suspect.losses).any():
        findings = [_destroyed(suspect, healthy)]
    elif healthy is not None and not np.isfinite(healthy.losses).any():
        findings = [Finding(None, f"checkpoint {healthy.step} gives no finite loss at all: compare with a healthy one")]
    else:
        found = (*_samples(suspect, healthy), _batch(suspect, healthy), _later(suspect, healthy))
        findings = [finding for finding in (*found, _since(suspect, step, recorded)) if finding]
    blamed = {finding.blames for finding in findings}
    compared = healthy is not None or (step is not None and suspect.step < step and recorded is not None)
    telling = len(suspect.losses) >= FEWEST or suspect.level is not None
    kind: Literal["data", "state", "both", "neither", "undecided"]
    if {"data", "state"} <= blamed:
        kind, text = "both", "the data stand out, and the state had changed as well"
    elif "data" in blamed:
        kind, text = "data", "the data stand out, whatever the state"
    elif "state" in blamed:
        kind, text = "state", "the state is to blame, not these data by themselves"
    elif None in blamed or not (compared and telling):
        kind, text = "undecided", "this does not tell data from state"
    else:
        kind, text = "neither", "neither the data nor the checkpoint stands out"
    return Blame(kind, tuple(findings), text, _caveat(suspect, healthy, step))


def _destroyed(suspect: Measured, healthy: Measured | None) -> Finding:
    text = f"checkpoint {suspect.step} gives no finite loss on any sample"
    if healthy is not None and np.isfinite(healthy.losses).all():
        return Finding("state", f"{text}, checkpoint {healthy.step} does on all: its weights are destroyed")
    return Finding(None, f"{text}: compare with a healthy one")


def _samples(suspect: Measured, healthy: Measured | None) -> list[Finding]:
    """Samples that stand out among those of the batch."""
    high = suspect.scores > FAR
    if healthy is None:
        if not high.any():
            return []
        return [Finding(None, f"{_count(high)} far above the batch's median under checkpoint {suspect.step}")]
    other, both = healthy.scores, f"checkpoints {suspect.step} and {healthy.step}"
    findings = []
    if (everywhere := (high & (other > NEAR)) | ((other > FAR) & (suspect.scores > NEAR))).any():
        rest = f", which without them would be {suspect.losses[~everywhere].mean():.4g}" if not everywhere.all() else ""
        mean = f"the batch's mean under {suspect.step} is {suspect.mean:.4g}{rest}"
        findings.append(Finding("data", f"{_count(everywhere)} far above the batch's median under {both}; {mean}"))
    if (alone := high & (other < NEAR)).any():
        text = f"{_count(alone)} far above the batch's median under checkpoint {suspect.step} only"
        learnt = suspect.step < healthy.step
        why = f", which {healthy.step} may simply have learnt since" if learnt else f", ordinary under {healthy.step}"
        findings.append(Finding(None if learnt else "state", text + why))
    return findings


def _batch(suspect: Measured, healthy: Measured | None) -> Finding | None:
    """The whole batch against what the run recorded on other batches when the checkpoints were written."""
    if suspect.height is None or suspect.level is None or suspect.height <= FAR:
        return None
    text = (
        f"the batch as a whole is hard for checkpoint {suspect.step}: {suspect.mean:.4g}, "
        f"where the run's loss was {suspect.level.median:.4g} on the batches about step {suspect.step}"
    )
    if healthy is None or healthy.height is None or healthy.level is None or NEAR <= healthy.height <= FAR:
        return Finding(None, text)
    other = f"{healthy.mean:.4g} against {healthy.level.median:.4g}"
    if healthy.height > FAR:
        return Finding("data", f"{text}; and for {healthy.step}: {other}")
    return Finding("state", f"{text}; not for {healthy.step}: {other}")


def _later(suspect: Measured, healthy: Measured | None) -> Finding | None:
    """Training makes losses fall: a later checkpoint that is worse throughout has been damaged."""
    if healthy is None or suspect.step <= healthy.step:
        return None
    finite = np.isfinite(suspect.losses) & np.isfinite(healthy.losses)
    if not finite.any():
        return None
    median, deviation = _robust(suspect.losses[finite] - healthy.losses[finite])
    usual = float(np.median(healthy.losses[finite]))
    if median <= RISE * usual or median <= NEAR * deviation / finite.sum() ** 0.5:
        return None
    return Finding(
        "state",
        f"checkpoint {suspect.step} is later than {healthy.step} and yet worse on the samples throughout, "
        f"by {median:.3g} nats in the median",
    )


def _since(suspect: Measured, step: int | None, recorded: float | None) -> Finding | None:
    """The same data, before: what the run recorded at the step against what the checkpoint before it gives."""
    if step is None or recorded is None or suspect.step >= step or not isfinite(suspect.mean):
        return None
    if isfinite(recorded) and recorded <= (1 + RISE) * suspect.mean:
        return None
    loss = f"a loss of {recorded:.4g}" if isfinite(recorded) else "a loss that is not finite"
    return Finding(
        "state",
        f"the run recorded {loss} on this batch at step {step}, where checkpoint {suspect.step} gives "
        f"{suspect.mean:.4g}: the state changed in between",
    )


def _caveat(suspect: Measured, healthy: Measured | None, step: int | None) -> str:
    parts = []
    if step is not None and suspect.step < step - 1:
        parts.append(f"checkpoint {suspect.step} is not the weights of step {step}, {step - suspect.step} steps later")
    parts.append("a loss does not show what the gradient or the optimizer's state did")
    parts.append("data of one kind in all samples only shows against the losses the run recorded")
    if len(suspect.losses) < FEWEST:
        parts.append(f"with fewer than {FEWEST} samples in a batch, none can be said to stand out")
    return "; ".join(parts)


def _count(which: np.ndarray) -> str:
    n = int(which.sum())
    return f"{n} of {len(which)} samples {'is' if n == 1 else 'are'}"


def _robust(values: np.ndarray) -> tuple[float, float]:
    """Median and robust standard deviation."""
    median = float(np.median(values))
    return median, SIGMA * float(np.median(np.abs(values - median)))
