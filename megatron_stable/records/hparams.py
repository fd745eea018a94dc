"""A run as TensorBoard's tab HParams compares it with others: its configuration, and what came of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from megatron_stable.config.schema import Config
from megatron_stable.records.callbacks import Callback
from megatron_stable.records.directory import SILENT
from megatron_stable.records.metrics import Record
from megatron_stable.stability.events import Event


class HParams(Callback):
    """Event files in a directory of their own, ``tensorboard/hparams``, of the newest start of the run alone.

    The tab takes every scalar that stands beside a configuration for a metric, and the first configuration for good:
    beside the curves it would have thousands of metrics, and after a resume with other values the old ones.
    """

    FINAL = ("loss", "validation_loss", "validation_perplexity", "tokens_per_second", "step")

    def __init__(self, directory: Path, config: Config) -> None:
        from tensorboard.plugins.hparams import metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import SessionStartInfo
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        for old in directory.glob("*tfevents*"):
            old.unlink()
        self.steps = config.run.steps
        self.final: dict[str, float | None] = {}
        self.stopped = False
        self.writer: Any = EventFileWriter(str(directory))
        start = SessionStartInfo(start_time_secs=time.time())
        for key, value in config.by_key().items():
            if key.split(".")[0] in SILENT or key == "run.directory":
                continue  # where it goes makes it no other run
            if isinstance(value, bool):
                start.hparams[key].bool_value = value
            elif isinstance(value, int | float):
                start.hparams[key].number_value = value
            elif value is not None:
                start.hparams[key].string_value = value if isinstance(value, str) else json.dumps(value)
        self._tell(metadata.SESSION_START_INFO_TAG, session_start_info=start)
        self.writer.flush()

    def event(self, event: Event) -> None:
        self.stopped |= event.event == "stop"

    def record(self, record: Record) -> None:
        self.final |= {key: record[key] for key in self.FINAL if key in record}
        if "validation_loss" in record:
            self._write_final()

    def close(self) -> None:
        from tensorboard.plugins.hparams import metadata
        from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
        from tensorboard.plugins.hparams.plugin_data_pb2 import SessionEndInfo

        ended = self.final.get("step") == self.steps
        if ended or self.stopped:
            status = STATUS_SUCCESS if ended else STATUS_FAILURE
            end = SessionEndInfo(status=status, end_time_secs=time.time())
            self._tell(metadata.SESSION_END_INFO_TAG, session_end_info=end)
        self._write_final()
        self.writer.close()

    def _write_final(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Entry
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = {f"final/{key}": value for key, value in self.final.items() if value is not None}
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self.writer.add_event(Entry(step=int(self.final.get("step") or 0), wall_time=time.time(), summary=summary))

    def _tell(self, tag: str, **info: Any) -> None:
        """What the tab reads is in the description of a tag, not in a value of it."""
        from tensorboard.compat.proto.event_pb2 import Event as Entry
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

        described = metadata.create_summary_metadata(HParamsPluginData(**info))
        value = Summary.Value(tag=tag, metadata=described, tensor=metadata.NULL_TENSOR)
        self.writer.add_event(Entry(wall_time=time.time(), summary=Summary(value=[value])))
