"""What each operation does to the function, by the model itself, and to the optimizer's state, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_stable.checkpoint.model import load_model
from megatron_stable.surgery.operations import origins
from tests.convert.models import our_logits
from tests.surgery.runs import VOCAB, cut, tokens, whole_of, write_trained

BIASED = {"bias": True}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": BIASED,
    "gated": {"norm": "rmsnorm", "activation": "swiglu", "kv_heads": 2},
    "olmo2": {"recipe": "olmo2", "kv_heads": 2},
    "qkv_norm": {"recipe": "qkv_norm"},
    "sandwich": {"recipe": "sandwich", **BIASED},
    "scaled": {"recipe": "layer_scale"},
    "tied": {"tied_embeddings": True, "embedding_norm": True},
    "learned": {"positions": "learned"},
}


def logits(folder: Path, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Before and after."""
    ids = tokens() if ids is None else ids
    return our_logits(folder / "before", ids), our_logits(folder / "after", ids)


@pytest.mark.parametrize("name", MODELS)
def test_stacked_blocks_change_nothing(tmp_path: Path, name: str) -> None:
    whole = write_trained(tmp_path / "before", **MODELS[name])
    done = cut(whole, tmp_path / "after", {"model.layers": 5})
    before, after = logits(tmp_path)
    assert torch.equal(before, after)
    assert done.continuity.verdict == "unchanged"
    assert [each.compared for each in done.continuity.layers if each.layer.startswith("blocks.")] == [
        "blocks.0", "blocks.0", "blocks.0", "blocks.1", "blocks.1"
    ]  # fmt: skip


def test_where_stacked_blocks_come_from() -> None:
    assert origins(2, 5) == [(0, False), (0, True), (0, True), (1, False), (1, True)]
    assert origins(3, 3) == [(0, False), (1, False), (2, False)]


def test_a_copy_has_its_origins_weights_and_second_moments_and_learns(tmp_path: Path) -> None:
    whole = write_trained(tmp_path / "before", **BIASED)
    done = cut(whole, tmp_path / "after", {"model.layers": 4})
    old, new = whole_of(whole), whole_of(done.whole)
    assert torch.equal(new["blocks.2.mlp.fc1.weight:exp_avg"], old["blocks.1.mlp.fc1.weight:exp_avg"])
    for kind, same in (("weight", True), ("exp_avg", False), ("exp_avg_sq", True)):
        key = f"mlp.fc1.weight:{kind}"
        assert torch.equal(new[f"blocks.3.{key}"], old[f"blocks.1.{key}"] if same else torch.zeros(48, 32))
    for ends in ("attention.proj", "mlp.fc2"):
        assert not new[f"blocks.3.{ends}.weight:weight"].any()
        assert not new[f"blocks.3.{ends}.bias:weight"].any()
        assert torch.equal(new[f"blocks.3.{ends}.weight:exp_avg_sq"], old[f"blocks.1.{ends}.weight:exp_avg_sq"])
    _, model, _ = load_model(tmp_path / "after")
    model(tokens()).square().mean().backward()
    grads = {name: weight.grad for name, weight in model.named_parameters()}
    assert grads["layers.blocks_3.mlp.fc2.weight"] is not None
    assert grads["layers.blocks_3.mlp.fc2.weight"].abs().max() > 0


@pytest.mark.parametrize("name", [name for name in MODELS if name != "scaled"])
def test_layer_scale_comes_and_goes(tmp_path: Path, name: str) -> None:
    whole = write_trained(tmp_path / "before", **MODELS[name])
    done = cut(whole, tmp_path / "after", {"model.layer_scale": 1e-3})
    before, after = logits(tmp_path)
    assert torch.equal(before, after)
    new = whole_of(done.whole)
    assert torch.equal(new["blocks.1.mlp_scale.weight:weight"], torch.ones(32))
    assert not new["blocks.1.mlp_scale.weight:exp_avg_sq"].any()


@pytest.mark.parametrize("more", [{}, {"attention_output_norm": True, "mlp_output_norm": True}, BIASED])
def test_layer_scale_is_folded_with_its_moments(tmp_path: Path, more: dict[str, Any]) -> None:
    whole = write_trained(tmp_path / "before", recipe="layer_scale", **more)
    done = cut(whole, tmp_path / "after", {"model.layer_scale": None})
    before, after = logits(tmp_path)
    assert (before - after).abs().max() < 1e-5 * before.abs().max()
    assert done.continuity.verdict == "unchanged"
    old, new = whole_of(whole), whole_of(done.whole)
    factor = old["blocks.0.mlp_scale.weight:weight"]
    name, by = ("blocks.0.mlp_output_norm.weight", factor) if more.get("mlp_output_norm") else (
        "blocks.0.mlp.fc2.weight", factor[:, None]
    )  # fmt: skip
    torch.testing.assert_close(new[f"{name}:weight"], old[f"{name}:weight"] * by)
    torch.testing.assert_close(new[f"{name}:exp_avg"], old[f"{name}:exp_avg"] / by)
    torch.testing.assert_close(new[f"{name}:exp_avg_sq"], old[f"{name}:exp_avg_sq"] / by**2)
    assert not any("_scale." in key for key in new)


