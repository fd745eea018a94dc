"""What is measured inside the model, brought together from all ranks: the probes of activations and of parameters.

::

    step     model/activations.py   a row for each block     ─┐  on the device, of this rank alone
             optim/probes.py        a column for each weight ─┴─> a row of the recorder, this step's
    record   recorder ── each number to its place among those of all ranks ── sum, largest ──> rank 0 ── by tag

The recorder keeps the rows of the last measured steps, so that when something goes wrong they can still be had.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import nn

from megatron_stable.config.schema import Config
from megatron_stable.engine.readings import Readings, Values
from megatron_stable.model.activations import Activations
from megatron_stable.model.probes import LOGITS, POINTS, SHARDED
from megatron_stable.optim.optimizer import Optimizer
from megatron_stable.parallel.topology import Topology
from megatron_stable.stability.probes import tag


class Probes:
    """All probes of a rank.

    Args:
        module: The layers on this rank.
        optimizer: Bound to what it updates.
        counted: Names of the parameters of which this rank's shards count.
    """

    def __init__(
        self,
        config: Config,
        topology: Topology,
        module: nn.Module,
        optimizer: Optimizer,
        counted: Collection[str],
        device: torch.device,
    ) -> None:
        self.config, self.topology, self.device = config, topology, device
        self.activations = Activations(module, config.model, config.logging, topology.tp, device)
        self.parameters = optimizer.measure(counted, config.logging.probes)
        self.optimizer = optimizer
        self.readings = Readings(config)
        self._lay_out()
        self.on = False
        size = max(1, config.logging.flight_recorder)
        self._steps: deque[tuple[int, int]] = deque(maxlen=size)  # (step, updates of the moments)
        self._sums = torch.zeros(size, len(self._sum_places), dtype=torch.float64, device=device)
        self._tops = torch.zeros(size, len(self._top_places), dtype=torch.float64, device=device)
        self._next = 0

    def begin(self, on: bool, histograms: bool = False) -> None:
        """Before a step that is measured, or is not; likewise of histograms."""
        self.on = on
        self.activations.begin(on, histograms)
        self.parameters.begin(on)

    def end(self, step: int) -> None:
        """After a step: keep what was measured."""
        if not self.on:
            return
        seen, row = self.activations, self._next
        self._sums[row] = torch.cat([seen.sums.flatten(), seen.logits, self.parameters.sums.flatten()])
        self._tops[row] = torch.cat([seen.tops.flatten(), seen.top_logit.view(1)])
        self._steps.append((step, self.optimizer.moments_age))
        self._next = (row + 1) % len(self._sums)
        seen.switch.on = False

    def forget(self) -> None:
        """What was measured is of steps that are not the run's any more."""
        self._steps.clear()
        self._next = 0

    def last(self) -> Values:
        """Of the last measured step. Collective: two small reductions; rank 0 alone knows the values."""
        return self._read(1)[0][1]

    def flight(self) -> list[tuple[int, Values]]:
        """(step, values) of all steps that are kept, oldest first. Collective like :meth:`last`."""
        return self._read(len(self._steps)) if self._steps else []

    def histograms(self) -> dict[str, list[float]]:
        """Of the last step that made them: by tag, how many elements have a magnitude in each power of two; see
        :func:`~megatron_stable.model.probes.magnitudes`. Collective; rank 0 alone knows them."""
        model, here = self.config.model, self.activations.counts
        assert here is not None
        counts = here.new_zeros(model.layers, *here.shape[1:])
        counts[self.activations.layers] = here * self._once[: len(POINTS), None]
        if self.topology.world > 1:
            dist.reduce(counts, 0)
        if self.topology.rank:
            return {}
        of_layers = counts.cpu().tolist()
        return {
            tag("output_histogram", point, layer): of_layers[layer][i]
            for i, point in enumerate(POINTS)
            for layer in range(model.layers)
        }

    def _read(self, count: int) -> list[tuple[int, Values]]:
        size = len(self._sums)
        rows = [(self._next - count + i) % size for i in range(count)]
        sums = self._sums.new_zeros(count, self.readings.sums)
        sums[:, self._sum_places] = self._sums[rows] * self._once
        tops = self._tops.new_full((count, self.readings.tops), -torch.inf)
        tops[:, self._top_places] = self._tops[rows].nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        if self.topology.world > 1:
            dist.reduce(sums, 0)
            dist.reduce(tops, 0, dist.ReduceOp.MAX)
        if self.topology.rank:
            return [(step, {}) for step, _ in list(self._steps)[-count:]]
        both = torch.cat([sums, tops], 1).cpu().numpy()  # the one read from the device
        steps = list(self._steps)[-count:]
        return [(step, self.readings.of(row, updates)) for (step, updates), row in zip(steps, both, strict=True)]

    def _lay_out(self) -> None:
        """Where this rank's numbers lie among those of all, and which of them count here."""
        model, tp = self.config.model, self.topology.tp
        here, points = model.heads // tp.size, len(POINTS)
        own = [*range(points), *(points + tp.rank * here + i for i in range(here))]
        blocks = [layer * (points + model.heads) + column for layer in self.activations.layers for column in own]
        behind = model.layers * (points + model.heads)
        rest = len(LOGITS) + self.parameters.sums.numel()
        self._sum_places = torch.tensor([*blocks, *range(behind, behind + rest)], device=self.device)
        self._top_places = torch.tensor([*blocks, behind], device=self.device)
        # an output that TP replicates counts once
        whole = [point in SHARDED or tp.sequence_sharded or tp.rank == 0 for point in POINTS] + [True] * here
        once = [*(whole * len(self.activations.layers)), *[True] * rest]
        self._once = torch.tensor(once, dtype=torch.float64, device=self.device)
