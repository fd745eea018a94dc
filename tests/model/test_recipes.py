"""Every recipe and every knob on one process against the reference, in float64: values and all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_stable.config.checks import conflicts
from megatron_stable.config.parametrization import model_multipliers
from megatron_stable.config.recipes import RECIPES
from megatron_stable.config.schema import Config, ModelConfig
from megatron_stable.model import sigma
from megatron_stable.model.elementwise import ScaleGradient
from megatron_stable.model.loss import language_model_loss, mu_loss, vocab_parallel_cross_entropy
from megatron_stable.model.norms import Norm, ShardedNorm
from megatron_stable.model.transformer import Transformer, layer_list
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.shards import Place
from megatron_stable.parallel.topology import TensorParallel, Topology
from tests.harness.ranks import Ranks
from tests.reference import model as reference

VOCAB = 61
ALONE = TensorParallel()
TWO = {"kv_heads": 2, "bias": True}
# every knob alone, and what a combination could break
KNOBS: dict[str, dict[str, Any]] = {
    "attention_input_norm": {"attention_input_norm": False},
    "mlp_input_norm": {"mlp_input_norm": False},
    "attention_output_norm": {"attention_output_norm": True},
    "mlp_output_norm": {"mlp_output_norm": True},
    "deepnorm_rms": {"recipe": "deepnorm", "norm": "rmsnorm"},
    "head_width": {"head_width": 10, "qk_norm": True, "qk_norm_scope": "full"},
    "layer_scale": {"layer_scale": 0.3, "attention_output_norm": True},
    "v_norm": {"v_norm": True},
    "full_layernorm": {"qk_norm": True, "v_norm": True, "qk_norm_scope": "full"},
    "full_rmsnorm": {"qk_norm": True, "qk_norm_scope": "full", "norm": "rmsnorm"},
    "attention_temperature": {"attention_temperature": 2.5},
    "attention_cap": {"attention_cap": 0.7},
    "attention_clip": {"attention_clip": (-0.1, 1.3)},
    "clip_and_cap": {"attention_clip": (-0.05, 1.1), "attention_cap": 0.7, "attention_temperature": 3.0},
    "sigma_reparam": {"sigma_reparam": True, "activation": "swiglu"},
    "sigma_reparam_norms": {"sigma_reparam": True, "qk_norm": True, "attention_output_norm": True},
    "embedding_scale": {"embedding_scale": True},
    "embedding_norm": {"embedding_norm": True, "positions": "learned"},
    "embedding_gradient": {"embedding_gradient": 0.1, "positions": "learned"},
    "embedding_gradient_tied": {"embedding_gradient": 0.1, "embedding_scale": True, "tied_embeddings": True},
    "final_logit_cap": {"final_logit_cap": 0.5},
}
CASES = {name: {"recipe": name} for name in RECIPES} | {f"knob_{name}": fields for name, fields in KNOBS.items()}


def config(**fields: Any) -> ModelConfig:
    shape = {"size": None, "layers": 2, "hidden": 24, "heads": 4, "ffn_hidden": 40, "sequence_length": 11}
    return ModelConfig(**{**shape, "vocab_size": VOCAB, **fields})


def filled(cfg: ModelConfig, parameters: reference.Parameters, **kwargs: Any) -> Transformer:
    """The model in float64 with the reference's parameters; vectors of sigmaReparam are exact."""
    model = Transformer(layer_list(cfg, ALONE, seed=0, draw=False, **kwargs)).double()
    with torch.no_grad():
        for weight in model.parameters():
            value = parameters[place(weight).name]
            weight.fill_(1e3)  # rows of padding must not matter
            weight[: len(value)] = value
        for known, vector in sigma.vectors(model):
            name, _, which = known.name.rpartition(".reparametrize.")
            matrix = parameters[f"{name}.weight"]
            u, v = reference.singular_vectors(matrix.reshape(-1, matrix.shape[-1]))
            vector.copy_((u if which == "u" else v).view_as(vector))
    sigma.measure(model)
    return model


def tokens(length: int) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(VOCAB, (3, length + 1), generator=torch.Generator().manual_seed(1))
    return drawn[:, :-1], drawn[:, 1:]


