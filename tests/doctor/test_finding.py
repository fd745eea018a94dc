"""What is found on each rank becomes rows: alike places together, others by name."""

from __future__ import annotations

from megatron_stable.doctor.finding import Finding, Row, Verdict, as_json, exit_code, summary
from megatron_stable.doctor.report import line, verdict_line

HOSTS = ("a", "a", "b", "b", "c", "c")
LEADERS = (0, 2, 4)


def by_machine(*findings: Finding) -> list[tuple[int, Finding]]:
    return list(zip(LEADERS, findings, strict=True))


def test_the_same_everywhere_is_one_row_without_a_place() -> None:
    rows = summary(by_machine(*[Finding("versions", "torch 2.13.0", alike=True)] * 3), HOSTS)
    assert rows == [Row("versions", Verdict.OK, "torch 2.13.0", "", "", {})]


def test_versions_that_differ_are_named_with_their_machines() -> None:
    found = [Finding("versions", f"torch {which}", alike=True) for which in ("2.13.0", "2.13.0", "2.12.1")]
    rows = summary(by_machine(*found), HOSTS)
    assert [(row.verdict, line(row)) for row in rows] == [
        (Verdict.WARNING, "a, b: torch 2.13.0"),
        (Verdict.WARNING, "c: torch 2.12.1"),
    ]
    assert all(row.remedy for row in rows)
    assert exit_code(rows) == 0


def test_numbers_of_alike_places_are_a_range() -> None:
    found = [Finding("writing", "{rate:.0f} MB/s", numbers={"rate": rate}) for rate in (110.2, 99.8, 120.0)]
    (row,) = summary(by_machine(*found), HOSTS)
    assert (line(row), row.numbers) == ("100 to 120 MB/s", {"rate": (99.8, 120.0)})
    (row,) = summary(by_machine(*[found[2]] * 3), HOSTS)
    assert line(row) == "120 MB/s"


def test_what_is_wrong_on_one_machine_comes_first_and_is_named() -> None:
    bad = Finding("storage", "full", Verdict.FAILURE, "make room")
    rows = summary(by_machine(Finding("storage", "fine"), bad, Finding("storage", "fine")), HOSTS)
    assert [(row.verdict.word, line(row)) for row in rows] == [("failure", "b: full"), ("ok", "a, c: fine")]
    assert exit_code(rows) == 2
    assert verdict_line(rows, HOSTS).startswith("1 failure on 6 ranks of 3 machines: ")


def test_a_slow_rank_is_named_against_the_median() -> None:
    rates = (10.0, 11.0, 10.5, 3.0, 10.0, 9.0)
    found = [Finding("speed", "{x:.0f}", numbers={"x": rate}, scope="rank", speed="x") for rate in rates]
    first, slow = summary(list(enumerate(found)), HOSTS)
    assert (first.verdict, line(first)) == (Verdict.OK, "3 to 11")
    assert (slow.verdict, line(slow)) == (Verdict.WARNING, "rank 3 (b): slow: 3 against a median of 10")
    near = [Finding("speed", "", numbers={"x": rate}, scope="rank", speed="x") for rate in (10.0, 8.0, 9.0)]
    assert len(summary(list(enumerate(near)), HOSTS)) == 1


def test_many_machines_are_not_all_named() -> None:
    hosts = [f"n{number}" for number in range(20)]
    found = [(rank, Finding("x", "good" if rank else "bad")) for rank in range(20)]
    assert [row.where for row in summary(found, hosts)] == [
        "n0",
        "n1, n2, n3, n4, n5, n6, n7, n8 and 11 more",
    ]


def test_json_has_all_of_it() -> None:
    rows = summary(by_machine(*[Finding("x", "{n:.0f}", Verdict.WARNING, "do", {"n": 1.5})] * 3), HOSTS)
    check = {"check": "x", "verdict": "warning", "text": "2", "remedy": "do", "where": "", "numbers": {"n": (1.5, 1.5)}}
    expected = {"verdict": "warning", "exit_code": 0, "ranks": 6, "machines": ["a", "b", "c"], "checks": [check]}
    assert as_json(rows, HOSTS) == expected
