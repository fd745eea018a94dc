"""Links are measured for real between neighbours, and one that is far slower than its like is named."""

from __future__ import annotations

from megatron_stable.doctor.finding import Finding, Verdict
from megatron_stable.doctor.links import Link, check_links, judged
from tests.doctor.rounds import crew
from tests.harness.ranks import Ranks


def links_on_rank(hosts: tuple[str, ...]) -> list[Finding]:
    return check_links(crew(hosts))


def test_all_pairs_of_neighbours_are_measured(ranks: Ranks) -> None:
    hosts = ("a", "a", "a", "b", "b")
    first, *others = ranks.run(5, links_on_rank, hosts)
    assert others == [[]] * 4
    by_check = {finding.check: finding for finding in first if finding.verdict is Verdict.OK}
    assert set(by_check) == {"links within a machine", "links between machines", "all-reduce"}
    assert "(3 pairs of neighbours)" in by_check["links within a machine"].text
    assert "(1 pair of neighbours)" in by_check["links between machines"].text
    for name in ("links within a machine", "links between machines"):
        numbers = by_check[name].numbers
        assert 1e-6 < numbers["latency_median"] < 1.0
        assert 1e6 < numbers["bandwidth_least"] < 1e12
    assert all(seconds > 0 for seconds in by_check["all-reduce"].numbers.values())


def test_one_rank_has_no_links(ranks: Ranks) -> None:
    assert ranks.run(1, links_on_rank, ("a",)) == [[]]


def test_a_slow_link_is_named_with_both_machines() -> None:
    hosts = ("a", "b", "c", "d")
    links = [Link((0, 1), 1e-5, 10e9), Link((1, 2), 1e-5, 1e9), Link((2, 3), 1e-5, 12e9)]
    told, slow = judged(links, hosts)
    assert told.text == "10 us one way, 1 to 12 GB/s (3 pairs of neighbours)"
    assert slow.verdict is Verdict.WARNING
    assert slow.text == "ranks 1 and 2 on b and c: 1 GB/s, the median is 10"
    assert len(judged([link._replace(bandwidth=9e9) for link in links], hosts)) == 1
