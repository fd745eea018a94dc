"""Conflicts between fields: each names the fields, their values and the remedy."""

import pytest

from megatron_stable.config.checks import check, conflicts
from megatron_stable.config.load import load_config
from megatron_stable.config.schema import Config
from megatron_stable.config.sizes import SIZES
from megatron_stable.errors import ConfigError


def build(**sections) -> Config:
    return Config.model_validate(sections)


CONFLICTS = {
    "first stage": (build(data={"stages": [[5, {"a": 1}]]}), None, ["data.stages begins at sample 5", "from sample 0"]),
    "order of stages": (
        build(data={"stages": [[0, {"a": 1}], [9, {"a": 2}], [9, {"b": 1}]]}),
        None,
        ["data.stages has sample 9 behind sample 9", "in order"],
    ),
    "stages without end": (
        build(data={"stages": [[0, {"a": 1}], [2**48, {"a": 2}]]}),
        None,
        [f"sample {2**48}", f"below {2**48}"],
    ),
    "stages, train": (
        build(data={"stages": [[0, {"a": 1}]], "train": {"a": 1}}),
        None,
        ["data.stages and data.train", "leave data.train unset", ".yaml"],
    ),
    "hidden, heads": (
        build(model={"hidden": 250, "heads": 4}),
        None,
        ["model.hidden 250", "model.heads 4", "248 or 252"],
    ),
    "heads, kv_heads": (build(model={"kv_heads": 3}), None, ["model.heads 4", "model.kv_heads 3", "3 or 6"]),
    "rope, odd head width": (
        build(model={"hidden": 36, "heads": 4}),
        None,
        ["model.positions rope", "model.hidden 36", "model.heads 4", "is 9", "model.positions=learned"],
    ),
    "rope, chosen head width": (
        build(model={"hidden": 36, "heads": 4, "head_width": 7}),
        None,
        ["model.positions rope", "model.head_width is 7", "model.positions=learned"],
    ),
    "document_mask, no tokenizer": (
        build(data={"document_mask": True}),
        None,
        ["data.document_mask true", "data.tokenizer and data.end_of_document", "data.document_mask=false"],
    ),
    "end_of_document, vocab_size": (
        build(data={"document_mask": True, "end_of_document": 64}, model={"vocab_size": 64}),
        None,
        ["data.end_of_document 64", "model.vocab_size 64", "leave it unset"],
    ),
    "end_of_document, no mask": (
        build(data={"end_of_document": 2}),
        None,
        ["data.end_of_document 2 has no effect", "data.document_mask=true", "data.end_of_document=null"],
    ),
    "repetition_periods, no filter": (
        build(data={"repetition_periods": (1, 5)}),
        None,
        ["data.repetition_periods [1, 5] has no effect", "data.repetition_filter=32", "[1, 13]"],
    ),
    "repetition_periods, reversed": (
        build(data={"repetition_filter": 32, "repetition_periods": (5, 2)}),
        None,
        ["data.repetition_periods [5, 2]", "[shortest, longest]"],
    ),
    "repetition_filter, sequence_length": (
        build(data={"repetition_filter": 300}),
        None,
        ["data.repetition_filter 300", "model.sequence_length 256 + 1"],
    ),
    "sdpa, cap": (
        build(model={"attention": "sdpa", "recipe": "qk_norm_cap"}),
        None,
        ["model.attention sdpa", "model.attention_cap 50", "model.attention=auto"],
    ),
    "flex, dropout": (
        build(model={"attention": "flex", "attention_dropout": 0.1}),
        None,
        ["model.attention flex", "model.attention_dropout 0.1", "model.attention=auto"],
    ),
    "checkpointing, layers": (
        build(model={"activation_checkpointing": 5}),
        None,
        ["model.activation_checkpointing 5", "model.layers is 4", "1..4"],
    ),
    "heads, tensor": (
        build(model={"hidden": 192, "heads": 6, "ffn_hidden": 512}, parallel={"tensor": 4}),
        None,
        ["model.heads 6", "parallel.tensor 4", "4 or 8"],
    ),
    "kv_heads, tensor": (
        build(model={"kv_heads": 2}, parallel={"tensor": 4}),
        None,
        ["model.kv_heads 2", "parallel.tensor 4"],
    ),
    "ffn_hidden, tensor": (
        build(model={"ffn_hidden": 1001}, parallel={"tensor": 2}),
        None,
        ["model.ffn_hidden 1001", "parallel.tensor 2", "1000 or 1002"],
    ),
    "sequence_length, tensor, sequence": (
        build(model={"sequence_length": 255}, parallel={"tensor": 2, "sequence": True}),
        None,
        ["model.sequence_length 255", "parallel.tensor 2", "254 or 256", "parallel.sequence=false"],
    ),
    "layers, pipeline": (
        build(parallel={"pipeline": 5}),
        None,
        ["model.layers 4", "parallel.pipeline 5", "at most 4"],
    ),
    "zero, pipeline": (
        build(parallel={"zero_stage": 2, "pipeline": 2}),
        None,
        ["parallel.zero_stage 2", "parallel.pipeline 2", "parallel.zero_stage=1"],
    ),
    "batch": (
        build(batch={"global_size": 10, "micro_size": 4}),
        None,
        ["batch.global_size 10", "batch.micro_size 4", "8 or 12"],
    ),
    "ranks, tensor x pipeline": (
        build(parallel={"tensor": 2, "pipeline": 2}),
        6,
        ["6 ranks", "parallel.tensor 2", "parallel.pipeline 2", "a multiple of 4"],
    ),
    "fewer ranks than tensor": (build(parallel={"tensor": 4}), 2, ["2 ranks", "parallel.tensor 4", "a multiple of 4"]),
    "batch, data parallel": (
        build(parallel={"tensor": 2}, batch={"global_size": 16, "micro_size": 4}),
        6,
        ["batch.global_size 16", "batch.micro_size 4", "3 data-parallel ranks", "12 or 24"],
    ),
    "minimum above the learning rate": (
        build(optimizer={"learning_rate": 1e-5}),
        None,
        ["schedule.min_learning_rate 3e-05", "optimizer.learning_rate 1e-05", "1e-06"],
    ),
    "warm-up, steps": (
        build(run={"steps": 100}),
        None,
        ["schedule.warmup_steps 100", "run.steps 100", "cosine", "below 100"],
    ),
    "warm-up, wsd": (
        build(run={"steps": 200}, schedule={"kind": "wsd", "warmup_steps": 150, "decay_fraction": 0.5}),
        None,
        ["schedule.warmup_steps 150", "step 100", "schedule.decay_fraction 0.5", "run.steps 200"],
    ),
    "loss scale": (
        build(precision={"dtype": "fp16", "initial_scale_power": 2, "min_scale": 8}),
        None,
        ["precision.initial_scale_power 2", "scale of 4", "precision.min_scale 8"],
    ),
    "tied embeddings summed in fp16": (
        build(
            model={"tied_embeddings": True},
            parallel={"pipeline": 2},
            precision={"dtype": "fp16", "reduce_dtype": "fp16"},
        ),
        None,
        ["precision.reduce_dtype fp16", "model.tied_embeddings", "precision.reduce_dtype=fp32"],
    ),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_conflict(name):
    config, world_size, words = CONFLICTS[name]
    (problem,) = conflicts(config, world_size)
    for word in words:
        assert word in problem.message
    for key in problem.keys:  # a problem is found by its keys where one of them was refused before
        assert key in problem.message
    with pytest.raises(ConfigError):
        check(config, world_size)


@pytest.mark.parametrize(
    ("config", "world_size"),
    [
        (build(), 1),
        (build(parallel={"sequence": True}), 1),
        (build(parallel={"tensor": 2, "sequence": True}), 8),
        (build(parallel={"tensor": 2, "pipeline": 2}), 4),
        (build(parallel={"pipeline": 4}), 4),
        (build(model={"sequence_length": 255}, parallel={"tensor": 2}), 2),
        (build(parallel={"zero_stage": 3, "tensor": 2}), 4),
        (build(model={"positions": "learned", "hidden": 36}), 1),
        (build(model={"activation_checkpointing": 4}), 1),
        (build(model={"attention": "flex", "recipe": "qk_norm_cap"}), 1),
        (build(model={"kv_heads": 2}, parallel={"tensor": 2}), 2),
        (build(run={"steps": 10}, schedule={"kind": "constant"}), 1),
        (build(optimizer={"learning_rate": 1e-6}, schedule={"kind": "constant"}), 1),
        (build(schedule={"kind": "wsd", "warmup_steps": 900}), 1),
        (build(precision={"dtype": "bf16", "initial_scale_power": 2, "min_scale": 8}), 1),
        (build(batch={"global_size": 8, "micro_size": 2}), 4),
    ],
)
def test_no_conflict(config, world_size):
    assert conflicts(config, world_size) == []
    check(config, world_size)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_runs_as_it_is_and_split(size):
    check(build(model={"size": size}), 1)
    check(build(model={"size": size}, parallel={"tensor": 2, "sequence": True, "pipeline": 2}), 8)


def test_all_conflicts_at_once():
    config = build(model={"hidden": 250}, parallel={"zero_stage": 3, "pipeline": 8}, batch={"global_size": 6})
    with pytest.raises(ConfigError) as caught:
        check(config, 8)
    heading, *lines = str(caught.value).splitlines()
    assert "4 problems" in heading and len(lines) == 4
    assert caught.value.exit_code == 2


def test_conflicts_are_found_when_a_file_is_loaded():
    with pytest.raises(ConfigError, match=r"model\.hidden 250 is not divisible by model\.heads 4"):
        load_config(None, ["model.hidden=250"])


def test_ranks_are_not_guessed_when_a_file_is_loaded():
    config = load_config(None, ["parallel.tensor=2"])
    with pytest.raises(ConfigError, match="3 ranks"):
        check(config, 3)
