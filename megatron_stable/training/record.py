"""The record of a step: what ``metrics.jsonl`` has of each that is logged."""

from __future__ import annotations

from megatron_stable.config.schema import Config
from megatron_stable.engine.outcome import Outcome
from megatron_stable.numbers import finite
from megatron_stable.records.metrics import EPOCHS, Record
from megatron_stable.stability.guard import Judgement
from megatron_stable.training.source import Source


def record_of(
    step: int, outcome: Outcome[Judgement], config: Config, source: Source, rate: float, speed: float | None
) -> Record:
    """The record of a step, without what is measured inside the model. Collective if nobody has judged the step.

    Args:
        rate: The learning rate.
        speed: Tokens per second since the last record, if that is known.
    """
    metrics, judgement, course = outcome.metrics, outcome.judgement, source.course
    record: Record = {
        "step": step,
        "loss": finite(metrics.loss),
        "z_loss": finite(metrics.z_loss),
        "grad_norm": finite(metrics.grad_norm),
        "learning_rate": rate,
        "loss_scale": metrics.loss_scale,
        "tokens": course.trained(step) * config.model.sequence_length,
        "tokens_per_second": speed,
        "skipped": metrics.skipped,
        "data_step": course.data_step(step),
        "samples": [[piece.start, piece.stop] for piece in course.samples(step)],
    }
    if judgement is not None:
        record |= {f"{name}_score": finite(score) for name, score in judgement.scores.items()}
    record |= {f"{EPOCHS}{name}": epochs for name, epochs in source.epochs(course.position(step)).items()}
    if config.data.repetition_filter is not None:
        record["left_out"] = metrics.left_out
    if config.loss.mu_loss:
        record["mu_loss"] = finite(metrics.mu_loss)
    return record
