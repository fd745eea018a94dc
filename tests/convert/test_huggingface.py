"""Both ways, against `transformers` itself: logits, and every byte of a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as safetensors
import torch

from megatron_stable.checkpoint.catalog import newest_whole
from megatron_stable.config.load import load_config
from megatron_stable.config.schema import ModelConfig
from megatron_stable.convert.huggingface.export import export
from megatron_stable.convert.huggingface.families import OURS, OWN
from megatron_stable.convert.huggingface.function import TRAINING
from megatron_stable.convert.huggingface.importing import take
from tests.convert.models import CLASSES, our_logits, tokens, weights_of, write_run

transformers = pytest.importorskip("transformers")
CASES = [pytest.param(family, fields, id=name) for family, cases in CLASSES.items() for name, fields in cases.items()]


@pytest.mark.parametrize(("family", "fields"), CASES)
def test_a_class_of_transformers_computes_the_same(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    write_run(tmp_path / "run", **fields)
    chosen = "mistral" if family == "mistral" else None  # it computes what Llama does, which is taken first
    done = export(newest_whole(tmp_path / "run"), tmp_path / "hf", "fp32", chosen)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )  # fused attention leaves Gemma 2's cap out in some versions
    assert model.config.model_type == family
    assert type(model).__name__ == done.architecture
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        logits = model.eval()(tokens()).logits
    torch.testing.assert_close(logits, our_logits(tmp_path / "run", tokens()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "fields"), CASES)
def test_a_round_trip_keeps_every_bit(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    write_run(tmp_path / "run", **fields)
    export(newest_whole(tmp_path / "run"), tmp_path / "hf", "fp32", family)
    taken = take(tmp_path / "hf", tmp_path / "back")
    before, after = weights_of(tmp_path / "run"), weights_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert taken.parameters == sum(weight.numel() for weight in before.values())
    assert torch.equal(our_logits(tmp_path / "run", tokens()), our_logits(tmp_path / "back", tokens()))
    export(newest_whole(tmp_path / "back"), tmp_path / "again", None, family)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


@pytest.mark.parametrize(("family", "fields"), CASES)
def test_what_transformers_saved_is_read(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    write_run(tmp_path / "run", **fields)
    export(newest_whole(tmp_path / "run"), tmp_path / "hf", "fp32", family)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    take(tmp_path / "theirs", tmp_path / "back")
    before, after = weights_of(tmp_path / "run"), weights_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("most", [1, 5000, 20000])
def test_files_are_of_bounded_size(most: int, tmp_path: Path) -> None:
    write_run(tmp_path / "run", **CLASSES["llama"]["llama"])
    export(newest_whole(tmp_path / "run"), tmp_path / "whole", "fp32")
    done = export(newest_whole(tmp_path / "run"), tmp_path / "hf", "fp32", most=most)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) == done.files > 1
    largest = max(weight.numel() for weight in weights_of(tmp_path / "run").values()) * 4
    assert all(path.stat().st_size < max(most, largest) + 10_000 for path in files)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    assert all(torch.equal(weight, reference[name]) for name, weight in model.state_dict().items())
    take(tmp_path / "hf", tmp_path / "back")
    before, after = weights_of(tmp_path / "run"), weights_of(tmp_path / "back")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_killed_export_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    write_run(tmp_path / "run", **CLASSES["llama"]["llama"])

    def killed(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(newest_whole(tmp_path / "run"), tmp_path / "hf", on_progress=killed)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_stretches_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_stable.convert.huggingface import export as exporting

    fields = {**CLASSES["llama"]["llama"], "sigma_reparam": True}
    write_run(tmp_path / "run", **fields)
    export(newest_whole(tmp_path / "run"), tmp_path / "whole", "fp32")
    monkeypatch.setattr(exporting, "STRETCH", 77)
    export(newest_whole(tmp_path / "run"), tmp_path / "cut", "fp32")
    whole, cut = (safetensors.load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.allclose(whole[name], cut[name], rtol=1e-6, atol=0) for name in whole)


def test_sigma_reparam_is_folded_into_a_class_of_transformers(tmp_path: Path) -> None:
    write_run(tmp_path / "run", **CLASSES["llama"]["llama"], sigma_reparam=True)
    assert export(newest_whole(tmp_path / "run"), tmp_path / "hf", "fp32").architecture == "LlamaForCausalLM"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, our_logits(tmp_path / "run", tokens()), rtol=0, atol=1e-5)


def test_a_window_bounds_the_sequence_length(tmp_path: Path) -> None:
    config = transformers.MistralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "hf")
    take(tmp_path / "hf", tmp_path / "run")
    assert load_config(tmp_path / "run" / "config.yaml").model.sequence_length == 8
    with torch.no_grad():
        expected = model(tokens(2, 8)).logits
    torch.testing.assert_close(our_logits(tmp_path / "run", tokens(2, 8)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "family", ["LlamaForCausalLM", "GPT2LMHeadModel", "Qwen3ForCausalLM", "Olmo2ForCausalLM", "Gemma2ForCausalLM"]
)
def test_a_model_of_theirs_is_read(family: str, tmp_path: Path) -> None:
    kind = getattr(transformers, family)
    shape = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2,
        "num_attention_heads": 4, "max_position_embeddings": 16, "head_dim": 8,
    }  # fmt: skip
    if family == "GPT2LMHeadModel":
        shape = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    torch.manual_seed(0)
    model = kind(kind.config_class(**shape)).eval()
    model.save_pretrained(tmp_path / "hf")
    take(tmp_path / "hf", tmp_path / "run")
    with torch.no_grad():
        torch.testing.assert_close(our_logits(tmp_path / "run", tokens()), model(tokens()).logits, rtol=0, atol=1e-5)


def test_each_knob_of_the_model_is_known_to_change_what_it_computes_or_not_to() -> None:
    known = {*OWN, *(key.knob for key in OURS.keys), "attention_temperature"} - {
        "attention_scale", "residual_scale", "logits_scale",
    }  # fmt: skip
    assert known | TRAINING == set(ModelConfig.model_fields)
    assert not known & TRAINING
