"""Packages that may be there, and what that changes for this one. ``tests/doctor`` holds it against the imports."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from megatron_stable import apex
from megatron_stable.config.schema import Config
from megatron_stable.doctor.finding import Finding, Verdict
from megatron_stable.doctor.versions import installed
from megatron_stable.model import flash


def check_optional(config: Config | None, on_gpu: bool) -> list[Finding]:
    """Each with what its presence or absence means."""
    return [_apex(config, on_gpu), _flash(config, on_gpu), _liger(), _mpi4py(), _triton(on_gpu)]


def _apex(config: Config | None, on_gpu: bool) -> Finding:
    found = apex.find()
    if config is not None and config.run.apex == "require" and not (found.usable and on_gpu):
        why = found.sentence if on_gpu else "there is no GPU"
        return Finding(
            "apex", f"run.apex is require, and {why}", Verdict.FAILURE, "set run.apex=auto, or see docs/apex.md"
        )
    if found.usable:
        return Finding(
            "apex", f"{found.sentence}; AdamW and RMSNorm take its kernels on GPUs, unless run.apex is never"
        )
    if found.absent:
        return Finding("apex", "not installed; AdamW and RMSNorm are PyTorch's fused ones (docs/apex.md)")
    return Finding("apex", found.sentence, Verdict.WARNING, "see docs/apex.md")


def _liger() -> Finding:
    return Finding("Liger", f"{_have('liger_kernel', 'liger-kernel')}; nothing here uses it: the loss is our own")


def _mpi4py() -> Finding:
    use = "under mpirun over several machines it tells where rank 0 is, if MASTER_ADDR does not"
    return Finding("mpi4py", f"{_have('mpi4py', 'mpi4py')}; {use}")


def _have(module: str, distribution: str) -> str:
    if find_spec(module) is None:
        return "not installed"
    return f"{version(distribution)} is installed" if installed(distribution) else "is installed"


def _flash(config: Config | None, on_gpu: bool) -> Finding:
    asked = config is not None and config.model.attention == "flash"
    have = [f"{flash.VERSIONS[name]} is installed" for name in flash.VERSIONS if find_spec(name) is not None]
    if have:
        return Finding(
            "flash-attn", f"{' and '.join(have)}; on GPUs auto takes it for attention caps, if it works there"
        )
    text = "not installed; model.attention=flash is refused, auto takes PyTorch's kernels"
    if asked:
        return Finding("flash-attn", text, Verdict.FAILURE, f"{flash.INSTALL}, or set model.attention=auto")
    return Finding("flash-attn", text)


def _triton(on_gpu: bool) -> Finding:
    there = find_spec("triton") is not None
    have = f"{version('triton')} is installed" if there and installed("triton") else "not installed"
    needs = "torch.compile and FlexAttention (attention caps) need it on a GPU"
    if on_gpu and not there:
        return Finding("triton", f"{have}; {needs}", Verdict.WARNING, "pip install triton, in the version torch names")
    return Finding("triton", f"{have}; {needs}" + ("" if on_gpu else ", and nothing on a CPU"))
