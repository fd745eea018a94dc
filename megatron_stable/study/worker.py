"""A process that trains one run of a sweep after another: importing torch and DeepSpeed takes longer than a small run.

It reads a line of JSON for each run, and writes one when that has ended::

    {"ranks": 1, "config": {…}}  ──>  {"status": "finished"}, or "diverged", "failed", "stopped"

What the run prints is in its directory, in ``output.log``. The process ends with its input, and after a failure, which
may have left anything behind.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from megatron_stable.config.load import dump_config, parse_config
from megatron_stable.config.schema import Config
from megatron_stable.errors import DivergenceError, InUseError, LossScaleError, MegatronStableError
from megatron_stable.files import write_file
from megatron_stable.persisted import Persisted
from megatron_stable.records import jsonl
from megatron_stable.records.directory import RunDirectory
from megatron_stable.study.outcome import Ended, read_ended, write_ended
from megatron_stable.training.host_memory import let_go


class Answer(Persisted):
    """How a run has ended, or that it was stopped, and why."""

    status: Literal["finished", "diverged", "failed", "stopped"]
    reason: str | None = None


OUTPUT = "output.log"
START = "start.yaml"  # what the ranks of a run read
FOLLOWS = 1.0  # seconds between looks for who asks
WHOLE, GLANCE = 1 << 20, 1 << 13  # bytes of metrics.jsonl that have its last record, or one of its last


def main() -> None:
    """Train what standard input asks for."""
    threading.Thread(target=_follow, args=(os.getppid(),), name="parent", daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing else is to speak there
    for line in sys.stdin:
        asked = json.loads(line)
        config = parse_config(asked["config"])
        ended = run(config, asked["ranks"])
        if ended is not None:
            write_ended(Path(config.run.directory), ended)
        answer = Answer(status="stopped") if ended is None else Answer(**ended.model_dump())
        print(answer.model_dump_json(), file=answers, flush=True)
        if ended is not None and ended.status == "failed":
            return


def _follow(parent: int) -> None:
    """Have the run in progress stop in order, and then this process, when the one that asks has gone."""
    while os.getppid() == parent:
        time.sleep(FOLLOWS)
    os.kill(os.getpid(), signal.SIGTERM)


def run(config: Config, ranks: int) -> Ended | None:
    """Train a run to its end; ``None``: a signal stopped it, or another process has it."""
    directory = Path(config.run.directory)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with _written_to(directory / OUTPUT):
            return _launch(config, ranks) if ranks > 1 else _train(config)
    except (DivergenceError, LossScaleError) as error:
        return Ended(status="diverged", reason=_first_line(error))
    except InUseError as error:
        print(f"{directory.name}: {error}", file=sys.stderr, flush=True)
        return None
    except MegatronStableError as error:
        return Ended(status="failed", reason=str(error))
    except Exception as error:
        with (directory / OUTPUT).open("a", encoding="utf-8") as log:
            traceback.print_exc(file=log)
        return Ended(status="failed", reason=f"{type(error).__name__}: {_first_line(error)}")
    finally:
        let_go()


def _train(config: Config) -> Ended | None:
    from megatron_stable.training.pretrain import train

    return Ended(status="finished") if train(config) is None else None


def _launch(config: Config, ranks: int) -> Ended | None:
    """Train on several ranks, each a process of its own."""
    from megatron_stable.checkpoint import store
    from megatron_stable.launching.local import TRAINING, launch

    run = RunDirectory(config.run.directory)
    path = run.path / START
    write_file(path, dump_config(config).encode())
    code = launch(TRAINING, ["--config", str(path)], ranks)
    if code == 0:
        saved = max((entry.step for entry in store.entries(run.checkpoints) if entry.usable), default=0)
        return Ended(status="finished") if saved >= config.run.steps else None
    if code in (DivergenceError.exit_code, LossScaleError.exit_code):
        return read_ended(run.path) or Ended(status="diverged")
    return Ended(status="failed", reason=f"exit code {code}; see {OUTPUT}")


def last_records(run: Path, size: int = GLANCE) -> Iterator[dict[str, Any]]:
    """The records among the last bytes of a run's."""
    yield from jsonl.tail(RunDirectory(run).metrics, size)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


@contextmanager
def _written_to(path: Path) -> Iterator[None]:
    """What this process prints goes to a file, behind what is in it."""
    before = [os.dup(stream) for stream in (1, 2)]
    with path.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, old in zip((1, 2), before, strict=True):
            os.dup2(old, stream)
            os.close(old)


if __name__ == "__main__":
    main()
