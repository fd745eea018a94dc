"""The guard: one verdict on each update before it is made, and a call for recovery when updates will not do.

It sees what all ranks know alike, loss and gradient norm of the step, so its decision is the same on all ranks
without a word between them.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf, isfinite
from typing import Any, NamedTuple

from megatron_stable.config.schema import GuardConfig
from megatron_stable.stability.detector import GRAD_NORM, LOSS, QUIET, SpikeDetector, Verdict
from megatron_stable.stability.recovery import Trouble

RECENT = 1000  # steps over which `max_drops` counts
NORMAL = ("warmup", "normal")


class Judgement(NamedTuple):
    """On one step.

    Attributes:
        take: Whether the update may be made.
        bad: Whether a checkpoint from shortly before should not be called healthy.
        events: For the ledger: (event, facts).
        trouble: What asks for recovery, or for the end of a run that may not recover.
        scores: MADs above the usual level, by series; infinite where a value was not finite.
    """

    take: bool
    bad: bool
    events: tuple[tuple[str, dict[str, Any]], ...]
    trouble: Trouble | None
    scores: dict[str, float]


class Guard:
    """Judges step after step. ``state`` belongs into the checkpoint.

    Args:
        config: What it may do.
        fp16: An overflow with a finite loss is then the loss scale's business, and no drop of the guard's.
    """

    def __init__(self, config: GuardConfig, fp16: bool = False) -> None:
        self.config, self.fp16 = config, fp16
        self._begin()

    def _begin(self) -> None:
        own = self.config.model_dump(include={"window", "warmup", "threshold", "patience"})
        self.detectors = {
            "loss": SpikeDetector(replace(LOSS, drift=self.config.drift, **own)),
            "grad_norm": SpikeDetector(replace(GRAD_NORM, **own)),
        }
        self.kinds = dict.fromkeys(self.detectors, "warmup")  # the last verdicts
        self.onsets: dict[str, int] = {}  # of excursions in progress
        self.calm = dict.fromkeys(self.detectors, 0)  # normal values in a row
        self.drops: list[int] = []  # recent steps without an update
        self.consecutive = 0
        self.overflows = 0  # in a row, of fp16

    def judge(self, step: int, loss: float, grad_norm: float, overflow: bool = False) -> Judgement:
        """Judge a step before its update is made.

        Args:
            step: Steps attempted, this one included.
            loss: Over all ranks.
            grad_norm: Global, before clipping.
            overflow: Whether gradients were not finite, so that the engine makes no update whatever the guard says.
        """
        routine = overflow and self.fp16 and isfinite(loss)
        self.overflows = self.overflows + 1 if overflow else 0
        rule = None if routine else self._not_finite(loss, grad_norm, overflow)
        seen = {"loss": loss, "grad_norm": grad_norm}
        if routine or rule is not None:  # what is known to be wrong, and told as such, is no news to the detectors
            seen = {name: value for name, value in seen.items() if isfinite(value)}
        verdicts = {name: self.detectors[name].update(step, value) for name, value in seen.items()}
        kinds = {name: verdict.kind for name, verdict in verdicts.items()}
        events = [event for name, value in seen.items() for event in self._turn(name, step, value, verdicts[name])]
        if rule is None and self.config.drop_spikes and "spike" in kinds.values():
            rule = "spike"
        if rule is not None:
            self.drops = [earlier for earlier in self.drops if earlier > step - RECENT] + [step]
            self.consecutive += 1
            facts = {"loss": _plain(loss), "grad_norm": _plain(grad_norm)}
            counts = {"consecutive": self.consecutive, "total": len(self.drops)}
            events.append(("drop", {"rule": rule, **facts, **counts, "by": "guard"}))
        elif not routine:
            self.consecutive = 0
        return Judgement(
            take=rule is None,
            bad=rule is not None or kinds.get("loss") in ("spike", "divergence"),
            events=tuple(events),
            trouble=self._trouble(step, rule, verdicts.get("loss")),
            scores={name: verdicts[name].score if name in verdicts else inf for name in self.detectors},
        )

    def state(self) -> dict[str, Any]:
        """All of it, as plain values."""
        detectors = {name: detector.state() for name, detector in self.detectors.items()}
        own = ("kinds", "onsets", "calm", "drops", "consecutive", "overflows")
        return {"detectors": detectors, **{name: getattr(self, name) for name in own}}

    def load(self, state: dict[str, Any] | None) -> None:
        """Restore what :meth:`state` returned; ``None``: begin anew. KeyError, TypeError or ValueError: unusable."""
        self._begin()
        if state is not None:
            for name, detector in self.detectors.items():
                detector.load(state["detectors"][name])
            self.kinds = {name: str(state["kinds"][name]) for name in self.kinds}
            self.onsets = {name: int(onset) for name, onset in state["onsets"].items() if name in self.detectors}
            self.calm = {name: int(state["calm"][name]) for name in self.calm}
            self.drops = [int(step) for step in state["drops"]]
            self.consecutive, self.overflows = int(state["consecutive"]), int(state["overflows"])

    def _not_finite(self, loss: float, grad_norm: float, overflow: bool) -> str | None:
        """Why the update must not be made; of an overflow, why it was not."""
        if overflow or not isfinite(grad_norm):
            return "non-finite gradient"
        return "non-finite loss" if not isfinite(loss) and self.config.mode != "watch" else None

    def _turn(self, name: str, step: int, value: float, verdict: Verdict) -> list[tuple[str, dict[str, Any]]]:
        """The event of a series: what begins, changes its kind, or is over."""
        if verdict.kind in NORMAL:
            self.calm[name] += 1
            if name not in self.onsets or self.calm[name] < QUIET:
                return []
            onset, self.kinds[name] = self.onsets.pop(name), verdict.kind
            return [("spike_end", {"series": name, "onset": onset, "duration": step - QUIET + 1 - onset})]
        self.calm[name] = 0
        onset = verdict.onset or step
        if (verdict.kind, onset) == (self.kinds[name], self.onsets.get(name)):
            return []
        self.kinds[name], self.onsets[name] = verdict.kind, onset
        if verdict.kind == "shift":
            del self.onsets[name]  # the level is another now, so nothing has to fall back
        facts = {"series": name, "value": _plain(value), "level": _plain(verdict.level), "score": _plain(verdict.score)}
        return [(verdict.kind, {**facts, "scale": _plain(verdict.scale), "onset": onset})]

    def _trouble(self, step: int, rule: str | None, loss: Verdict | None) -> Trouble | None:
        config = self.config
        if config.mode == "watch":
            return None
        if rule is not None and self.consecutive >= config.max_consecutive_drops:
            reason = f"{self.consecutive} updates in a row were dropped ({rule})"
            return Trouble("consecutive drops", self._onset(self.drops[-self.consecutive :][0]), step, reason)
        if rule is not None and len(self.drops) >= config.max_drops:
            reason = f"{len(self.drops)} updates were dropped within {RECENT} steps, the last for a {rule}"
            return Trouble("total drops", self._onset(step), step, reason)
        onset = self._onset(step)
        # a rise that began longer ago is too slow for its data to be to blame: that is the user's to judge
        recent = step - onset <= max(config.patience, config.near_steps)
        if loss is not None and loss.kind == "divergence" and config.mode == "recover" and recent:
            reason = f"the loss rose from {loss.level:.4g} at step {onset} and has not fallen back by step {step}"
            return Trouble("divergence", onset, step, reason)
        return None

    def _onset(self, step: int) -> int:
        """Where trouble that is noticed in ``step`` began: with the rise of the loss that it is part of, if any."""
        return min(step, self.onsets.get("loss", step))


def _plain(value: float) -> float | None:
    return value if isfinite(value) else None