def test_moments_follow_the_gradient(tmp_path: Path) -> None:
    """The gradient of a folded weight is the old one divided by the factor, so that moments are what they were of."""
    whole = write_trained(tmp_path / "before", recipe="layer_scale")
    cut(whole, tmp_path / "after", {"model.layer_scale": None})
    grads = []
    for run in ("before", "after"):
        _, model, _ = load_model(tmp_path / run)
        model(tokens()).square().mean().backward()
        grads.append({name: weight.grad for name, weight in model.named_parameters()})
    factor = whole_of(whole)["blocks.1.attention_scale.weight:weight"][:, None]
    old, new = (each["layers.blocks_1.attention.proj.weight"] for each in grads)
    torch.testing.assert_close(new, old / factor, rtol=1e-3, atol=1e-4 * float(new.abs().max()))


def test_an_untied_head_is_the_embedding(tmp_path: Path) -> None:
    whole = write_trained(tmp_path / "before", tied_embeddings=True)
    done = cut(whole, tmp_path / "after", {"model.tied_embeddings": False})
    assert torch.equal(*logits(tmp_path))
    new = whole_of(done.whole)
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert torch.equal(new[f"head.weight:{kind}"], new[f"embedding.weight:{kind}"])
        assert new[f"head.weight:{kind}"][:VOCAB].any()
    assert done.parameters[1] - done.parameters[0] == 128 * 32


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_are_the_mean_of_the_old_ones(tmp_path: Path, tied: bool) -> None:
    whole = write_trained(tmp_path / "before", tied_embeddings=tied)
    done = cut(whole, tmp_path / "after", {"model.vocab_size": 150})
    config, model, _ = load_model(tmp_path / "after")
    assert config.model.vocab_size == 150
    with torch.no_grad():
        after = model(tokens())
    before = our_logits(tmp_path / "before", tokens())
    assert torch.equal(after[..., :VOCAB], before)
    torch.testing.assert_close(after[..., VOCAB], before.mean(-1))
    torch.testing.assert_close(after[..., 149], before.mean(-1))
    assert not after[..., 150:].any()
    new = whole_of(done.whole)
    assert new["embedding.weight:weight"].shape == (256, 32)
    assert not new["embedding.weight:exp_avg_sq"][VOCAB:].any()
    rise = done.continuity.after - done.continuity.before  # type: ignore[operator]
    assert 0 < rise <= torch.log(torch.tensor(150 / VOCAB))


def test_a_longer_table_of_positions_repeats(tmp_path: Path) -> None:
    whole = write_trained(tmp_path / "before", positions="learned")
    done = cut(whole, tmp_path / "after", {"model.sequence_length": 40})
    assert torch.equal(*logits(tmp_path))
    table = whole_of(done.whole)["positions.weight:weight"]
    assert torch.equal(table, table[torch.arange(40) % 16])
    shorter = cut(done.whole, tmp_path / "shorter", {"model.sequence_length": 8}, tokens(8, 9))
    assert torch.equal(whole_of(shorter.whole)["positions.weight:weight"], table[:8])


NORMS = {
    "qk_norm": {"attention.q_norm": 8, "attention.k_norm": 8},
    "v_norm": {"attention.v_norm": 8},
    "attention_output_norm": {"attention_output_norm": 32},
    "mlp_output_norm": {"mlp_output_norm": 32},
    "attention_input_norm": {"attention_input_norm": 32},
    "mlp_input_norm": {"mlp_input_norm": 32},
}


def activations(run: Path, slot: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into a norm of the first block, and comes out."""
    seen: list[Tensor] = []
    _, model, _ = load_model(run)
    part = model.layers["blocks_0"].get_submodule(slot)
    part.register_forward_hook(lambda _, given, y: seen.extend((given[0].detach().double(), y.detach().double())))
    model(ids)
    return seen[0], seen[1]


@pytest.mark.parametrize("knob", NORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_new_norm_changes_least(tmp_path: Path, knob: str, bias: bool) -> None:
    """Its gain and offset are those of a least-squares fit, feature by feature, by numpy's own solver."""
    import numpy as np

    absent = {} if knob.endswith(("output_norm", "qk_norm", "v_norm")) else {knob: False}
    whole = write_trained(tmp_path / "before", bias=bias, **absent)
    ids = tokens(8, 17)
    done = cut(whole, tmp_path / "after", {f"model.{knob}": True}, ids)
    new = whole_of(done.whole)
    for slot, size in NORMS[knob].items():
        x, _ = activations(tmp_path / "before", slot, ids[:, :-1])
        normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-5)
        for feature in range(size):
            a, b = normed[..., feature].flatten().numpy(), x[..., feature].flatten().numpy()
            columns = np.stack([a, np.ones_like(a)] if bias else [a], 1)
            fit = np.linalg.lstsq(columns, b, rcond=None)[0]
            assert float(new[f"blocks.0.{slot}.weight:weight"][feature]) == pytest.approx(fit[0], rel=1e-4, abs=1e-5)
            if bias:
                got = float(new[f"blocks.0.{slot}.bias:weight"][feature])
                assert got == pytest.approx(fit[1], rel=1e-4, abs=1e-5)
        assert not new[f"blocks.0.{slot}.weight:exp_avg"].any()


