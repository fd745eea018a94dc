"""A decoder-only Transformer in plain PyTorch, one process, written from the formulas: slow, explicit, any float dtype.

Shapes: b batch, s sequence, h hidden, n heads, g key/value heads (groups), r = n/g, d head dim, F MLP width,
V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_stable.config.schema import ModelConfig, OptimizerConfig

Parameters = dict[str, Tensor]


def parameter_shapes(cfg: ModelConfig, vocab: int) -> dict[str, tuple[int, ...]]:
    """Every parameter's full shape, in the order of the forward pass. ``vocab`` is unpadded."""
    h, d, width = cfg.hidden, cfg.head_dim, cfg.ffn
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        if cfg.bias:
            shapes[f"{name}.bias"] = shape[:-1]
        if cfg.sigma_reparam:
            shapes[f"{name}.reparametrize.gamma"] = (1,)

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = (size,)
        if cfg.bias and cfg.norm == "layernorm":
            shapes[f"{name}.bias"] = (size,)

    shapes["embedding.weight"] = (vocab, h)
    if cfg.embedding_norm:
        norm("embedding_norm", h)
    if cfg.positions == "learned":
        shapes["positions.weight"] = (cfg.sequence_length, h)
    full = cfg.qk_norm_scope == "full"
    for i in range(cfg.layers):
        block = f"blocks.{i}"
        if cfg.attention_input_norm:
            norm(f"{block}.attention_input_norm", h)
        linear(f"{block}.attention.qkv", (cfg.heads + 2 * cfg.groups) * d, h)
        if cfg.qk_norm:
            norm(f"{block}.attention.q_norm", cfg.heads * d if full else d)
            norm(f"{block}.attention.k_norm", cfg.groups * d if full else d)
        if cfg.v_norm:
            norm(f"{block}.attention.v_norm", cfg.groups * d if full else d)
        linear(f"{block}.attention.proj", h, cfg.heads * d)
        if cfg.mlp_input_norm:
            norm(f"{block}.mlp_input_norm", h)
        linear(f"{block}.mlp.fc1", *((2, width, h) if cfg.activation in ("swiglu", "geglu") else (width, h)))
        linear(f"{block}.mlp.fc2", h, width)
        for part in ("attention", "mlp"):
            if getattr(cfg, f"{part}_output_norm"):
                norm(f"{block}.{part}_output_norm", h)
            if cfg.layer_scale is not None:
                shapes[f"{block}.{part}_scale.weight"] = (h,)
            if cfg.deepnorm:
                norm(f"{block}.{part}_post_norm", h)
    if not cfg.deepnorm:
        norm("final_norm", h)
    if not cfg.tied_embeddings:
        shapes["head.weight"] = (vocab, h)
    return shapes


def draw_parameters(cfg: ModelConfig, vocab: int, seed: int, dtype: torch.dtype = torch.float64) -> Parameters:
    """Random parameters, none symmetric or zero: norm weights near 1, biases near 0, matrices by fan-in."""
    generator = torch.Generator().manual_seed(seed)
    parameters: Parameters = {}
    for name, shape in parameter_shapes(cfg, vocab).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith(".bias"):
            value = 0.1 * noise
        elif len(shape) == 1:
            value = 1 + 0.1 * noise
        else:
            value = noise / math.sqrt(shape[-1])
        parameters[name] = value.to(dtype)
    return parameters


def forward(params: Parameters, tokens: Tensor, cfg: ModelConfig, optimizer: OptimizerConfig | None = None) -> Tensor:
    """Logits [b, s, V] of tokens [b, s]. Without dropout, which a reference cannot share.

    ``optimizer`` names the parametrization, if it is not the standard one.
    """
    attention_scale, branch, output = multipliers(cfg, optimizer)
    x = params["embedding.weight"][tokens]
    alpha = cfg.embedding_gradient
    x = alpha * x + (1 - alpha) * x.detach()
    if cfg.embedding_scale:
        x = math.sqrt(cfg.hidden) * x
    x = norm(params, "embedding_norm", x, cfg)
    if cfg.positions == "learned":
        x = x + params["positions.weight"][: tokens.shape[1]]
    for i in range(cfg.layers):
        for part, function in (("attention", attention), ("mlp", mlp)):
            name = f"blocks.{i}.{part}"
            scale = (attention_scale,) if part == "attention" else ()
            y = function(params, name, norm(params, f"{name}_input_norm", x, cfg), cfg, *scale)
            y = branch * norm(params, f"{name}_output_norm", y, cfg)
            if cfg.layer_scale is not None:
                y = params[f"{name}_scale.weight"] * y
            if cfg.deepnorm:
                x = norm(params, f"{name}_post_norm", (2 * cfg.layers) ** (1 / 4) * x + y, cfg)
            else:
                x = x + y
    x = output * norm(params, "final_norm", x, cfg)
    logits = x @ params["embedding.weight" if cfg.tied_embeddings else "head.weight"].T
    if cfg.final_logit_cap is not None:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = cfg.final_logit_cap * torch.tanh(logits / cfg.final_logit_cap)
    return logits


