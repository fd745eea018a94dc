"""The model card, ``README.md``: what the model is, how and on what it was trained, what happened on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_stable.checkpoint.catalog import Whole
from megatron_stable.config.load import dump_config
from megatron_stable.config.schema import Config, DataConfig, ModelConfig
from megatron_stable.convert.huggingface.families import OURS, Family
from megatron_stable.convert.huggingface.function import TRAINING
from megatron_stable.data import Stages
from megatron_stable.model.transformer import parameter_count
from megatron_stable.persisted import package_version
from megatron_stable.records.logbook import render
from megatron_stable.stability.events import Event


def model_card(
    whole: Whole, config: Config, family: Family, events: Sequence[Event], name: str, tokenizer: bool
) -> str:
    """The card of a checkpoint, in Markdown.

    Args:
        events: The run's ledger.
        name: The model's.
        tokenizer: Whether it has one.
    """
    rows = "\n".join(f"| {what} | {value} |" for what, value in facts(whole, config))
    import_ours = "import megatron_stable.hf  # pip install 'megatron-stable[hf]'\n" if family is OURS else ""
    words = "AutoModelForCausalLM, AutoTokenizer" if tokenizer else "AutoModelForCausalLM"
    load_words = '\ntokenizer = AutoTokenizer.from_pretrained("PATH")' if tokenizer else ""
    story = render([event for event in events if event.step is None or event.step <= whole.step])
    story = story.replace("# Logbook\n", "").replace("\n## ", "\n### ").strip()
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- megatron-stable
---
# {name}

A language model of class `{family.architecture}`, trained with megatron-stable; exported by version
{package_version()}.

```python
{import_ours}from transformers import {words}

model = AutoModelForCausalLM.from_pretrained("PATH"){load_words}
```

## Training

| | |
|---|---|
{rows}

Stability, as far as it is not that of a plain pre-norm decoder: {_knobs(config.model)}.

## What happened

{story}

## Configuration

```yaml
{dump_config(config).strip()}
```
"""


def facts(whole: Whole, config: Config) -> list[tuple[str, str]]:
    """(what, value) of the run."""
    model, course = config.model, whole.manifest.state.course
    samples = course.trained(whole.step)
    schedule, optimizer = config.schedule, config.optimizer
    return [
        ("parameters", f"{parameter_count(model)[0]:,}"),
        ("recipe", f"`{model.recipe}`"),
        ("tokens", f"{samples * model.sequence_length:,} in {whole.step:,} steps"),
        ("data", _data(config.data, whole.manifest.state.stages, course.position(whole.step))),
        ("documents", "kept apart" if config.data.document_mask else "attention sees across them within a sequence"),
        ("skipped", f"{sum(high - low for low, high in _stretches(course)):,} sequences"),
        ("tokenizer", _code(config.data.tokenizer)),
        ("sequence length", f"{model.sequence_length:,}"),
        ("batch", f"{config.batch.global_size:,} sequences"),
        ("optimizer", f"{optimizer.name}, peak learning rate {optimizer.learning_rate:g}, {schedule.kind} schedule"),
        ("weight decay", f"{optimizer.weight_decay:g}"),
        ("precision", config.precision.dtype),
        ("seed", str(config.run.seed)),
    ]


def _stretches(course: Any) -> list[tuple[int, int]]:
    return [(stretch[0], stretch[1]) for stretch in course.skip]


def _data(data: DataConfig, stages: Stages | None, position: int) -> str:
    """What it was trained on up to a sample: by what the run has noted, which knows of each change."""
    if stages is not None:
        first, *later = (stage for stage in stages.stages if stage.sample < max(1, position))
        alone = [_code(name) for name in first.weights if len(first.weights) == 1]
        begun = alone[0] if alone else _blend(first.weights)
        return "; ".join([begun, *(f"from sequence {each.sample:,} on {_blend(each.weights)}" for each in later)])
    if data.stages:
        return "; ".join(f"from sequence {sample:,} on {_blend(weights)}" for sample, weights in data.stages)
    if isinstance(data.train, dict):
        return _blend(data.train)
    return ", ".join(map(_code, data.train)) if isinstance(data.train, tuple) else _code(data.train)


def _blend(weights: dict[str, float]) -> str:
    total = sum(weights.values())
    return ", ".join(f"{_code(Path(prefix).name)} {weight / total:.1%}" for prefix, weight in weights.items())


def _code(name: str | None) -> str:
    return f"`{Path(name).name}`" if name else "not recorded"


def _knobs(model: ModelConfig) -> str:
    """Fields of the model that differ from the defaults, shape aside."""
    plain = ModelConfig(size=None)
    shape = {"layers", "hidden", "heads", "kv_heads", "ffn_hidden", "sequence_length", "vocab_size"}
    fields = [name for name in ModelConfig.model_fields if name not in TRAINING - {"sigma_reparam"} | shape]
    different = [f"`{name}: {getattr(model, name)}`" for name in fields if getattr(model, name) != getattr(plain, name)]
    return ", ".join(different) or "nothing"