@pytest.mark.parametrize("shape", [{}, TWO], ids=["plain", "gqa_bias"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_reference(name: str, shape: dict[str, Any]) -> None:
    cfg = config(**shape, **CASES[name])
    parameters = reference.draw_parameters(cfg, VOCAB, seed=5)
    model = filled(cfg, parameters)
    leaves = {key: value.clone().requires_grad_() for key, value in parameters.items()}
    inputs, targets = tokens(9)
    output = parameters.get("head.weight", parameters["embedding.weight"])
    head = next(p for p in model.parameters() if place(p).full_shape[-1:] == output.shape[-1:] and p.ndim == 2)
    head = {place(p).name: p for p in model.parameters()}.get("head.weight", head)
    losses = language_model_loss(model(inputs), targets, ALONE, VOCAB, 0.1, cfg.final_logit_cap, 0.2, head)
    total = sum(losses[1:], start=losses[0])
    wanted = reference.loss(leaves, inputs, targets, cfg, 0.1, 0.2)
    # the rotary table is fp32
    torch.testing.assert_close(total, wanted, rtol=1e-7, atol=1e-7)
    total.backward()
    wanted.backward()
    gradients = {place(p).name: p.grad for p in model.parameters()}
    assert set(gradients) == set(leaves)
    for key, leaf in leaves.items():
        gradient = gradients[key]
        assert gradient is not None and leaf.grad is not None
        scale = float(leaf.grad.abs().max())
        torch.testing.assert_close(gradient[: len(leaf)], leaf.grad, rtol=1e-5, atol=1e-6 * scale + 1e-10, msg=key)
        assert (gradient[len(leaf) :] == 0).all(), f"{key}: padding has a gradient"


def test_every_knob_is_off_by_default_and_every_one_has_a_case() -> None:
    knobs = {field for fields in (*RECIPES.values(), *KNOBS.values()) for field in fields}
    fields = list(ModelConfig.model_fields)
    between = fields[fields.index("attention_input_norm") : fields.index("attention")]
    assert set(between) <= knobs
    assert RECIPES["baseline"] == {}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_have_no_conflicts_and_a_field_beside_them_wins(recipe: str) -> None:
    assert conflicts(Config.model_validate({"model": {"recipe": recipe}}), 1) == []
    chosen = ModelConfig(recipe=recipe)
    assert all(getattr(chosen, key) == (tuple(v) if isinstance(v, list) else v) for key, v in RECIPES[recipe].items())
    assert ModelConfig(recipe=recipe, norm_eps=0.5, qk_norm=True).qk_norm


def test_the_papers_recipes() -> None:
    """Their values: a typo in the data would be a wrong experiment."""
    assert ModelConfig(recipe="soft_temp").attention_temperature == 0.5
    assert ModelConfig(recipe="soft_cap").attention_cap == 50
    assert ModelConfig(recipe="soft_clip").attention_clip == (-0.03, 1.03)
    qkv = ModelConfig(recipe="qkv_norm")
    assert qkv.qk_norm and qkv.v_norm and qkv.mlp_input_norm and not qkv.attention_input_norm
    both = ModelConfig(recipe="qk_norm_cap")
    assert both.qk_norm and both.attention_cap == 50
    olmo = ModelConfig(recipe="olmo2")
    assert (olmo.norm, olmo.qk_norm_scope) == ("rmsnorm", "full") and not olmo.attention_input_norm
    assert ModelConfig(recipe="gemma2").final_logit_cap == 30


@pytest.mark.parametrize("name", ["mu_simple", "mu_full", "complete_p"])
def test_parametrizations_equal_the_reference(name: str) -> None:
    init = {"init": "fixed"} if name == "complete_p" else {}
    optimizer = {"parametrization": name, "base_width": 8, "base_depth": 1}
    whole = Config.model_validate({"model": config(**init).model_dump(), "optimizer": optimizer})
    cfg = whole.model
    parameters = reference.draw_parameters(cfg, VOCAB, seed=5)
    model = filled(cfg, parameters, multipliers=model_multipliers(whole))
    inputs, _ = tokens(9)
    wanted = reference.forward(parameters, inputs, cfg, whole.optimizer)
    torch.testing.assert_close(model(inputs)[..., :VOCAB], wanted, rtol=1e-6, atol=1e-6)
    if name != "mu_simple":
        assert not torch.allclose(wanted, reference.forward(parameters, inputs, cfg), rtol=1e-3)


def drawn(cfg: ModelConfig, tp: TensorParallel = ALONE, whole: Config | None = None) -> dict[str, Tensor]:
    by = model_multipliers(whole) if whole else None
    model = Transformer(layer_list(cfg, tp, 1, multipliers=by))
    return {place(p).name: p.detach() for p in model.parameters()}


def test_initial_values_of_deepnorm() -> None:
    plain, deep = drawn(config(layers=3, kv_heads=2)), drawn(config(layers=3, kv_heads=2, recipe="deepnorm"))
    gain = (8 * 3) ** -0.25
    for name, value in deep.items():
        if name.endswith(("proj.weight", "fc1.weight", "fc2.weight")):
            torch.testing.assert_close(value, gain * plain[name])
        elif name.endswith("qkv.weight"):
            parts, before = (x.view(2, 4, 6, 24) for x in (value, plain[name]))  # groups, q q k v, d, h
            assert torch.equal(parts[:, :3], before[:, :3])
            torch.testing.assert_close(parts[:, 3], gain * before[:, 3])
        elif value.ndim > 1:
            assert torch.equal(value, plain[name])
    assert "final_norm.weight" not in deep and "blocks.2.mlp_post_norm.weight" in deep


def test_initial_values_of_the_parametrizations() -> None:
    mu = Config.model_validate(
        {"model": config(kv_heads=2).model_dump(), "optimizer": {"parametrization": "mu_full", "base_width": 6}}
    )
    plain, found = drawn(mu.model), drawn(mu.model, whole=mu)
    qkv, before = (x["blocks.0.attention.qkv.weight"].view(2, 4, 6, 24) for x in (found, plain))
    assert (qkv[:, :2] == 0).all() and torch.equal(qkv[:, 2:], before[:, 2:])
    torch.testing.assert_close(found["head.weight"], plain["head.weight"] / 2)
    complete = Config.model_validate(
        {
            "model": config(init="fixed").model_dump(),
            "optimizer": {"parametrization": "complete_p", "base_width": 6},
        }
    )
    plain, found = drawn(complete.model), drawn(complete.model, whole=complete)
    for name, value in found.items():
        factor = 0.5 if name.startswith("blocks") and value.ndim > 1 else 1.0
        torch.testing.assert_close(value, factor * plain[name], msg=name)


@pytest.mark.parametrize("tensor", [2, 4])
def test_slices_of_all_ranks_make_the_full_draw(tensor: int) -> None:
    cfg = config(hidden=32, recipe="deepnorm")
    full = drawn(cfg)
    models = [Transformer(layer_list(cfg, TensorParallel(None, rank, tensor), 1)) for rank in range(tensor)]
    for parts in zip(*(model.parameters() for model in models), strict=True):
        known = place(parts[0])
        whole = parts[0] if known.dim is None else torch.cat(parts, known.dim)
        assert torch.equal(whole.detach(), full[known.name]), known.name


def sigma_state(cfg: ModelConfig, tensor: int = 1) -> list[tuple[Place, Tensor]]:
    """On a rank, or alone: how sigmaReparam starts."""
    tp = Topology(tensor).tp if tensor > 1 else ALONE
    model = Transformer(layer_list(cfg, tp, 1))
    gammas = [p.detach() for p in model.parameters() if place(p).name.endswith(".gamma")]
    return [*sigma.vectors(model), (Place((len(gammas),)), torch.cat(gammas))]


@pytest.mark.parametrize("tensor", [2, 4])
def test_sigma_starts_alike_on_every_layout(ranks: Ranks, tensor: int) -> None:
    cfg = config(hidden=48, ffn_hidden=256, recipe="sigma_reparam", activation="swiglu")
    results = ranks.run(tensor, sigma_state, cfg, tensor)
    for (known, whole), *parts in zip(sigma_state(cfg), *results, strict=True):
        dim, local = parts[0][0].dim, [part for _, part in parts]
        assert dim is not None or all(torch.equal(part, local[0]) for part in local), known.name
        joined = local[0] if dim is None else torch.cat(local, dim)
        torch.testing.assert_close(joined, whole, rtol=1e-4, atol=1e-5, msg=known.name)


def sigmas(model: Transformer) -> dict[str, tuple[Tensor, sigma.SigmaReparam]]:
    named = dict(model.named_modules())
    return {
        name: (named[name.rpartition(".")[0]].weight.detach().flatten(0, -2), part)
        for name, part in named.items()
        if isinstance(part, sigma.SigmaReparam)
    }


def test_sigma_starts_at_the_spectral_norm_and_follows_it() -> None:
    cfg = config(recipe="sigma_reparam", hidden=48, ffn_hidden=256)
    model = Transformer(layer_list(cfg, ALONE, seed=0))
    parts = sigmas(model)
    assert len(parts) == 4 * cfg.layers
    for matrix, part in parts.values():
        exact = float(torch.linalg.matrix_norm(matrix, 2))
        assert float(part.gamma.detach()) == pytest.approx(exact, rel=1e-3)
        torch.testing.assert_close(part(matrix, matrix), matrix, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        for matrix, _ in parts.values():
            matrix += 0.05 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1))
    for _ in range(300):
        sigma.power_iteration(model)
    for name, (matrix, part) in parts.items():
        exact = float(torch.linalg.matrix_norm(matrix, 2))
        assert float(part.sigma) == pytest.approx(exact, rel=2e-3), name
        assert torch.linalg.matrix_norm(part(matrix, matrix), 2).item() == pytest.approx(part.gamma.item(), rel=2e-3)
        assert float(part.u.norm()) == pytest.approx(1, rel=1e-5)
        kept = part.u.clone()
        sigma.measure(model)
        assert torch.equal(kept, part.u), "measuring moved the vectors"


def test_sigma_of_large_matrices_is_close_from_the_start() -> None:
    """Where a few iterations of a random subspace do not give it exactly."""
    for rows, columns in ((512, 512), (1024, 256)):
        linear = sigma.reparametrized(_linear(rows, columns), config(sigma_reparam=True))
        holder = torch.nn.ModuleList([linear])
        torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(0))
        sigma.start(holder, 0)
        exact = float(torch.linalg.matrix_norm(linear.weight.detach(), 2))
        assert exact * 0.99 < linear.reparametrize.gamma.item() <= exact * 1.0001


