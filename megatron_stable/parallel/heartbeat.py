"""What ranks say of themselves every few seconds, and what rank 0 makes of it. Decisions, by a clock that is given.

A rank whose beats cease is *silent*: its machine is down or cut off, or its process was stopped. A rank that beats but
gets nothing done is *still*; then all soon are, as they wait for each other in collectives, and where they are tells
which one the others wait for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from math import inf
from pathlib import PurePath
from traceback import walk_stack
from types import FrameType
from typing import NamedTuple

LEFT = -1  # the number of a rank that has left in order
DEPTH = 20  # frames of a stack that are told
PLUMBING = ("/torch/nn/modules/module.py", "/deepspeed/utils/nvtx.py")  # frames that say nothing
WAITING = (
    "/torch/distributed/",
    "/deepspeed/comm/",
    "/megatron_stable/parallel/lifeline.py",
    "/megatron_stable/parallel/line.py",
)
NAMED = 4  # ranks that are named with their hosts, at most
GO, STACKS, END = "go", "stacks", "end"  # rank 0's words
ANEW = "the same command begins anew"


class Beat(NamedTuple):
    """A rank's word on itself.

    Attributes:
        number: Of the beat.
        progress: Of what its main thread has done: steps, batches, saves.
        allowance: Seconds that what it does now may take.
        stack: Where its main thread is; empty unless that was asked for.
        waits: Whether that is in a collective.
        place: The innermost call there.
    """

    number: int
    progress: int
    allowance: float
    stack: str = ""
    waits: bool = False
    place: str = ""

    def encode(self) -> str:
        """As it is sent."""
        return json.dumps(self)

    @classmethod
    def decode(cls, sent: bytes) -> Beat:
        """What :meth:`encode` made."""
        return cls(*json.loads(sent))


class Verdict(NamedTuple):
    """Why a run ends.

    Attributes:
        reason: Who or what is to blame.
        remedy: What to do about it.
        stacks: Where every rank stands, by ranks: those that few share first.
    """

    reason: str
    remedy: str
    stacks: dict[str, str]


def stack_of(frame: FrameType) -> tuple[str, bool, str]:
    """(the innermost frames as text, whether they wait in a collective, the innermost one).

    Without lines of source: what hangs may be the file system that has them.
    """
    found = [(each.f_code.co_filename, line, each.f_code.co_name) for each, line in walk_stack(frame)]
    frames = [each for each in found if not each[0].endswith(PLUMBING)][:DEPTH]
    text = "".join(f'  File "{file}", line {line}, in {name}\n' for file, line, name in reversed(frames))
    waits = any(mark in file for file, _, _ in frames[:4] for mark in WAITING)
    return text, waits, f"{frames[0][2]}, {PurePath(frames[0][0]).name}:{frames[0][1]}" if frames else ""


class Judge:
    """Rank 0's eye on all ranks.

    Args:
        limit: Seconds without a beat after which a rank is silent.
        answer: Seconds in which ranks answer when they are asked for their stacks.
        now: Seconds, of the clock by which it is called.
        again: What the same command does after the end, in words.
    """

    def __init__(self, ranks: int, limit: float, answer: float, now: float, again: str = ANEW) -> None:
        self.limit, self.answer, self.again = limit, answer, again
        self.beats = [Beat(0, 0, limit)] * ranks
        self._beaten, self._moved = [now] * ranks, [now] * ranks
        self._missed = 2 / 3 * answer  # seconds: two beats that did not come, of the three in which ranks answer
        self._asked: float | None = None
        self._now = now
        self._stood = 0.0  # seconds without anything done, of the rank that stands longest

    def see(self, now: float, beats: Sequence[Beat], met: float = -inf) -> str:
        """What to say to all ranks: go on, give your stacks, or end.

        Args:
            met: When all ranks last did something together: none of them was lost then, though after a link was down
                its beats may come later than its gradients, by a connection of their own.
        """
        for rank, (before, beat) in enumerate(zip(self.beats, beats, strict=True)):
            self._beaten[rank] = now if beat.number != before.number else max(self._beaten[rank], met)
            self._moved[rank] = now if beat.progress != before.progress else max(self._moved[rank], met)
        self.beats, self._now = [*beats], now
        stood = (now - since for since, beat in zip(self._moved, beats, strict=True) if beat.number != LEFT)
        self._stood = max(stood, default=0.0)
        if not self._trouble(now):
            self._asked = None
            return GO
        if self._asked is None:
            self._asked = now
        return END if now - self._asked > self.answer or not self._unheard() else STACKS

    def awaited(self) -> list[int]:
        """Ranks that the others wait for, as far as the last beats tell: the silent, or those that stand apart."""
        return self._silent(self._missed) or self._apart()

    def silent(self, seconds: float) -> bool:
        """Whether a rank has been, for so long."""
        return bool(self._silent(seconds))

    def named(self, ranks: Sequence[int], host: Callable[[int], str]) -> str:
        """Ranks in words, with their machines, and what is known of them; nothing of none."""
        if not ranks:
            return ""
        quiet = self._now - max(self._beaten[rank] for rank in ranks)
        places = {self.beats[rank].place for rank in ranks}
        if quiet > self._missed:
            known = f" (silent for {quiet:.0f} s)"
        else:
            known = f" (in {places.pop()})" if len(places) == 1 else ""
        return _named(ranks, host) + known

    def verdict(self, host: Callable[[int], str]) -> Verdict:
        """Why the run ends, and where every rank stands."""
        silent, apart = self._unheard(), self._apart()
        if silent:
            reason = f"{_named(silent, host)} fell silent {self.limit:.0f} s ago (down, cut off, or stopped)"
            remedy = "see to that machine, or start without it"
        elif apart:
            reason = f"no progress for {self._stood:.0f} s: {_named(apart, host)}, for whom others wait"
            remedy = "its stack says where"
        else:
            reason = f"no progress for {self._stood:.0f} s, and no rank stands out: a GPU or the network hangs"
            remedy = "see the kernel's log of each machine (dmesg)"
        by_stack: dict[str, list[int]] = {}
        for rank, beat in enumerate(self.beats):
            if beat.stack:
                by_stack.setdefault(beat.stack.rstrip(), []).append(rank)
        stacks = {spans(together): stack for stack, together in sorted(by_stack.items(), key=lambda each: len(each[1]))}
        return Verdict(reason, f"{remedy}; {self.again}", stacks)

    def _silent(self, seconds: float) -> list[int]:
        return [
            rank
            for rank, beat in enumerate(self.beats)
            if beat.number != LEFT and self._now - self._beaten[rank] > seconds
        ]

    def _apart(self) -> list[int]:
        """Ranks that are not in a collective while others are; if none is, as on GPUs, which hosts run ahead of, those
        that are elsewhere than most; or those that are behind. Empty: none stands out."""
        present = {rank: beat for rank, beat in enumerate(self.beats) if beat.number != LEFT}
        if not present:
            return []
        common, count = Counter(beat.place for beat in present.values()).most_common(1)[0]
        most = 2 * count > len(present) and not any(beat.waits for beat in present.values())
        foremost = max(beat.progress for beat in present.values())
        for apart in (
            [rank for rank, beat in present.items() if not beat.waits],
            [rank for rank, beat in present.items() if most and beat.place != common],
            [rank for rank, beat in present.items() if beat.progress < foremost],
        ):
            if 0 < len(apart) < len(present):
                return apart
        return []

    def _trouble(self, now: float) -> bool:
        return any(
            now - self._beaten[rank] > self.limit or now - self._moved[rank] > beat.allowance
            for rank, beat in enumerate(self.beats)
            if beat.number != LEFT
        )

    def _unheard(self) -> list[int]:
        """Ranks without a word on where they are."""
        return [rank for rank, beat in enumerate(self.beats) if beat.number != LEFT and not beat.stack]


def spans(ranks: Iterable[int]) -> str:
    """Rising numbers of ranks in words: "ranks 0-6, 8"."""
    ranks = [*ranks]
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"rank{'s' * (len(ranks) > 1)} {text}"


def _named(ranks: Sequence[int], host: Callable[[int], str]) -> str:
    first = ", ".join(f"rank {rank} on {host(rank)}" for rank in ranks[:NAMED])
    return first + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")
