"""What to change where a forecast sees a risk: causes, their signs, and remedies, as data, each with its source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_stable.stability.warning_rules import RULES
from megatron_stable.study.scaling import Prediction

Verdict = Literal["stable", "at risk", "unstable", "unknown"]

CRITICAL, DRIFT, ABOVE_EPS = (
    {rule.name: rule.threshold for rule in RULES}[name]
    for name in ("attention_logits_lost", "output_logsumexp", "gradient_rms")
)


@dataclass(frozen=True)
class Signs:
    """What advice goes by.

    Attributes:
        values: What is foretold, of `QUANTITIES`.
        logit_risk: That a run diverges, by its attention logits.
        eps: Adam's.
        row: The configuration of runs like it.
    """

    verdict: Verdict
    values: Mapping[str, Prediction]
    logit_risk: float | None
    eps: float
    row: Mapping[str, Any]

    @property
    def risky(self) -> bool:
        """Whether anything is to be done about divergence."""
        return self.verdict in ("at risk", "unstable")


@dataclass(frozen=True)
class Advice:
    """A remedy.

    Attributes:
        change: What to set.
        because: The cause.
        pages: Of docs/methods.
        source: Who found it to help.
        applies: Whether the signs call for it.
    """

    change: str
    because: str
    pages: tuple[str, ...]
    source: str
    applies: Callable[[Signs], bool]

    def __str__(self) -> str:
        pages = "".join(f", docs/methods/{page}.md" for page in self.pages)
        return f"{self.because}: {self.change} ({self.source}{pages})"


WORTSMAN, RYBAKOV = "arXiv 2309.14322", "arXiv 2410.16682"

ADVICE: tuple[Advice, ...] = (
    Advice(
        "model.recipe=qk_norm",
        "attention logits grow too large",
        ("qk_norm",),
        f"{WORTSMAN}, §3.1",
        lambda signs: signs.risky and (signs.logit_risk or 0) > 0.1,
    ),
    Advice(
        "model.recipe=qk_norm_cap or qkv_norm",
        "the same, and learning rates half as high again as qk_norm bears",
        ("qk_norm_cap", "qkv_norm"),
        RYBAKOV,
        lambda signs: signs.risky and (signs.logit_risk or 0) > 0.1,
    ),
    Advice(
        "optimizer.qk_clip=100",
        "the same, where the model is to stay as it is",
        ("qk_clip",),
        "arXiv 2507.20534, §2.1",
        lambda signs: signs.risky and (signs.logit_risk or 0) > 0.1,
    ),
    Advice(
        "loss.z_loss=1e-4",
        "output logits drift",
        ("z_loss",),
        f"{WORTSMAN}, §3.2",
        lambda signs: "log_z" in signs.values and signs.values["log_z"].high > DRIFT and not signs.row["loss.z_loss"],
    ),
    Advice(
        "optimizer.eps=1e-15",
        "ε is too large: the gradient RMS comes within ten times of it, and updates vanish",
        ("adam_eps",),
        f"{WORTSMAN}, §3.4",
        lambda signs: "grad_rms" in signs.values and signs.values["grad_rms"].low < ABOVE_EPS * signs.eps,
    ),
    Advice(
        "a longer schedule.warmup_steps",
        "large models at high learning rates need a longer warm-up",
        (),
        WORTSMAN,
        lambda signs: signs.risky,
    ),
    Advice(
        "optimizer.independent_weight_decay=true",
        "weight decay that does not go with the learning rate lowers its sensitivity",
        ("independent_weight_decay",),
        WORTSMAN,
        lambda signs: signs.risky and not signs.row.get("optimizer.independent_weight_decay"),
    ),
)


def advise(signs: Signs) -> tuple[Advice, ...]:
    """What the signs call for."""
    return tuple(advice for advice in ADVICE if advice.applies(signs))
