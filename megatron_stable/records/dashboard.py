"""The layout of TensorBoard's tab Custom Scalars: what tells whether a run is stable comes first, then every probe.

A category is a mapping of titles to charts, as ``torch.utils.tensorboard`` wants them. A chart shows all tags that match a
regular expression, so its lines are the layers that the run has.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from megatron_stable.config.schema import LoggingConfig
from megatron_stable.stability.probes import LINEARS, PROBES, Probe, tag

Charts: TypeAlias = dict[str, list[Any]]

NAMES = {"qkv": "QKV", "q": "Q", "k": "K", "v": "V", "proj": "Proj", "fc1": "FC1", "fc2": "FC2"}


def layout(logging: LoggingConfig) -> dict[str, Charts]:
    """Charts by category: ``stability``, which opens; one for each group of probes; and what is left."""
    groups = logging.probes if logging.probes_every else ()
    probes = [probe for probe in PROBES.values() if probe.group in groups]
    first = {
        "loss": _lines("train/loss", "validation/loss"),
        "gradient norm": _lines("train/grad_norm"),
        "events": ["Multiline", ["^events/"]],
        "learning rate": _lines("train/learning_rate"),
    }
    for probe in (PROBES["attention/max_logit"], PROBES["output_norm"]):
        if probe in probes:
            first |= _by_layer(probe, tuple(point for point in probe.points if point in LINEARS))
    categories: dict[str, Charts] = {group: {} for group in groups}
    for probe in probes:
        categories[probe.group] |= _charts(probe, logging.probe_heads)
    return {
        "stability": first,
        **categories,
        "guard": {
            "scores": _lines("guard/loss_score", "guard/grad_norm_score"),
            "dropped updates": _lines("guard/dropped"),
        },
        "run": {
            "z-loss": _lines("train/z_loss", "train/mu_loss"),
            "loss scale": _lines("train/loss_scale"),
            "tokens per second": _lines("train/tokens_per_second"),
            "MFU": _lines("train/mfu"),
            "data step": _lines("train/data_step"),
        },
    }


def _charts(probe: Probe, heads: bool) -> Charts:
    if not probe.layered:
        return {_title(probe): _lines(probe.name)}
    charts = _by_layer(probe, probe.points)
    if probe.outside:
        charts[f"{_title(probe)}: {' and '.join(probe.outside)}"] = _lines(*(tag(probe.name, at) for at in probe.outside))
    if probe.heads and heads:
        charts[f"{_title(probe)} by head"] = ["Multiline", [rf"^{probe.name}/layer_\d+/head_\d+$"]]
    return charts


def _by_layer(probe: Probe, points: tuple[str, ...]) -> Charts:
    """A chart for each point, or one for a probe without any, with a line for each layer."""
    return {
        f"{_title(probe, point)} by layer": ["Multiline", [rf"^{tag(probe.name, point)}/layer_\d+$"]]
        for point in points or (None,)
    }


def _title(probe: Probe, point: str | None = None) -> str:
    words = f"{probe.name.replace('/', ', ').replace('_', ' ')}"
    return f"{words}: {NAMES.get(point, point)}" if point else words


def _lines(*tags: str) -> list[Any]:
    return ["Multiline", [f"^{name}$" for name in tags]]  # they are matched from the beginning only
