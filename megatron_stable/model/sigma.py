"""sigmaReparam (arXiv 2303.06296): a linear layer multiplies with gamma / sigma(W) x W instead of W.

sigma(W) is the spectral norm of the whole matrix, whatever TP is: u^T W v with u and v followed by power iteration,
once per optimizer step, for the weights change no faster than that. gamma is learned and starts at sigma(W), so that
the layer starts as the plain one. The gradient goes through sigma with u and v held fixed, d sigma / d W = u v^T.

Recomputation, evaluation and further micro batches of a step see the same u and v. They are state, which checkpoints
hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_stable.config.schema import ModelConfig
from megatron_stable.parallel.parameters import draw_full, parameter, place
from megatron_stable.parallel.shards import ONES, Place
from megatron_stable.parallel.topology import TensorParallel


class _Reparametrized(torch.autograd.Function):
    """gamma / sigma x W, where sigma = u^T W v with constant u and v; all vectors local, sums over TP in backward."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, gamma: Tensor, u: Tensor, v: Tensor, sigma: Tensor, tp: TensorParallel
    ) -> Tensor:
        ctx.save_for_backward(weight, gamma, u, v, sigma)
        ctx.tp = tp
        return (weight.to(u.dtype) * (gamma.to(u.dtype) / sigma)).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        weight, gamma, u, v, sigma = ctx.saved_tensors
        dot = (grad.to(u.dtype) * weight.to(u.dtype)).sum()  # d loss / d (gamma / sigma)
        if ctx.tp.active:
            dist.all_reduce(dot, group=ctx.tp.group)
        scale = gamma.to(u.dtype) / sigma
        d_weight = grad.to(u.dtype) * scale - (dot * scale / sigma) * (u.unsqueeze(-1) * v)
        return d_weight.to(weight.dtype), (dot / sigma).expand_as(gamma).to(gamma.dtype), None, None, None, None


