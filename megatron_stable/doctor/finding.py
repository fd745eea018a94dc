"""What checks find, on which ranks, and what that comes to over all of them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from statistics import median
from typing import Any, Literal

from megatron_stable.errors import ConfigError
from megatron_stable.parallel.heartbeat import spans

SLOW = 0.6  # of the median: a place below it is named
NAMED = 8  # machines that are named, at most


class Verdict(IntEnum):
    """Of a check; the worst counts."""

    OK = 0
    WARNING = 1
    FAILURE = 2

    @property
    def word(self) -> str:
        """As people read it."""
        return self.name.lower()


@dataclass(frozen=True)
class Finding:
    """What a check found in one place.

    Attributes:
        check: Its subject, a few words; findings of one subject are told together.
        text: What it is; ``{name}`` stands for a number, as ``str.format`` has it.
        remedy: What to do about it; numbers as in ``text``.
        numbers: Measured values, which may differ between places that are alike otherwise.
        scope: What it is true of: this rank, its machine, or all ranks.
        speed: The number of which less is slower: places far below the median are named.
        alike: Whether it must be the same everywhere.
    """

    check: str
    text: str
    verdict: Verdict = Verdict.OK
    remedy: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    scope: Literal["rank", "machine", "world"] = "machine"
    speed: str = ""
    alike: bool = False


@dataclass(frozen=True)
class Row:
    """What a check found, all places with the same finding taken together.

    Attributes:
        where: These places in words; empty: everywhere.
        numbers: Least and greatest value by name.
    """

    check: str
    verdict: Verdict
    text: str
    remedy: str
    where: str
    numbers: dict[str, tuple[float, float]]


class Span(tuple[float, float]):
    """Least and greatest value, which format as one number where they look the same."""

    def __format__(self, spec: str) -> str:
        low, high = (format(value, spec) for value in self)
        return low if low == high else f"{low} to {high}"


def summary(findings: Sequence[tuple[int, Finding]], hosts: Sequence[str]) -> list[Row]:
    """All ranks' findings as rows, by check in the order in which they came, the worst first.

    Args:
        findings: Each with the rank that found it.
        hosts: The machine of each rank, by name.
    """
    by_check: dict[str, list[tuple[int, Finding]]] = {}
    for rank, finding in findings:
        by_check.setdefault(finding.check, []).append((rank, finding))
    return [row for found in by_check.values() for row in _rows(found, hosts)]


def _rows(found: list[tuple[int, Finding]], hosts: Sequence[str]) -> list[Row]:
    groups: dict[tuple[Verdict, str, str], list[tuple[int, Finding]]] = {}
    for rank, finding in found:
        groups.setdefault((finding.verdict, finding.text, finding.remedy), []).append((rank, finding))
    differ = len(groups) > 1 and any(finding.alike for _, finding in found)
    rows = []
    for verdict, text, remedy in sorted(groups, key=lambda key: -key[0]):
        members = groups[verdict, text, remedy]
        measured = {name: [finding.numbers[name] for _, finding in members] for name in members[0][1].numbers}
        ranges = {name: Span((min(values), max(values))) for name, values in measured.items()}
        scope = members[0][1].scope
        everywhere = scope == "world" or {rank for rank, _ in members} == {rank for rank, _ in found}
        where = "" if everywhere else named([rank for rank, _ in members], hosts, scope)
        if differ:
            verdict = max(verdict, Verdict.WARNING)
            remedy = remedy or "this should be the same on all machines: install and set them up alike"
        values = {name: (low, high) for name, (low, high) in ranges.items()}
        rows.append(Row(members[0][1].check, verdict, text.format(**ranges), remedy.format(**ranges), where, values))
    return rows + _stragglers(found, hosts)


def _stragglers(found: list[tuple[int, Finding]], hosts: Sequence[str]) -> list[Row]:
    """Places that are much slower than most."""
    speeds = {rank: finding.numbers[finding.speed] for rank, finding in found if finding.speed}
    if len(speeds) < 2:
        return []
    middle, first = median(speeds.values()), found[0][1]
    slow = {rank: speed for rank, speed in speeds.items() if speed < SLOW * middle}
    if not slow:
        return []
    low, where = min(slow.values()), named(sorted(slow), hosts, first.scope)
    text = f"slow: {low:.3g} against a median of {middle:.3g}"
    remedy = "all ranks wait for the slowest: see what else runs there, or leave it out"
    return [Row(first.check, Verdict.WARNING, text, remedy, where, {first.speed: (low, middle)})]


def named(ranks: Sequence[int], hosts: Sequence[str], scope: str = "rank") -> str:
    """Places in words: machines, or ranks with their machines."""
    machines = list(dict.fromkeys(hosts[rank] for rank in ranks))
    told = ", ".join(machines[:NAMED]) + (f" and {len(machines) - NAMED} more" if len(machines) > NAMED else "")
    return told if scope == "machine" else f"{spans(ranks)} ({told})"


def worst(rows: Iterable[Row]) -> Verdict:
    """Of all rows."""
    return max((row.verdict for row in rows), default=Verdict.OK)


def exit_code(rows: Iterable[Row]) -> int:
    """0 unless something failed: there is something to mend before a run."""
    return ConfigError.exit_code if worst(rows) is Verdict.FAILURE else 0


def as_json(rows: Sequence[Row], hosts: Sequence[str]) -> dict[str, Any]:
    """The whole report, for programs."""
    return {
        "verdict": worst(rows).word,
        "exit_code": exit_code(rows),
        "ranks": len(hosts),
        "machines": list(dict.fromkeys(hosts)),
        "checks": [{**asdict(row), "verdict": row.verdict.word} for row in rows],
    }
