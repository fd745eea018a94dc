"""A run from configuration to trained model, on this rank."""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from pathlib import Path

from megatron_stable.config.checks import check
from megatron_stable.config.schema import Config
from megatron_stable.errors import ConfigError, MegatronStableError

ERROR_FILE = "MEGATRON_STABLE_ERROR_FILE"  # a crashing rank leaves its error there too


def pretrain(config: Config) -> None:
    """Train, on this rank of whatever launcher started it; alone without one. Returns when the run has ended.

    Raises:
        MegatronStableError: The same on all ranks, with a message for the user.
    """
    # the engine's own prints say nothing a user needs, and torch warns about calls that DeepSpeed makes
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import torch.distributed as dist

    from megatron_stable.parallel.world import Lifeline, join_world

    join_world()
    lifeline = Lifeline()
    _train(config, dist.get_rank(), dist.get_world_size())
    lifeline.leave()
    dist.destroy_process_group()


def _train(config: Config, rank: int, world: int) -> None:
    from megatron_stable.data import Tokenizer, check_tokenizer, check_vocabulary
    from megatron_stable.engine.checkpoint import store
    from megatron_stable.parallel.agreement import StopSignal, together
    from megatron_stable.parallel.topology import Topology
    from megatron_stable.training.callbacks import Callbacks, MetricsFile, ProgressLine, TensorBoard
    from megatron_stable.training.directory import RunDirectory
    from megatron_stable.training.trainer import Trainer

    check(config, world)  # the same on all ranks: there is nothing to agree upon
    directory = RunDirectory(config.run.directory)
    tokenizer = None
    changed = {}
    with together():
        if config.data.tokenizer is not None:
            tokenizer = Tokenizer(config.data.tokenizer)
        config = with_vocabulary(config, tokenizer.vocab_size if tokenizer else None)
        if rank == 0:
            changed = directory.claim(config)
            store.clean(directory.checkpoints)
    progress = ProgressLine(config)
    report = progress.message if rank == 0 else _silence
    topology = Topology(config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence)
    stop = StopSignal()
    trainer = Trainer(config, topology, directory, report)
    with together():
        if rank == 0:
            assert config.model.vocab_size is not None
            for data in filter(None, (trainer.train_data, trainer.validation_data)):
                if tokenizer:
                    check_tokenizer(data, tokenizer)
                check_vocabulary(data, config.model.vocab_size)
    trainer.resume()
    if trainer.step >= config.run.steps:
        report(f"nothing to do: {directory.path} has trained {trainer.step} of {config.run.steps} steps")
        return
    callbacks = None
    if rank == 0:
        facts = {"layout": vars(config.parallel), "ranks": world} | ({"changed": changed} if changed else {})
        directory.ledger.write("resume" if trainer.step else "start", trainer.step, **facts)
        writers = [TensorBoard(directory.tensorboard, trainer.step + 1)] if config.logging.tensorboard else []
        callbacks = Callbacks(MetricsFile(directory.metrics), *writers, progress)
    try:
        signal = trainer.run(callbacks.record if callbacks else _silence, stop)
    finally:
        if callbacks:
            callbacks.close()
    if signal:
        report(f"{signal}: stopped after step {trainer.step}, saved; the same command goes on from there")
    else:
        report(f"done: {trainer.step} steps, in {directory.path}")


def with_vocabulary(config: Config, tokenizer_size: int | None) -> Config:
    """The configuration with its vocabulary size resolved from the tokenizer.

    Raises:
        ConfigError: Neither says what it is, or the model's is smaller than the tokenizer's.
    """
    size = config.model.vocab_size
    if size is None:
        size = tokenizer_size
    if size is None:
        raise ConfigError("model.vocab_size and data.tokenizer are both unset: set one of them")
    if tokenizer_size is not None and size < tokenizer_size:
        raise ConfigError(
            f"model.vocab_size {size} is smaller than the vocabulary of data.tokenizer, {tokenizer_size}: "
            "leave model.vocab_size unset to take the tokenizer's"
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})


def guarded(config: Config) -> int:
    """:func:`pretrain`, with errors turned into messages on one rank and the exit code that DESIGN promises."""
    from megatron_stable.parallel.world import announce_crash, crash_is_known, environment_rank

    try:
        pretrain(config)
        return 0
    except MegatronStableError as error:
        if environment_rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except BaseException as error:
        if crash_is_known() or _lost_connection(error):
            time.sleep(1.0)  # another rank is to blame; its error is the one to read
            if not crash_is_known():
                print(
                    f"rank {environment_rank()}: lost the connection to another rank; stopping",
                    file=sys.stderr,
                    flush=True,
                )
        else:
            announce_crash()
            text = f"rank {environment_rank()} failed:\n{''.join(traceback.format_exception(error))}"
            if path := os.environ.get(ERROR_FILE):
                Path(path).write_text(text, encoding="utf-8")
            print(text, file=sys.stderr, flush=True)
            time.sleep(2.0)  # rank 0 holds the store from which the others learn of it
        sys.stdout.flush()
        os._exit(1)  # no orderly end: DeepSpeed's and torch's exit handlers would wait for the other ranks


def _lost_connection(error: BaseException) -> bool:
    text = str(error)
    marks = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket", "remote process exited")
    return isinstance(error, RuntimeError) and any(mark in text for mark in marks)


def _silence(*_: object) -> None:
    pass
