"""What an optimizer step moves, launches, sends and reads, counted operator by operator on one rank's engine.

python benchmarks/optimizer_counts.py [--pairs 7]

Sizes keep their layers and layout and are made narrow, as bytes per parameter and operators do not depend on the width;
the rank is the first of its world and imagines all others. A fused or foreach operator is one, whatever it launches for
large tensors. Muon's iteration is counted at full width, on shapes alone, and timed on small ones on this machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_stable.config.schema import Config
from megatron_stable.optim import muon
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.shards import Place
from megatron_stable.parallel.topology import TensorParallel

MEMORY, ACHIEVED = 3.35e12, 400e12  # an H100's bytes per second; floating-point operations per second, 40 % of its peak
HIDDEN, SEQUENCE, VOCABULARY = 128, 16, 512  # of the narrow ones
# what a function is part of, for whatever it does and calls
PASSES = {
    "accumulate_hp_grads_and_remove_lp": "accumulate",
    "reduce": "reduce",
    "_sum": "sum over TP",
    "_norm": "norm",
    "_global_norm": "norm",
    "scale": "clip",
    "_clip": "clip",
    "observe": "clip",
    "_measure": "metrics",
    "adamw": "AdamW",
    "orthogonalize_": "Muon",
    "update_lp_params": "copy",
    "clear_hp_grads": "zero",
}
ROOMS = ("/megatron_stable/engine/", "/megatron_stable/optim/", "/deepspeed/runtime/")
ORDER = ("accumulate", "zero", "reduce", "sum over TP", "norm", "metrics", "clip", "AdamW", "copy")
OVERWRITES = ("copy_", "_foreach_copy_", "zero_", "_foreach_zero_", "fill_")  # what they write they do not read
NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "alias", "lift_fresh", "_unsafe_view")


class Layout(NamedTuple):
    """A size in its layout, and how many ranks there are."""

    size: str
    ranks: int
    tensor: int = 1
    pipeline: int = 1
    dtype: str = "bf16"
    zero_stage: int = 1

    def config(self, micro_batches: int) -> Config:
        """The narrow model."""
        model = {"size": self.size, "hidden": HIDDEN, "sequence_length": SEQUENCE, "vocab_size": VOCABULARY}
        replicas = self.ranks // (self.tensor * self.pipeline)
        return Config.model_validate(
            {
                "model": {**model, "heads": 8, "recipe": "qk_norm", "norm": "rmsnorm"},
                "parallel": {
                    "tensor": self.tensor,
                    "pipeline": self.pipeline,
                    "sequence": self.tensor > 1,
                    "zero_stage": self.zero_stage,
                },
                "precision": {"dtype": self.dtype},
                "batch": {"global_size": micro_batches * replicas, "micro_size": 1},
                "logging": {"probes_every": 0},
            }
        )


LAYOUTS = (  # 30b has the layers and the layout of 10b
    Layout("830m", 1),
    Layout("830m", 8),
    Layout("10b", 1024, 4, 2),
)


class Counted(TorchDispatchMode):
    """Counts by pass: bytes read and written, operators, collectives; and reads by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        self.reads += name in ("_local_scalar_dense", "nonzero", "equal")
        part = _pass()
        if part is None or func.is_view or name in NOTHING:
            return result
        if func.namespace == "c10d":
            self.collectives[part] += 1
        else:
            self.operators[part] += 1
            self.bytes[part] += traffic(func, args, kwargs or {}, result)
        return result


def traffic(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    """Bytes that an operator reads and writes, by its schema."""
    name, moved, given = func._schema.name.partition("::")[2], 0, set()
    named = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    for argument in func._schema.arguments:
        size = _size(named.get(argument.name))
        written = argument.alias_info is not None and argument.alias_info.is_write
        if name.startswith("_fused_adam") and argument.name == "grads":
            written = named.get("grad_scale") is not None  # the schema says always, the kernels then
        moved += size * (written + (not written or name not in OVERWRITES))
        given |= {id(tensor) for tensor in _tensors(named.get(argument.name))}
    return moved + sum(_size(tensor) for tensor in _tensors(result) if id(tensor) not in given)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _size(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))


def _pass() -> str | None:
    """What the code that runs is a part of."""
    frame = sys._getframe(2)
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if name in PASSES and any(room in file for room in ROOMS):
            return PASSES[name]
        frame = frame.f_back  # type: ignore[assignment]
    return None


def count(layout: Layout, micro_batches: int) -> dict[str, Any]:
    """On a process of its own: the second step of the first rank of many."""
    import deepspeed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_stable.engine.engine import Engine
    from megatron_stable.engine.outcome import Refused
    from megatron_stable.parallel.topology import Topology

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(layout.ranks))
    deepspeed.utils.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    dist.init_process_group("fake", rank=0, world_size=layout.ranks, store=FakeStore())
    deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)
    config = layout.config(micro_batches)
    engine = Engine(config, Topology(layout.tensor, layout.pipeline, layout.tensor > 1))
    for step in (1, 2):
        batches = [torch.randint(0, VOCABULARY, (1, SEQUENCE + 1)) for _ in range(micro_batches)]
        counted, tolist = Counted(), Tensor.tolist

        def noted(tensor: Tensor, counted: Counted = counted, tolist: Any = tolist) -> Any:
            counted.reads += 1
            return tolist(tensor)

        with mock.patch.object(Tensor, "tolist", noted), counted:
            engine.train_step(step, batches, 1e-3, lambda metrics: Refused(True))
    parameters = sum(weight.numel() for weight in engine.module.parameters())
    names = {**counted.bytes, **counted.collectives}
    return {
        "reads": counted.reads,
        **{n: (counted.bytes[n] / parameters, counted.operators[n], counted.collectives[n]) for n in names},
    }


