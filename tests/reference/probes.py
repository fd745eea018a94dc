"""What the probes should say, from the plain model in one process: every definition spelt out, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_stable.config.schema import Config
from tests.reference import model as plain
from tests.reference.model import Parameters
from tests.reference.optimizer import AdamW, clip, learning_rate

Values = dict[str, float]
LINEARS = {"qkv": "attention.qkv", "proj": "attention.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


def measure_training(parameters: Parameters, batches: Sequence[tuple[Tensor, Tensor]], config: Config) -> list[Values]:
    """Train a step on each global batch (tokens [b, s], labels [b, s]); all probes of each step."""
    parameters = {name: value.double() for name, value in parameters.items()}
    optimizer, power, found = AdamW(parameters, config.optimizer), plain.PowerIteration(parameters), []
    for step, (tokens, labels) in enumerate(batches, start=1):
        leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        vectors = power.step(parameters)
        loss = plain.loss(
            leaves | vectors, tokens, labels, config.model, config.loss.z_loss, config.loss.mu_loss, config.optimizer
        )
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        clipped, _ = clip(gradients, config.optimizer.clip_grad)
        before = parameters
        parameters = optimizer.step(parameters, clipped, learning_rate(step, config))
        with torch.no_grad():
            values = of_activations(before | vectors, tokens, config)
            found.append(values | of_parameters(before, gradients, clipped, parameters, optimizer, config))
    return found


def of_activations(params: Parameters, tokens: Tensor, config: Config) -> Values:
    """Outputs, attention, logits."""
    cfg, values = config.model, dict[str, float]()
    attention_scale, branch, _ = plain.multipliers(cfg, config.optimizer)
    every = math.ceil(cfg.sequence_length / config.logging.probe_positions)
    sampled = [p for p in range(cfg.sequence_length) if (p + 1) % every == 0]
    d, g, r = cfg.head_dim, cfg.groups, cfg.heads // cfg.groups

    def output(point: str, layer: int, y: Tensor) -> None:
        vectors = y.reshape(-1, y.shape[-1])  # a token's each
        place = f"{point}/layer_{layer:02}"
        values[f"output_norm/{place}"] = math.sqrt(sum(float(v @ v) for v in vectors) / len(vectors))
        values[f"output_rms/{place}"] = math.sqrt(float((vectors**2).mean()))
        values[f"output_max/{place}"] = float(vectors.abs().max())

    x = params["embedding.weight"][tokens]
    if cfg.embedding_scale:
        x = math.sqrt(cfg.hidden) * x
    x = plain.norm(params, "embedding_norm", x, cfg)
    if cfg.positions == "learned":
        x = x + params["positions.weight"][: tokens.shape[1]]
    for i in range(cfg.layers):
        name = f"blocks.{i}.attention"
        entering = plain.norm(params, f"{name}_input_norm", x, cfg)
        qkv = plain.linear(params, f"{name}.qkv", entering)
        output("qkv", i, qkv)
        qkv = qkv.unflatten(-1, (g, r + 2, d))
        q, k, v = qkv[..., :r, :].flatten(2, 3), qkv[..., r, :], qkv[..., r + 1, :]
        for point, y in (("q", q), ("k", k), ("v", v)):
            output(point, i, y.flatten(2))
        q, k = (_over_heads(params, f"{name}.{which}_norm", y, config) for which, y in (("q", q), ("k", k)))
        if cfg.positions == "rope":
            q, k = plain.rotate(q, cfg.rope_theta), plain.rotate(k, cfg.rope_theta)
        of_heads = []
        for head in range(cfg.heads):
            largest, entropies = -math.inf, []
            for b in range(len(tokens)):
                for p in sampled:
                    logits = cfg.attention_temperature * attention_scale * (k[b, : p + 1, head // r] @ q[b, p, head])
                    largest = max(largest, float(logits.max()))
                    if cfg.attention_cap is not None:
                        logits = cfg.attention_cap * torch.tanh(logits / cfg.attention_cap)
                    entropies.append(_entropy(logits))
            of_heads.append((largest, sum(entropies) / len(entropies)))
            values[f"attention/max_logit/layer_{i:02}/head_{head:02}"] = largest
            values[f"attention/entropy/layer_{i:02}/head_{head:02}"] = of_heads[-1][1]
        values[f"attention/max_logit/layer_{i:02}"] = max(largest for largest, _ in of_heads)
        values[f"attention/entropy/layer_{i:02}"] = sum(entropy for _, entropy in of_heads) / cfg.heads
        for part, function in (("attention", plain.attention), ("mlp", plain.mlp)):
            name = f"blocks.{i}.{part}"
            entering = plain.norm(params, f"{name}_input_norm", x, cfg)
            if part == "mlp":
                fc1 = plain.matrix(params, f"{name}.fc1").flatten(0, -2)
                bias = params[f"{name}.fc1.bias"].flatten() if cfg.bias else 0.0
                output("fc1", i, entering @ fc1.T + bias)
            y = function(params, name, entering, cfg, *((attention_scale,) if part == "attention" else ()))
            output("proj" if part == "attention" else "fc2", i, y)
            y = branch * plain.norm(params, f"{name}_output_norm", y, cfg)
            if cfg.layer_scale is not None:
                y = params[f"{name}_scale.weight"] * y
            skip = (2 * cfg.layers) ** (1 / 4) * x if cfg.deepnorm else x
            x = plain.norm(params, f"{name}_post_norm", skip + y, cfg)
        output("residual", i, x)
    logits = plain.forward(params, tokens, cfg, config.optimizer)
    every_position = [float(row.exp().sum().log()) for row in logits.flatten(0, 1)]
    rows = logits[:, sampled].flatten(0, 1)
    values["logits/mean"] = float(rows.mean())
    values["logits/max"] = float(rows.max())
    values["logits/logsumexp"] = sum(every_position) / len(every_position)
    entropies = [_entropy(row) for row in rows]
    values["logits/entropy"] = sum(entropies) / len(entropies)
    return values


def _over_heads(params: Parameters, name: str, x: Tensor, config: Config) -> Tensor:
    """A norm of each head, or of all together."""
    if config.model.qk_norm_scope == "full":
        return plain.norm(params, name, x.flatten(2), config.model).view_as(x)
    return plain.norm(params, name, x, config.model)


def _entropy(logits: Tensor) -> float:
    p = logits.exp() / logits.exp().sum()
    return -float((p * p.log()).sum())


def of_parameters(
    before: Parameters, gradients: Parameters, clipped: Parameters, after: Parameters, adam: AdamW, config: Config
) -> Values:
    """Weights, gradients, updates, moments, noise scale."""
    (b1, b2), eps, t = config.optimizer.betas, config.optimizer.eps, adam.steps
    values = dict[str, float]()

    def root_mean(x: Tensor) -> float:
        return math.sqrt(float((x**2).mean()))

    def place(point: str, layer: int | None) -> str:
        return point if layer is None else f"{point}/layer_{layer:02}"

    first = {name: value / (1 - b1**t) for name, value in adam.first.items()}
    second = {name: value / (1 - b2**t) for name, value in adam.second.items()}
    single: list[tuple[str, int | None, str]] = [
        (point, i, f"blocks.{i}.{name}.weight") for i in range(config.model.layers) for point, name in LINEARS.items()
    ]
    single += [(point, None, f"{point}.weight") for point in ("embedding", "head") if f"{point}.weight" in before]
    whole = [
        ("block", i, [name for name in before if name.startswith(f"blocks.{i}.")]) for i in range(config.model.layers)
    ]
    both: list[tuple[str, int | None, list[str]]] = [(point, i, [name]) for point, i, name in single]
    for point, layer, names in [*both, *whole]:
        at, of = place(point, layer), lambda p, names=names: torch.cat([p[n].flatten() for n in names])
        for kind, values_of in (("weight", before), ("grad", gradients)):
            values[f"{kind}_norm/{at}"] = float(of(values_of).norm())
            values[f"{kind}_rms/{at}"] = root_mean(of(values_of))
    for point, layer, name in single:
        at, update = place(point, layer), after[name] - before[name]
        values[f"grad_under_eps/{at}"] = float((gradients[name].abs() < eps).double().mean())
        values[f"update_rms/{at}"] = root_mean(update)
        values[f"update_ratio/{at}"] = root_mean(update) / root_mean(before[name])
        values[f"moment_rms/{at}"] = math.sqrt(float(second[name].mean()))
        values[f"moment_under_eps/{at}"] = float((second[name].sqrt() < eps).double().mean())
        values[f"moment_surprise/{at}"] = math.sqrt(float((clipped[name] ** 2 / second[name].clamp(min=eps**2)).mean()))
    # of averages of t gradients with weights w that add up to 1, the noise has the variance sum of w^2
    weights = torch.tensor([(1 - b1) * b1 ** (t - i) for i in range(1, t + 1)], dtype=torch.float64) / (1 - b1**t)
    left = float((weights**2).sum())
    total = sum(float(second[name].sum()) for *_, name in single)
    squared = sum(float((first[name] ** 2).sum()) for *_, name in single)
    if t > 1 and squared > left * total:
        noise = (total - squared) / (1 - left)  # tr(Sigma) / B
        values["noise_scale"] = config.batch.global_size * noise / (total - noise)
    return values
