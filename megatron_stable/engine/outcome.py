"""What a training step comes to: its metrics, what was thought of it, and whether its loss scale has come to an end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, NamedTuple, Protocol, TypeVar


@dataclass(frozen=True)
class StepMetrics:
    """What a step has to say, over all ranks.

    Attributes:
        loss: Mean cross-entropy, nats per token, without the terms below.
        z_loss, mu_loss: Coefficients included.
        grad_norm: Global L2 norm of the gradient before clipping; infinite where one was not finite.
        loss_scale: fp16's loss scale, else 1.
        skipped: Whether the update was not made: gradients were not finite, or it was not approved.
        stop: Whether a rank wished to stop after the step.
        left_out: Share of the tokens that were read and not predicted.
    """

    loss: float
    z_loss: float
    mu_loss: float
    grad_norm: float
    loss_scale: float
    skipped: bool
    stop: bool = False
    left_out: float = 0.0


class Approval(Protocol):
    """A judgement on an update before it is made."""

    @property
    def take(self) -> bool:
        """Whether it may be made."""


class Refused(NamedTuple):
    """An approval that is none."""

    take: bool = False


J = TypeVar("J", bound=Approval)


class Outcome(Generic[J]):
    """What a step comes to.

    Args:
        measure: Gives the metrics.
        judgement: What the one who approves updates said; ``None`` if nobody was asked.
        loss_scale_exhausted: Whether gradients overflowed at the lowest loss scale.
    """

    def __init__(self, measure: Callable[[], StepMetrics], judgement: J | None, loss_scale_exhausted: bool) -> None:
        self._measure, self.judgement, self.loss_scale_exhausted = measure, judgement, loss_scale_exhausted

    @cached_property
    def metrics(self) -> StepMetrics:
        """Collective until the next step begins; costs one small reduction and one read from the device, unless
        somebody was asked to approve, and so has paid for them."""
        return self._measure()
