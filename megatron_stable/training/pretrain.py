"""A run from configuration to trained model, on this rank."""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_stable.config.checks import check
from megatron_stable.config.schema import Config
from megatron_stable.errors import ConfigError, JoinError, MegatronStableError, not_installed
from megatron_stable.parallel.launcher import SPEAKS, Seat, first_on_machine, seat
from megatron_stable.training.hangup import Starters

if TYPE_CHECKING:
    from megatron_stable.data import Tokenizer
    from megatron_stable.parallel.lifeline import Lifeline
    from megatron_stable.parallel.topology import Topology
    from megatron_stable.records.directory import RunDirectory
    from megatron_stable.training.last_words import LastWords
    from megatron_stable.training.stop import Stopped, StopSignal, Wish

ERROR_FILE = "MEGATRON_STABLE_ERROR_FILE"  # where a crashing rank leaves its exit code and error, if set
RESUMES = "the same command goes on from the last checkpoint"


Tell = Callable[[MegatronStableError], None]


def train(config: Config, tell: Tell = lambda error: None) -> Stopped | None:
    """Train, on this rank of whatever launcher started it; alone without one. Returns when the run has ended. A process
    group that is there already is used, and left.

    Args:
        tell: Called with an error that is the same on all ranks, before any of them ends.

    Returns:
        What stopped it; ``None``: it has come to its last step.

    Raises:
        MegatronStableError: With a message for the user; ``agreed`` if it is the same on all ranks. After any other
            error, here or on another rank, the processes of the other ranks end themselves.
    """
    # torch warns about calls that DeepSpeed makes
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import torch.distributed as dist

    from megatron_stable.parallel.agreement import everywhere
    from megatron_stable.parallel.determinism import make_deterministic
    from megatron_stable.parallel.launch_order import keep_launch_order
    from megatron_stable.parallel.lifeline import SLOW, Lifeline
    from megatron_stable.parallel.world import join_world, leave_world
    from megatron_stable.training.last_words import LastWords
    from megatron_stable.training.stop import StopSignal

    starters = Starters() if config.run.on_hangup == "stop" else None  # before anything that takes time
    if config.run.deterministic:
        make_deterministic()
    order = keep_launch_order(config.parallel)
    own = not dist.is_initialized()
    # the lifeline loses patience first
    place = join_world(
        config.run.patience + 2 * SLOW, config.run.join_timeout, config.by_key(), config.logging.verbosity == "debug"
    )
    last_words = LastWords()
    lifeline = Lifeline(config.run.patience, last_words, RESUMES)
    with StopSignal(lambda wish: lifeline.stop(wish.why, int(wish.forced)), starters) as stop:
        try:
            stopped = _train_in_world(config, stop, lifeline, last_words, place, order)
        except BaseException as error:
            if isinstance(error, MegatronStableError) and error.agreed:
                tell(error)
                everywhere(None)  # launchers end all ranks when the first ends, which may not be the one that tells
                lifeline.leave()
                if own:
                    leave_world()
            else:
                lifeline.crash(cause(error), code(error))
            raise
        lifeline.leave()
    if own:
        leave_world()
    return stopped


def _train_in_world(
    config: Config, stop: StopSignal, lifeline: Lifeline, last_words: LastWords, place: str, order: str | None
) -> Stopped | None:
    import torch
    import torch.distributed as dist

    from megatron_stable.checkpoint import store
    from megatron_stable.config.load import replaced
    from megatron_stable.data import Tokenizer
    from megatron_stable.model.backends import choose_backend
    from megatron_stable.parallel.agreement import decided, together
    from megatron_stable.parallel.lifeline import SLOW
    from megatron_stable.parallel.topology import Topology
    from megatron_stable.records.directory import RunDirectory
    from megatron_stable.records.interventions import read_interventions
    from megatron_stable.records.wandb import require_wandb
    from megatron_stable.training.host_memory import keep_freed_memory, let_go
    from megatron_stable.training.operation import settle

    rank, world = dist.get_rank(), dist.get_world_size()
    directory = RunDirectory(config.run.directory)
    tokenizer = None
    with ExitStack() as stack:
        made = decided(lambda: read_interventions(directory.path))
        with together():
            if made is not None:  # it may have operated on itself
                config = replaced(config, made.applied(config.model_dump(mode="json")))
            check(config, world)
            choose_backend(config.model, "cuda" if torch.cuda.is_available() else "cpu", config.data.document_mask)
            if config.data.tokenizer is not None:
                tokenizer = Tokenizer(config.data.tokenizer)
            config = with_vocabulary(config, tokenizer.vocab_size if tokenizer else None)
            config = with_documents(config, tokenizer)
            if rank == 0:
                if config.logging.wandb is not None:
                    require_wandb()
                stack.push(partial(_at_orderly_end, directory.release))
                directory.claim(config)
                store.clean(directory.checkpoints)
                settle(directory, made)
                stop.watch(partial(_asked, directory))
        with together():
            if not directory.checkpoints.is_dir():
                raise ConfigError(
                    f"run.directory {config.run.directory} is not to be seen: it must be on a file system that all "
                    "ranks share"
                )
        if not torch.cuda.is_available():
            keep_freed_memory()
            order = None
        going: Config | None = config
        topology = Topology(config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence)
        while going is not None:
            lifeline.progress(SLOW)
            stopped, going = _train_model(
                going, topology, directory, tokenizer, stop, lifeline, last_words, place, order
            )
            let_go()
        return stopped


