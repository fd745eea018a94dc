"""What apex's AdamW and RMSNorm take beside PyTorch's, on a GPU where NVIDIA's apex is installed.

python benchmarks/apex_kernels.py [--elements 268435456]

One flat tensor for AdamW, as a rank has it under ZeRO-1; 8 x 4096 positions of 4096 features in bf16 for the norm,
forward and backward. Milliseconds, mean of 20 after 5.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from megatron_stable import apex
from megatron_stable.config.schema import ModelConfig
from megatron_stable.model.norms import Norm
from megatron_stable.optim.adamw import Flat, adamw


def milliseconds(work: Callable[[], object], times: int = 20) -> float:
    """Mean over calls, after some that do not count."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(5):
        work()
    begin.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


def works(elements: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    weight, grad, *moments = (torch.rand(elements, device="cuda") for _ in range(4))
    state = {"exp_avg": moments[0], "exp_avg_sq": moments[1], "step": torch.ones((), device="cuda")}
    flat = Flat(weight, grad, state, {"lr": 1e-6, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1})
    norm = Norm(4096, ModelConfig.model_validate({"norm": "rmsnorm"}), partial=False).to("cuda", torch.bfloat16)
    x = torch.randn(8, 4096, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn_like(x)
    return {
        f"AdamW, {elements} elements": lambda: adamw([flat], 2),
        "RMSNorm, forward": lambda: norm(x),
        "RMSNorm, both": lambda: torch.autograd.grad(norm(x), (x, norm.weight), upstream),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=2**28)
    given = works(parser.parse_args().elements) if torch.cuda.is_available() else {}
    if not given:
        sys.exit("there is no GPU")
    ours = {name: milliseconds(work) for name, work in given.items()}
    found = apex.try_out(torch.device("cuda"))
    print(found.sentence)
    if found.usable:
        apex.take()
    for name, work in given.items():
        print(f"{name:32} PyTorch {ours[name]:8.3f} ms" + f"   apex {milliseconds(work):8.3f} ms" * found.usable)


if __name__ == "__main__":
    main()
