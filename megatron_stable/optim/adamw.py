"""AdamW, and AdamW whose step is bounded for each parameter."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from megatron_stable import apex
from megatron_stable.optim.partition import LocalShard, Partition

MOMENTS = ("exp_avg", "exp_avg_sq")


class Flat(NamedTuple):
    """A flat tensor of the optimizer at a step: what a rule reads and writes.

    Attributes:
        weight: fp32, 1-d under DeepSpeed.
        grad: Like ``weight``; rules may overwrite it.
        state: Moments by name, like ``weight``, and ``step``, the number of updates.
        group: ``lr``, ``betas``, ``eps``, ``weight_decay`` and what else the rule needs.
    """

    weight: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    group: dict[str, Any]


def adamw(flats: list[Flat], step: int, divisor: Tensor | None = None) -> None:
    """AdamW (arXiv 1711.05101) by a fused kernel, to which a flat is as good as its parameters: PyTorch's, or apex's.

    Args:
        step: Number of this update since the moments began, from 1; that of ``state["step"]`` afterwards.
        divisor: fp32, on the device: what gradients are divided by, which the kernel does as it reads them, and stores.
    """
    alike: dict[int, list[Flat]] = {}
    for flat in flats:
        alike.setdefault(id(flat.group), []).append(flat)
    for members in alike.values():
        group, kernels = members[0].group, apex.taken()
        if kernels is not None and all(flat.weight.is_cuda and flat.weight.numel() < apex.MOST for flat in members):
            tensors = [[flat.grad for flat in members], [flat.weight for flat in members]]
            tensors += [[flat.state[name] for flat in members] for name in MOMENTS]
            apex.adamw_(kernels, tensors, step, group, divisor)
            torch._foreach_add_([flat.state["step"] for flat in members], 1)
            continue
        torch_adamw(
            [flat.weight for flat in members],
            [flat.grad for flat in members],
            [flat.state["exp_avg"] for flat in members],
            [flat.state["exp_avg_sq"] for flat in members],
            [],
            [flat.state["step"] for flat in members],
            fused=True,
            grad_scale=divisor,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def stable_adamw(flats: list[Flat], partition: Partition) -> None:
    """StableAdamW (arXiv 2304.13013, algorithm 2): AdamW with the rate of each parameter divided by max(1, RMS).

    RMS is the root of the mean over the whole parameter of g^2 / max(v, eps^2), v being the bias-corrected second
    moment that g has already entered: about 1 while gradients are as usual, large when they have outgrown it.
    Collective over the pipeline stage.
    """
    if not flats:
        return
    of = {flat.weight: flat for flat in flats}
    for _, grad, state, group in flats:
        beta1, beta2 = group["betas"]
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)

    def corrections(flat: Flat) -> list[Tensor]:
        # in fp64: fp32 would lose 1 - beta^step
        return [1 - beta ** flat.state["step"].double() for beta in flat.group["betas"]]

    def excess(shard: LocalShard) -> Tensor:
        flat = of[shard.flat]
        second = shard.of(flat.state["exp_avg_sq"]) / corrections(flat)[1]
        floor = max(flat.group["eps"] ** 2, torch.finfo(torch.float32).tiny)  # a denormal one may count as 0
        return shard.of(flat.grad).square().div_(second.clamp_min_(floor)).sum(dtype=torch.float64)

    sums = partition.sums(of, excess)
    for i, shard in partition.within(of):
        flat = of[shard.flat]
        group, (bias1, bias2) = flat.group, corrections(flat)
        rate = group["lr"] / (sums[i] / partition.numel[i]).sqrt().clamp_min(1.0)
        root = (shard.of(flat.state["exp_avg_sq"]) / bias2).sqrt_().add_(group["eps"])
        weight = shard.of(flat.weight)
        weight.mul_(1 - rate * group["weight_decay"])
        weight.sub_((shard.of(flat.state["exp_avg"]) / root).mul_(rate / bias1))
