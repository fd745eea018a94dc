"""The ranks that use a trained model together: which part of it each holds, and what they tell each other.

Each pass goes down the pipeline's stages; the last one has the logits, of whose vocabulary each TP rank has a part. One
rank, the decider, sees all of them, and tells all others what it makes of them: so no two ranks can disagree.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_stable.config.checks import check
from megatron_stable.config.schema import Config
from megatron_stable.errors import ConfigError, MegatronStableError
from megatron_stable.parallel.agreement import everywhere, together
from megatron_stable.parallel.launcher import seat
from megatron_stable.parallel.lifeline import SLOW, Lifeline
from megatron_stable.parallel.line import Line
from megatron_stable.parallel.topology import TensorParallel, Topology
from megatron_stable.parallel.world import join_world, leave_world
from megatron_stable.training.pretrain import Tell, cause, code

T = TypeVar("T")
PATIENCE = 300.0  # seconds
LAYOUT = ("parallel.tensor", "parallel.pipeline")


@dataclass(frozen=True)
class Ranks:
    """Those that use a model together; without a topology this process does so alone."""

    topology: Topology | None = None
    progress: Callable[[], None] = lambda: None

    @property
    def tp(self) -> TensorParallel:
        """The TP group."""
        return self.topology.tp if self.topology else TensorParallel()

    @property
    def first(self) -> bool:
        """Whether this rank is the one that speaks to the user."""
        return self.topology is None or self.topology.rank == 0

    @property
    def first_stage(self) -> bool:
        """Whether this rank has the embedding."""
        return self.topology is None or self.topology.stage == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank has the output head."""
        return self.topology is None or self.topology.last_stage

    @property
    def replica(self) -> tuple[int, int]:
        """(which copy of the model this rank has a part of, how many there are)."""
        return (self.topology.data_rank, self.topology.data_size) if self.topology else (0, 1)

    def hand_on(self, x: Tensor, layers: Sequence[Callable[[Tensor], Tensor]], hidden: int) -> Tensor | None:
        """Tokens ``[b, s]`` through the layers of all stages; what comes out, on the last one."""
        line = self._line(x, hidden)
        if line is not None and not self.first_stage:
            x = line.receive()
        for layer in layers:
            x = layer(x)
        if line is not None:
            line.send(x)
            line.settle()
        return x if self.last_stage else None

    def whole(self, logits: Tensor) -> Tensor | None:
        """``[n, v/tp]`` on the last stage -> ``[n, v]``, on the decider."""
        if not self.tp.active:
            return logits
        assert self.topology is not None
        parts = [torch.empty_like(logits) for _ in range(self.tp.size)] if self.tp.rank == 0 else None
        dist.gather(logits.contiguous(), parts, self._decider, self.tp.group)
        return torch.cat(parts, -1) if parts else None

    def told(self, decision: list[int] | None, numbers: int, device: torch.device) -> list[int]:
        """What the decider has decided; elsewhere ``decision`` is not looked at."""
        self.progress()
        if self.topology is None:
            assert decision is not None
            return decision
        decides = self.topology.rank == self._decider
        words = torch.tensor(decision, device=device) if decides else torch.empty(numbers, dtype=torch.int64).to(device)
        dist.broadcast(words, self._decider, self.topology.model_group)
        found: list[int] = words.tolist()
        return found

    def everywhere(self, here: T) -> list[T]:
        """What it is on each rank. Collective."""
        return everywhere(here) if self.topology else [here]

    def together(self) -> AbstractContextManager[None]:
        """Within, a user's error on any rank is one on all of them. Collective."""
        return together() if self.topology else nullcontext()

    @property
    def _decider(self) -> int:
        """The first TP rank of the last stage of this replica."""
        assert self.topology is not None
        return dist.get_global_rank(self.topology.pipeline_group, self.topology.pipeline_size - 1) - self.tp.rank

    def _line(self, tokens: Tensor, hidden: int) -> Line | None:
        topology = self.topology
        if topology is None or topology.pipeline_size == 1:
            return None
        like = torch.empty(*tokens.shape, hidden, device=tokens.device)
        return Line(topology, topology.pipeline_group, topology.stage + 1, topology.stage - 1, like)


@contextmanager
def joined(tell: Tell = lambda error: None) -> Iterator[Lifeline | None]:
    """Join the ranks that a launcher has started with this one; ``None`` where this process is alone.

    Args:
        tell: Called with an error that is the same on all ranks, before any of them ends.
    """
    if not several():
        yield None
        return
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    join_world(PATIENCE + 2 * SLOW)
    lifeline = Lifeline(PATIENCE)
    try:
        yield lifeline
    except BaseException as error:
        if isinstance(error, MegatronStableError) and error.agreed:
            tell(error)
            everywhere(None)  # launchers end all ranks when the first ends, which may not be the one that tells
            lifeline.leave()
            leave_world()
        else:
            lifeline.crash(cause(error), code(error))
        raise
    everywhere(None)  # rank 0 has printed
    lifeline.leave()
    leave_world()


def several() -> bool:
    """Whether a launcher has started this process as one of several ranks."""
    mine = seat()
    return mine is not None and mine.size > 1


def layout(config: Config, world: int, given: Sequence[str], replicas: bool = True) -> tuple[int, int]:
    """(TP, PP) of so many ranks: as given, by ``parallel.tensor=N`` and ``parallel.pipeline=N``, or as the run was.

    Args:
        replicas: Whether there may be several copies of the model.

    Raises:
        ConfigError: They do not suit the model, or the ranks.
    """
    sizes = dict.fromkeys(LAYOUT, 1)
    for each in given:
        key, _, value = each.partition("=")
        if key not in LAYOUT or not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"{each}: of a trained run only {' and '.join(f'{key}=N' for key in LAYOUT)} can be set")
        sizes[key] = int(value)
    if not given and world > 1:
        sizes = dict(zip(LAYOUT, (config.parallel.tensor, config.parallel.pipeline), strict=True))
    tensor, pipeline = sizes.values()
    size = tensor * pipeline
    if world % size or not (replicas or world == size):
        raise ConfigError(
            f"{world} rank(s) cannot hold the model as {tensor} (parallel.tensor) x {pipeline} (parallel.pipeline): "
            f"start {'a multiple of ' * replicas}{size}, or give another layout, as parallel.tensor={world}"
        )
    parallel = {"tensor": tensor, "pipeline": pipeline, "sequence": False, "zero_stage": 1}
    check(config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)}))
    return tensor, pipeline
