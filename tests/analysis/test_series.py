"""Reading series: a run's own record, and event files as PyTorch, TensorFlow and others write them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto
from torch.utils.tensorboard import SummaryWriter

from megatron_stable.analysis.event_files import EventFile
from megatron_stable.analysis.series import _kept, read_gradient_norm, read_series
from megatron_stable.errors import ConfigError, DataError

Point = tuple[int, float]


def by_torch(directory: Path, points: Iterable[Point], tag: str = "train/loss", **options: object) -> Path:
    """An event file as PyTorch writes it, with a second tag and a histogram; its path."""
    writer = SummaryWriter(str(directory), **options)
    for step, value in points:
        writer.add_scalar(tag, value, step)
        writer.add_scalar("train/learning_rate", 1e-4, step)
    writer.add_histogram("weights", np.arange(4.0), 1)
    writer.add_text("config", f"{tag} is in this text")
    path = Path(writer.file_writer.event_writer._file_name)
    writer.close()
    return path


def by_hand(path: Path, events: Iterable[Event]) -> Path:
    """An event file of TensorBoard's own records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        records = RecordWriter(file)
        records.write(Event(wall_time=1.0, file_version="brain.Event:2").SerializeToString())
        for event in events:
            records.write(event.SerializeToString())
    return path


def scalar(step: int, value: float, time: float = 1.0, tag: str = "loss") -> Event:
    """As older writers have it."""
    return Event(step=step, wall_time=time, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))


def tensor(step: int, value: object, dtype: object = np.float32, tag: str = "loss") -> Event:
    """As TensorFlow 2 has it."""
    value = Summary.Value(tag=tag, tensor=make_tensor_proto(value, dtype))
    value.metadata.plugin_data.plugin_name = "scalars"
    return Event(step=step, wall_time=1.0, summary=Summary(value=[value]))


def points(path: Path, tag: str | None = None) -> list[Point]:
    """What `read_series` finds."""
    series = read_series(path, tag)
    return list(zip(series.steps.tolist(), series.values.tolist(), strict=True))


def write_metrics(path: Path, records: Sequence[object]) -> Path:
    """A run's directory with a record."""
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_what_torch_writes(tmp_path: Path) -> None:
    written = [(step, step % 7 + 0.5) for step in (0, 1, 100, 127, 128, 20_000, 3_000_000_000)]
    by_torch(tmp_path, written)
    assert points(tmp_path, "train/loss") == written
    assert points(tmp_path) == written, "the tag is guessed"
    assert read_series(tmp_path).notes == ("took 'train/loss', as no tag was named",)
    times = EventFile(next(tmp_path.iterdir())).scalars("train/loss").times
    assert times.tolist() == sorted(times.tolist()) and times[0] > 1.7e9
    assert read_gradient_norm(tmp_path) is None


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    by_torch(tmp_path, [(1, 2.0), (2, float("nan")), (3, float("inf"))])
    values = read_series(tmp_path).values
    assert values[0] == 2 and np.isnan(values[1]) and np.isinf(values[2])


def test_scalars_as_tensors(tmp_path: Path) -> None:
    events = [
        tensor(1, 1.5),
        tensor(2, 2.5, np.float64),
        tensor(3, 3, np.int64),
        tensor(4, [4.5]),
        tensor(5, [5.5, 6.5]),
        tensor(6, b"text", None),
        scalar(7, 7.5),
    ]
    content = Event(step=8, wall_time=1.0, summary=Summary(value=[Summary.Value(tag="loss")]))
    content.summary.value[0].tensor.dtype = 1
    content.summary.value[0].tensor.tensor_content = struct.pack("<f", 8.5)  # as TensorFlow's own kernel does
    by_hand(tmp_path / "events.out.tfevents.1", [*events, content])
    assert points(tmp_path) == [(1, 1.5), (2, 2.5), (3, 3.0), (4, 4.5), (7, 7.5), (8, 8.5)]


def test_pytorchs_new_style(tmp_path: Path) -> None:
    writer, written = SummaryWriter(str(tmp_path)), [(step, step % 7 + 0.5) for step in (1, 300, 70_000)]
    for step, value in written:
        writer.add_scalar("loss", value, step, new_style=True)
    writer.close()
    assert points(tmp_path) == written


@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize("form", ["simple_value", "tensor_content", "float_val"])
def test_plain_scalars_are_not_decoded_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, shaped: bool
) -> None:
    written = [(step, step % 7 + 0.5) for step in (1, 300, 70_000)]
    events = [scalar(step, value) for step, value in written]
    for event, (_, value) in zip(events, written, strict=True):
        proto = event.summary.value[0].tensor
        if form != "simple_value":
            proto.dtype = 1
        if form == "tensor_content":
            proto.tensor_content = struct.pack("<f", value)
        if form == "float_val":
            proto.float_val.append(value)
        if form != "simple_value" and shaped:
            proto.tensor_shape.SetInParent()
    path = by_hand(tmp_path / "events.out.tfevents.1", events)
    monkeypatch.delattr(EventFile, "_decoded")
    found = EventFile(path).scalars("loss")
    assert list(zip(found.steps.tolist(), found.values.tolist(), strict=True)) == written


