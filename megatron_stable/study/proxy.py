"""The file of a sweep of small models that stand for a large one, so that `forecast` and `recommend` can go by them.

Sizes share the target's width of a head, and grow in depth and width together, as in arXiv 2309.14322: from some 25
times smaller than the target, near enough for a forecast to follow, down by enough that its law carries so far
(`scaling.refusal`). Learning rates, tokens of a step and the share of warm-up are that paper's; there are a
tenth of its steps, and no more than the target has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_stable.config.notation import dump
from megatron_stable.config.schema import Config
from megatron_stable.errors import ConfigError
from megatron_stable.study.evidence import follows_recipe
from megatron_stable.study.known import WARMUP_SHARE

STEPS, SEQUENCE, BATCH = 10_000, 512, 256
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SEEDS = (1, 2)
ALTERNATIVE = "qk_norm_cap"  # beside the recipe of the target: it bears the highest rates (arXiv 2410.16682)
PARTS = 4  # sizes: their numbers of heads are so many even parts of a third of the target's
LEAST_HEADS = 10

_HEAD = """\
# Small models for {of}, written by `megatron-stable recommend`. Train them, and ask again with what they say:
#
#   megatron-stable sweep {file}
#   megatron-stable forecast {directory} --leave-out-largest
#   megatron-stable recommend ... --sweep {directory}
#
# Sizes have the target's width of a head; learning rates are those of arXiv 2309.14322. The loss is lowest inside of
# the grid, or add rates at its end; more seeds make the frontier surer, more sizes the laws.
"""


def proxy_sweep(config: Config, base: Path, file: Path) -> str:
    """The YAML of a sweep.

    Args:
        config: Of the target.
        base: The file that holds it.
        file: Where the sweep's will be.

    Raises:
        ConfigError: The target has too few heads for smaller models of its kind.
    """
    model = config.model
    if model.heads < LEAST_HEADS:
        raise ConfigError(
            f"--proxy: a model of {model.heads} heads is too small for {PARTS} smaller ones of its kind, which takes "
            f"{LEAST_HEADS}: sweep learning rates of the model itself (docs/sweep.md)"
        )
    directory = Path("sweeps") / file.stem
    axes: dict[str, Any] = {"size": dict(map(_size(config), _heads(model.heads)))}
    recipes = list(dict.fromkeys((model.recipe, "qk_norm" if model.recipe == ALTERNATIVE else ALTERNATIVE)))
    if follows_recipe(model):
        axes["model.recipe"] = recipes
    axes |= {"optimizer.learning_rate": list(RATES), "run.seed": list(SEEDS)}
    steps = min(STEPS, config.run.steps)
    shared = {"run.steps": steps, "schedule.warmup_steps": round(WARMUP_SHARE * steps), **_SHARED}
    sweep = {"directory": str(directory), "base": str(base), "config": shared, "axes": axes}
    of = f"size {model.size}" if model.size else str(base)
    return _HEAD.format(of=of, file=file, directory=directory) + dump(sweep)


_SHARED = {
    "model.sequence_length": SEQUENCE,
    "model.kv_heads": None,
    "model.activation_checkpointing": "none",
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "parallel.sequence": False,
    "batch.global_size": BATCH,
    "batch.micro_size": 8,
    "schedule.min_learning_rate": 1e-5,
    "evaluation.every": 1000,
    "checkpoint.every": 1000,
}


def _heads(heads: int) -> list[int]:
    """Of each size: up to a third of the target's, which has some 27 times as many parameters."""
    most = -(-heads // 3)
    return [max(1, most * part // PARTS) for part in range(1, PARTS + 1)]


def _size(config: Config) -> Any:
    model = config.model

    def shape(heads: int) -> tuple[str, dict[str, Any]]:
        part, width = heads / model.heads, heads * model.head_dim
        layers = max(1, round(model.layers * part))
        fields: dict[str, Any] = {"model.layers": layers, "model.hidden": width, "model.heads": heads}
        if model.ffn_hidden is not None:
            fields["model.ffn_hidden"] = round(model.ffn_hidden * part)
        return f"{layers}x{width}", fields

    return shape
