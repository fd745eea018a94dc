"""Every optimizer rule from its formula: full tensors, float64, one parameter after the other, no engine."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_stable.config.schema import Config
from tests.reference import model as plain

Parameters = dict[str, Tensor]
LAST_QUIET = 20  # as SPAM's code has it; tests of a few steps lower it


def kind(name: str, value: Tensor) -> str:
    if name.endswith("bias"):
        return "biases"
    if name.split(".")[0] in ("embedding", "positions"):
        return "embeddings"
    if name.startswith("head"):
        return "head"
    return "norms" if value.ndim == 1 else "matrices"


def norm(values: list[Tensor]) -> float:
    return math.sqrt(sum(float((value**2).sum()) for value in values))


class Rules:
    """A run's optimizer: :meth:`step` takes gradients as backward left them, before any clipping."""

    def __init__(self, config: Config, quiet: int = LAST_QUIET) -> None:
        self.config, self.o, self.quiet, self.t = config, config.optimizer, quiet, 0
        self.state: dict[tuple[str, str], Tensor] = {}
        self.gamma: dict[str, float] = {}
        self.norms: list[float] = []
        given = (self.o.clipping_threshold, self.o.clipping_decay, self.o.clipping_warmup)
        published = (2.5, 0.97, 25) if self.o.clipping == "zclip" else (1.05, 0.98, 100)
        self.threshold, self.decay, self.warmup = (b if a is None else a for a, b in zip(given, published, strict=True))
        self.mean = self.var = 0.0

    def step(self, parameters: Parameters, gradients: Parameters, rate: float) -> Parameters:
        self.t += 1
        gradients = self.clip(dict(gradients))
        updated = {n: self.update(n, w, gradients[n], rate) for n, w in parameters.items()}
        if self.o.mu_centering:
            output = "embedding.weight" if self.config.model.tied_embeddings else "head.weight"
            updated[output] = updated[output] - updated[output].mean(0)
        return updated

    def clip(self, g: Parameters) -> Parameters:
        o, total = self.o, norm(list(g.values()))
        limit = o.clip_grad or math.inf
        if o.clipping == "global_norm":
            return {n: x * min(1.0, limit / (total + 1e-6)) for n, x in g.items()}
        warm = self.t <= self.warmup
        if o.clipping == "zclip":
            bound = total
            if warm:
                self.norms.append(total)
                self.mean = sum(self.norms) / len(self.norms)
                self.var = sum((x - self.mean) ** 2 for x in self.norms) / len(self.norms)
            else:
                z = (total - self.mean) / (self.var**0.5 + 1e-6)
                if z > self.threshold:
                    bound = self.mean + self.threshold**2 * self.var**0.5 / z
                a = self.decay
                self.mean = a * self.mean + (1 - a) * bound
                self.var = a * self.var + (1 - a) * (bound - self.mean) ** 2
            bound = min(bound, limit)
            return {n: x * (bound / (total + 1e-6) if total > bound else 1.0) for n, x in g.items()}
        for n, x in g.items():
            size = norm([x])
            if size == 0:
                continue
            if warm:
                h = min(1.0, limit / (total + 1e-6))
                self.gamma[n] = min(self.gamma.get(n, math.inf), h * size)
            else:
                gamma = self.gamma.get(n, math.inf)
                h = min(1.0, self.threshold * gamma / size)
                b = self.decay
                self.gamma[n] = h * size if gamma == math.inf else b * gamma + (1 - b) * h * size
            g[n] = h * x
        return g

    def moment(self, name: str, which: str, like: Tensor) -> Tensor:
        return self.state.get((name, which), torch.zeros_like(like))

    def update(self, name: str, w: Tensor, g: Tensor, rate: float) -> Tensor:
        o, what = self.o, kind(name, w)
        scale, eps, decay = self.parametrization(name, what)
        eta = rate * scale
        lam = 0.0 if what in o.no_decay else o.weight_decay
        shrink = rate / o.learning_rate * lam if o.independent_weight_decay else eta * lam * decay
        if o.name == "muon" and what == "matrices":
            m = o.muon_momentum * self.moment(name, "m", w) + (1 - o.muon_momentum) * g
            self.state[name, "m"] = m
            return w - shrink * w - eta * self.orthogonal(name, (1 - o.muon_momentum) * g + o.muon_momentum * m)
        m, v = self.moment(name, "m", w), self.moment(name, "v", w)
        every, since = o.momentum_reset_every, self.t % (o.momentum_reset_every or 10**9)
        if every and since == 0:
            m, v = torch.zeros_like(w), torch.zeros_like(w)
        if o.spike_threshold and self.t >= self.quiet and since >= self.quiet:
            spike = (g**2 > o.spike_threshold * v) & (v > 0)
            g = torch.where(spike, g.sign() * (o.spike_threshold * v).sqrt(), g)
        if every and self.t >= every and since < o.momentum_reset_warmup:
            eta *= 1 - 0.99 * (1 + math.cos(math.pi * (since + 1) / (o.momentum_reset_warmup + 1))) / 2
        (b1, b2), t = o.betas, self.t
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        self.state[name, "m"], self.state[name, "v"] = m, v
        mh, vh = m / (1 - b1**t), v / (1 - b2**t)
        if o.name == "stable_adamw":
            rms = float((g**2 / vh.clamp(min=eps**2)).mean().sqrt())
            eta, shrink = eta / max(1, rms), shrink / max(1, rms)
        return w - shrink * w - eta * mh / (vh.sqrt() + eps)

    def parametrization(self, name: str, what: str) -> tuple[float, float, float]:
        """Factor of the rate, eps, factor of coupled decay."""
        o, model, eps = self.o, self.config.model, self.o.eps
        m, d = model.hidden / o.base_width, model.layers / o.base_depth
        if o.parametrization == "complete_p":
            eps = eps / m / (d if name.startswith("blocks") else 1)
            return (1 / m, eps, m) if what == "matrices" else (1.0, eps, 1.0)
        if o.parametrization != "standard" and what in ("matrices", "head"):
            return 1 / m, eps, 1.0
        return 1.0, eps, 1.0

    def orthogonal(self, name: str, update: Tensor) -> Tensor:
        model = self.config.model
        if not name.endswith("qkv.weight"):
            parts = update if update.ndim == 3 else update[None]
            return torch.stack([orthogonalized(part) for part in parts]).view(update.shape)
        d, q, groups = model.head_dim, model.heads // model.groups, model.groups
        row = torch.arange(update.shape[0])
        within = row // d % (q + 2)
        out = torch.zeros_like(update)
        assert len(row) == groups * (q + 2) * d
        for rows in (within < q, within == q, within == q + 1):
            out[rows] = orthogonalized(update[rows])
        return out