def _linear(rows: int, columns: int) -> Any:
    from megatron_stable.parallel.layers import ColumnParallelLinear
    from megatron_stable.parallel.parameters import name_parameters
    from megatron_stable.parallel.shards import ZEROS

    linear = ColumnParallelLinear(columns, rows, ZEROS, ALONE)
    name_parameters(linear, "linear")
    return linear


def test_sigma_reparam_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gamma, u, v = (
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((5, 4), (1,), (5,), (4,))
    )

    x = torch.randn(3, 4, dtype=torch.float64, generator=generator).requires_grad_()

    def reparametrized(w: Tensor, g: Tensor) -> Tensor:
        return sigma._Scaled.apply(x, w, g, g.detach(), u, v, u @ w.detach() @ v, None) @ w.T

    def formula(w: Tensor, g: Tensor) -> Tensor:
        return x @ (g / (u @ w @ v) * w).T

    ours, theirs = ([x.clone().requires_grad_() for x in (weight, gamma)] for _ in range(2))
    direction = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    found = torch.autograd.grad((reparametrized(*ours) * direction).sum(), [x, *ours])
    wanted = torch.autograd.grad((formula(*theirs) * direction).sum(), [x, *theirs])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(reparametrized, [x.clone().requires_grad_() for x in (weight, gamma)])


