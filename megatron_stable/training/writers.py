"""What a run writes as it goes: the callbacks of its directory, on rank 0."""

from __future__ import annotations

from megatron_stable.config.schema import Config
from megatron_stable.records.callbacks import Callback, Callbacks
from megatron_stable.records.chronicle import Chronicle
from megatron_stable.records.directory import RunDirectory
from megatron_stable.records.flight import FlightFiles
from megatron_stable.records.hparams import HParams
from megatron_stable.records.metrics_file import MetricsFile
from megatron_stable.records.tensorboard import TensorBoard
from megatron_stable.records.wandb import WeightsAndBiases
from megatron_stable.training.watch import EarlyWarnings


def writers(config: Config, directory: RunDirectory, callbacks: Callbacks, step: int) -> list[Callback]:
    """Those that the configuration asks for.

    Args:
        callbacks: To be told of early warnings.
        step: That the run begins behind.
    """
    logging = config.logging
    found: list[Callback] = [Chronicle(directory), MetricsFile(directory.metrics), FlightFiles(directory.path)]
    if logging.tensorboard:
        found.append(TensorBoard(directory.tensorboard, step + 1, config))
        found.append(HParams(directory.tensorboard / "hparams", config))
    if logging.wandb is not None:
        found.append(WeightsAndBiases(config, directory.path))
    if logging.warnings and logging.probes_every:
        found.append(EarlyWarnings(config, directory, callbacks, step))
    return found
