"""What a pipeline costs: how much of a step its stages idle, by our schedule and by DeepSpeed's; what is sent.

    python benchmarks/pipeline.py            # all of it, on two cores
    python benchmarks/pipeline.py --counts   # only what needs no processes

1. *counted*: what a rank of 10b and 30b sends and holds for the pipeline, by arithmetic.
2. *played*: both schedules with stated times of passes and messages, where a message begins when both sides are there.
3. *measured*: real gloo ranks that take steps by both schedules in turn on one engine. Where a row states the time of a
   pass, each forward pass also sleeps so long, and each backward pass twice as long: more ranks than cores then idle as
   they would on machines of their own.

Stages idle (PP - 1) / (micro batches + PP - 1) of a step if all take equally long and messages no time. Nothing is
asserted.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

os.environ.update({"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"})

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import p2p, schedule
from scale import ACHIEVED, BATCH, LAYOUTS, NETWORK, config_of

from megatron_stable.analysis.memory import memory
from megatron_stable.config.schema import Config
from megatron_stable.engine.engine import Engine
from megatron_stable.engine.schedule import one_forward_one_backward
from megatron_stable.model.transformer import parameter_count
from megatron_stable.optim.schedule import learning_rate
from megatron_stable.parallel.topology import Topology
from megatron_stable.parallel.world import join_world

Op = tuple[str, tuple[str, int]]  # "send", "post" (a send that does not wait), "receive" and the channel; or a pass


def formula(stages: int, micro_batches: int) -> float:
    """The share of a step that each stage idles."""
    return (stages - 1) / (micro_batches + stages - 1)


def ours(stage: int, stages: int, micro_batches: int) -> Iterator[Op]:
    """What a stage does in a step."""
    for forward in one_forward_one_backward(stage, stages, micro_batches):
        kind, step = ("forward", 1) if forward else ("backward", -1)
        if 0 <= stage - step < stages:
            yield "receive", (kind, stage)
        yield kind, ("", 0)
        if 0 <= stage + step < stages:
            yield "post", (kind, stage + step)


def deepspeeds(stage: int, stages: int, micro_batches: int) -> Iterator[Op]:
    """What a stage does in a step by DeepSpeed."""
    meaning: dict[type, Op] = {
        schedule.SendActivation: ("send", ("forward", stage + 1)),
        schedule.RecvActivation: ("receive", ("forward", stage)),
        schedule.SendGrad: ("send", ("backward", stage - 1)),
        schedule.RecvGrad: ("receive", ("backward", stage)),
        schedule.ForwardPass: ("forward", ("", 0)),
        schedule.BackwardPass: ("backward", ("", 0)),
    }
    for commands in schedule.TrainSchedule(micro_batches, stages, stage):
        yield from (meaning[type(command)] for command in commands if type(command) in meaning)


def played(
    program: Callable[[int, int, int], Iterator[Op]], stages: int, micro_batches: int, forward: float, message: float
) -> float:
    """The share of a step that stages idle, where a backward pass takes twice as long as a forward pass.

    Args:
        forward, message: Seconds of a forward pass, and of a message from when both sides are there.
    """
    programs = [list(program(stage, stages, micro_batches)) for stage in range(stages)]
    at, clock = [0] * stages, [0.0] * stages
    ready: dict[tuple[str, tuple[str, int]], list[float]] = defaultdict(list)  # by side: when it came to a message
    ends: dict[tuple[str, int], list[float]] = defaultdict(list)
    here = [False] * stages  # whether a stage stands at a message and has said so
    while any(place < len(whole) for place, whole in zip(at, programs, strict=True)):
        for stage in range(stages):
            while at[stage] < len(programs[stage]):
                kind, channel = programs[stage][at[stage]]
                if kind in ("forward", "backward"):
                    clock[stage] += forward * (1 if kind == "forward" else 2)
                    at[stage] += 1
                    continue
                side = ready["receive" if kind == "receive" else "send", channel]
                if not here[stage]:
                    if kind == "post" and len(side) > len(ends[channel]):
                        break  # the one before has not been received
                    if kind == "post" and side:
                        clock[stage] = max(clock[stage], ends[channel][len(side) - 1])
                    side.append(clock[stage])
                    here[stage] = True
                number = len(side) - 1
                sent, received, over = ready["send", channel], ready["receive", channel], ends[channel]
                if len(over) == number and min(len(sent), len(received)) > number:
                    over.append(max(sent[number], received[number], *over[-1:]) + message)
                if kind != "post":
                    if len(over) <= number:
                        break
                    clock[stage] = over[number]
                at[stage] += 1
                here[stage] = False
    busy = 3 * forward * micro_batches
    return 1 - busy / max(clock)


def counted() -> None:
    """What the pipeline sends and holds, and how long stages idle if passes are as fast as ``scale`` has it."""
    print(
        "| size | ranks | TP x PP | micro batches | message | of a forward pass | sent a step, most | logits: ours",
        end="",
    )
    print(" | DeepSpeed's | idle: formula | played: ours | DeepSpeed's |\n|" + 12 * "---|")
    for size in ("10b", "30b"):
        for ranks, (tensor, pipeline) in LAYOUTS[size].items():
            if pipeline == 1:
                continue
            config = config_of(size, tensor, pipeline)
            micro_batches, model = BATCH[size] * tensor * pipeline // ranks, config.model
            size_sent = 2 * model.sequence_length * model.hidden / tensor
            message = size_sent / NETWORK
            forward = 2 * parameter_count(model)[1] * model.sequence_length / (tensor * pipeline * ACHIEVED)
            sent = micro_batches * min(2, pipeline - 1)
            logits = memory(config, ranks)[-1].logits
            idle = [played(each, pipeline, micro_batches, forward, message) for each in (ours, deepspeeds)]
            print(f"| {size} | {ranks} | {tensor} x {pipeline} | {micro_batches}", end="")
            print(f" | {size_sent / 1e6:.1f} MB, {message * 1e3:.2f} ms | {message / forward:.1%}", end="")
            print(
                f" | {sent}, {sent * size_sent / 1e6:,.0f} MB | {logits / 1e6:.0f} MB | {2 * logits / 1e6:.0f} MB",
                end="",
            )
            print(f" | {formula(pipeline, micro_batches):.2%} | {idle[0]:.2%} | {idle[1]:.2%} |")


def play() -> None:
    print("\n| PP | micro batches | message / forward pass | formula | played: ours | DeepSpeed's | its step / ours |")
    print("|" + 7 * "---|")
    for stages, micro_batches in ((2, 8), (4, 8), (4, 32), (8, 32)):
        for message in (0.0, 0.01, 0.1):
            mine, other = (played(each, stages, micro_batches, 1.0, message) for each in (ours, deepspeeds))
            print(
                f"| {stages} | {micro_batches} | {message} | {formula(stages, micro_batches):.1%} "
                f"| {mine:.1%} | {other:.1%} | {(1 - mine) / (1 - other):.3f} |"
            )


class Rank:
    """Steps of a rank by either schedule, with the time that it waits for its neighbours.

    Args:
        sleep: Seconds that a forward pass sleeps, and a backward pass twice.
    """

    def __init__(self, config: Config, sleep: float) -> None:
        self.config, self.sleep = config, sleep
        self.topology = Topology(1, config.parallel.pipeline)
        self.engine = Engine(config, self.topology)
        assert self.engine.schedule is not None
        self.schedule: Any = self.engine.schedule
        self.inner, self.own, self.step = self.schedule.engine, self.schedule.train, 0
        self.waited, self.ended = 0.0, 0.0
        for line in (self.schedule.down, self.schedule.up):
            line.receive, line.settle = self._waiting(line.receive), self._waiting(line.settle)
        p2p.send, p2p.recv = self._waiting(p2p.send), self._waiting(p2p.recv)
        after = self.inner._exec_reduce_tied_grads

        def passes_are_over() -> None:
            self.ended = time.perf_counter()
            dist.barrier()
            self.all_ended = time.perf_counter()
            after()

        self.inner._exec_reduce_tied_grads = passes_are_over
        # DeepSpeed finds its instructions in a table of the class
        table = {**type(self.inner)._INSTRUCTION_MAP, schedule.ReduceTiedGrads: lambda engine: passes_are_over()}
        self.inner._INSTRUCTION_MAP = table
        if sleep:
            self.engine.module.register_forward_hook(self._sleep)
        length = config.model.sequence_length + 1
        self.batches = [
            torch.randint(0, config.model.vocab_size or 2, (config.batch.micro_size, length))
            for _ in range(self.engine.accumulation)
        ]

    def _sleep(self, module: Any, given: Any, out: torch.Tensor) -> None:
        time.sleep(self.sleep)
        if out.requires_grad:
            out.register_hook(lambda grad: time.sleep(2 * self.sleep))

    def _waiting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.waited += time.perf_counter() - began

        return timed

    def timed(self, mine: bool) -> tuple[float, float]:
        """(idle share of this stage, seconds) of the passes of a step."""
        self.schedule.train = self.own if mine else self.inner.train_batch
        self.step, self.waited = self.step + 1, 0.0
        dist.barrier()
        began = time.perf_counter()
        self.engine.train_step(self.step, self.batches, learning_rate(self.config, 1))
        span = self.all_ended - began
        return 1 - (self.ended - began - self.waited) / span, span


def rank_main(stages: int, micro_batches: int, sleep: float, hidden: int, length: int, steps: int) -> None:
    """One rank of a measured row; the first prints it."""
    join_world()
    config = Config.model_validate(
        {
            "model": {
                "size": None,
                "layers": 2 * stages,
                "hidden": hidden,
                "heads": 4,
                "sequence_length": length,
                "vocab_size": 512,
                "norm": "rmsnorm",
            },
            "parallel": {"pipeline": stages},
            "batch": {"global_size": micro_batches, "micro_size": 1},
            "logging": {"probes_every": 0},
        }
    )
    rank = Rank(config, sleep)
    for mine in (True, False):
        rank.timed(mine)
    pairs = torch.tensor(
        [[rank.timed(True), rank.timed(False)] for _ in range(steps)]
    )  # [steps, whose, (idle, seconds)]
    idle = pairs[:, :, 0].contiguous()
    dist.all_reduce(idle)
    if dist.get_rank() == 0:
        mine, other = (idle / stages).median(0).values.tolist()
        ratios = sorted((pairs[:, 1, 1] / pairs[:, 0, 1]).tolist())
        low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
        work = f"{sleep * 1e3:.0f} ms, twice" if sleep else f"{hidden} wide"
        print(f"| {stages} | {micro_batches} | {work} | {4 * length * hidden / 1e6:.3f} MB", end="")
        print(f" | {formula(stages, micro_batches):.1%} | {mine:.1%} | {other:.1%}", end="")
        print(f" | {statistics.median(ratios):.3f} ({low:.3f}–{high:.3f}) |", flush=True)


def measure(steps: int) -> None:
    print("\n| PP | micro batches | a pass | message | formula | measured: ours | DeepSpeed's | its time / ours |")
    print("|" + 8 * "---|", flush=True)
    rows = [  # (stages, micro batches, sleep, hidden, length)
        (2, 4, 0.0, 256, 256),
        (2, 8, 0.0, 256, 256),
        (2, 8, 0.1, 64, 16),
        (4, 2, 0.1, 64, 16),
        (4, 8, 0.1, 64, 16),
    ]
    for row in rows:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        world = {"WORLD_SIZE": str(row[0]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, __file__, "--row", *map(str, (*row, steps))]
        ranks = [
            subprocess.Popen(command, env={**os.environ, **world, "RANK": str(n), "LOCAL_RANK": str(n)})
            for n in range(row[0])
        ]
        for rank in ranks:
            rank.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", action="store_true", help="count and play, without processes")
    parser.add_argument("--steps", type=int, default=10, help="pairs of steps of each measured row")
    parser.add_argument("--row", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        stages, micro_batches, sleep, hidden, length, steps = args.row
        rank_main(int(stages), int(micro_batches), float(sleep), int(hidden), int(length), int(steps))
        return
    counted()
    play()
    if not args.counts:
        measure(args.steps)


if __name__ == "__main__":
    main()