@pytest.mark.parametrize("knob", NORMS)
def test_what_stands_for_a_norm_is_folded(tmp_path: Path, knob: str) -> None:
    """Factors per feature, of queries, keys and values per head, through the origin: by hand."""
    whole = write_trained(tmp_path / "before", kv_heads=2, **{knob: True})
    ids = tokens(8, 17)
    done = cut(whole, tmp_path / "after", {f"model.{knob}": False}, ids)
    old, new = whole_of(whole), whole_of(done.whole)
    for slot in NORMS[knob]:
        x, y = activations(tmp_path / "before", slot, ids[:, :-1])
        factor = (x * y).sum((0, 1)) / x.square().sum((0, 1))
        assert f"blocks.0.{slot}.weight:weight" not in new
        if slot.startswith("attention."):
            # two groups of two queries, a key and a value, eight rows each
            w, v = (t["blocks.0.attention.qkv.weight:weight"].view(2, 4, 8, 32) for t in (old, new))
            where = {"q": slice(0, 2), "k": slice(2, 3), "v": slice(3, 4)}[slot.split(".")[1][0]]
            expected = w[:, where] * factor.view(2, -1, 8, 1).float()
            torch.testing.assert_close(v[:, where], expected, rtol=1e-4, atol=1e-6)
        else:
            matrix = {
                "attention_output_norm": "attention.proj", "mlp_output_norm": "mlp.fc2",
                "attention_input_norm": "attention.qkv", "mlp_input_norm": "mlp.fc1",
            }[slot]  # fmt: skip
            by = factor.float() if "input" in slot else factor.float()[:, None]
            key = f"blocks.0.{matrix}.weight"
            torch.testing.assert_close(new[f"{key}:weight"], old[f"{key}:weight"] * by, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(new[f"{key}:exp_avg"], old[f"{key}:exp_avg"] / by, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("recipe", ["qk_norm", "qkv_norm", "qk_fc_norm", "peri_ln"])
def test_where_every_token_is_alike_norms_come_and_go_without_a_trace(tmp_path: Path, recipe: str) -> None:
    """The one thing that least squares cannot give a norm is how its input's size varies; here it does not."""
    from megatron_stable.config.recipes import RECIPES

    same = torch.full((4, 17), 5)
    values = {f"model.{knob}": value for knob, value in RECIPES[recipe].items()}
    shape = {"positions": "none", "heads": 1, "bias": True}
    whole = write_trained(tmp_path / "before", **shape)
    added = cut(whole, tmp_path / "after", values, same)
    before, after = logits(tmp_path, same[:, :-1])
    assert (before - after).abs().max() < 2e-3 * before.abs().max()
    cut(added.whole, tmp_path / "back", {key: getattr(_plain(), key.split(".")[1]) for key in values}, same)
    back = our_logits(tmp_path / "back", same[:, :-1])
    assert (before - back).abs().max() < 2e-3 * before.abs().max()


def _plain() -> Any:
    from megatron_stable.config.schema import ModelConfig

    return ModelConfig()


def test_a_cap_far_above_the_logits_changes_little(tmp_path: Path) -> None:
    whole = write_trained(tmp_path / "before")
    cut(whole, tmp_path / "after", {"model.attention_cap": 1e4, "model.final_logit_cap": 1e4})
    before, after = logits(tmp_path)
    assert 0 < (before - after).abs().max() < 1e-3


def test_all_at_once(tmp_path: Path) -> None:
    """Operations compose: names and shapes are those of the model, or the operation would have ended in an error."""
    whole = write_trained(tmp_path / "before", tied_embeddings=True, **BIASED)
    values = {
        "model.qk_norm": True, "model.v_norm": True, "model.attention_input_norm": False, "model.layer_scale": 0.1,
        "model.attention_output_norm": True, "model.mlp_output_norm": True, "model.tied_embeddings": False,
        "model.vocab_size": 70, "model.layers": 4, "model.attention_cap": 500.0, "model.rope_theta": 20000.0,
    }  # fmt: skip
    done = cut(whole, tmp_path / "after", values)
    assert our_logits(tmp_path / "after", tokens()).isfinite().all()
    assert done.continuity.layers[-1].layer == "final_norm"
