"""NVIDIA's apex, where it is there: its kernels for AdamW and RMSNorm, in place of PyTorch's own fused ones.

docs/apex.md says what that buys. What the name apex stands for is found out from files and from the extensions it was
built with, and nothing is imported for that: PyPI's package of that name is another one, and a build without extensions
has all the names and none of the kernels. Kernels are taken once per process, on all ranks or none, and only after they
have computed, on the device, what PyTorch computes; until then, and for whatever a kernel cannot do exactly, PyTorch's
are used.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EXTENSIONS = {"AdamW": "amp_C", "RMSNorm": "fused_layer_norm_cuda"}
BUILD = "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation . in a clone of NVIDIA/apex"
CHUNK = 2048 * 32  # elements that a block of threads takes at a time, as in apex.multi_tensor_apply
MOST = 2**31  # elements of a tensor that apex counts in 32 bits


class Found(NamedTuple):
    """What the name of a package stands for in this environment.

    Attributes:
        usable: The package that is meant, with kernels.
        sentence: What is there, for people; what to do, if it is not usable.
        absent: Nothing bears the name, of which nobody needs to be told.
    """

    usable: bool
    sentence: str
    absent: bool = False


class Kernels(NamedTuple):
    """What is taken from apex.

    Attributes:
        adam: ``amp_C.multi_tensor_adam_capturable``, the one that scales gradients.
        rms_norm: ``(input, weight, shape, eps) -> output``, differentiable; statistics in fp32.
    """

    adam: Callable[..., None]
    rms_norm: Callable[..., Tensor]


_taken: Kernels | None = None


def find() -> Found:
    """Look for apex on ``sys.path`` without running any of its code."""
    spec = find_spec("apex")
    if spec is None:
        return Found(False, f"apex is not installed; to have it: {BUILD}", absent=True)
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    where = places[0] if places else spec.origin
    if not any((place / "optimizers" / "fused_adam.py").is_file() for place in places):
        return Found(
            False,
            f"the package apex in {where} is not NVIDIA's (PyPI's apex is a toolkit for the web framework Pyramid): "
            f"pip uninstall apex, and to have NVIDIA's: {BUILD}",
        )
    missing = [what for what, extension in EXTENSIONS.items() if find_spec(extension) is None]
    if missing:
        return Found(False, f"NVIDIA's apex in {where} was built without its kernels ({', '.join(missing)}): {BUILD}")
    return Found(True, f"NVIDIA's apex in {where}")


def try_out(device: torch.device) -> Found:
    """Import the kernels and compare them with PyTorch's on a CUDA device; takes milliseconds."""
    found = find()
    if not found.usable:
        return found
    try:
        kernels = _import()
        wrong = [name for name, same in (("AdamW", _same_adam), ("RMSNorm", _same_norm)) if not same(kernels, device)]
    except Exception as error:  # built for another torch or another GPU: whatever its kernels raise
        return Found(False, f"{found.sentence} does not work here ({type(error).__name__}: {error}): {BUILD}")
    if wrong:
        return Found(False, f"{found.sentence} computes {' and '.join(wrong)} otherwise than PyTorch: {BUILD}")
    return found


def take() -> None:
    """Use apex's kernels in this process from now on, after :func:`try_out` has found them usable."""
    global _taken
    _taken = _import()


def taken() -> Kernels | None:
    """The kernels in use; ``None``: PyTorch's."""
    return _taken


def adamw_(
    kernels: Kernels, tensors: list[list[Tensor]], step: int, group: dict[str, Any], divisor: Tensor | None = None
) -> None:
    """AdamW (arXiv 1711.05101) by apex: theta <- theta - lr (m' / (sqrt(v') + eps) + decay theta), m' and v' corrected.

    Args:
        tensors: Gradients, weights, first and second moments; fp32, of fewer than ``MOST`` elements each.
        step: Number of this update, from 1.
        group: ``lr``, ``betas``, ``eps``, ``weight_decay``.
        divisor: fp32, on the device: what gradients are divided by, in place; ``None``: 1.
    """
    import torch

    like = tensors[0][0]
    skip = like.new_zeros(1, dtype=torch.int32)
    inverse = like.new_ones(1) if divisor is None else divisor.reciprocal().view(1)
    rate, count = like.new_full((1,), group["lr"]), like.new_full((1,), step, dtype=torch.int32)
    decoupled = corrected = 1
    rule = rate, *group["betas"], group["eps"], count, decoupled, corrected, group["weight_decay"], inverse
    kernels.adam(CHUNK, skip, tensors, *rule)


def _import() -> Kernels:
    def rms_norm(x: Tensor, weight: Tensor, shape: tuple[int, ...], eps: float) -> Tensor:
        return normalization.fused_rms_norm_affine(x, weight, shape, eps)

    normalization: Any = import_module("apex.normalization.fused_layer_norm")
    import_module("fused_layer_norm_cuda")
    return Kernels(import_module("amp_C").multi_tensor_adam_capturable, rms_norm)


def _same_adam(kernels: Kernels, device: torch.device) -> bool:
    import torch
    from torch.optim.adamw import adamw

    generator = torch.Generator(device).manual_seed(0)
    draw = lambda: torch.randn(100_003, device=device, generator=generator)  # noqa: E731 - more than a chunk
    ours = draw()
    theirs = ours.clone()
    moments = [torch.zeros_like(ours) for _ in range(4)]
    count = torch.zeros((), device=device)
    group = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    for step, divisor in enumerate((None, torch.full((), 1.7, device=device), None), start=1):
        grad = draw()
        adamw_(kernels, [[grad.clone()], [theirs], [moments[0]], [moments[1]]], step, group, divisor)
        adamw(
            [ours], [grad], [moments[2]], [moments[3]], [], [count], grad_scale=divisor,
            fused=True, amsgrad=False, beta1=0.9, beta2=0.95, lr=0.1, weight_decay=0.1, eps=1e-8, maximize=False,
        )  # fmt: skip
    pairs = ((theirs, ours), (moments[0], moments[2]), (moments[1], moments[3]))
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)


def _same_norm(kernels: Kernels, device: torch.device) -> bool:
    import torch
    import torch.nn.functional as F

    generator = torch.Generator(device).manual_seed(0)
    for dtype, close in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        results = []
        x, upstream = (torch.randn(64, 128, device=device, generator=generator).to(dtype) for _ in range(2))
        weight = torch.rand(128, device=device, generator=generator).add(0.5).to(dtype)
        for norm in (kernels.rms_norm, lambda x, weight, shape, eps: F.rms_norm(x, shape, weight, eps)):
            inputs = [t.clone().requires_grad_() for t in (x, weight)]
            y = norm(inputs[0], inputs[1], (128,), 1e-5)
            results.append([y.detach(), *torch.autograd.grad(y, inputs, upstream)])
        for a, b in zip(*results, strict=True):
            if not torch.allclose(a.float(), b.float(), rtol=close, atol=close * float(b.abs().max())):
                return False
    return True
