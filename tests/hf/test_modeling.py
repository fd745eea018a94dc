"""Our class of `transformers` against the trainer's model: every recipe and knob; padding, cache, gradients, PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_stable.checkpoint.catalog import newest_whole
from megatron_stable.config.recipes import RECIPES
from megatron_stable.convert.huggingface.export import export
from megatron_stable.convert.huggingface.importing import take
from tests.convert.models import GATED, our_logits, tokens, weights_of, write_run

transformers = pytest.importorskip("transformers")
import megatron_stable.hf  # noqa: E402

KNOBS: dict[str, dict[str, Any]] = {
    "learned": {"positions": "learned", "embedding_norm": True},
    "no_positions": {"positions": "none", "activation": "squared_relu", "tied_embeddings": True},
    "full_layernorm": {"qk_norm": True, "v_norm": True, "qk_norm_scope": "full", "bias": True, "kv_heads": 2},
    "clip_and_cap": {"attention_clip": (-0.05, 1.1), "attention_cap": 0.7, "attention_temperature": 3.0},
    "sigma_swiglu": {**GATED, "sigma_reparam": True, "recipe": "qk_norm_cap"},
    "complete_p": {"optimizer": {"parametrization": "complete_p", "base_width": 16}, "layer_scale": 0.3},
    "mu_full": {"optimizer": {"parametrization": "mu_full", "base_width": 16}, "final_logit_cap": 0.5},
    "wide_heads": {"head_width": 12, "qk_norm": True, "v_norm": True, "kv_heads": 2},
    "geglu": {**GATED, "activation": "geglu"},
    "no_mlp_norm": {"mlp_input_norm": False, "activation": "gelu_erf", "rope_theta": 77.0},
}
CASES = {name: {"recipe": name} for name in RECIPES} | KNOBS


def exported(tmp_path: Path, **fields: Any) -> Any:
    """A run's model as our class has it."""
    write_run(tmp_path / "run", **fields)
    export(newest_whole(tmp_path / "run"), tmp_path / "hf", "fp32", "megatron_stable")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == "MegatronStableForCausalLM"
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_trainer_does_and_comes_back(case: str, tmp_path: Path) -> None:
    model = exported(tmp_path, **CASES[case])
    expected = our_logits(tmp_path / "run", tokens())
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=0, atol=1e-5)
    take(tmp_path / "hf", tmp_path / "back")
    torch.testing.assert_close(our_logits(tmp_path / "back", tokens()), expected, rtol=0, atol=1e-5)
    if "sigma" not in case:
        before, after = weights_of(tmp_path / "run"), weights_of(tmp_path / "back")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    export(newest_whole(tmp_path / "back"), tmp_path / "again", "fp32", "megatron_stable")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


@pytest.mark.parametrize("case", ["qk_norm", "qk_norm_cap", "learned", "no_positions", "deepnorm"])
def test_padding_on_the_left_changes_nothing(case: str, tmp_path: Path) -> None:
    model, ids = exported(tmp_path, **CASES[case]), tokens(1, 9)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    padded = torch.stack((torch.cat((torch.full((3,), 5), ids[0])), tokens(2, 12)[1]))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        both = model(padded, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(both[0, 3:], model(ids).logits[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(both[1:], model(padded[1:]).logits, rtol=0, atol=1e-5)
    words = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 5, "eos_token_id": None}
    alone = model.generate(ids, **words)[0, 9:]
    together = model.generate(padded, attention_mask=mask, **words)[0, 12:]
    assert alone.tolist() == together.tolist()


@pytest.mark.parametrize("case", ["qkv_norm", "soft_cap", "learned"])
def test_the_cache_changes_nothing(case: str, tmp_path: Path) -> None:
    model, ids = exported(tmp_path, **CASES[case]), tokens(2, 12)
    with torch.no_grad():
        whole = model(ids, use_cache=False)
        assert whole.past_key_values is None
        first = model(ids[:, :7])
        second = model(ids[:, 7:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), whole.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool, tmp_path: Path) -> None:
    model, ids = exported(tmp_path, recipe="qk_norm_cap").train(), tokens()
    model(ids, labels=ids).loss.backward()
    plain = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 2  # recomputed
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, plain[name])


def test_the_loss_is_that_of_the_next_token(tmp_path: Path) -> None:
    model, ids = exported(tmp_path, recipe="qkv_norm"), tokens()
    labels = ids.clone()
    labels[0, :5] = -100
    found = model(ids, labels=labels)
    log_p = found.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    counted = labels[:, 1:] != -100
    torch.testing.assert_close(found.loss, -log_p[counted].mean())


def test_save_pretrained_writes_what_can_be_read_again(tmp_path: Path) -> None:
    model = exported(tmp_path, recipe="qk_fc_norm", tied_embeddings=True)
    model.save_pretrained(tmp_path / "saved")
    take(tmp_path / "saved", tmp_path / "back")
    before, after = weights_of(tmp_path / "run"), weights_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_fresh_model_has_sane_weights() -> None:
    config = megatron_stable.hf.MegatronStableConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, intermediate_size=48, layer_scale=True, attention_scale=0.35
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert torch.isfinite(model(tokens()).logits).all()
    assert model.model.layers[0].mlp_layer_scale.weight.unique().tolist() == pytest.approx([1e-4])


def test_peft_trains_an_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, ids = exported(tmp_path, recipe="qkv_norm"), tokens()
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([w for w in lora.parameters() if w.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        loss = lora(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
