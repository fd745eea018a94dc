"""Whether blocks are compiled: where the configuration leaves it open, all ranks try it, and all do or none."""

from __future__ import annotations

import socket

import torch
from packaging.version import Version

from megatron_stable.config.parametrization import model_multipliers
from megatron_stable.config.schema import Config
from megatron_stable.model import sigma
from megatron_stable.model.backends import choose_backend
from megatron_stable.model.block import Block
from megatron_stable.model.documents import DocumentMask
from megatron_stable.parallel.agreement import everywhere
from megatron_stable.parallel.topology import TensorParallel

GRAPHS = Version("2.13")  # whose Dynamo has been seen to take the collectives of a block into its graph
LENGTH, HEADS = 128, 2  # of the block that is tried
# how far outputs and gradients may be off, of their norms: as far as rounding takes them
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def why_not(config: Config, device: str) -> str | None:
    """What stands against compiling on ``device`` ("cpu", "cuda") where ``model.compile`` is auto, if anything."""
    if device != "cuda":
        return "there is no GPU"
    if config.parallel.zero_stage == 3:
        return "under ZeRO-3 weights are gathered within a block"
    if config.parallel.tensor > 1 and Version(torch.__version__) < GRAPHS:
        return f"PyTorch {torch.__version__} cannot trace collectives that overlap, {GRAPHS} can"
    return "run.deterministic is on" if config.run.deterministic else None


def choose_compilation(config: Config) -> tuple[bool, str | None]:
    """Whether to compile blocks, and what to tell the user, if anything. Collective, and the same on all ranks.

    TP ranks that compute the same activations have to round them in the same way, so that none compiles alone.
    """
    if config.model.compile != "auto":
        return config.model.compile, None
    if (reason := why_not(config, "cuda" if torch.cuda.is_available() else "cpu")) is not None:
        return False, f"blocks are not compiled: {reason}" if torch.cuda.is_available() else None
    for problem, host in everywhere((try_out(config, torch.device("cuda")), socket.gethostname())):
        if problem is not None:
            return False, f"blocks are not compiled: {problem} (on {host}); model.compile=false says so from the start"
    return True, "blocks are compiled, each on its own; the first step takes longer"


def try_out(config: Config, device: torch.device) -> str | None:
    """Compile a small block of the recipe and compare it with the plain one; what is wrong with it, if anything."""
    model = config.model.model_copy(
        update={
            "layers": 1, "heads": HEADS, "kv_heads": HEADS if config.model.heads == config.model.groups else 1,
            "hidden": HEADS * config.model.head_dim, "ffn_hidden": 128, "sequence_length": LENGTH,
            "dropout": 0.0, "attention_dropout": 0.0,
        }
    )  # fmt: skip
    dtype = DTYPES[config.precision.dtype]
    among = config.data.document_mask
    backend = choose_backend(model, device.type, among).name
    block = Block(model, TensorParallel(), backend, False, model_multipliers(config))
    if among:
        DocumentMask(block, model, 0, device).announce((torch.arange(2 * LENGTH) % 50).view(2, LENGTH))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in block.parameters():
            scale = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 1.0
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    sigma.start(block, 0)
    block.to(device, dtype)
    x = torch.randn(2, LENGTH, model.hidden, generator=generator).to(device, dtype).requires_grad_()
    inputs = [x, *block.parameters()]

    def results() -> list[torch.Tensor]:
        y = block(x)
        return [y.detach(), *torch.autograd.grad(y.float().square().mean(), inputs)]

    plain = results()
    try:
        block.compile(dynamic=False)
        compiled = results()
    except Exception as error:  # whatever a compiler, a linker or a driver comes up with
        return f"torch.compile does not work here ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
    off = max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(compiled, plain, strict=True))
    return None if off <= ROUNDING[dtype] else f"a compiled block computes something else (by {off:.1e})"
