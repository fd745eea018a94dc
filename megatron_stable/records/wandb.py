"""A run's metrics and events on Weights & Biases, for those who want them there: ``logging.wandb``.

``WANDB_MODE=offline`` needs no account and no network; all else that can be set is the library's environment variables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import Any

from megatron_stable.config.schema import Config
from megatron_stable.errors import ConfigError
from megatron_stable.files import replace_file
from megatron_stable.records.callbacks import Callback
from megatron_stable.records.chronicle import FREQUENT
from megatron_stable.records.metrics import Record
from megatron_stable.records.tags import markers, scalars
from megatron_stable.stability.events import Event

PATIENCE = 60.0  # seconds that a start, and the end, wait for the network


class WeightsAndBiases(Callback):
    """Logs records under TensorBoard's tags, events as pulses of ``events/…``, as lines of the log and as alerts.

    Charts go by the metric ``step``, as the library's own counter cannot go back: where the run does, a curve has two
    branches. All starts of a run are one on Weights & Biases, by the id in ``RUN/wandb/id``. Whatever the library
    raises becomes an OSError, which never stops the run; if it cannot begin, the next start tries again.

    Args:
        directory: The run's.
    """

    def __init__(self, config: Config, directory: Path) -> None:
        self.run: Any = None
        self.pulses = Counter[str]()  # to be logged with the next record
        self.pulsing: set[str] = set()
        self.failure = ""
        try:
            with self._sending():
                self._begin(config, directory)
        except OSError as error:
            self.failure = str(error)

    def _begin(self, config: Config, directory: Path) -> None:
        import wandb

        settings = wandb.Settings(console="off", silent=True, init_timeout=PATIENCE, finish_timeout=PATIENCE)
        if wandb.setup(settings).settings.mode == "online" and not wandb.login(prompt=False):
            raise OSError("no account is known here: `wandb login`, or WANDB_MODE=offline")
        identity = directory / "wandb" / "id"
        if not identity.exists():
            identity.parent.mkdir(exist_ok=True)
            replace_file(identity, token_hex(4).encode())
        self.run = wandb.init(
            project=config.logging.wandb,
            id=identity.read_text(encoding="utf-8").strip(),
            name=directory.resolve().name,
            dir=str(directory),
            config=config.model_dump(mode="json"),
            resume="allow",
            settings=settings,
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def event(self, event: Event) -> None:
        self.pulses.update(markers(event))
        with self._sending():
            self.run.write_logs(event.sentence())
            if not isinstance(event, FREQUENT):
                self.run.alert(title=f"{self.run.name}: {event.event}"[:63], text=event.sentence())

    def record(self, record: Record) -> None:
        with self._sending():
            zeros = dict.fromkeys(self.pulsing, 0)
            self.run.log({"step": record["step"], **scalars(record), **zeros, **self.pulses})
        self.pulsing |= self.pulses.keys()
        self.pulses.clear()

    def close(self) -> None:
        if self.run is not None:
            with self._sending():
                self.run.finish()

    @contextmanager
    def _sending(self) -> Iterator[None]:
        if self.failure:
            raise OSError(self.failure)
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error


def require_wandb() -> None:
    """Raise ConfigError unless the library is installed."""
    spec = find_spec("wandb")
    if spec is None or spec.origin is None:  # a folder of that name, which it leaves behind, is not the library
        raise ConfigError(
            "logging.wandb is set, but wandb is not installed: pip install 'megatron-stable[wandb]', or leave "
            "logging.wandb unset"
        )