def test_several_values_to_an_event_and_values_of_its_own(tmp_path: Path) -> None:
    both = scalar(3, 2.0)
    both.summary.value.add(tag="lm loss", simple_value=9.0)
    image = Event(step=4, summary=Summary(value=[Summary.Value(tag="loss", image=Summary.Image(height=1))]))
    by_hand(tmp_path / "events.out.tfevents.1", [scalar(1, 1.0, tag="lm loss validation"), both, image])
    assert points(tmp_path, "loss") == [(3, 2.0)]
    assert points(tmp_path, "lm loss") == [(3, 9.0)]
    assert points(tmp_path) == [(3, 9.0)], "'lm loss' comes before 'loss'"


def test_the_same_as_tensorboard(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    by_torch(tmp_path, [(step, float(rng.standard_normal())) for step in range(1, 400)])
    theirs = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload().Scalars("train/loss")
    assert points(tmp_path) == [(each.step, each.value) for each in theirs]


def test_a_restart_supersedes_what_was_after_it(tmp_path: Path) -> None:
    by_torch(tmp_path, [(step, 1.0) for step in range(1, 11)])
    by_torch(tmp_path, [(step, 2.0) for step in range(6, 8)], purge_step=6, filename_suffix=".b")
    assert points(tmp_path) == [(step, 1.0) for step in range(1, 6)] + [(6, 2.0), (7, 2.0)]
    assert "5 values" in read_series(tmp_path).notes[1]
    by_torch(tmp_path, [], purge_step=4, filename_suffix=".c")  # killed before its first step
    assert points(tmp_path) == [(1, 1.0), (2, 1.0), (3, 1.0)]


def test_a_restart_that_does_not_say_so(tmp_path: Path) -> None:
    by_torch(tmp_path, [(step, 1.0) for step in range(1, 11)])
    by_torch(tmp_path, [(step, 2.0) for step in range(6, 8)], filename_suffix=".b")
    assert points(tmp_path) == [(step, 1.0) for step in range(1, 6)] + [(6, 2.0), (7, 2.0)]


def test_a_session_that_starts_within_a_file(tmp_path: Path) -> None:
    start = Event(step=3, wall_time=2.0, session_log=SessionLog(status=SessionLog.START, msg="again"))
    stop = Event(step=1, wall_time=2.0, session_log=SessionLog(status=SessionLog.STOP))
    by_hand(tmp_path / "events.out.tfevents.1", [scalar(1, 1.0), scalar(3, 3.0), scalar(4, 4.0), stop, start])
    assert points(tmp_path) == [(1, 1.0)]


def test_directories_below_written_in_turn_are_one_run(tmp_path: Path) -> None:
    by_hand(tmp_path / "z" / "events.out.tfevents.1", [scalar(step, 1.0, 100 + step) for step in range(1, 9)])
    by_hand(tmp_path / "a" / "events.out.tfevents.2", [scalar(step, 2.0, 200 + step) for step in range(5, 7)])
    by_hand(tmp_path / "other" / "events.out.tfevents.3", [scalar(step, 7.0, 100, "eval") for step in range(3)])
    assert points(tmp_path) == [(step, 1.0) for step in range(1, 5)] + [(5, 2.0), (6, 2.0)]
    assert any("z, a" in note for note in read_series(tmp_path).notes)


def test_runs_written_at_the_same_time_are_several(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        by_hand(tmp_path / name / "events.out.tfevents.1", [scalar(step, 1.0, 100 + step) for step in range(1, 9)])
    with pytest.raises(ConfigError, match=r"several runs.*\n.*train\n.*validation"):
        read_series(tmp_path)
    assert len(points(tmp_path / "train")) == 8


def test_one_file(tmp_path: Path) -> None:
    assert points(by_torch(tmp_path / "x", [(1, 2.0)])) == [(1, 2.0)]


@pytest.mark.parametrize("left", [1, 5, 12, 20, 39])
def test_a_file_cut_off_is_read_as_far_as_it_is_whole(tmp_path: Path, left: int) -> None:
    path = by_hand(tmp_path / "events.out.tfevents.1", [scalar(1, 1.0), scalar(2, 2.0)])
    last = 16 + len(scalar(2, 2.0).SerializeToString())
    path.write_bytes(path.read_bytes()[: left - last])
    assert points(tmp_path) == [(1, 1.0)]
    (note,) = [note for note in read_series(tmp_path).notes if str(path) in note]
    assert f"cut off: its last {left} bytes" in note
    path.write_bytes(path.read_bytes() + bytes(50))
    assert points(tmp_path) == [(1, 1.0)], "zeros where a machine went down"


def test_an_empty_file_beside_others(tmp_path: Path) -> None:
    by_torch(tmp_path, [(1, 2.0)])
    (tmp_path / "events.out.tfevents.9").touch()
    assert points(tmp_path) == [(1, 2.0)]
    assert any("9 is empty" in note for note in read_series(tmp_path).notes)


def test_nothing_but_empty_files(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.9").touch()
    with pytest.raises(DataError, match=r"(?s)holds no scalars.*tfevents.9 is empty"):
        read_series(tmp_path)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.9").write_bytes(b"\x89PNG and so on, long enough to be read")
    with pytest.raises(DataError, match=r"tfevents.9 is no event file of TensorBoard"):
        read_series(tmp_path)


def test_records_that_are_no_events(tmp_path: Path) -> None:
    with (tmp_path / "events.out.tfevents.9").open("wb") as file:
        RecordWriter(file).write(b"\xff\xff\xff loss")
    with pytest.raises(DataError, match="holds something else"):
        read_series(tmp_path, "loss")


def test_a_length_that_is_damaged(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "events.out.tfevents.1", [scalar(1, 1.0), scalar(2, 2.0), scalar(3, 3.0)])
    content, last = bytearray(path.read_bytes()), 16 + len(scalar(3, 3.0).SerializeToString())
    content[-last] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"tfevents.1 is damaged at byte {len(content) - last}"):
        read_series(tmp_path)


def test_a_value_that_is_damaged_is_left_out(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "events.out.tfevents.1", [scalar(1, 1.0), scalar(2, 2.0), tensor(300, 3.0)])
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<f", 2.0))] ^= 64
    path.write_bytes(content)
    assert points(tmp_path) == [(1, 1.0), (300, 3.0)]
    assert any("1 records that do not agree" in note for note in read_series(tmp_path).notes)


def test_a_tag_that_is_not_there(tmp_path: Path) -> None:
    by_torch(tmp_path, [(1, 2.0)], tag="pretraining/lm_loss_total")
    with pytest.raises(ConfigError, match=r"no tag 'pretraining/lm_los'; did you mean 'pretraining/lm_loss_total'\?"):
        read_series(tmp_path, "pretraining/lm_los")
    with pytest.raises(ConfigError, match=r"known.*--tag.*'pretraining/lm_loss_total', 'train/learning_rate'$"):
        read_series(tmp_path)
    with pytest.raises(ConfigError, match="no tag 'weights'"):
        read_series(tmp_path, "weights")  # a histogram
    with pytest.raises(ConfigError, match="no tag 'gnorm'"):
        read_gradient_norm(tmp_path, "gnorm")


def test_a_directory_without_any(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither metrics\.jsonl nor event files"):
        read_series(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        read_series(tmp_path / "no")


def test_a_runs_own_record(tmp_path: Path) -> None:
    records = [{"step": n, "loss": float(n), "grad_norm": 0.5, "data_step": n + 10 * (n > 2)} for n in range(1, 6)]
    run = write_metrics(tmp_path / "run", [*records, {"step": 4, "loss": None, "grad_norm": 2, "data_step": 24}])
    series = read_series(run)
    assert series.name == "loss"
    assert series.steps.tolist() == [1, 2, 3, 4], "step 5 is of before the run went back"
    assert series.values[:3].tolist() == [1, 2, 3] and np.isnan(series.values[3])
    assert series.notes == ("2 values of 'loss' were superseded where the run went back to an earlier step",)
    assert [series.data_step(step) for step in (1, 2, 3, 4, 6)] == [1, 2, 13, 24, 26]
    norm = read_gradient_norm(run)
    assert norm is not None and norm.values.tolist() == [0.5, 0.5, 0.5, 2]
    with pytest.raises(ConfigError, match=r"no 'lss'; did you mean 'loss'\?"):
        read_series(run, "lss")


def test_a_record_cut_off_or_empty(tmp_path: Path) -> None:
    run = write_metrics(
        tmp_path / "run",
        [
            {"step": 1, "loss": 2.0},
            [],
            {"loss": 1.0},
            {"step": 2, "loss": 1.0},
            {"step": 3, "loss": 1, "data_step": None},
        ],
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    series = read_series(run)
    assert series.values.tolist() == [2.0, 1.0]
    assert "4 lines" in series.notes[0]
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="no step yet"):
        read_series(run)


@given(st.lists(st.integers(0, 20)))
def test_what_is_kept_is_what_a_reader_line_by_line_would_keep(steps: list[int]) -> None:
    kept: list[tuple[int, int]] = []
    for i, step in enumerate(steps):
        kept = [each for each in kept if each[0] < step] + [(step, i)]
    assert np.flatnonzero(_kept(np.array(steps, np.int64))).tolist() == [i for _, i in kept]


@settings(deadline=None)  # of a machine that does other things as well
@given(st.lists(st.tuples(st.integers(-5, 2**62), st.floats(width=32, allow_nan=False), st.floats(0, 1e10))))
def test_any_scalar_comes_back(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, float, float]]) -> None:
    path = by_hand(tmp_path_factory.mktemp("any") / "tfevents", [scalar(*row) for row in rows])
    found = EventFile(path).scalars("loss")
    assert list(zip(found.steps.tolist(), found.values.tolist(), found.times.tolist(), strict=True)) == rows
