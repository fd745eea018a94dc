"""A decoder-only Transformer in plain PyTorch, one process, written from the formulas: slow, explicit, any float dtype.

Shapes: b batch, s sequence, h hidden, n heads, g key/value heads (groups), r = n/g, d head dim, F MLP width,
V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_stable.config.schema import ModelConfig

Parameters = dict[str, Tensor]


def parameter_shapes(cfg: ModelConfig, vocab: int) -> dict[str, tuple[int, ...]]:
    """Every parameter's full shape, in the order of the forward pass. ``vocab`` is unpadded."""
    h, d, width = cfg.hidden, cfg.head_dim, cfg.ffn
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        if cfg.bias:
            shapes[f"{name}.bias"] = shape[:-1]

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = (size,)
        if cfg.bias and cfg.norm == "layernorm":
            shapes[f"{name}.bias"] = (size,)

    shapes["embedding.weight"] = (vocab, h)
    if cfg.positions == "learned":
        shapes["positions.weight"] = (cfg.sequence_length, h)
    for i in range(cfg.layers):
        block = f"blocks.{i}"
        norm(f"{block}.attention_norm", h)
        linear(f"{block}.attention.qkv", (cfg.heads + 2 * cfg.groups) * d, h)
        if cfg.qk_norm:
            norm(f"{block}.attention.q_norm", d)
            norm(f"{block}.attention.k_norm", d)
        linear(f"{block}.attention.proj", h, cfg.heads * d)
        norm(f"{block}.mlp_norm", h)
        linear(f"{block}.mlp.fc1", *((2, width, h) if cfg.activation == "swiglu" else (width, h)))
        linear(f"{block}.mlp.fc2", h, width)
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


def forward(params: Parameters, tokens: Tensor, cfg: ModelConfig) -> Tensor:
    """Logits [b, s, V] of tokens [b, s]. Without dropout, which a reference cannot share."""
    x = params["embedding.weight"][tokens]
    if cfg.positions == "learned":
        x = x + params["positions.weight"][: tokens.shape[1]]
    for i in range(cfg.layers):
        block = f"blocks.{i}"
        x = x + attention(params, f"{block}.attention", norm(params, f"{block}.attention_norm", x, cfg), cfg)
        x = x + mlp(params, f"{block}.mlp", norm(params, f"{block}.mlp_norm", x, cfg), cfg)
    x = norm(params, "final_norm", x, cfg)
    return x @ params["embedding.weight" if cfg.tied_embeddings else "head.weight"].T


def loss(params: Parameters, tokens: Tensor, labels: Tensor, cfg: ModelConfig, z_loss: float = 0.0) -> Tensor:
    """Mean over tokens of cross-entropy + z_loss * log(Z)^2 (PaLM, arXiv 2204.02311), Z the softmax's denominator.

    Half-precision logits are raised to fp32 first.
    """
    logits = forward(params, tokens, cfg)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = logits.max(dim=-1, keepdim=True).values.detach()
    log_z = (largest + (logits - largest).exp().sum(dim=-1, keepdim=True).log()).squeeze(-1)
    label_logits = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (log_z - label_logits).mean() + z_loss * (log_z**2).mean()


def attention(params: Parameters, name: str, x: Tensor, cfg: ModelConfig) -> Tensor:
    """Causal self-attention of x [b, s, h], before the residual is added."""
    b, s, _ = x.shape
    g, r, d = cfg.groups, cfg.heads // cfg.groups, cfg.head_dim
    # Group by group: r queries, their key, their value (Megatron's layout).
    qkv = linear(params, f"{name}.qkv", x).reshape(b, s, g, r + 2, d)
    query, key, value = qkv[:, :, :, :r], qkv[:, :, :, r], qkv[:, :, :, r + 1]  # [b, s, g, r, d], [b, s, g, d] twice
    if cfg.qk_norm:
        query = norm(params, f"{name}.q_norm", query, cfg)
        key = norm(params, f"{name}.k_norm", key, cfg)
    if cfg.positions == "rope":
        query = rotate(query.reshape(b, s, g * r, d), cfg.rope_theta).reshape(b, s, g, r, d)
        key = rotate(key, cfg.rope_theta)
    logits = torch.einsum("bigrd,bjgd->bgrij", query, key) / math.sqrt(d)
    if cfg.attention_cap is not None:
        logits = cfg.attention_cap * torch.tanh(logits / cfg.attention_cap)
    position = torch.arange(s)
    in_the_future = position[None, :] > position[:, None]  # [i, j]: query i must not see key j
    logits = logits.masked_fill(in_the_future, -math.inf)
    weights = (logits - logits.max(dim=-1, keepdim=True).values.detach()).exp()
    weights = weights / weights.sum(dim=-1, keepdim=True)
    mixed = torch.einsum("bgrij,bjgd->bigrd", weights, value).reshape(b, s, g * r * d)
    return linear(params, f"{name}.proj", mixed)


def mlp(params: Parameters, name: str, x: Tensor, cfg: ModelConfig) -> Tensor:
    """The MLP of x [b, s, h], before the residual is added."""
    if cfg.activation == "swiglu":
        both = torch.einsum("bsh,kfh->kbsf", x, params[f"{name}.fc1.weight"])
        if cfg.bias:
            both = both + params[f"{name}.fc1.bias"][:, None, None, :]
        gate, up = both[0], both[1]
        y = gate * torch.sigmoid(gate) * up
    else:
        y = linear(params, f"{name}.fc1", x)
        if cfg.activation == "squared_relu":
            y = y.clamp(min=0) ** 2
        else:
            y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    return linear(params, f"{name}.fc2", y)


def linear(params: Parameters, name: str, x: Tensor) -> Tensor:
    """x W^T, plus the bias where there is one."""
    y = x @ params[f"{name}.weight"].T
    return y + params[f"{name}.bias"] if f"{name}.bias" in params else y


def norm(params: Parameters, name: str, x: Tensor, cfg: ModelConfig) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension."""
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