def multipliers(cfg: ModelConfig, optimizer: OptimizerConfig | None) -> tuple[float, float, float]:
    """Scale of q k, factor of each residual branch, factor of the output logits (arXiv 2309.14322, 2505.01618)."""
    name, d = optimizer.parametrization if optimizer else "standard", cfg.head_dim
    if optimizer is not None and name == "complete_p":
        return 1 / d, optimizer.base_depth / cfg.layers, optimizer.base_width / cfg.hidden
    return (1 / d if name == "mu_full" else 1 / math.sqrt(d)), 1.0, 1.0


def loss(
    params: Parameters,
    tokens: Tensor,
    labels: Tensor,
    cfg: ModelConfig,
    z_loss: float = 0.0,
    mu_loss: float = 0.0,
    optimizer: OptimizerConfig | None = None,
) -> Tensor:
    """Mean over tokens of cross-entropy + z_loss * log(Z)^2 (PaLM, arXiv 2204.02311), Z the softmax's denominator,
    + mu_loss * |mean of the output embedding over the vocabulary|^2 (arXiv 2601.02031).

    Half-precision logits are raised to fp32 first.
    """
    logits = forward(params, tokens, cfg, optimizer)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = logits.max(dim=-1, keepdim=True).values.detach()
    log_z = (largest + (logits - largest).exp().sum(dim=-1, keepdim=True).log()).squeeze(-1)
    label_logits = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    mean = params["embedding.weight" if cfg.tied_embeddings else "head.weight"].mean(dim=0)
    return (log_z - label_logits).mean() + z_loss * (log_z**2).mean() + mu_loss * (mean**2).sum()


def attention(params: Parameters, name: str, x: Tensor, cfg: ModelConfig, scale: float | None = None) -> Tensor:
    """Causal self-attention of x [b, s, h], before the residual is added; ``scale`` of q k (None: 1/sqrt(d))."""
    b, s, _ = x.shape
    g, r, d = cfg.groups, cfg.heads // cfg.groups, cfg.head_dim
    # Group by group: r queries, their key, their value (Megatron's layout).
    qkv = linear(params, f"{name}.qkv", x).reshape(b, s, g, r + 2, d)
    query, key, value = qkv[:, :, :, :r], qkv[:, :, :, r], qkv[:, :, :, r + 1]  # [b, s, g, r, d], [b, s, g, d] twice

    def over_heads(which: str, y: Tensor) -> Tensor:
        if cfg.qk_norm_scope == "full":
            return norm(params, f"{name}.{which}", y.reshape(b, s, -1), cfg).reshape(y.shape)
        return norm(params, f"{name}.{which}", y, cfg)

    query, key, value = over_heads("q_norm", query), over_heads("k_norm", key), over_heads("v_norm", value)
    if cfg.positions == "rope":
        query = rotate(query.reshape(b, s, g * r, d), cfg.rope_theta).reshape(b, s, g, r, d)
        key = rotate(key, cfg.rope_theta)
    logits = torch.einsum("bigrd,bjgd->bgrij", query, key) * (1 / math.sqrt(d) if scale is None else scale)
    logits = cfg.attention_temperature * logits
    if cfg.attention_cap is not None:
        logits = cfg.attention_cap * torch.tanh(logits / cfg.attention_cap)
    position = torch.arange(s)
    in_the_future = position[None, :] > position[:, None]  # [i, j]: query i must not see key j
    logits = logits.masked_fill(in_the_future, -math.inf)
    weights = (logits - logits.max(dim=-1, keepdim=True).values.detach()).exp()
    weights = weights / weights.sum(dim=-1, keepdim=True)
    if cfg.attention_clip is not None:
        gamma, zeta = cfg.attention_clip
        stretched = (zeta - gamma) * weights + gamma
        weights = torch.where(stretched > 1, torch.ones_like(weights), stretched)
        weights = torch.where((stretched < 0) | in_the_future, torch.zeros_like(weights), weights)
    mixed = torch.einsum("bgrij,bjgd->bigrd", weights, value).reshape(b, s, g * r * d)
    return linear(params, f"{name}.proj", mixed)