def test_the_vectors_of_sigma_reparam_stay_fp32() -> None:
    model = Transformer(layer_list(config(recipe="sigma_reparam"), ALONE, seed=0))
    before = {known.name: vector.clone() for known, vector in sigma.vectors(model)}
    model.bfloat16()
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    for known, vector in sigma.vectors(model):
        assert torch.equal(vector, before[known.name]), "rounded to bf16"
    assert model(torch.zeros(1, 11, dtype=torch.int64)).dtype == torch.bfloat16


def test_evaluation_and_recomputation_leave_the_vectors_alone() -> None:
    model = Transformer(layer_list(config(recipe="sigma_reparam", activation_checkpointing="full"), ALONE, seed=0))
    before = [vector.clone() for _, vector in sigma.vectors(model)]
    model(torch.zeros(1, 11, dtype=torch.int64)).sum().backward()
    with torch.no_grad():
        model.eval()(torch.zeros(1, 11, dtype=torch.int64))
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, sigma.vectors(model), strict=True))
    sigma.power_iteration(model)
    assert not all(torch.equal(a, b) for a, (_, b) in zip(before, sigma.vectors(model), strict=True))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100.0), st.sampled_from(["layernorm", "rmsnorm"]))
def test_norms_make_the_output_free_of_scale(seed: int, factor: float, kind: str) -> None:
    cfg = config(norm=kind, norm_eps=1e-12)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for norm in (Norm(6, cfg, partial=False), ShardedNorm(4, cfg, ALONE)):
        torch.nn.init.ones_(norm.weight)
        norm.double()
        torch.testing.assert_close(norm(factor * x), norm(x), rtol=1e-6, atol=1e-6)
        size = 6 if isinstance(norm, Norm) else 24
        assert float(norm(x).square().sum()) == pytest.approx(x.numel(), rel=1e-6), f"RMS over {size} is not 1"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 30.0), st.floats(-40.0, 40.0))