class SigmaReparam(nn.Module):
    """The reparametrization of one linear layer's weight ``[..., out, in]``, sharded over TP along rows or columns.

    Attributes:
        u: ``[..., out]``, or this rank's part; fp32 whatever the model's dtype.
        v: ``[in]``, or this rank's part.
        sigma: Of the weight and vectors that :func:`power_iteration` or :func:`measure` last saw.
    """

    u: Tensor
    v: Tensor
    sigma: Tensor

    def __init__(self, weight: nn.Parameter, tp: TensorParallel) -> None:
        super().__init__()
        self.tp, known = tp, place(weight)
        last = len(known.full_shape) - 1
        self.rows_sharded, self.columns_sharded = known.dim not in (None, last), known.dim == last
        self.gamma = parameter((1,), ONES)
        u, v = Place(known.full_shape[:-1]), Place(known.full_shape[-1:])
        self._places = {
            "u": replace(u, dim=known.dim, low=known.low, high=known.high) if self.rows_sharded else u,
            "v": replace(v, dim=0, low=known.low, high=known.high) if self.columns_sharded else v,
        }
        self.register_buffer("u", torch.zeros(weight.shape[:-1]))
        self.register_buffer("v", torch.zeros(weight.shape[-1:]))
        self.register_buffer("sigma", torch.ones(()))

    def forward(self, weight: Tensor) -> Tensor:
        """``[..., out, in]`` to the same."""
        return _Reparametrized.apply(weight, self.gamma, self.u, self.v, self.sigma, self.tp)

    def places(self) -> dict[str, Place]:
        """Of u and v in the whole model, with their global names."""
        prefix = place(self.gamma).name.removesuffix("gamma")
        return {name: replace(known, name=prefix + name) for name, known in self._places.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SigmaReparam:
        """Move the vectors along with the module, but never to less than fp32."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, moved in self._buffers.items():
            kept = before[name]
            if moved is not None and kept is not None and moved.element_size() < kept.element_size():
                self._buffers[name] = kept.to(moved.device)
        return self


def reparametrized(linear: Any, config: ModelConfig) -> Any:
    """The layer, with sigmaReparam if the recipe has it."""
    if config.sigma_reparam:
        linear.reparametrize = SigmaReparam(linear.weight, linear.tp)
    return linear


@torch.no_grad()
def start(module: nn.Module, seed: int) -> None:
    """Set u, v, sigma and gamma of weights that were just drawn, from the full matrices; no communication."""
    for linear in _layers(module):
        known, sigma = place(linear.weight), linear.reparametrize
        full = linear.weight if known.slices == 1 else draw_full(known, seed)
        with torch.random.fork_rng([]):
            torch.manual_seed(0)  # svd_lowrank starts from a random subspace
            u, s, v = torch.svd_lowrank(full.flatten(0, -2), q=min(32, full[..., 0].numel(), full.shape[-1]), niter=8)
        for name, vector in (("u", u[:, 0]), ("v", v[:, 0])):
            where = sigma.places()[name]
            getattr(sigma, name).copy_(where.slice(vector.view(where.full_shape)))
        sigma.sigma.copy_(s[0])
        sigma.gamma.fill_(s[0])


@torch.no_grad()
def power_iteration(module: nn.Module) -> None:
    """Follow the weights: u <- W v, v <- W^T u, both normalised, sigma = |W^T u|. Once per optimizer step, before
    its first forward. Collective over TP: four small reductions for all layers of ``module``."""
    layers = list(_layers(module))
    if not layers:
        return
    tp, sigmas = layers[0].tp, [layer.reparametrize for layer in layers]
    rows, columns = [s.rows_sharded for s in sigmas], [s.columns_sharded for s in sigmas]
    us = _sum([_matrix(layer) @ layer.reparametrize.v for layer in layers], columns, tp)
    lengths = _lengths(us, rows, tp)
    for sigma, u, length in zip(sigmas, us, lengths, strict=True):
        sigma.u.copy_((u / length).view_as(sigma.u))
    vs = _sum([_matrix(layer).T @ layer.reparametrize.u.flatten() for layer in layers], rows, tp)
    lengths = _lengths(vs, columns, tp)
    for sigma, v, length in zip(sigmas, vs, lengths, strict=True):
        sigma.v.copy_(v / length)
        sigma.sigma.copy_(length)


@torch.no_grad()
def measure(module: nn.Module) -> None:
    """sigma = u^T W v of the weights as they are now, u and v unchanged. Collective over TP."""
    layers = list(_layers(module))
    if layers:
        sigmas = [layer.reparametrize for layer in layers]
        found = [_matrix(layer) @ s.v @ s.u.flatten() for layer, s in zip(layers, sigmas, strict=True)]
        sharded = [s.rows_sharded or s.columns_sharded for s in sigmas]
        for sigma, value in zip(sigmas, _sum(found, sharded, layers[0].tp), strict=True):
            sigma.sigma.copy_(value)


def vectors(module: nn.Module) -> Iterator[tuple[Place, Tensor]]:
    """The state of all layers of ``module``: u and v, each with its place in the whole model."""
    for linear in _layers(module):
        for name, known in linear.reparametrize.places().items():
            yield known, getattr(linear.reparametrize, name)


def _layers(module: nn.Module) -> Iterator[Any]:
    return (part for part in module.modules() if isinstance(getattr(part, "reparametrize", None), SigmaReparam))


def _matrix(linear: Any) -> Tensor:
    """``[out, in]``, or this rank's part, at least fp32."""
    weight: Tensor = linear.weight.detach().flatten(0, -2)
    return weight.to(linear.reparametrize.u.dtype)


def _sum(values: list[Tensor], partial: Sequence[bool], tp: TensorParallel) -> list[Tensor]:
    """Sum over TP those values of which each rank has a part, all in one reduction."""
    parts = [value for value, mine in zip(values, partial, strict=True) if mine]
    if not tp.active or not parts:
        return values
    whole = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(whole, group=tp.group)
    sums = iter(whole.split([part.numel() for part in parts]))
    return [next(sums).view_as(value) if mine else value for value, mine in zip(values, partial, strict=True)]


def _lengths(values: list[Tensor], sharded: Sequence[bool], tp: TensorParallel) -> list[Tensor]:
    """L2 norms of vectors of which each TP rank has a part, or all."""
    return [square.sqrt() for square in _sum([value.square().sum() for value in values], sharded, tp)]
