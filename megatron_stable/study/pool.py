"""Runs of a sweep side by side on this machine: processes that each train one run after another."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NamedTuple

from megatron_stable.errors import ConfigError
from megatron_stable.launching.local import OWN_GROUP, gpu_count, ignored
from megatron_stable.parallel.launcher import alone
from megatron_stable.study.grid import Cell
from megatron_stable.study.outcome import Ended, write_ended
from megatron_stable.study.worker import OUTPUT, Answer
from megatron_stable.training.stop import SIGNALS

EVERY = 0.5  # seconds between looks at what goes on
ENDS = 10.0  # seconds that a process whose run has failed may take to end


class Change(NamedTuple):
    """Something has happened, or a moment has passed.

    Attributes:
        cell: The run that has ended, if one has.
        ended: How; ``None``: it was stopped.
        running: The runs that go on.
        again: Whether it is tried once more.
    """

    cell: Cell | None
    ended: Ended | None
    running: tuple[Cell, ...]
    again: bool = False


def places(ranks: int, jobs: int | None) -> tuple[int, list[str]]:
    """Runs at a time on this machine, ``jobs`` if that is given, and GPUs for each.

    Raises:
        ConfigError: It has GPUs, but fewer than a run has ranks.
    """
    gpus = gpu_count()
    if 0 < gpus < ranks:
        raise ConfigError(f"ranks: {ranks}, but this machine has {gpus} GPU(s)")
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = shown.split(",") if shown else [str(gpu) for gpu in range(gpus)]
    devices = [",".join(names[first : first + ranks]) for first in range(0, gpus - ranks + 1, ranks)] if gpus else []
    return jobs or len(devices) or max(1, len(os.sched_getaffinity(0)) // ranks), devices


class Pool:
    """Processes that train.

    Args:
        ranks: Of each run.
        jobs: Runs at a time.
        devices: GPUs for each process, as CUDA_VISIBLE_DEVICES names them.
        retries: Times that a run that failed is tried again.
    """

    def __init__(self, ranks: int, jobs: int, devices: Sequence[str] = (), retries: int = 1) -> None:
        self.ranks, self.jobs, self.devices, self.retries = ranks, jobs, devices, retries
        self._stopping = False

    def train(self, cells: Sequence[Cell]) -> Iterator[Change]:
        """Train runs, in this order. A signal to this process stops them in order, and what they wait for.

        Raises:
            KeyboardInterrupt: There was such a signal, and all have stopped.
        """
        waiting, tries = deque(cells), dict.fromkeys((cell.name for cell in cells), 0)
        workers: list[_Worker] = []
        with selectors.DefaultSelector() as ready, self._signals(workers):
            try:
                while waiting or any(worker.cell for worker in workers):
                    self._hand_out(waiting, workers, ready)
                    if self._stopping and not any(worker.cell for worker in workers):
                        break
                    told = [key.data for key, _ in ready.select(EVERY)]
                    for worker in told:
                        cell, ended = worker.answer()
                        if worker.over:
                            ready.unregister(worker.stdout)
                            workers.remove(worker)
                            worker.end()  # before another one may try the same run
                        if cell is None:
                            continue
                        tries[cell.name] += 1
                        again = ended is not None and ended.status == "failed" and tries[cell.name] <= self.retries
                        again = again and not self._stopping
                        if again:
                            waiting.append(cell)
                        yield Change(cell, ended, self._running(workers), again)
                    if not told:
                        yield Change(None, None, self._running(workers))
            finally:
                for worker in workers:
                    worker.end()
        if self._stopping:
            raise KeyboardInterrupt

    def _hand_out(self, waiting: deque[Cell], workers: list[_Worker], ready: selectors.BaseSelector) -> None:
        while waiting and not self._stopping:
            idle = next((worker for worker in workers if worker.cell is None), None)
            if idle is None:
                if len(workers) == self.jobs:
                    return
                taken = Counter(worker.devices for worker in workers)
                idle = _Worker(min(self.devices, key=taken.__getitem__, default=None), self.jobs * self.ranks)
                workers.append(idle)
                ready.register(idle.stdout, selectors.EVENT_READ, idle)
            idle.ask(waiting.popleft(), self.ranks)
            if self._stopping:  # by a signal that came in between
                idle.signal(signal.SIGTERM)

    def _running(self, workers: Sequence[_Worker]) -> tuple[Cell, ...]:
        return tuple(worker.cell for worker in workers if worker.cell is not None)

    @contextmanager
    def _signals(self, workers: list[_Worker]) -> Iterator[None]:
        """The first signal stops the runs, which save; a second one ends them."""

        def receive(number: int, frame: FrameType | None) -> None:
            for worker in workers:
                worker.signal(signal.SIGKILL if self._stopping else signal.SIGTERM)
            self._stopping = True

        before = {number: signal.signal(number, receive) for number in SIGNALS if not ignored(number)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


class _Worker:
    """A process of :mod:`megatron_stable.study.worker`, and the run that it trains.

    Args:
        sharing: Ranks that share this machine's cores.
    """

    cell: Cell | None

    def __init__(self, devices: str | None, sharing: int) -> None:
        self.devices, self.cell, self.over = devices, None, False
        threads = str(max(1, len(os.sched_getaffinity(0)) // sharing))
        environment = {"OMP_NUM_THREADS": threads, **alone()}
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        command = [sys.executable, "-m", "megatron_stable.study.worker"]
        pipe = subprocess.PIPE
        self.process: subprocess.Popen[str] = subprocess.Popen(
            command, text=True, stdin=pipe, stdout=pipe, env=environment, **OWN_GROUP
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def ask(self, cell: Cell, ranks: int) -> None:
        """Have a run trained."""
        self.cell = cell
        with suppress(BrokenPipeError):  # its end is noticed where its answer is waited for
            self.stdin.write(f'{{"ranks": {ranks}, "config": {cell.config.model_dump_json()}}}\n')
            self.stdin.flush()

    def answer(self) -> tuple[Cell | None, Ended | None]:
        """The run that has ended, and how."""
        line, cell = self.stdout.readline(), self.cell
        self.cell = None
        if line:
            told = Answer.model_validate_json(line)
            self.over = told.status == "failed"
            return cell, None if told.status == "stopped" else Ended(status=told.status, reason=told.reason)
        self.over = True
        code = self.process.wait()
        if cell is None or code in (0, -signal.SIGTERM):
            return cell, None
        why = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        ended = Ended(status="failed", reason=f"its process {why}; see {OUTPUT}")
        write_ended(cell.directory, ended)
        return cell, ended

    def signal(self, number: int) -> None:
        """Send a signal."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def end(self) -> None:
        """Let it end, and wait for that."""
        with suppress(BrokenPipeError):
            self.stdin.close()
        if self.cell is not None:
            self.signal(signal.SIGTERM)
        elif self.over:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(ENDS)
            self.signal(signal.SIGKILL)
        self.process.wait()
        self.stdout.close()
