"""What a run is planned for: nodes of GPUs, how fast their parts are at best, and how much of that is assumed to be reached.

Presets are data sheets' figures; efficiencies are assumptions, printed with every plan and overridden in a file of one's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_stable.config.notation import parse
from megatron_stable.errors import ConfigError


class Part(BaseModel):
    """What is read from a file: no key that it does not know, no infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Efficiency(Part):
    """How much of what the parts could do a run is assumed to reach; megatron-stable has not measured these on GPUs."""

    gemm: float = Field(0.6, gt=0, le=1)
    """Of peak FLOP/s, in matrix products of half precision: 600 of an H100's 989 TFLOP/s."""
    gemm_fp32: float = Field(0.8, gt=0, le=1)
    """Of peak FLOP/s, in matrix products of fp32."""
    attention: float = Field(0.4, gt=0, le=1)
    """Of peak FLOP/s, in a fused attention kernel that computes the causal half (FlashAttention-2 on H100: 35-40%,
    arXiv 2407.08608)."""
    memory: float = Field(0.7, gt=0, le=1)
    """Of memory bandwidth, in element-wise kernels."""
    links: float = Field(0.75, gt=0, le=1)
    """Of link speeds, in collectives."""
    usable_memory: float = Field(0.94, gt=0, le=1)
    """Of a GPU's memory; the rest is lost to fragmentation."""


class Machine(Part):
    """A node, and many of them."""

    name: str = "own"
    """For the title."""
    device: Literal["cuda", "cpu"] = "cuda"
    """What kernels run on, on which it depends what they keep for the backward pass."""
    gpus_per_node: int = Field(8, ge=1)
    """GPUs, and so ranks, of a node."""
    memory: float = Field(gt=0)
    """Bytes of a GPU."""
    peak_flops: dict[Literal["bf16", "fp16", "fp32"], float]
    """Dense FLOP/s of a GPU by dtype; fp32 without TF32, as PyTorch has it off."""
    memory_bandwidth: float = Field(gt=0)
    """Bytes per second of a GPU's memory."""
    link_in_node: float = Field(gt=0)
    """Bytes per second that a GPU sends to others of its node."""
    link_between_nodes: float = Field(gt=0)
    """Bytes per second that each GPU sends to other nodes."""
    link_to_host: float = Field(25e9, gt=0)
    """Bytes per second from a GPU to pinned memory of its host: PCIe 4 x16 at what it reaches."""
    disk_write: float = Field(2e9, gt=0)
    """Bytes per second that a node writes to the checkpoints' file system; an assumption: measure yours."""
    price_per_gpu_hour: float = Field(gt=0)
    """What a GPU costs per hour, in the currency of your choice; an assumption: set yours."""
    node_mtbf_hours: float = Field(6300, gt=0)
    """Hours between two failures of one node that end a run. 6300: 419 unexpected interruptions in 54 days on 16,384 H100
    (2,048 nodes), Llama 3, arXiv 2407.21783, table 5."""
    restart_seconds: float = Field(600, ge=0)
    """From a failure until the run trains again; an assumption."""
    launch_seconds: float = Field(6e-6, ge=0)
    """Of the host, for each kernel that it starts without torch.compile; where this is more than the kernel takes, the
    host limits the step. An assumption."""
    reserve: float = Field(2e9, ge=0)
    """Bytes of a GPU for the CUDA context (~0.5 GB), libraries' workspaces and NCCL's buffers (1-2 GB). An assumption."""
    efficiency: Efficiency = Efficiency()

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a run can fill."""
        return self.memory * self.efficiency.usable_memory


MACHINES = {
    # NVIDIA A100 80GB SXM data sheet: 312 TFLOP/s bf16 and fp16, 19.5 fp32, 2,039 GB/s, NVLink 600 GB/s both ways together.
    # DGX A100: eight 200 Gb/s adapters. Failures: 6.50 per 1,000 node-days on RSC-1 (A100), arXiv 2410.21680.
    # FlashAttention-2 reaches 50-73% of an A100's peak (arXiv 2307.08691); GEMMs come closer to it than on H100.
    "a100": Machine(
        name="a100 (80 GB, SXM)",
        memory=80e9,
        peak_flops={"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
        memory_bandwidth=2.039e12,
        link_in_node=300e9,
        link_between_nodes=25e9,
        price_per_gpu_hour=2.0,
        node_mtbf_hours=3700,
        efficiency=Efficiency(gemm=0.75, attention=0.55),
    ),
    # NVIDIA H100 SXM data sheet: 989 TFLOP/s bf16 and fp16 dense, 67 fp32, 3.35 TB/s, NVLink 900 GB/s both ways together.
    # DGX H100: eight 400 Gb/s adapters.
    "h100": Machine(
        name="h100 (80 GB, SXM)",
        memory=80e9,
        peak_flops={"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
        memory_bandwidth=3.35e12,
        link_in_node=450e9,
        link_between_nodes=50e9,
        link_to_host=50e9,
        price_per_gpu_hour=3.0,
    ),
    # NVIDIA H200 SXM data sheet: an H100 with 141 GB at 4.8 TB/s.
    "h200": Machine(
        name="h200 (141 GB, SXM)",
        memory=141e9,
        peak_flops={"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
        memory_bandwidth=4.8e12,
        link_in_node=450e9,
        link_between_nodes=50e9,
        link_to_host=50e9,
        price_per_gpu_hour=3.5,
    ),
    # NVIDIA DGX B200 data sheet: 1,440 GB and 64 TB/s for eight, 2,250 TFLOP/s bf16 dense each, NVLink 1.8 TB/s both ways
    # together, eight 400 Gb/s adapters; fp32: HGX B200, 600 TFLOP/s for eight.
    "b200": Machine(
        name="b200 (180 GB)",
        memory=180e9,
        peak_flops={"bf16": 2250e12, "fp16": 2250e12, "fp32": 75e12},
        memory_bandwidth=8e12,
        link_in_node=900e9,
        link_between_nodes=50e9,
        link_to_host=50e9,
        price_per_gpu_hour=5.0,
    ),
}


def machine(name: str) -> Machine:
    """A preset by name, or what a YAML file describes.

    In a file, ``base: h100`` fills in what the file leaves out.

    Raises:
        ConfigError: Neither, or a value that is not valid.
    """
    if name.lower() in MACHINES:
        return MACHINES[name.lower()]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"--machine {name} is neither one of {', '.join(MACHINES)} nor a file")
    try:
        given = parse(path.read_bytes())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, Mapping):
        raise ConfigError(f"{path}: holds no machine; write memory, peak_flops, ... or `base: h100` and what differs")
    values = {str(key): value for key, value in given.items()}
    base = str(values.pop("base", "")).lower()
    if base and base not in MACHINES:
        raise ConfigError(f"{path}: base {base} is none of {', '.join(MACHINES)}")
    start = MACHINES[base].model_dump() if base else {}
    for key in ("efficiency", "peak_flops"):
        if isinstance(values.get(key), Mapping):
            values[key] = {**start.get(key, {}), **values[key]}
    try:
        return Machine.model_validate({**start, "name": path.stem, **values})
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg'].lower()}" for one in error.errors()]
        raise ConfigError(f"{path}: " + "; ".join(lines)) from error
