"""Parameter groups: which rule, learning rate, weight decay and eps a parameter is trained with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from megatron_stable.config.parametrization import optimizer_multipliers
from megatron_stable.config.schema import Config
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.shards import Place


def kind(known: Place) -> str:
    """What a parameter is to the optimizer: "matrices" (of the blocks), "norms" (and all other vectors), "biases",
    "embeddings" (of tokens and positions; the output head, too, where it is tied) or "head"."""
    if known.name.endswith(".bias"):
        return "biases"
    if known.name == "head.weight":
        return "head"
    if known.name in ("embedding.weight", "positions.weight"):
        return "embeddings"
    return "matrices" if len(known.full_shape) > 1 else "norms"


def settings(known: Place, config: Config) -> dict[str, Any]:
    """The settings of a parameter's group, for :class:`~megatron_stable.optim.optimizer.Optimizer`.

    Independent weight decay (arXiv 2309.14322) is theta <- theta - s (eta Delta + lambda theta) with the schedule's
    factor s: the coupled one, theta - s eta (Delta + lambda' theta), with lambda' = lambda / eta.
    """
    optimizer, what = config.optimizer, kind(known)
    by = optimizer_multipliers(config, what, in_block=known.name.startswith("blocks."))
    decay = optimizer.weight_decay if what not in optimizer.no_decay else 0.0
    if optimizer.independent_weight_decay:
        decay = decay and decay / (optimizer.learning_rate * by.learning_rate)
    else:
        decay *= by.weight_decay
    own: dict[str, Any]
    if optimizer.name == "muon" and what == "matrices":
        own = {"rule": "muon", "momentum": optimizer.muon_momentum}
    else:
        rule = "adamw" if optimizer.name == "muon" else optimizer.name
        own = {"rule": rule, "betas": optimizer.betas, "eps": optimizer.eps * by.eps}
    # pipeline stages keep copies of a tied matrix; alone in its flat, it is summed in the same order on each of them
    tied = known.name == "embedding.weight" and config.model.tied_embeddings
    return {**own, "weight_decay": decay, "rate_factor": by.learning_rate, "tied": tied}


def parameter_groups(parameters: Iterable[nn.Parameter], config: Config) -> list[dict[str, Any]]:
    """Parameters with equal settings share a group, and so one of DeepSpeed's flats.

    Groups are sorted by their settings, so that pipeline stages with the same groups have them in the same order.
    """
    found: dict[str, dict[str, Any]] = {}
    for weight in parameters:
        own = settings(place(weight), config)
        found.setdefault(f"{own}", {**own, "params": []})["params"].append(weight)
    return [found[key] for key in sorted(found)]