def orthogonalized(x: Tensor) -> Tensor:
    n, m = x.shape
    y = x / max(float(x.norm()), 1e-7)
    if n > m:
        y = y.T
    for _ in range(5):
        a = y @ y.T
        y = 3.4445 * y - 4.7750 * a @ y + 2.0315 * a @ a @ y
    return (y.T if n > m else y) * 0.2 * math.sqrt(max(n, m))


def largest_logits(parameters: Parameters, tokens: Tensor, config: Config) -> dict[str, Tensor]:
    """Of each attention ``[heads]``, before any cap, from all s x s logits of the batch; for models without QK-norm."""
    cfg, inputs, found = config.model, {}, {}
    d, scale = cfg.head_dim, cfg.attention_temperature * plain.multipliers(cfg, config.optimizer)[0]
    attention = plain.attention

    def spy(params: Parameters, name: str, x: Tensor, *rest: Any) -> Tensor:
        inputs[name] = x
        return attention(params, name, x, *rest)

    with mock.patch.object(plain, "attention", spy), torch.no_grad():
        plain.forward(parameters, tokens, cfg)
    for name, x in inputs.items():
        qkv = plain.linear(parameters, f"{name}.qkv", x).unflatten(-1, (cfg.groups, -1, d))  # [b, s, g, r + 2, d]
        q, k = qkv[:, :, :, :-2].flatten(2, 3), qkv[:, :, :, -2]
        if cfg.positions == "rope":
            q, k = plain.rotate(q, cfg.rope_theta), plain.rotate(k, cfg.rope_theta)
        heads = []
        row, column = torch.tril_indices(x.shape[1], x.shape[1])
        for head in range(cfg.heads):
            logits = q[:, :, head] @ k[:, :, head * cfg.groups // cfg.heads].mT  # [b, s, s]
            heads.append((logits * scale)[:, row, column].max())
        found[name] = torch.stack(heads)
    return found


def clip_heads(parameters: Parameters, largest: dict[str, Tensor], config: Config) -> Parameters:
    """QK-Clip: head by head, queries x gamma / kappa, keys x kappa, kappa = (least gamma of the key)^(1 - alpha)."""
    cfg, clipped = config.model, dict(parameters)
    r, d = cfg.heads // cfg.groups, cfg.head_dim
    for name, logits in largest.items():
        gamma = [min(1.0, config.optimizer.qk_clip / float(x)) if x > 0 else 1.0 for x in logits]
        for which in (f"{name}.qkv.weight", f"{name}.qkv.bias"):
            if which not in parameters:
                continue
            rows = parameters[which].clone()
            for group in range(cfg.groups):
                own = gamma[group * r : (group + 1) * r]
                kappa, first = min(own) ** (1 - config.optimizer.qk_clip_alpha), group * (r + 2) * d
                for i, factor in enumerate([*(g / kappa for g in own), kappa]):
                    rows[first + i * d : first + (i + 1) * d] *= factor
            clipped[which] = rows
    return clipped


def train(config: Config, parameters: Parameters, batches: list[Tensor], quiet: int = LAST_QUIET) -> Any:
    """The plain model of tests/reference trained with these rules; returns (parameters, global norms)."""
    from tests.reference.optimizer import learning_rate

    rules, norms = Rules(config, quiet), []
    parameters = {name: value.double() for name, value in parameters.items()}
    for step, tokens in enumerate(batches, start=1):
        leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        loss = plain.loss(leaves, tokens[:, :-1], tokens[:, 1:], config.model, config.loss.z_loss,
                          config.loss.mu_loss, config.optimizer)  # fmt: skip
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norms.append(norm(list(gradients.values())))
        largest = largest_logits(parameters, tokens[:, :-1], config) if config.optimizer.qk_clip else {}
        parameters = rules.step(parameters, gradients, learning_rate(step, config))
        parameters = clip_heads(parameters, largest, config)
    return parameters, norms
