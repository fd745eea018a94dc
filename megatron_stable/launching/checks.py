"""What is wrong with the machines, going by their answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron_stable.launching.asking import Answer
from megatron_stable.launching.hosts import span
from megatron_stable.launching.survey import DIGESTS, FREE, TAKEN, Survey, must_agree

SKEW = 2.0  # seconds between clocks, which records of several machines tell


class Problem(NamedTuple):
    """Something to see to.

    Attributes:
        fatal: No run comes of it.
    """

    fatal: bool
    text: str

    def __str__(self) -> str:
        return f"{'error' if self.fatal else 'warning'}: {self.text}"


def problems(answers: Sequence[Answer], slots: Mapping[str, int], port: int, run: str, needed: float) -> list[Problem]:
    """All of them, the fatal ones first.

    Args:
        slots: Ranks by host; the first host is that of rank 0.
        port: Where the ranks are to meet.
        run: The run's directory.
        needed: Bytes that the checkpoints to come will take there.
    """
    found = [Problem(True, f"{answer.host}: {answer.error}") for answer in answers if answer.survey is None]
    known = {answer.host: answer.survey for answer in answers if answer.survey is not None}
    found += _unlike(known)
    found += _unshared(known, run)
    found += _unreachable(known, next(iter(slots)), port)
    for host, survey in known.items():
        if 0 < survey.gpus < slots[host]:
            found.append(Problem(True, f"{host} has {survey.gpus} GPUs and slots={slots[host]} in the hostfile"))
        if survey.ranks:
            pids = " ".join(survey.ranks)
            said = next(iter(survey.ranks.values()))
            text = f"{host} trains already ({said}): `megatron-stable stop` its run, or end it: kill {pids}"
            found.append(Problem(False, text))
    found += _skewed([answer for answer in answers if answer.survey is not None])
    if known and (free := min(survey.free for survey in known.values())) < needed:
        text = f"{run} has {free / 1e9:,.1f} GB free; the checkpoints that are kept take {needed / 1e9:,.1f} GB"
        found.append(Problem(False, text))
    return sorted(found, key=lambda problem: not problem.fatal)


def _unlike(known: Mapping[str, Survey]) -> list[Problem]:
    """Machines that differ from most in what must be the same."""
    if not known:
        return []
    found = []
    for what in must_agree(next(iter(known.values()))):
        values = {host: must_agree(survey)[what] for host, survey in known.items()}
        usual = Counter(values.values()).most_common(1)[0][0]
        if others := [host for host, value in values.items() if value != usual]:
            shown = "differs, or is not there" if what in DIGESTS else f"is {values[others[0]]} and not {usual}"
            found.append(Problem(True, f"{span(others)}: {what} {shown}; give all machines the same environment"))
        elif not usual:
            found.append(Problem(True, f"no machine sees {what}; give it a path that all of them share"))
    return found


def _unshared(known: Mapping[str, Survey], run: str) -> list[Problem]:
    blind = [host for host, survey in known.items() if not survey.sees]
    if not blind:
        return []
    return [Problem(True, f"{span(blind)}: run.directory {run} is not on a file system that this machine shares")]


def _unreachable(known: Mapping[str, Survey], first: str, port: int) -> list[Problem]:
    """Machines that would not find rank 0."""
    found = []
    if first in known and known[first].answer == TAKEN:
        text = f"port {port} of {first} is taken (by an earlier run that still lives?): end it, or give another --port"
        return [Problem(True, text)]
    by_answer: dict[str, list[str]] = {}
    for host, survey in known.items():
        if survey.answer not in (FREE, TAKEN):
            by_answer.setdefault(survey.answer, []).append(host)
    for answer, hosts in by_answer.items():
        text = f"{span(hosts)}: {first}:{port} cannot be reached ({answer}); does a firewall let this port through?"
        found.append(Problem(True, text))
    return found


def _skewed(answers: Sequence[Answer]) -> list[Problem]:
    off = [answer for answer in answers if abs(answer.offset) > SKEW + answer.uncertain]
    if not off:
        return []
    worst = max(off, key=lambda answer: abs(answer.offset))
    text = f"the clock of {span([answer.host for answer in off])} differs by {worst.offset:+.0f} s; set them by NTP"
    return [Problem(False, text)]


def master_address(surveys: Sequence[Survey]) -> str:
    """The address at which most other machines know the first, which may call itself 127.0.1.1; alone, a loopback."""
    first, *others = surveys
    if not others:
        return "127.0.0.1"
    return Counter(survey.first for survey in others).most_common(1)[0][0] or first.host
