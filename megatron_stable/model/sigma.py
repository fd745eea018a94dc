"""sigmaReparam (arXiv 2303.06296): a linear layer multiplies with gamma / sigma(W) x W instead of W.

sigma(W) is the spectral norm of the whole matrix, whatever TP is: u^T W v with u and v followed by power iteration,
once per optimizer step, for the weights change no faster than that. gamma is learned and starts at sigma(W), so that
the layer starts as the plain one. The gradient goes through sigma with u and v held fixed, d sigma / d W = u v^T.

The factor is applied to the layer's input, (gamma / sigma x) W^T: a micro batch then makes no second weight, and in
half precision gamma can be fp32 (:func:`follow_masters`) all the same.

Recomputation, evaluation and further micro batches of a step see the same u and v. They are state, which checkpoints
hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_stable.config.schema import ModelConfig
from megatron_stable.parallel.drawing import draw
from megatron_stable.parallel.parameters import parameter, place
from megatron_stable.parallel.shards import ONES, Init, Place
from megatron_stable.parallel.topology import TensorParallel

KRYLOV = 32  # dimensions of the space in which the first singular vector is sought


class _Scaled(torch.autograd.Function):
    """x times gamma / sigma, where sigma = u^T W v with constant u and v.

    With D = sum of (scaled x) x (its gradient): d gamma = D / gamma, and d W = -D / sigma x u v^T beside what the
    linear layer that takes x gives it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        parameter: Tensor,
        gamma: Tensor,
        u: Tensor,
        v: Tensor,
        sigma: Tensor,
        tp: TensorParallel | None,
    ) -> Tensor:
        scaled = (x.to(u.dtype) * (gamma / sigma)).to(x.dtype)
        ctx.save_for_backward(scaled, gamma, u, v, sigma)
        ctx.types, ctx.tp = (weight.dtype, parameter.dtype), tp
        return scaled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None, None, None]:
        scaled, gamma, u, v, sigma = ctx.saved_tensors
        dot = (grad.to(u.dtype) * scaled.to(u.dtype)).sum()
        if ctx.tp is not None:
            dist.all_reduce(dot, group=ctx.tp.group)
        d_x = (grad.to(u.dtype) * (gamma / sigma)).to(grad.dtype)
        d_weight = (u * (-dot / sigma)).unsqueeze(-1) * v
        return d_x, d_weight.to(ctx.types[0]), (dot / gamma).to(ctx.types[1]), None, None, None, None, None


class SigmaReparam(nn.Module):
    """The reparametrization of one linear layer's weight ``[..., out, in]``, sharded over TP along rows or columns.

    Attributes:
        u: ``[..., out]``, or this rank's part; fp32 whatever the model's dtype.
        v: ``[in]``, or this rank's part.
        sigma: Of the weight and vectors that :func:`power_iteration` or :func:`measure` last saw.
        master: gamma in fp32, where the parameter is but its copy in half precision.
    """

    u: Tensor
    v: Tensor
    sigma: Tensor
    master: Tensor | None

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
        self.register_buffer("master", None)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """The input of the layer, times gamma / sigma."""
        gamma = self.gamma.detach().to(self.u.dtype) if self.master is None else self.master
        # each TP rank sees some of the features, or of the positions
        partial = self.columns_sharded or self.tp.sequence
        tp = self.tp if partial and self.tp.active else None
        return _Scaled.apply(x, weight, self.gamma, gamma, self.u, self.v, self.sigma, tp)

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
    """Set u, v, sigma and gamma of weights that were just drawn. Collective over TP."""
    for linear in _layers(module):
        linear.reparametrize.v.copy_(_leading(linear, seed))
    power_iteration(module)
    for linear in _layers(module):
        linear.reparametrize.gamma.fill_(linear.reparametrize.sigma)


def _leading(linear: Any, seed: int) -> Tensor:
    """The right singular vector of the largest singular value, or this rank's part of it.

    Lanczos on W^T W, from a drawn vector: the best approximation in the span of v, W^T W v, (W^T W)^2 v, ... The
    largest singular values of a random matrix lie so close together that power iteration would take hundreds of steps.
    """
    weight, own, tp = _matrix(linear), linear.reparametrize, linear.tp
    full, where = place(linear.weight).full_shape, own.places()["v"]
    x = draw(replace(where, init=Init(std=1.0)), seed).to(weight)
    basis, images = weight.new_zeros(0, len(x)), weight.new_zeros(0, len(weight))
    for _ in range(min(KRYLOV, prod(full[:-1]), full[-1])):
        for _ in range(2):  # once is not enough for orthogonality in fp32
            x = x - _sum([basis @ x], [own.columns_sharded], tp)[0] @ basis
        x = x / _lengths([x], [own.columns_sharded], tp)[0].clamp(min=torch.finfo(x.dtype).tiny)
        (y,) = _sum([weight @ x], [own.columns_sharded], tp)
        basis, images = torch.vstack((basis, x)), torch.vstack((images, y))
        (x,) = _sum([weight.T @ y], [own.rows_sharded], tp)
    (gram,) = _sum([images @ images.T], [own.rows_sharded], tp)
    best = torch.linalg.eigh(gram.double().cpu()).eigenvectors[:, -1].to(x)
    return best * best[0].sign() @ basis  # its sign, too, is the same on every layout


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


@torch.no_grad()
def follow_masters(module: nn.Module, held: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Multiply with the gammas that the optimizer holds, in fp32. Once per optimizer step; one small reduction.

    Args:
        held: Of each gamma that this rank's optimizer holds its value, by name.
        group: The replicas, of which one holds each.
    """
    sigmas = [layer.reparametrize for layer in _layers(module)]
    if sigmas:
        zero = sigmas[0].gamma.new_zeros(1, dtype=torch.float32)
        masters = torch.stack([held.get(place(own.gamma).name, zero) for own in sigmas])
        dist.all_reduce(masters, group=group)
        for own, master in zip(sigmas, masters, strict=True):
            own.master = master


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
