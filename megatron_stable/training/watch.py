"""Early warnings of a run in progress: records in, events to all that hear of them. On rank 0; it decides nothing."""

from __future__ import annotations

from megatron_stable.config.schema import Config
from megatron_stable.records import jsonl
from megatron_stable.records.callbacks import Callback
from megatron_stable.records.directory import RunDirectory
from megatron_stable.records.metrics import Record
from megatron_stable.stability.events import EarlyWarning
from megatron_stable.stability.warnings import Watch

TAIL = 32 * 2**20  # bytes of metrics.jsonl: hundreds of measurements even of the largest models, read in a second


class EarlyWarnings(Callback):
    """Watches the records, and tells of warnings.

    Args:
        config: The run.
        directory: Its past is read from there: measurements from the metrics, what was said from the ledger.
        callbacks: Told of warnings.
        step: The last one that was trained.

    Raises:
        OSError: The directory cannot be read.
    """

    def __init__(self, config: Config, directory: RunDirectory, callbacks: Callback, step: int) -> None:
        self.config, self.directory, self.callbacks = config, directory, callbacks
        self.rewind(step)

    def record(self, record: Record) -> None:
        for warning in self.watch.update(record["step"], record):
            self.callbacks.event(warning.model_copy(update={"data_step": record.get("data_step")}))

    def rewind(self, step: int) -> None:
        said = (event for event in self.directory.ledger.read() if isinstance(event, EarlyWarning))
        self.watch = Watch(self.config, said)
        records = (record for record in jsonl.tail(self.directory.metrics, TAIL) if type(record.get("step")) is int)
        held: list[Record] = []
        for record in records:
            while held and held[-1]["step"] >= record["step"]:  # of steps that the run went back behind
                held.pop()
            held.append(record)
        for record in held:
            if record["step"] <= step:
                self.watch.learn(record["step"], record)
