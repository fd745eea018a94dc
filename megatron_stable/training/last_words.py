"""What the lifeline says of a run, into its ledger: stdout may be gone."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path

from megatron_stable.parallel.notice import Lost, Suspected, WentOn, Word
from megatron_stable.records import owner
from megatron_stable.records.directory import RunDirectory
from megatron_stable.stability import events

STACKS = 8  # places that are kept


class LastWords:
    """Called from a thread with what should be kept, on rank 0 and on the last rank.

    Nothing is written unless the run's directory still belongs to this start. That rank 0 is lost, the last rank
    writes, if rank 0's process is gone, or its count in ``owner.json`` stands still; else it lives, cut off from the
    others, and says itself why it ends. A line is one write at the end of the file.
    """

    def __init__(self) -> None:
        self._run: RunDirectory | None = None
        self._token: str | None = None
        self._suspected: tuple[float, int] | None = None  # when, and what rank 0's count was

    def begin(self, run: Path, token: str | None) -> None:
        """Training begins in a run's directory, for an owner with this token."""
        self._run, self._token = RunDirectory(run), token

    def __call__(self, word: Word) -> None:
        """Put it on record. OSError: it cannot be written."""
        if self._run is None:
            return
        found = owner.read_owner(self._run.path / owner.OWNER)
        if found is None or found.token != self._token:
            return  # another start has it
        if isinstance(word, Suspected):
            self._suspected = time.monotonic(), found.beats
        elif not isinstance(word, Lost):
            kind = events.WentOn if isinstance(word, WentOn) else events.Waiting
            facts = {key: value for key, value in word._asdict().items() if key in kind.model_fields}
            self._run.ledger.write(kind(**facts))  # into the logbook with what comes next
        elif word.rank_0 != "silent" or self._stands_still(found):
            stacks = dict(islice(word.stacks.items(), STACKS)) or None
            self._run.log(events.Stop(step=word.step, exit_code=word.exit_code, reason=word.reason, stacks=stacks))

    def _stands_still(self, rank_0: owner.Owner) -> bool:
        """Whether rank 0 has not counted since it was suspected, for long enough that it will not write itself."""
        since, beats = self._suspected or (time.monotonic(), 0)
        return beats == rank_0.beats and time.monotonic() - since > 2 * owner.BEAT