def rows(layout: Layout) -> Iterator[str]:
    """The lines of a layout."""
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        one, two = pool.starmap(count, [(layout, 1), (layout, 2)], chunksize=1)
    none = (0.0, 0, 0)
    later = [b - a for a, b in zip(one.get("accumulate", none), two.get("accumulate", none), strict=True)]
    found = {"first micro batch": one.get("accumulate", none), "each later one": later}
    found |= {name: one[name] for name in ORDER[1:] if name in one}
    for name, (moved, operators, collectives) in found.items():
        yield f"| {name} | {moved:.2f} | {operators} | {collectives} |"
    totals = [sum(row[i] for name, row in found.items() if name != "each later one") for i in range(3)]
    yield f"| a step of one micro batch | {totals[0]:.2f} | {totals[1]} | {totals[2]} |"
    yield f"\nHost reads: {one['reads']}."


def whole_matrices(config: Config, layers: int | None = None) -> dict[str, Tensor]:
    """Muon's matrices at full width, on no device."""
    from megatron_stable.model.transformer import layer_list

    with torch.device("meta"):
        blocks = [layer.build() for layer in layer_list(config.model, TensorParallel(), 0, "meta", False)[1:-1]]
    weights = [weight for block in blocks[:layers] for weight in block.parameters()]
    return {place(w).name: torch.empty(place(w).full_shape, device="meta") for w in weights if w.ndim > 1}


def muon_counts(size: str) -> tuple[int, int, int, int]:
    """On one rank: matrices, rounds, operators of these, and operators of one matrix at a time."""
    config = Config.model_validate({"model": {"size": size, "vocab_size": 64}})
    wholes = whole_matrices(config)
    rounds = muon._rounds([Place(tuple(whole.shape), name=name) for name, whole in wholes.items()], 1)
    operators = []
    for batches in (rounds, [[name] for name in wholes]):
        with Counted() as counted:
            for names in batches:
                muon.orthogonalize_({name: wholes[name] for name in names}, config.model, torch.bfloat16)
        operators.append(counted.operators["Muon"])
    return len(wholes), len(rounds), *operators


def muon_seconds(hidden: int, layers: int, pairs: int) -> tuple[float, float, float]:
    """Median seconds of an iteration of all matrices together and of each alone, in turn, and of their ratios."""
    model = {"size": None, "layers": layers, "hidden": hidden, "heads": 8, "sequence_length": 8, "vocab_size": 64}
    config = Config.model_validate({"model": model})
    wholes = {name: torch.randn(shape.shape) for name, shape in whole_matrices(config).items()}
    times: list[list[float]] = [[], []]
    for _ in range(pairs + 1):
        for way, rounds in enumerate(([wholes], [{name: whole} for name, whole in wholes.items()])):
            began = time.process_time()
            for each in rounds:
                copies = {name: whole.clone() for name, whole in each.items()}
                muon.orthogonalize_(copies, config.model, torch.bfloat16)
            times[way].append(time.process_time() - began)
    together, alone = (statistics.median(way[1:]) for way in times)
    return together, alone, statistics.median(b / a for a, b in zip(*(way[1:] for way in times), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="of timings of Muon's iteration")
    pairs = parser.parse_args().pairs
    for layout in LAYOUTS:
        grid = f"TP {layout.tensor}, PP {layout.pipeline}, DP {layout.ranks // layout.tensor // layout.pipeline}"
        print(f"\n{layout.size}, {layout.ranks} ranks ({grid}), {layout.dtype}, ZeRO-{layout.zero_stage}\n")
        print("| pass | bytes per parameter of the rank | operators | collectives |\n|---|---|---|---|")
        print("\n".join(rows(layout)), flush=True)
    print("\nBytes saved per parameter and micro batch, as a share of the time of 6 operations per token; predicted.\n")
    print("| tokens | 8 bytes | 4 bytes |\n|---|---|---|")
    for tokens in (4096, 8192, 16384):
        share = [size / MEMORY / (6 * tokens / ACHIEVED) for size in (8, 4)]
        print("| {} | {:.1%} | {:.1%} |".format(tokens, *share))
    print("\n| Muon, one rank | matrices | rounds | operators | one at a time |\n|---|---|---|---|---|")
    for size in ("830m", "10b"):
        print("| {} | {} | {} | {} | {} |".format(size, *muon_counts(size)), flush=True)
    print("\n| Muon on this CPU | together | each alone | ratio |\n|---|---|---|---|")
    for hidden, layers in ((64, 24), (256, 8)):
        together, alone, ratio = muon_seconds(hidden, layers, pairs)
        print(f"| {layers} layers of width {hidden} | {together * 1e3:.1f} ms | {alone * 1e3:.1f} ms | {ratio:.2f} |")


if __name__ == "__main__":
    main()