def _train_model(
    config: Config,
    topology: Topology,
    directory: RunDirectory,
    tokenizer: Tokenizer | None,
    stop: StopSignal,
    lifeline: Lifeline,
    last_words: LastWords,
    place: str,
    order: str | None,
) -> tuple[Stopped | None, Config | None]:
    """Train until the run ends, or has made another model of its own. Collective.

    Returns:
        (what stopped it, the configuration of the other model)
    """
    import torch.distributed as dist

    from megatron_stable.parallel.agreement import agreed, everywhere, together
    from megatron_stable.records.callbacks import Callbacks
    from megatron_stable.records.presence import Rank, forget_request, write_start
    from megatron_stable.records.stages import write_stages
    from megatron_stable.stability.events import Resume, Start, Stop
    from megatron_stable.training.compilation import choose_compilation
    from megatron_stable.training.kernels import choose_attention, choose_kernels
    from megatron_stable.training.progress import ProgressLine
    from megatron_stable.training.trainer import Trainer
    from megatron_stable.training.writers import writers

    rank, world = dist.get_rank(), dist.get_world_size()
    with ExitStack() as stack:
        callbacks = stack.enter_context(closing(Callbacks(*[ProgressLine(config)] * (rank == 0))))
        with lifeline.slow():  # kernels are compiled and tried out
            attention, kernels = choose_attention(config), choose_kernels(config.run)
            compiles, compilation = choose_compilation(config)
        for said in (f"attention backend {attention.name}: {attention.reason}", kernels, compilation, order):
            if said is not None:
                callbacks.message(said)
        trainer = Trainer(config, topology, directory, callbacks, tokenizer, compiles)
        stack.push(partial(_at_orderly_end, trainer.engine.close))
        ranks, tokens = zip(*everywhere((Rank.myself(), directory.token)), strict=True)
        with lifeline.slow():
            changed = trainer.resume()
        lifeline.stands_at(trainer.step)
        if trainer.step >= config.run.steps:
            callbacks.ended(f"nothing to do: {directory.path} has trained {trainer.step} of {config.run.steps} steps")
            return None, None
        with together():
            if rank == 0:
                directory.commit(config)
                if trainer.source.stages is not None:
                    write_stages(directory.path, trainer.source.stages)
                write_start(directory.path, ranks, place)
                started: dict[str, Any] = {"step": trainer.step, "ranks": world, "layout": config.parallel}
                with directory.explained():
                    directory.log(Resume(**started, changed=changed) if trainer.step else Start(**started))
                    callbacks.callbacks += writers(config, directory, callbacks, trainer.step)
                    trainer.recovery.catch_up(trainer.step)
        last_words.begin(directory.path, tokens[0])
        stopped = trainer.run(stop, lifeline)
        if trainer.operated is not None:
            return None, trainer.operated
        if stopped and rank == 0:
            with suppress(OSError):  # the checkpoint counts
                forget_request(directory.path)
                directory.log(Stop(step=trainer.step, exit_code=int(stopped.forced), reason=stopped.reason))
        if stopped and stopped.forced:  # no launcher on another machine is to take it for done
            raise agreed(MegatronStableError, str(stopped))
        callbacks.ended(str(stopped) if stopped else f"done: {trainer.step} steps, in {directory.path}")
        return stopped, None


def _asked(directory: RunDirectory) -> Wish | None:
    """What a person wishes of this start of the run, on rank 0."""
    from megatron_stable.records.presence import request
    from megatron_stable.training.stop import Wish

    asked = request(directory.path)
    return Wish(asked.by, asked.save) if asked and asked.token == directory.token else None


