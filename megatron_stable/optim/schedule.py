"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

from math import cos, pi, sqrt

from megatron_stable.config.schema import Config


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of optimizer step ``step`` (from 1): linear warm-up from 0, then ``schedule.kind``; after
    surgery on the run once more from 0, over ``schedule.rewarm``, to where it stands.

    linear and cosine fall from the peak at the end of warm-up to the minimum at the run's last step; wsd stays at
    the peak and falls linearly over the last ``decay_fraction`` of the steps (MiniCPM, arXiv 2404.06395);
    inverse_sqrt is peak x sqrt(warm-up / step), not below the minimum.
    """
    rate = _scheduled(config, step)
    if config.schedule.rewarm is None:
        return rate
    begin, length = config.schedule.rewarm
    return rate * min(1.0, (step - begin) / length) if step > begin else rate


def _scheduled(config: Config, step: int) -> float:
    peak, low = config.optimizer.learning_rate, config.schedule.min_learning_rate
    warmup, steps, kind = config.warmup_steps, config.run.steps, config.schedule.kind
    if step <= warmup:
        return peak * step / warmup
    if kind == "constant":
        return peak
    if kind == "inverse_sqrt":
        return max(low, peak * sqrt(max(warmup, 1) / step))
    start = warmup if kind != "wsd" else max(warmup, steps - config.schedule.decay_fraction * steps)
    progress = min(1.0, max(0.0, (step - start) / max(1e-9, steps - start)))
    remaining = (1 + cos(pi * progress)) / 2 if kind == "cosine" else 1 - progress
    return low + (peak - low) * remaining
