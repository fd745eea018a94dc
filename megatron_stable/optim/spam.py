"""SPAM (arXiv 2501.06842): cut off gradient elements that spike, and forget the moments from time to time."""

from __future__ import annotations

from math import cos, inf, pi

from torch import Tensor

QUIET = 20  # steps at the start and after a reset in which the second moment is too young to judge by


def clips_spikes(update: int, reset_every: int | None, moments_from: int = 0) -> bool:
    """Whether update number ``update`` (from 1) cuts off spikes; moments began after number ``moments_from``."""
    return update - moments_from >= QUIET and (reset_every is None or update % reset_every >= QUIET)


def clip_spikes_(grad: Tensor, second_moment: Tensor, threshold: float) -> None:
    """g <- sign(g) sqrt(threshold v) where g^2 > threshold v, v being the second moment as kept before this step.

    Where v is 0, as of a token that has not been seen yet, nothing is cut: cut to 0, it would stay frozen for ever.
    """
    limit = second_moment.mul(threshold).sqrt_().masked_fill_(second_moment == 0, inf)
    grad.clamp_(max=limit).clamp_(min=limit.neg_())


def resets(update: int, reset_every: int | None) -> bool:
    """Whether moments are zeroed before update number ``update``; the step of the bias correction goes on."""
    return reset_every is not None and update % reset_every == 0


def age(update: int, reset_every: int | None, moments_from: int = 0) -> int:
    """How many gradients the moments have seen with that of update number ``update``."""
    since = update - moments_from
    return since if reset_every is None or update < reset_every else min(since, update % reset_every + 1)


def rate_factor(update: int, reset_every: int | None, warmup: int) -> float:
    """Of the learning rate: after a reset it rises from about 0.01 to 1 over ``warmup`` updates, along a cosine."""
    if reset_every is None or update < reset_every or (since := update % reset_every) >= warmup:
        return 1.0
    return 1.0 - 0.99 * (1 + cos(pi * (since + 1) / (warmup + 1))) / 2
