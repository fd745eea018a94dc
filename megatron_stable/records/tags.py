"""What a record is called on a dashboard: the tags of TensorBoard and of Weights & Biases."""

from __future__ import annotations

from functools import cache

from megatron_stable.records.metrics import EPOCHS, Record
from megatron_stable.stability.events import Event, Rollback
from megatron_stable.stability.probes import parse

TAGS = {
    "loss": "train/loss",
    "z_loss": "train/z_loss",
    "mu_loss": "train/mu_loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "loss_scale": "train/loss_scale",
    "tokens_per_second": "train/tokens_per_second",
    "mfu": "train/mfu",
    "data_step": "train/data_step",
    "left_out": "train/left_out",
    "validation_loss": "validation/loss",
    "validation_perplexity": "validation/perplexity",
    "loss_score": "guard/loss_score",
    "grad_norm_score": "guard/grad_norm_score",
    "skipped": "guard/dropped",
}


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record by tag: of probes and epochs it is their key. What was not finite is left out."""
    return {tag: float(value) for key, value in record.items() if value is not None and (tag := tag_of(key))}


@cache
def tag_of(key: str) -> str | None:
    """The tag of a record's key; ``None``: it is not charted."""
    return TAGS.get(key) or (key if key.startswith(EPOCHS) or parse(key) else None)


def markers(event: Event) -> tuple[str, ...]:
    """Tags of the pulses that show an event beside the curves."""
    skips = isinstance(event, Rollback) and event.windows
    return (f"events/{event.event}", *(["events/skip_window"] if skips else []))
