"""How long a step is predicted to take: a sum of roofline times under the machine's stated efficiencies.

Nothing here has been measured on a GPU by this project. docs/plan.md has the formulas, and predictions beside
published rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_stable.analysis.activations import Layers, backend
from megatron_stable.analysis.footprint import Footprint, footprints
from megatron_stable.analysis.machines import Machine
from megatron_stable.analysis.memory import stage_layers
from megatron_stable.analysis.tape import Tape, Value
from megatron_stable.config.schema import Config
from megatron_stable.model.transformer import padded_vocabulary, recomputes
from megatron_stable.training.compilation import why_not
from megatron_stable.training.flops import flops_per_token

# what the loss reads and writes, forward and backward, as benchmarks/cross_entropy.py counts it: on CUDA, passes over
# the logits; on a CPU, bytes per logit of half precision, and the cap's share
LOSS_PASSES, LOSS_TRAFFIC, CAP_TRAFFIC = 3, 64, 84
# kernels that an operation of the tape starts, forward and backward together
KERNELS = 4
# bytes per parameter, as benchmarks/optimizer_counts.py counts them: a gradient's way into its fp32 sum, per micro
# batch; norm, update and copy, of the replica's own part
ACCUMULATION, UPDATE = 10, 42
COMPILED = 0.5  # of element-wise traffic is left when torch.compile fuses a block


@dataclass(frozen=True)
class Speed:
    """A predicted step.

    Attributes:
        seconds: Of a step.
        tokens_per_second: Of all ranks.
        mfu: Model FLOPs utilisation as training reports it: attention over the full s x s, recomputation not counted
            (PaLM, arXiv 2204.02311, appendix B).
        mfu_causal: The same with the causal half of attention only.
        bubble: Share of the step in which the busiest stage waits for the pipeline to fill and drain.
        parts: Seconds of a step by what takes them, the largest first.
        bound_by_host: Whether the host's kernel launches take longer than the kernels.
    """

    seconds: float
    tokens_per_second: float
    mfu: float
    mfu_causal: float
    bubble: float
    parts: dict[str, float]
    bound_by_host: bool

    @property
    def limit(self) -> str:
        """What takes most of the step."""
        return next(iter(self.parts))


def speed(config: Config, world: int, on: Machine) -> Speed:
    """The predicted step of ``world`` ranks; ``config.model.vocab_size`` must be known."""
    parallel, batch, model = config.parallel, config.batch, config.model
    replicas = world // (parallel.tensor * parallel.pipeline)
    micro_batches = batch.global_size // (batch.micro_size * replicas)
    stages = footprints(config, world)
    each = [
        _micro_batch(config, names, own, micro_batches, world, on)
        for names, own in zip(stage_layers(config), stages, strict=True)
    ]
    host = [parts.pop("host") for parts in each]
    busy = [max(sum(parts.values()), waiting) for parts, waiting in zip(each, host, strict=True)]
    slowest = max(range(len(busy)), key=busy.__getitem__)
    parts = {name: seconds * micro_batches for name, seconds in each[slowest].items()}
    if host[slowest] > sum(each[slowest].values()):
        parts["waiting for the host"] = micro_batches * (host[slowest] - sum(each[slowest].values()))
    parts["pipeline bubble"] = (parallel.pipeline - 1) * busy[slowest]
    own = stages[slowest]
    parts["DP traffic"] = own.dp_bytes / data_link(config, world, on)
    memory_speed = on.memory_bandwidth * on.efficiency.memory
    parts["optimizer"] = own.parameters * UPDATE / replicas / memory_speed
    seconds = sum(parts.values())
    tokens = batch.global_size * model.sequence_length
    peak = on.peak_flops.get(config.precision.dtype, on.peak_flops["fp32"]) * world
    counted = flops_per_token(model) * tokens
    halved = counted - 3 * model.layers * 2 * model.sequence_length * model.heads * model.head_dim * tokens
    return Speed(
        seconds,
        tokens / seconds,
        counted / seconds / peak,
        halved / seconds / peak,
        (parallel.pipeline - 1) / (micro_batches + parallel.pipeline - 1),
        {name: value for name, value in sorted(parts.items(), key=lambda part: -part[1]) if value},
        "waiting for the host" in parts,
    )


def data_link(config: Config, world: int, on: Machine) -> float:
    """Bytes per second that a rank sends around the ring of its replicas."""
    parallel = config.parallel
    replicas = world // (parallel.tensor * parallel.pipeline)
    if parallel.tensor * replicas <= on.gpus_per_node:
        return on.link_in_node * on.efficiency.links
    # the members of a group that share a node use all of their adapters
    members = max(1, min(replicas, on.gpus_per_node // parallel.tensor))
    return min(on.link_in_node, members * on.link_between_nodes) * on.efficiency.links


def _micro_batch(
    config: Config, names: list[str], own: Footprint, micro_batches: int, world: int, on: Machine
) -> dict[str, float]:
    """Seconds of a micro batch on a stage, forward and backward, by what takes them; ``host``: of launching kernels."""
    model, parallel = config.model, config.parallel
    layers = Layers(config, on.device)
    blocks = [int(name.removeprefix("blocks.")) for name in names if name.startswith("blocks.")]
    again = sum(recomputes(model, index) for index in blocks)
    passes = 3 * len(blocks) + again  # forward, twice that backward; forward once more
    tokens, tp = layers.tokens, parallel.tensor
    width, kv = model.heads * model.head_dim, 2 * model.groups * model.head_dim
    ffn = model.ffn * (3 if model.gated else 2)
    products = 2.0 * model.hidden * (2 * width + kv + ffn) / tp * tokens * passes
    rows = padded_vocabulary(model.vocab_size or 0, tp) / tp
    if "head" in names:
        products += 3 * 2.0 * model.hidden * rows * tokens
    half = config.precision.dtype != "fp32"
    peak = on.peak_flops.get(config.precision.dtype, on.peak_flops["fp32"])
    memory_speed = on.memory_bandwidth * on.efficiency.memory
    parts = {"matrix products": products / peak / (on.efficiency.gemm if half else on.efficiency.gemm_fp32)}
    tape = Tape()
    entering = Value(layers.stream)
    layers._block(tape, entering)
    scores = 2.0 * model.sequence_length * width / tp * tokens  # causal half of 4 s x width, forward
    if backend(config, on.device) != "math":
        # backward is 2.5 times forward, as it computes the scores once more (arXiv 2205.14135)
        parts["attention"] = scores * (3.5 * len(blocks) + again) / peak / on.efficiency.attention
    else:  # the whole s x s in fp32
        parts["attention"] = 2 * scores * passes / on.peak_flops["fp32"] / on.efficiency.gemm_fp32
    compiles = why_not(config, on.device) is None if model.compile == "auto" else model.compile
    fused = COMPILED if compiles else 1.0
    traffic = sum(_moved(tape)) * passes * fused
    parts["element-wise"] = traffic / memory_speed
    if "head" in names:
        if on.device == "cuda":
            per_logit: float = LOSS_PASSES * layers.width
        else:
            per_logit = LOSS_TRAFFIC * (1 if half else 1.25) + (CAP_TRAFFIC if model.final_logit_cap is not None else 0)
        parts["loss"] = rows * tokens * per_logit / memory_speed
    parts["gradient sums"] = own.parameters * ACCUMULATION / memory_speed
    in_node = tp <= on.gpus_per_node
    link = on.link_in_node if in_node else on.link_between_nodes
    parts["TP traffic"] = own.tp_bytes / micro_batches / link / on.efficiency.links
    apart = world // parallel.pipeline >= on.gpus_per_node
    link = on.link_between_nodes if apart else on.link_in_node
    parts["PP traffic"] = own.pp_bytes / micro_batches / link / on.efficiency.links
    kernels = KERNELS * len(tape.operations) * len(blocks) * (1 + again / max(1, len(blocks)) / 3)
    parts["host"] = kernels * fused * on.launch_seconds if on.device == "cuda" else 0.0
    return parts


def _moved(tape: Tape) -> Iterable[float]:
    """Bytes that each operation of a forward pass reads and writes."""
    for op in tape.operations:
        yield sum(value.size for value in (*op.inputs, *op.outputs)) + op.scratch / 2
