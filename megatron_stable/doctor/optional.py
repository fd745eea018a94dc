"""Packages that may be there, and what that changes for this one. ``tests/doctor`` holds it against the imports."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from megatron_stable.config.schema import Config
from megatron_stable.doctor.finding import Finding, Verdict
from megatron_stable.doctor.versions import installed, is_nvidia_apex

# modules that nothing here imports, and why nothing is missed
UNUSED = {
    "apex": "AdamW and norms are PyTorch's fused ones, with or without it",
    "liger_kernel": "the loss and the norms are our own and PyTorch's, with or without it",
    "mpi4py": "under mpirun, ranks take their places from the environment; for several machines set MASTER_ADDR",
}


def check_optional(config: Config | None, on_gpu: bool) -> list[Finding]:
    """Each with what its presence or absence means."""
    return [
        _unused("apex", "apex", "apex" if find_spec("apex") is None or is_nvidia_apex() else ""),
        _flash(config, on_gpu),
        _unused("Liger", "liger-kernel", "liger_kernel"),
        _unused("mpi4py", "mpi4py", "mpi4py"),
        _triton(on_gpu),
    ]


def _unused(name: str, distribution: str, module: str) -> Finding:
    if not module:
        return Finding("apex", "NVIDIA's is not installed; nothing here would use it")
    there = find_spec(module) is not None
    have = f"{version(distribution)} is installed" if there and installed(distribution) else "is installed"
    return Finding(name, f"{have if there else 'not installed'}; nothing here uses it: {UNUSED[module]}")


def _flash(config: Config | None, on_gpu: bool) -> Finding:
    asked = config is not None and config.model.attention == "flash"
    if find_spec("flash_attn") is not None:
        have = version("flash-attn") if installed("flash-attn") else ""
        return Finding("flash-attn", f"{have} is installed; used where model.attention is flash, and nowhere else")
    text = "not installed; model.attention=flash is refused, auto takes PyTorch's kernels"
    if asked:
        return Finding("flash-attn", text, Verdict.FAILURE, "pip install flash-attn, or set model.attention=auto")
    return Finding("flash-attn", text)


def _triton(on_gpu: bool) -> Finding:
    there = find_spec("triton") is not None
    have = f"{version('triton')} is installed" if there and installed("triton") else "not installed"
    needs = "torch.compile and FlexAttention (attention caps) need it on a GPU"
    if on_gpu and not there:
        return Finding("triton", f"{have}; {needs}", Verdict.WARNING, "pip install triton, in the version torch names")
    return Finding("triton", f"{have}; {needs}" + ("" if on_gpu else ", and nothing on a CPU"))
