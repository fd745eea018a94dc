"""Whether the gradient norm rose before the loss did: GLM-130B's collapses lag it by a few steps (arXiv 2210.02414)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_stable.analysis.series import Series, is_gradient_norm
from megatron_stable.config.schema import GuardConfig
from megatron_stable.stability.detector import GRAD_NORM, LOSS, DetectorSettings, Spike, find_spikes

NEAR = 20  # recorded steps before a spike of the loss in which one of the gradient norm belongs to it


def settings_for(name: str, guard: GuardConfig | None = None) -> DetectorSettings:
    """How to search a series of this name: the noise of a norm multiplies, that of a loss adds.

    Args:
        guard: Of the run that it belongs to, so that what is found is what the guard would find.
    """
    settings = GRAD_NORM if is_gradient_norm(name) else LOSS
    own = guard.model_dump(include={"window", "warmup", "threshold", "patience"}) if guard else {}
    return replace(settings, **own)


def lead(spike: Spike, norm: Series, settings: DetectorSettings = GRAD_NORM) -> int | None:
    """By how many steps the gradient norm's excursion began before a spike of the loss; negative if it began after.

    ``None`` if it had none: from `NEAR` recorded steps before the loss's onset to the loss's peak. Only the steps
    about the spike are looked at, so that it costs the same in a run of any length.
    """
    onset = int(np.searchsorted(norm.steps, spike.onset))
    first = max(0, onset - NEAR)
    begin = max(0, first - settings.window - settings.warmup)
    end = int(np.searchsorted(norm.steps, spike.onset + spike.duration, "right")) + 1
    found = find_spikes(norm.steps[begin:end].tolist(), norm.values[begin:end].tolist(), settings)
    if not found or first == len(norm.steps):
        return None
    near = [each.onset for each in found if norm.steps[first] <= each.onset <= spike.peak_step]
    return spike.onset - min(near) if near else None
