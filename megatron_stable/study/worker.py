"""A process that trains one run of a sweep after another: importing torch and DeepSpeed takes longer than a small run.

It reads a line of JSON for each run, and writes one when that has ended::

    {"ranks": 1, "config": {…}}  ──>  {"status": "finished"}, or "diverged", "failed", "stopped"

What the run prints is in its directory, in ``output.log``. The process ends with its input, and after a failure, which
may have left anything behind.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from megatron_stable.config.load import dump_config, parse_config
from megatron_stable.config.schema import Config
from megatron_stable.errors import DivergenceError, LossScaleError, MegatronStableError
from megatron_stable.files import write_file
from megatron_stable.persisted import Persisted
from megatron_stable.records import jsonl
from megatron_stable.records.directory import RunDirectory
from megatron_stable.study.outcome import Ended, write_ended


class Answer(Persisted):
    """How a run has ended, or that it was stopped, and why."""

    status: Literal["finished", "diverged", "failed", "stopped"]
    reason: str | None = None


OUTPUT = "output.log"
START = "start.yaml"  # what the ranks of a run read
WHOLE, GLANCE = 1 << 20, 1 << 13  # bytes of metrics.jsonl that have its last record, or one of its last


def main() -> None:
    """Train what standard input asks for."""
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


def run(config: Config, ranks: int) -> Ended | None:
    """Train a run to its end; ``None``: a signal stopped it."""
    directory = Path(config.run.directory)
    directory.mkdir(parents=True, exist_ok=True)
    with _written_to(directory / OUTPUT):
        try:
            ended = _launch(config, ranks) if ranks > 1 else _train(config)
        except (DivergenceError, LossScaleError) as error:
            return Ended(status="diverged", reason=_first_line(error))
        except MegatronStableError as error:
            if os.getppid() == 1:  # it was stopped, as who asked for it has gone
                sys.exit(0)
            return Ended(status="failed", reason=str(error))
        except Exception as error:
            traceback.print_exc()
            return Ended(status="failed", reason=f"{type(error).__name__}: {_first_line(error)}")
    if ended is not None:
        return ended
    return Ended(status="finished") if last_step(directory) >= config.run.steps else None


def _train(config: Config) -> Ended | None:
    from megatron_stable.parallel.world import join_world
    from megatron_stable.training.pretrain import train

    join_world()  # once: the next run finds it joined
    train(config)
    gc.collect()  # a model is full of cycles, and the next one should not have to stand beside it
    return None


def _launch(config: Config, ranks: int) -> Ended | None:
    """Train on several ranks, each a process of its own."""
    from megatron_stable.launching.local import TRAINING, launch

    path = Path(config.run.directory) / START
    write_file(path, dump_config(config).encode())
    code = launch(TRAINING, ["--config", str(path)], ranks)
    if code == 0:
        return None
    stops = [event for event in RunDirectory(config.run.directory).ledger.read() if event.event == "stop"]
    if code in (DivergenceError.exit_code, LossScaleError.exit_code):
        return Ended(status="diverged", reason=getattr(stops[-1], "reason", None) if stops else None)
    return Ended(status="failed", reason=f"exit code {code}; see {OUTPUT}")


def last_step(run: Path) -> int:
    """The last step on record."""
    return max((int(record.get("step", 0)) for record in last_records(run, WHOLE)), default=0)


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
