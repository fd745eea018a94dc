"""The MLP: FC1, a non-linearity, FC2."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_stable.config.parametrization import ModelMultipliers
from megatron_stable.config.schema import ModelConfig
from megatron_stable.model.init import fc1_init, output_init
from megatron_stable.model.probes import UNPROBED, Unprobed
from megatron_stable.model.sigma import reparametrized
from megatron_stable.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_stable.parallel.topology import TensorParallel


def gelu(x: Tensor) -> Tensor:
    """GELU, tanh form (arXiv 1606.08415)."""
    return F.gelu(x, approximate="tanh")


def gelu_erf(x: Tensor) -> Tensor:
    """GELU as it is defined, by the error function."""
    return F.gelu(x)


def squared_relu(x: Tensor) -> Tensor:
    """ReLU squared (Primer, arXiv 2109.08668)."""
    return F.relu(x).square()


def swiglu(x: Tensor) -> Tensor:
    """SiLU(gate) x up (arXiv 2002.05202): ``[..., 2f]``, gate first, to ``[..., f]``."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def geglu(x: Tensor) -> Tensor:
    """GELU(gate) x up (arXiv 2002.05202), GELU in its tanh form, as Gemma has it: ``[..., 2f]`` to ``[..., f]``."""
    gate, up = x.chunk(2, -1)
    return gelu(gate) * up


ACTIVATIONS = {
    "gelu": gelu, "gelu_erf": gelu_erf, "squared_relu": squared_relu, "swiglu": swiglu, "geglu": geglu,
}  # fmt: skip


class MLP(nn.Module):
    """``fc2(activation(fc1(x)))``; where it is gated, FC1 holds gate and up projection, ``[2, ffn, hidden]``."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, by: ModelMultipliers) -> None:
        super().__init__()
        width = (2, config.ffn) if config.gated else config.ffn
        self.fc1 = reparametrized(
            ColumnParallelLinear(config.hidden, width, fc1_init(config, by), tp, config.bias), config
        )
        self.fc2 = reparametrized(
            RowParallelLinear(config.ffn, config.hidden, output_init(config, config.ffn, by), tp, config.bias), config
        )
        self.activation = ACTIVATIONS[config.activation]
        self.probe: Unprobed = UNPROBED

    def forward(self, x: Tensor) -> Tensor:
        """``[b, s, h]``, under SP ``[b, s/tp, h]``, to the same."""
        hidden = self.activation(self.probe("fc1", self.fc1(x)))
        return self.probe("fc2", self.fc2(hidden))
