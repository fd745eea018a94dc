"""TensorBoard shows a run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event as Entry
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
from tensorboard.util.tensor_util import make_ndarray

from megatron_stable.config.schema import Config
from megatron_stable.records.hparams import HParams
from megatron_stable.records.tags import scalars, tag_of
from megatron_stable.records.tensorboard import TensorBoard
from megatron_stable.stability.events import Event, Rollback, Spike, Stop, Undo
from megatron_stable.stability.probes import PROBES, places

LAYERS, HEADS = 3, 2
TAGS = {where.tag: float(number) for number, where in enumerate(
    where for probe in PROBES.values() for where in places(probe, LAYERS, HEADS)
)}  # fmt: skip


def spike(step: int, **facts: Any) -> Spike:
    return Spike(
        step=step, **({"series": "loss", "value": 9, "level": 2, "scale": 0.1, "score": 70, "onset": step} | facts)
    )


def rollback(step: int, to: int) -> Rollback:
    return Rollback(step=step, id="a", by="guard", rule="divergence", rollback_to=to, windows=((3, 4),))


def read(path: Path) -> EventAccumulator:
    """As the server reads it."""
    return EventAccumulator(str(path)).Reload()


def plugin(events: EventAccumulator, tag: str) -> str:
    name: str = events.SummaryMetadata(tag).plugin_data.plugin_name
    return name


def points(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, make_ndarray(event.tensor_proto).item()) for event in events.Tensors(tag)]


def latest(events: EventAccumulator) -> dict[str, float]:
    """The last value of each scalar."""
    tags = [tag for tag in events.Tags()["tensors"] if plugin(events, tag) == "scalars"]
    return {tag: points(events, tag)[-1][1] for tag in tags}


def sentences(events: EventAccumulator, kind: str) -> list[tuple[int, str]]:
    shown = events.Tensors(f"events/{kind}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in shown]


def test_a_run_that_went_back_writes_over_what_it_left(tmp_path: Path) -> None:
    writer = TensorBoard(tmp_path, 1, Config())
    for step, loss in [(1, 3.0), (2, 2.0), (3, 9.0), (4, 9.5)]:
        writer.record({"step": step, "loss": loss})
    writer.rewind(2)
    writer.record({"step": 4, "loss": 1.0})  # not every step is recorded
    writer.close()
    assert points(read(tmp_path), "train/loss") == [(1, 3.0), (2, 2.0), (4, 1.0)]


def test_events_are_text_beside_the_curves(tmp_path: Path) -> None:
    writer, event = TensorBoard(tmp_path, 1, Config()), Undo(step=7, by="user", id="a")
    writer.event(event)
    writer.close()
    assert sentences(read(tmp_path), "undo") == [(7, event.sentence())]


def test_an_event_is_a_pulse_at_its_step(tmp_path: Path) -> None:
    writer, both = TensorBoard(tmp_path, 1, Config()), [spike(23), spike(23, series="grad_norm")]
    for step in (10, 20, 30, 40):  # each tenth is recorded
        if step == 30:
            for event in both:
                writer.event(event)
        writer.record({"step": step, "loss": 1.0})
    writer.close()
    events = read(tmp_path)
    assert points(events, "events/spike") == [(20, 0), (23, 2), (30, 0), (40, 0)]
    assert sentences(events, "spike") == [(23, "\n\n".join(event.sentence() for event in both))]


def test_what_led_to_a_rollback_is_still_told_after_it(tmp_path: Path) -> None:
    writer, told = TensorBoard(tmp_path, 1, Config()), list[Event]()
    for step in (1, 2, 3, 4):
        if step == 3:
            told.append(spike(3))
            writer.event(told[-1])
        writer.record({"step": step, "loss": 1.0})
    told.append(rollback(4, to=2))
    writer.event(told[-1])
    writer.rewind(2)
    for step in (3, 4):
        writer.record({"step": step, "loss": 1.0})
    writer.close()
    events = read(tmp_path)
    for kind, event in zip(("spike", "rollback"), told, strict=True):
        assert sentences(events, kind) == [(3, event.sentence())]
    for kind in ("spike", "rollback", "skip_window"):
        assert points(events, f"events/{kind}")[-2:] == [(3, 1), (4, 0)]


def test_probes_are_one_entry_of_the_file(tmp_path: Path) -> None:
    writer = TensorBoard(tmp_path, 1, Config())
    writer.record({"step": 10, "loss": 2.0, **TAGS, "output_norm/qkv/layer_01": None, "samples": [[0, 8]]})
    writer.close()
    expected = {**TAGS, "train/loss": 2.0}
    del expected["output_norm/qkv/layer_01"]  # which was not finite
    assert latest(read(tmp_path)) == expected
    (file,) = tmp_path.iterdir()
    entries = [Entry.FromString(data) for data in RawEventFileLoader(str(file)).Load()]
    assert [len(entry.summary.value) for entry in entries if entry.step == 10] == [len(expected)]


def test_histograms_go_by_powers_of_two(tmp_path: Path) -> None:
    writer, counts = TensorBoard(tmp_path, 1, Config()), [0.0] * 64
    counts[30], counts[32], counts[33] = 3, 5, 1  # [1/4, 1/2), [1, 2), [2, 4)
    writer.histograms(7, {"output_histogram/fc1/layer_00": counts, "output_histogram/fc1/layer_01": [0.0] * 64})
    writer.close()
    events = read(tmp_path)
    (shown,) = events.Tensors("output_histogram/fc1/layer_00")
    buckets = [tuple(bucket) for bucket in make_ndarray(shown.tensor_proto) if bucket[2]]
    assert shown.step == 7 and buckets == [(-2, -1, 3), (0, 1, 5), (1, 2, 1)]
    assert "output_histogram/fc1/layer_01" not in events.Tags()["tensors"]  # of which nothing was finite


def test_a_key_that_is_nobodys_has_no_tag() -> None:
    assert scalars({"step": 3, "tokens": 9, "loss": 1.5, "skipped": True, "noise_scale": 4.0, "output_norm/x": 1}) == {
        "train/loss": 1.5, "guard/dropped": 1.0, "noise_scale": 4.0,
    }  # fmt: skip
    assert tag_of("validation_loss") == "validation/loss"


@pytest.mark.parametrize("groups", [None, ["attention"], []])
def test_the_layout_shows_each_tag_once_by_what_was_measured(tmp_path: Path, groups: list[str] | None) -> None:
    logging = {"probe_heads": True} | ({} if groups is None else {"probes": groups})
    config = Config.model_validate({"logging": logging})
    TensorBoard(tmp_path, 1, config).close()
    (shown,) = read(tmp_path).Tensors("custom_scalars__config__")
    layout = Layout.FromString(shown.tensor_proto.string_val[0])
    first, *others = layout.category
    assert [chart.title for chart in first.chart][:4] == ["loss", "gradient norm", "events", "learning rate"]
    assert ("attention, max logit by layer" in {chart.title for chart in first.chart}) == (groups != [])
    charts = [chart.multiline.tag for category in others for chart in category.chart]
    for tag in TAGS:
        wanted = groups is None or PROBES[next(n for n in sorted(PROBES, key=len) if tag.startswith(n))].group in groups
        assert sum(any(re.match(pattern, tag) for pattern in chart) for chart in charts) == wanted, tag
    (loss,) = [chart.multiline.tag for chart in first.chart if chart.title == "loss"]
    assert not any(re.match(pattern, "train/loss_scale") for pattern in loss)


def hparams(path: Path) -> tuple[dict[str, Any], Any]:
    """(values, end) as the tab reads them."""
    events = read(path)
    start, end = (
        events.SummaryMetadata(tag).plugin_data.content
        for tag in (metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG)
    )
    info = metadata.parse_session_start_info_plugin_data(start)
    values = {key: getattr(value, value.WhichOneof("kind")) for key, value in info.hparams.items()}
    return values, metadata.parse_session_end_info_plugin_data(end).status


def test_a_run_is_compared_by_its_newest_configuration_and_its_last_numbers(tmp_path: Path) -> None:
    for steps, rate in ((4, 1e-3), (8, 2e-3)):
        values = {"run": {"steps": steps}, "optimizer": {"learning_rate": rate}, "precision": {"dtype": "bf16"}}
        writer = HParams(tmp_path, Config.model_validate(values))
        writer.record({"step": steps - 1, "loss": 3.0, "validation_loss": 2.5, "validation_perplexity": 12.0})
        writer.record({"step": steps, "loss": 2.0, "tokens_per_second": None})
        writer.close()
    found, status = hparams(tmp_path)
    assert (found["run.steps"], found["optimizer.learning_rate"], found["precision.dtype"]) == (8, 2e-3, "bf16")
    assert found["optimizer.betas"] == "[0.9, 0.95]" and found["run.deterministic"] is False
    assert not {"run.directory", "logging.every", "model.kv_heads"} & set(found)
    assert latest(read(tmp_path)) == {
        "final/loss": 2.0, "final/validation_loss": 2.5, "final/validation_perplexity": 12.0, "final/step": 8,
    }  # fmt: skip
    assert status == STATUS_SUCCESS


def test_a_run_that_diverged_has_failed(tmp_path: Path) -> None:
    writer = HParams(tmp_path, Config())
    writer.record({"step": 3, "loss": 2.0})
    writer.event(Stop(step=3, exit_code=3, reason="divergence"))
    writer.close()
    assert hparams(tmp_path)[1] == STATUS_FAILURE
