"""The base optimizer: what DeepSpeed calls, once or several times per step, after it has reduced the gradients.

How often it calls :meth:`Optimizer.step` within one optimizer step depends on DeepSpeed's own optimizer: once under
bf16 with ZeRO-1, else once per parameter group (ZeRO-1, ZeRO-2) or part of one (ZeRO-3). What must happen once per step
waits for the first call after :meth:`Optimizer.begin_step`. All else looks at the flats of one call, which hold whole
parameters over the ranks of a pipeline stage::

    begin_step(rate) ── forward, backward … ── step() ── step() ── …
                                               │ once: approval, count of updates, statistics of the global norm
                                               └ each: clip gradients, cut off spikes, update, centre the output,
                                                       clip queries and keys

A clipped gradient is the gradient divided by one number, which the fused update does in passing. Rules that read the
gradient more than once, or compare it with what was before, have it divided first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import inf

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_stable.config.schema import Config
from megatron_stable.optim import adamw, muon, spam
from megatron_stable.optim.adamw import Flat
from megatron_stable.optim.centering import center_
from megatron_stable.optim.clipping import build_clipping
from megatron_stable.optim.clipping_state import ClippingState
from megatron_stable.optim.groups import parameter_groups
from megatron_stable.optim.partition import LocalShard, Partition
from megatron_stable.optim.probes import ParameterProbes
from megatron_stable.optim.qk_clip import qk_clip_
from megatron_stable.parallel.parameters import place

MOMENTS = {"adamw": adamw.MOMENTS, "stable_adamw": adamw.MOMENTS, "muon": muon.MOMENTS}  # by rule


class Optimizer(torch.optim.Optimizer):
    """The rules that ``config.optimizer`` names, over plain parameters or, after :meth:`bind`, over DeepSpeed's flats.

    Over plain parameters it is for one process; there each call of ``step`` is a whole step.

    Args:
        parameters: Each with its place in the whole model, and its name.
        config: The run.

    Attributes:
        updates: Steps that were applied; dropped ones are not counted.
        moments_from: How many of these there were when the moments began at zero.
        max_logits: Asked once per step that is taken, if the configuration has QK-Clip: by block ("blocks.0"), the
            largest attention logit of each local head over the global batch.
        probes: What measures weights, gradients, updates and moments, if anything does.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: Config) -> None:
        groups = parameter_groups(parameters, config)
        super().__init__(groups, {"lr": torch.finfo(torch.float32).tiny})
        self.config = config
        self.updates = self.moments_from = 0
        self._approve: Callable[[Tensor], bool] | None = None  # of this step
        self.max_logits: Callable[[], Mapping[str, Tensor]] = dict
        self._peaks: Mapping[str, Tensor] = {}  # of this step
        self.probes: ParameterProbes | None = None
        self.group_of = {place(weight).name: i for i, group in enumerate(groups) for weight in group["params"]}
        weights = [(i, weight) for i, group in enumerate(groups) for weight in group["params"]]
        self._global_norm: Callable[[], Tensor] | None = None
        self._begun = self._taken = False
        self._muon_dtype = torch.float32 if config.precision.dtype == "fp32" else torch.bfloat16
        self._lay_out(weights, Partition([LocalShard(place(w), 0, w.numel(), w, 0) for _, w in weights]))
        self._pipeline_group: dist.ProcessGroup | None = None
        self._clipping = build_clipping(config.optimizer)

    def bind(
        self,
        flats: Sequence[tuple[int, Tensor]],
        partition: Partition,
        global_norm: Callable[[], Tensor],
        pipeline_group: dist.ProcessGroup,
    ) -> None:
        """Tell the optimizer what its flats hold. Collective; after ``deepspeed.initialize``, before the first step.

        Args:
            flats: (number of the parameter group, flat), all of them, in the same order on every rank of a stage.
            partition: Of this rank's pipeline stage.
            global_norm: This step's global gradient norm, unscaled and before clipping; asked within ``step``.
            pipeline_group: The ranks that hold the stages of this rank's replica.
        """
        self._lay_out(flats, partition)
        self._global_norm = global_norm
        self._pipeline_group = pipeline_group
        self._clipping = build_clipping(self.config.optimizer, pipeline_group)
        for _, flat in flats:
            self._state(flat)

    def measure(self, counted: Collection[str], groups: Collection[str]) -> ParameterProbes:
        """Let steps be measured; after :meth:`bind`.

        Args:
            counted: Names of the parameters of which this rank's shard counts.
            groups: Of probes.
        """
        adam = {flat for flat, rule in self._rules.items() if "exp_avg_sq" in MOMENTS[rule]}
        self.probes = ParameterProbes(self._partition, adam, counted, self.config.model.layers, groups)
        return self.probes

    def begin_step(self, learning_rate: float, approve: Callable[[Tensor], bool] | None = None) -> None:
        """Start an optimizer step.

        Args:
            learning_rate: Each group applies its factor to it.
            approve: Asked once in this step with the global gradient norm, before anything changes. Where it says no,
                the step is dropped: weights, moments, statistics and counts stay as they are. It must say the same on
                all ranks. ``None``: the step is taken.
        """
        self._begun, self._approve = False, approve
        for group in self.param_groups:
            group["lr"] = learning_rate * group["rate_factor"]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient. Collective over the stage."""
        flats = [
            Flat(flat, flat.grad, self._state(flat), group)
            for group in self.param_groups
            for flat in group["params"]
            if flat.grad is not None
        ]
        probes = self.probes if self.probes is not None and self.probes.on else None
        if probes is not None:
            probes.gradients(flats)
        if not self._begun:
            self._begin(flats)
        if probes is not None and self._taken:
            probes.before(flats)
        if self._taken:
            self._update(flats)
        if probes is not None:
            probes.after(flats, self.moments_age) if self._taken else probes.dropped()
        if self._global_norm is None:
            self._begun = False

    @property
    def moments_age(self) -> int:
        """How many gradients the moments have seen."""
        return spam.age(self.updates, self.config.optimizer.momentum_reset_every, self.moments_from)

    def moments(self, flat: Tensor) -> dict[str, Tensor]:
        """The state that is kept for each element of a flat, by name."""
        return {name: self._state(flat)[name] for name in MOMENTS[self._rules[flat]]}

    def set_updates(self, updates: int, moments_from: int = 0) -> None:
        """Set the counts of steps, those before the moments began apart, and with them Adam's bias correction."""
        self.updates, self.moments_from = updates, moments_from
        for state in self.state.values():
            if "step" in state:
                state["step"].fill_(float(updates - moments_from))

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew with all moments."""
        for flat in self.state:
            for moment in self.moments(flat).values():
                moment.zero_()
        self.set_updates(self.updates, self.updates)

    def set_clip(self, limit: float) -> None:
        """Change the global norm to which gradients are clipped, under rules that adapt in any case; 0: none."""
        self._clipping.limit = limit or inf

    def clipping_state(self) -> ClippingState | None:
        """What the clipping rule knows, for a checkpoint; ``None`` if it keeps no statistics. Collective."""
        return self._clipping.state()

    def load_clipping_state(self, stored: ClippingState | None) -> str | None:
        """Restore what :meth:`clipping_state` returned; returns a message for the user where that could not be."""
        if self._clipping.load(stored):
            return None
        self._clipping = build_clipping(self.config.optimizer, self._pipeline_group)
        rule, before = self.config.optimizer.clipping, "none" if stored is None else f"those of {stored.rule}"
        return f"optimizer.clipping {rule} starts its statistics anew: the checkpoint has {before}"

    def _lay_out(self, flats: Sequence[tuple[int, Tensor]], partition: Partition) -> None:
        self._partition = partition
        self._rules: dict[Tensor, str] = {flat: self.param_groups[group]["rule"] for group, flat in flats}
        self._exchanges = {
            flat: muon.exchanges(partition, flat) for flat, rule in self._rules.items() if rule == "muon"
        }

    def _state(self, flat: Tensor) -> dict[str, Tensor]:
        state = self.state[flat]
        if not state:
            state |= {name: torch.zeros_like(flat.detach()) for name in MOMENTS[self._rules[flat]]}
            if "exp_avg_sq" in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        return state

    def _begin(self, flats: list[Flat]) -> None:
        """Once per step: whether it is taken, and what the clipping rule makes of the global norm."""
        self._begun = True
        norm = self._global_norm() if self._global_norm is not None else _norm(flats)
        self._taken = self._approve is None or self._approve(norm)
        if self._taken:
            self.updates += 1
            if self.config.optimizer.qk_clip is not None:
                self._peaks = self.max_logits()
            self._clipping.observe(norm)

    def _update(self, flats: list[Flat]) -> None:
        partition = self._partition
        divisor = self._clip(flats)
        flats = self._spam(flats)
        by_rule = {rule: [flat for flat in flats if flat.group["rule"] == rule] for rule in MOMENTS}
        adamw.adamw(by_rule["adamw"], self.updates - self.moments_from, divisor)
        adamw.stable_adamw(by_rule["stable_adamw"], partition)
        muon.muon(by_rule["muon"], self._exchanges, self.config.model, self._muon_dtype)
        if self.config.optimizer.mu_centering:
            output = "embedding.weight" if self.config.model.tied_embeddings else "head.weight"
            for number, shard in partition.within(flat.weight for flat in flats):
                if shard.place.name == output:
                    center_(partition, number)
        if self.config.optimizer.qk_clip is not None:
            weights = [flat.weight for flat in flats]
            threshold, alpha = self.config.optimizer.qk_clip, self.config.optimizer.qk_clip_alpha
            qk_clip_(partition, weights, self._peaks, self.config.model, threshold, alpha)

    def _clip(self, flats: list[Flat]) -> Tensor | None:
        """Clip all gradients but those that the fused update divides by what is returned."""
        divisor = self._clipping.scale(flats, self._partition)
        if divisor is None or not flats:
            return None
        if isinstance(divisor, float):
            # filled by a kernel; a copy from the host would wait for the device
            divisor = torch.full((), divisor, device=flats[0].grad.device)
        divisor = divisor.to(flats[0].grad.device)
        fused = not self._cuts_spikes
        first = [flat.grad for flat in flats if not fused or flat.group["rule"] != "adamw"]
        if first:
            torch._foreach_div_(first, divisor)
        return divisor if fused else None

    @property
    def _cuts_spikes(self) -> bool:
        settings = self.config.optimizer
        clips = spam.clips_spikes(self.updates, settings.momentum_reset_every, self.moments_from)
        return settings.spike_threshold is not None and clips

    def _spam(self, flats: list[Flat]) -> list[Flat]:
        """Zero moments, cut off spikes, and lower the learning rate after a reset, where the configuration says so."""
        settings = self.config.optimizer
        every, threshold = settings.momentum_reset_every, settings.spike_threshold
        for flat in flats:
            if spam.resets(self.updates, every):
                for moment in self.moments(flat.weight).values():
                    moment.zero_()
            if threshold is not None and self._cuts_spikes:
                spam.clip_spikes_(flat.grad, flat.state["exp_avg_sq"], threshold)
        factor = spam.rate_factor(self.updates, every, settings.momentum_reset_warmup)
        if factor == 1.0:
            return flats
        # the learning rate alone is lowered, not the weight decay that it is multiplied with
        change = lambda group: {"lr": group["lr"] * factor, "weight_decay": group["weight_decay"] / factor}  # noqa: E731
        return [flat._replace(group={**flat.group, **change(flat.group)}) for flat in flats]


def _norm(flats: list[Flat]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(flat.grad, dtype=torch.float64) for flat in flats]).norm()
