"""`megatron-stable plan`: what a run will need, before anything is paid for."""

import json
import re
from math import inf
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_stable.analysis.layouts import Candidate, search
from megatron_stable.analysis.machines import MACHINES, Machine, machine
from megatron_stable.analysis.plan import Plan, make_plan
from megatron_stable.config.load import load_config
from megatron_stable.config.schema import Config
from megatron_stable.errors import ConfigError
from megatron_stable.training.progress import duration

SHOWN = 12  # rows of --search
UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def plan(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Fields to override, by dotted key.")
    ] = None,
    config: Annotated[Path, typer.Option(help="The run's YAML; see `megatron-stable init`.")] = Path("config.yaml"),
    ranks: Annotated[int | None, typer.Option(min=1, help="GPUs, one rank each. Default: one replica.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Full nodes, in place of --ranks.")] = None,
    machine_name: Annotated[
        str, typer.Option("--machine", metavar="NAME|FILE", help=f"{', '.join(MACHINES)}, or a YAML file.")
    ] = "h100",
    tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens to train on, as 300B. Default: run.steps batches.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=2, help="Where model.vocab_size is null, as the tokenizer is not read.")
    ] = None,
    search_layouts: Annotated[bool, typer.Option("--search", help="Rank all layouts of so many GPUs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say what a run will need: memory of each GPU, time, money, checkpoints, and what limits it.

    Nothing is started or read but the configuration. Parameters, bytes held and bytes sent are counted; speed is
    predicted from the machine's data sheet and the efficiencies that are printed with it, and not measured on GPUs by
    this project. Exit code 2 if it does not fit, with what would make it fit. docs/plan.md explains every number.

    Example:
      megatron-stable plan --config examples/30b.yaml --ranks 512 --machine h100 --vocab-size 64000
      megatron-stable plan --config config.yaml --nodes 4 --machine cluster.yaml --tokens 300B
      megatron-stable plan --config config.yaml --nodes 4 --search
    """
    on = machine(machine_name)
    loaded = _with_vocabulary(load_config(config, overrides or []), vocab_size)
    world = _world(loaded, ranks, nodes, on)
    found = (
        None
        if search_layouts
        else make_plan(loaded, world, on, None if tokens is None else token_count(tokens, "--tokens"))
    )
    if found is None:
        fitting, reasons = search(loaded, world, on)
        if as_json:
            rows = [
                {"changes": one.changes, "memory": one.memory, "tokens_per_second": one.speed.tokens_per_second}
                for one in fitting
                if one.speed
            ]
            print(json.dumps({"ranks": world, "fitting": rows, "not_fitting": reasons}, indent=1))
        else:
            _print_search(loaded, world, on, fitting, reasons)
        fits = bool(fitting)
    else:
        fits = found.fits
        if as_json:
            print(json.dumps(found.summary(), indent=1))
        else:
            _print_plan(found)
    if not fits:
        raise typer.Exit(ConfigError.exit_code)


def _with_vocabulary(config: Config, vocab_size: int | None) -> Config:
    known = vocab_size or config.model.vocab_size
    if known is None:
        raise ConfigError(
            "model.vocab_size is null, and plan does not read the tokenizer: "
            "give --vocab-size N, for example --vocab-size 64000, or set model.vocab_size"
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": known})})


def _world(config: Config, ranks: int | None, nodes: int | None, on: Machine) -> int:
    if ranks is not None and nodes is not None:
        raise ConfigError(f"--ranks {ranks} and --nodes {nodes} are both set: leave one of them out")
    if nodes is not None:
        return nodes * on.gpus_per_node
    return ranks or config.parallel.tensor * config.parallel.pipeline


def token_count(text: str, option: str) -> float:
    """A number of tokens as people write it: 300B, 1.5T, 2e9. ConfigError: it is none."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)([kmbt]?)", text.lower())
    if match is None or not 0 < (count := float(match[1]) * UNITS[match[2]]) < inf:
        raise ConfigError(f"{option} {text} is not a number of tokens: write one as 300B, 1.5T or 2e9")
    return count


def _print_plan(found: Plan) -> None:
    config, console = found.config, Console(highlight=False, soft_wrap=True)
    parallel = config.parallel
    replicas = found.world // (parallel.tensor * parallel.pipeline)
    console.print(
        f"{found.parameters / 1e9:,.3f}B parameters ({found.parameters:,}; {found.outside_embeddings:,} of them "
        f"outside embedding and head), {config.precision.dtype}, sequences of {config.model.sequence_length:,}"
    )
    console.print(
        f"{found.world:,} GPUs of {found.machine.name}: TP {parallel.tensor} x PP {parallel.pipeline} x DP {replicas}, "
        f"ZeRO {parallel.zero_stage}{', SP' if parallel.sequence else ''}; {config.tokens_per_step:,} tokens a step in "
        f"{found.micro_batches} micro batches of {config.batch.micro_size} per replica\n"
    )
    console.print(_verdict(found))
    console.print("\nMemory of a GPU at the fullest moment of a step, by pipeline stage")
    console.print(_memory_table(found))
    console.print("Sent by a GPU in a step")
    console.print(_traffic_table(found))
    _print_speed(console, found)
    _print_checkpoints(console, found)


def _verdict(found: Plan) -> str:
    stage, usable = found.stages[found.fullest], found.machine.usable
    where = f"stage {found.fullest} needs {size(stage.total)} of {size(usable)} usable"
    if found.fits:
        return f"FITS: {where}, {size(usable - stage.total)} to spare"
    lines = [f"DOES NOT FIT: {where}, {size(stage.total - usable)} too much"]
    if not found.remedies:
        lines.append("No layout of so many GPUs fits: take more of them, or larger ones")
    for one in found.remedies[:4]:
        assert one.speed is not None
        lines.append(f"  fits with {one.overrides()}: {size(one.memory)}, {one.speed.tokens_per_second:,.0f} tokens/s")
    return "\n".join(lines)


def _memory_table(found: Plan) -> Table:
    table = Table("", *(f"stage {number}" for number in range(len(found.stages))), box=None, pad_edge=False)
    rows = {
        "parameters": [f"{stage.parameters / 1e6:,.0f} M" for stage in found.stages],
        "blocks": [f"{stage.blocks}" for stage in found.stages],
        "micro batches in flight": [f"{stage.in_flight}" for stage in found.stages],
    }
    for name, column in rows.items():
        table.add_row(name, *column)
    kinds = {
        "weights": "weights",
        "gradients": "gradients, summed in fp32",
        "optimizer": "masters and moments",
        "buckets": "buckets for reduction",
        "activations": "activations in flight",
        "logits": "logits",
        "working": "working memory of backward",
        "reserve": "CUDA, NCCL (allowance)",
        "total": "total",
    }
    if any(stage.measured > stage.backward for stage in found.stages):
        kinds["measured"] = "instead of backward: a copy, to measure updates"
    for kind, name in kinds.items():
        values = [getattr(stage, kind) for stage in found.stages]
        if any(values):
            table.add_row(name, *map(size, values))
    return table


def _traffic_table(found: Plan) -> Table:
    table = Table("", *(f"stage {number}" for number in range(len(found.stages))), box=None, pad_edge=False)
    name = "TP and SP, activations" if found.config.parallel.sequence else "TP, activations"
    for label, kind in (
        (name, "tp_bytes"),
        ("PP, to neighbours", "pp_bytes"),
        ("DP, gradients and weights", "dp_bytes"),
    ):
        table.add_row(label, *(size(getattr(stage, kind)) for stage in found.traffic))
    return table


def _print_speed(console: Console, found: Plan) -> None:
    speed, on = found.speed, found.machine
    assumed = ", ".join(f"{name} {value:g}" for name, value in on.efficiency.model_dump().items())
    console.print(f"\nSpeed, predicted (not measured on GPUs by this project; assumed: {assumed})")
    console.print(
        f"  {speed.seconds:.3g} s a step, {speed.tokens_per_second:,.0f} tokens/s, "
        f"{speed.tokens_per_second / found.world:,.0f} per GPU"
    )
    console.print(
        f"  MFU {speed.mfu:.1%} with attention over the full s x s (PaLM's convention, as training reports it), "
        f"{speed.mfu_causal:.1%} with its causal half"
    )
    shares = ", ".join(f"{name} {seconds / speed.seconds:.0%}" for name, seconds in speed.parts.items())
    console.print(f"  limited by {speed.limit}; of a step: {shares}")
    if found.config.parallel.pipeline > 1:
        console.print(f"  pipeline bubble: {speed.bubble:.1%} of a stage's time")
    console.print(
        f"  {found.tokens / 1e9:,.1f}B tokens: {found.days:,.1f} days, {found.days * 24 * found.world:,.0f} GPU hours, "
        f"{found.cost:,.0f} at {on.price_per_gpu_hour:g} per GPU hour"
    )


def _print_checkpoints(console: Console, found: Plan) -> None:
    lasting, every = found.durability, found.config.checkpoint.every
    nodes = -(-found.world // found.machine.gpus_per_node)
    console.print("\nCheckpoints")
    console.print(
        f"  {size(lasting.checkpoint_bytes)} each; training stands still for {lasting.stall_seconds:.2g} s, the files "
        f"are written after {lasting.write_seconds:,.0f} s at {size(found.machine.disk_write)}/s and node"
    )
    console.print(
        f"  a failure every {duration(lasting.failure_seconds)} is to be expected of {nodes} node(s) with "
        f"{found.machine.node_mtbf_hours:,.0f} h each"
    )
    console.print(
        f"  best: checkpoint.every={lasting.best_every} ({duration(lasting.best_seconds)}; Young and Daly), which "
        f"costs {lasting.best_overhead:.2%} of the time; checkpoint.every={every} costs {lasting.overhead:.2%}"
    )


def _print_search(config: Config, world: int, on: Machine, fitting: list[Candidate], reasons: list[str]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"Layouts of {world:,} GPUs of {on.name} that fit: {len(fitting)}. Speed is predicted, not measured on GPUs by "
        "this project"
    )
    table = Table("", "TP", "PP", "DP", "ZeRO", "SP", "micro_size", "recompute", "tokens/s", "MFU", "memory", box=None)
    for number, one in enumerate(fitting[:SHOWN], start=1):
        parallel, speed = one.config.parallel, one.speed
        assert speed is not None
        replicas = world // (parallel.tensor * parallel.pipeline)
        # fmt: off
        table.add_row(
            f"{number}", f"{parallel.tensor}", f"{parallel.pipeline}", f"{replicas}", f"{parallel.zero_stage}",
            "yes" if parallel.sequence else "no", f"{one.config.batch.micro_size}",
            f"{one.config.model.activation_checkpointing}", f"{speed.tokens_per_second:,.0f}", f"{speed.mfu:.1%}",
            size(one.memory),
        )
        # fmt: on
    if fitting:
        console.print(table)
        console.print(f"the first: {fitting[0].overrides()}")
    for reason in reasons:
        console.print(f"not {reason}")


def size(count: float) -> str:
    """Bytes for people."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:,.{1 if unit != 'TB' else 2}f} {unit}"
    return f"{count / 1e3:,.1f} kB" if count else "0"
