"""What early warnings warn of: the rules, as data, each with its paper. docs/warnings.md is made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from megatron_stable.config.schema import Config
from megatron_stable.stability.probes import LINEARS, RYBAKOV, STABLE_ADAMW, WORTSMAN


@dataclass(frozen=True)
class Rule:
    """What to warn of.

    Attributes:
        name: In the ledger and in docs/warnings.md.
        probe: Of `PROBES`.
        points: Of the probe, those that are looked at; empty: all.
        kind: reaches: has passed ``threshold``, or will if it goes on so; passes: has passed it; grows: by that factor,
            at least, in the later half of what is looked at; jumps: by that factor above its median.
        threshold: In the probe's unit, or a factor; of Adam's eps where ``of_eps`` is set.
        what: The quantity, in words.
        meaning: What it means for the run.
        remedy: The configuration that treats it.
        page: The method's, below docs/methods.
        source: Who has seen it.
        falls: Whether low values are the bad ones.
        linear: Whether it grows by addition; else its logarithm does.
        per_rate: Whether it is taken relative to the learning rate.
        of_eps: Whether the threshold is in units of `optimizer.eps`.
        treated: Whether a run with this configuration does what ``remedy`` says.
        applies: Whether a run with this configuration needs it.
        when: ``applies``, in words.
    """

    name: str
    probe: str
    kind: Literal["reaches", "passes", "grows", "jumps"]
    threshold: float
    what: str
    meaning: str
    remedy: str
    page: str
    source: str
    points: tuple[str, ...] = ()
    falls: bool = False
    linear: bool = False
    per_rate: bool = False
    of_eps: bool = False
    treated: Callable[[Config], bool] = lambda config: False
    applies: Callable[[Config], bool] = lambda config: True
    when: str = "always"

    def limit(self, config: Config) -> float:
        """The threshold in a run."""
        return self.threshold * (config.optimizer.eps if self.of_eps else 1.0)

    def advice(self, config: Config) -> str:
        """What to do in a run; where that is done already, what is left."""
        return "a lower optimizer.learning_rate" if self.treated(config) else self.remedy


_LOGITS: dict[str, Any] = {
    "probe": "attention/max_logit",
    "kind": "reaches",
    "what": "the largest attention logit",
    "remedy": "model.recipe=qk_norm_cap in a new run, optimizer.qk_clip=100 in this one",
    "page": "qk_norm_cap",
    "treated": lambda config: config.optimizer.qk_clip is not None,
    "applies": lambda config: config.model.attention_cap is None,
    "when": "unless `model.attention_cap` bounds what the softmax sees",
}
_MATRICES = (*LINEARS, "embedding", "head")
_UPDATES: dict[str, Any] = {
    "points": _MATRICES,
    "remedy": "optimizer.name=stable_adamw",
    "page": "stable_adamw",
    "treated": lambda config: config.optimizer.name == "stable_adamw",
}
RULES: tuple[Rule, ...] = (
    Rule(
        name="attention_logits",
        threshold=1e3,
        meaning="softmax nears an argmax, whose gradient vanishes",
        source=f"{WORTSMAN}, §3.1: forced logits harm from 10³ on",
        **_LOGITS,
    ),
    Rule(
        name="attention_logits_lost",
        threshold=1e4,
        meaning="runs with logits beyond it diverged, all of them",
        source=f"{WORTSMAN}, §3.3",
        **_LOGITS,
    ),
    Rule(
        name="attention_entropy",
        probe="attention/entropy",
        kind="reaches",
        threshold=0.1,
        falls=True,
        what="the attention entropy",
        meaning="queries attend to hardly more than a single key",
        remedy="model.recipe=sigma_reparam or qk_norm_cap in a new run",
        treated=lambda config: config.model.sigma_reparam or config.model.attention_cap is not None,
        page="sigma_reparam",
        source="Zhai et al., arXiv 2303.06296, §3: entropy collapse; the threshold is ours",
    ),
    Rule(
        name="output_logsumexp",
        probe="logits/logsumexp",
        kind="reaches",
        threshold=32.0,
        linear=True,
        what="the magnitude of log Z, the output logsumexp,",
        meaning="output logits drift, and bf16 rounds numbers of this size to quarters",
        remedy="loss.z_loss=1e-4",
        treated=lambda config: config.loss.z_loss >= 1e-4,
        page="z_loss",
        source=f"{WORTSMAN}, §3.2: output logits drift; the threshold is ours",
    ),
    Rule(
        name="gradient_rms",
        probe="grad_rms",
        points=_MATRICES,
        kind="reaches",
        threshold=10.0,
        falls=True,
        of_eps=True,
        what="the gradient RMS",
        meaning="it nears Adam's ε, and updates vanish",
        remedy="optimizer.eps=1e-15",
        treated=lambda config: config.optimizer.eps <= 1e-15,
        page="adam_eps",
        source=f"{WORTSMAN}, §3.4; ten times ε is ours: there the update has lost a tenth",
    ),
    Rule(
        name="update_rms",
        probe="update_rms",
        kind="jumps",
        threshold=4.0,
        per_rate=True,
        what="the update RMS",
        meaning="the second moment does not know such gradients yet, and the loss may spike within steps",
        source=f"{STABLE_ADAMW}; the factor is ours",
        **_UPDATES,
    ),
    Rule(
        name="moment_surprise",
        probe="moment_surprise",
        kind="passes",
        threshold=2.3,
        what="the gradient relative to Adam's second moment",
        meaning="the second moment is out of date, and the loss may spike within steps",
        source=f"{STABLE_ADAMW}; its bound, from memory of the paper",
        **_UPDATES,
    ),
    Rule(
        name="output_norm",
        probe="output_norm",
        points=("qkv", "proj", "fc2"),
        kind="grows",
        threshold=4.0,
        what="the output norm",
        meaning="outputs of QKV, Proj and FC2 outgrow those of a run that converges",
        remedy="model.recipe=qkv_norm or qk_norm_cap in a new run",
        page="qkv_norm",
        source=f"{RYBAKOV}: more than twice as large as in a run that converges; a factor within a run is ours",
        applies=lambda config: not config.model.qk_norm,
        when="unless `model.qk_norm` is set: then they grow as much without harm",
    ),
)