def mlp(params: Parameters, name: str, x: Tensor, cfg: ModelConfig) -> Tensor:
    """The MLP of x [b, s, h], before the residual is added."""
    if cfg.activation in ("swiglu", "geglu"):
        both = torch.einsum("bsh,kfh->kbsf", x, matrix(params, f"{name}.fc1"))
        if cfg.bias:
            both = both + params[f"{name}.fc1.bias"][:, None, None, :]
        gate, up = both[0], both[1]
        y = (gate * torch.sigmoid(gate) if cfg.activation == "swiglu" else gelu(gate)) * up
    else:
        y = linear(params, f"{name}.fc1", x)
        if cfg.activation == "squared_relu":
            y = y.clamp(min=0) ** 2
        elif cfg.activation == "gelu_erf":
            y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        else:
            y = gelu(y)
    return linear(params, f"{name}.fc2", y)


def gelu(x: Tensor) -> Tensor:
    """In its tanh form."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(params: Parameters, name: str, x: Tensor) -> Tensor:
    """x W^T, plus the bias where there is one."""
    y = x @ matrix(params, name).T
    return y + params[f"{name}.bias"] if f"{name}.bias" in params else y


def matrix(params: Parameters, name: str) -> Tensor:
    """W, or gamma / sigma(W) * W (sigmaReparam, arXiv 2303.06296).

    sigma = u^T W v with constant u and v, those in ``params`` or else the exact singular vectors.
    """
    weight = params[f"{name}.weight"]
    if f"{name}.reparametrize.gamma" not in params:
        return weight
    flat = weight.reshape(-1, weight.shape[-1])
    if f"{name}.u" in params:
        u, v = params[f"{name}.u"], params[f"{name}.v"]
    else:
        u, v = singular_vectors(flat)
    return params[f"{name}.reparametrize.gamma"] / (u @ flat @ v) * weight


def singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the largest singular value."""
    left, _, right = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    return left[:, 0].to(matrix.dtype), right[0].to(matrix.dtype)


class PowerIteration:
    """u and v of every reparametrized matrix: exact at first, then one iteration per optimizer step."""

    def __init__(self, params: Parameters) -> None:
        self.vectors: Parameters = {}
        for name in self._names(params):
            self.vectors[f"{name}.u"], self.vectors[f"{name}.v"] = singular_vectors(self._flat(params, name))

    def step(self, params: Parameters) -> Parameters:
        """u <- W v / |W v|, v <- W^T u / |W^T u|; returns all vectors."""
        for name in self._names(params):
            flat = self._flat(params, name)
            u = flat @ self.vectors[f"{name}.v"]
            u = u / u.norm()
            v = flat.T @ u
            self.vectors[f"{name}.u"], self.vectors[f"{name}.v"] = u, v / v.norm()
        return self.vectors

    @staticmethod
    def _names(params: Parameters) -> list[str]:
        return [name.removesuffix(".reparametrize.gamma") for name in params if name.endswith(".reparametrize.gamma")]

    @staticmethod
    def _flat(params: Parameters, name: str) -> Tensor:
        weight = params[f"{name}.weight"].detach()
        return weight.reshape(-1, weight.shape[-1])


def norm(params: Parameters, name: str, x: Tensor, cfg: ModelConfig) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension; x itself where there is no such norm."""
    if f"{name}.weight" not in params:
        return x
    if cfg.norm == "layernorm":
        x = x - x.mean(dim=-1, keepdim=True)
    y = x / (x**2).mean(dim=-1, keepdim=True).add(cfg.norm_eps).sqrt() * params[f"{name}.weight"]
    return y + params[f"{name}.bias"] if f"{name}.bias" in params else y


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions (arXiv 2104.09864) of x [b, s, n, d].

    At position p, the pair (x_i, x_{i+d/2}) turns by the angle p * theta^(-2i/d).
    """
    s, d = x.shape[1], x.shape[-1]
    frequency = theta ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
    angle = torch.arange(s, dtype=torch.float64)[:, None] * frequency  # [s, d/2]
    cos, sin = angle.cos().to(x.dtype)[None, :, None, :], angle.sin().to(x.dtype)[None, :, None, :]
    first, second = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
