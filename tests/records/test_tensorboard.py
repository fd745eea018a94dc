"""TensorBoard shows a run as it stands."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_stable.records.tensorboard import TensorBoard
from megatron_stable.stability.events import Undo


def test_a_run_that_went_back_writes_over_what_it_left(tmp_path: Path) -> None:
    writer = TensorBoard(tmp_path, 1)
    for step, loss in [(1, 3.0), (2, 2.0), (3, 9.0), (4, 9.5)]:
        writer.record({"step": step, "loss": loss})
    writer.rewind(2)
    writer.record({"step": 4, "loss": 1.0})  # not every step is recorded
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 3.0), (2, 2.0), (4, 1.0)]


def test_events_are_text_beside_the_curves(tmp_path: Path) -> None:
    writer, event = TensorBoard(tmp_path, 1), Undo(step=7, by="user", id="a")
    writer.event(event)
    writer.close()
    (shown,) = EventAccumulator(str(tmp_path)).Reload().Tensors("events/text_summary")
    assert shown.step == 7 and shown.tensor_proto.string_val[0].decode() == event.sentence()
