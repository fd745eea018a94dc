"""The layout of TensorBoard's tab Custom Scalars: what tells whether a run is stable comes first, then every probe.

A chart shows all tags that match one of its regular expressions, so its lines are the layers that the run has. The
categories behind the first are closed: TensorBoard draws all charts of the open ones at once, and here are a hundred.
"""

from __future__ import annotations

from typing import Any

from megatron_stable.config.schema import LoggingConfig
from megatron_stable.records.metrics import EPOCHS
from megatron_stable.stability.probes import LINEARS, PROBES, Probe, tag

Charts = dict[str, tuple[str, ...]]  # regular expressions by title

NAMES = {"qkv": "QKV", "q": "Q", "k": "K", "v": "V", "proj": "Proj", "fc1": "FC1", "fc2": "FC2"}


def layout(logging: LoggingConfig) -> Any:
    """The layout, as the summary that TensorBoard looks for: for a run that measures these groups of probes."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    categories: list[Any] = []
    for title, charts in _categories(logging).items():
        drawn = [
            layout_pb2.Chart(title=name, multiline=layout_pb2.MultilineChartContent(tag=tags))
            for name, tags in charts.items()
        ]
        categories.append(layout_pb2.Category(title=title, chart=drawn, closed=bool(categories)))
    data = layout_pb2.Layout(category=categories).SerializeToString()
    value = Summary.Value(
        tag=metadata.CONFIG_SUMMARY_TAG, metadata=metadata.create_summary_metadata(), tensor=make_tensor_proto(data)
    )
    return Summary(value=[value])


def _categories(logging: LoggingConfig) -> dict[str, Charts]:
    """Charts by category: ``stability``; one for each group of probes; and what is left."""
    groups = logging.probes if logging.probes_every else ()
    probes = [probe for probe in PROBES.values() if probe.group in groups]
    first = {
        "loss": _exactly("train/loss", "validation/loss"),
        "gradient norm": _exactly("train/grad_norm"),
        "events": ("^events/",),
        "learning rate": _exactly("train/learning_rate"),
    }
    for probe in (PROBES["attention/max_logit"], PROBES["output_norm"]):
        if probe in probes:
            first |= _by_layer(probe, tuple(point for point in probe.points if point in LINEARS))
    categories: dict[str, Charts] = {"stability": first, **{group: {} for group in groups}}
    for probe in probes:
        categories[probe.group] |= _charts(probe, logging.probe_heads)
    categories["guard"] = {
        "scores": _exactly("guard/loss_score", "guard/grad_norm_score"),
        "dropped updates": _exactly("guard/dropped"),
    }
    categories["run"] = {
        "epochs by source": (f"^{EPOCHS}",),
        "z-loss": _exactly("train/z_loss", "train/mu_loss"),
        "loss scale": _exactly("train/loss_scale"),
        "tokens per second": _exactly("train/tokens_per_second"),
        "MFU": _exactly("train/mfu"),
        "data step": _exactly("train/data_step"),
        "share of tokens left out": _exactly("train/left_out"),
    }
    return categories


def _charts(probe: Probe, heads: bool) -> Charts:
    if not probe.layered:
        return {_title(probe): _exactly(probe.name)}
    charts = _by_layer(probe, probe.points)
    if probe.outside:
        outside = [tag(probe.name, point) for point in probe.outside]
        charts[f"{_title(probe)}: {' and '.join(probe.outside)}"] = _exactly(*outside)
    if probe.heads and heads:
        charts[f"{_title(probe)} by head"] = (rf"^{probe.name}/layer_\d+/head_\d+$",)
    return charts


def _by_layer(probe: Probe, points: tuple[str, ...]) -> Charts:
    """A chart for each point, or one for a probe without any, with a line for each layer."""
    return {
        f"{_title(probe, point)} by layer": (rf"^{tag(probe.name, point)}/layer_\d+$",) for point in points or (None,)
    }


def _title(probe: Probe, point: str | None = None) -> str:
    words = probe.name.replace("/", ", ").replace("_", " ")
    return f"{words}: {NAMES.get(point, point)}" if point else words


def _exactly(*tags: str) -> tuple[str, ...]:
    return tuple(f"^{name}$" for name in tags)  # TensorBoard matches from the beginning only