def _at_orderly_end(let_go: Callable[[], None], _: object, error: BaseException | None, __: object) -> None:
    """Let go of something, but not after a crash: a thread may be writing yet, and a device may be gone."""
    if error is None or getattr(error, "agreed", False):
        let_go()


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


def with_documents(config: Config, tokenizer: Tokenizer | None) -> Config:
    """The configuration with the token between documents resolved from the tokenizer, where it is wanted.

    Raises:
        ConfigError: It is not in the vocabulary.
        DataError: The tokenizer has none.
    """
    data = config.data
    if not data.document_mask:
        return config
    if data.end_of_document is None and tokenizer is not None:
        data = data.model_copy(update={"end_of_document": tokenizer.end_of_document})
        config = config.model_copy(update={"data": data})
    check(config)
    return config


def run_to_exit_code(config: Config) -> int:
    """:func:`train`; returns the exit code."""

    def work(tell: Tell) -> int:
        train(config, tell)
        return 0

    if config.logging.verbosity == "debug":
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "INFO")  # torch looks when it is imported
    try:
        return to_exit_code(work)
    except KeyboardInterrupt:  # later, StopSignal takes it
        _say("SIGINT: stopped before training began")
        return 0


def to_exit_code(work: Callable[[Tell], int]) -> int:
    """The exit code of what this rank does with others. One rank prints the message of an error that the user can mend,
    before any other ends, as many launchers end all ranks then.

    Args:
        work: Given what to call with an error that is the same on all ranks, before any of them ends.

    Raises:
        KeyboardInterrupt: As it came.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of a lost rank are a page each
    try:
        return work(lambda error: _say(f"error: {error}"))
    except KeyboardInterrupt:
        raise
    except MegatronStableError as error:
        if not error.agreed:
            _crash(error)
        if isinstance(error, JoinError):  # without a process group, others can but wait
            _say(f"error: {error}") if _rank() == 0 else time.sleep(SPEAKS)
        return error.exit_code
    except BaseException as error:
        _crash(error)


def _say(message: str) -> None:
    if _rank() == 0:
        print(message, file=sys.stderr, flush=True)


def _rank() -> int:
    return (seat() or Seat(0, 1, 0)).rank


def cause(error: BaseException) -> str:
    """What happened, in words; nothing if another rank is to blame."""
    if isinstance(error, MegatronStableError):
        return str(error)
    return "" if _lost_connection(error) else f"{type(error).__name__}: {error}".splitlines()[0]


def code(error: BaseException) -> int:
    """With which it ends a process."""
    return error.exit_code if isinstance(error, MegatronStableError) else 1


def _crash(error: BaseException) -> NoReturn:
    """End this process, and with it the run, because of an error of this rank alone."""
    if _lost_connection(error):
        time.sleep(5.0)  # another rank is to blame; its word, or that of its neighbour, ends this one
    try:
        _tell_crash(error, code(error))
    finally:
        os._exit(code(error))  # no orderly end: DeepSpeed's and torch's exit handlers would wait for the other ranks


def _tell_crash(error: BaseException, code: int) -> None:
    if _speaks(error):
        rank = _rank()
        if isinstance(error, JoinError):
            text = f"error: {error}\n"
        elif _wrong_python(error):
            assert isinstance(error, ModuleNotFoundError)
            text = f"error: {not_installed(error)}\n"
        elif isinstance(error, MegatronStableError):
            text = f"error: rank {rank}: {error}\n"
        else:
            text = f"rank {rank} failed:\n{''.join(traceback.format_exception(error))}"
        if path := os.environ.get(ERROR_FILE):
            Path(path).write_text(f"{code}\n{text}", encoding="utf-8")  # the launcher prints it, last
        else:
            print(text, file=sys.stderr, end="", flush=True)
    elif isinstance(error, JoinError) or _wrong_python(error):
        time.sleep(SPEAKS)  # the one that tells may come later, and launchers end all ranks when the first ends
    sys.stdout.flush()


def _speaks(error: BaseException) -> bool:
    """Whether this rank is the one to tell of a crash."""
    if isinstance(error, JoinError) or _wrong_python(error):
        return first_on_machine()
    from megatron_stable.parallel.world import first_to_crash

    return first_to_crash()


def _wrong_python(error: BaseException) -> bool:
    return isinstance(error, ModuleNotFoundError) and error.name in ("torch", "numpy", "deepspeed")


def _lost_connection(error: BaseException) -> bool:
    text = str(error)
    marks = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket", "remote process exited")
    return isinstance(error, RuntimeError) and any(mark in text for mark in marks)