def test_z_loss_pulls_the_logsumexp_to_zero(seed: int, spread: float, shift: float) -> None:
    """A step against its gradient moves log Z towards zero, from either side."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 13, dtype=torch.float64, generator=generator) * spread + shift
    logits.requires_grad_()
    _, before = vocab_parallel_cross_entropy(logits, torch.zeros(5, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(before.square().sum(), logits)
    _, after = vocab_parallel_cross_entropy(logits - 1e-3 * gradient, torch.zeros(5, dtype=torch.int64))
    moved = before.abs() > 1e-3
    assert (after.abs()[moved] < before.abs()[moved]).all()
    assert (gradient.sum(-1).sign() == before.sign())[moved].all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3.0, 3.0))
def test_what_mu_loss_and_mu_centering_take_away_the_softmax_does_not_see(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    embedding, hidden = (torch.randn(n, 8, dtype=torch.float64, generator=generator) for n in (11, 5))
    shifted = embedding + size * torch.randn(8, dtype=torch.float64, generator=generator)
    before, after = (hidden @ x.T for x in (shifted, shifted - shifted.mean(0)))
    torch.testing.assert_close(before.softmax(-1), after.softmax(-1))
    torch.testing.assert_close((before - after).std(-1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-9)
    weight = shifted.clone().requires_grad_()
    loss = mu_loss(weight, ALONE, 11)
    assert float(loss) == pytest.approx(float(shifted.mean(0).square().sum()), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(gradient, (2 * shifted.mean(0) / 11).expand(11, 8))
    assert float(mu_loss(shifted - shifted.mean(0), ALONE, 11)) < 1e-20


def test_mu_loss_takes_no_rows_of_padding() -> None:
    weight = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: mu_loss(w, ALONE, 11), (weight,))
    (gradient,) = torch.autograd.grad(mu_loss(weight, ALONE, 11), weight)
    assert (gradient[11:] == 0).all() and (gradient[:11] != 0).all()


@pytest.mark.parametrize("cap", [0.5, 3.0, 30.0])
def test_final_logit_cap_has_exact_gradients(cap: float) -> None:
    logits = 5 * torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([0, 3, 6, 2])

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        return vocab_parallel_cross_entropy(x, targets, vocab_size=7, cap=cap)

    assert torch.autograd.gradcheck(ours, (logits.clone().requires_grad_(),), atol=1e-7)
    capped = cap * torch.tanh(logits[:, :7] / cap)
    nll, log_z = ours(logits)
    torch.testing.assert_close(log_z, capped.logsumexp(-1))
    torch.testing.assert_close(nll, torch.nn.functional.cross_entropy(capped, targets, reduction="none"))


def test_embedding_gradient_leaves_values_as_they_are() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = ScaleGradient(0.1)(x)
    assert torch.equal(y, x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.full((3, 4), 0.1))
