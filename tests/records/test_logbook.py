"""The logbook says what the ledger says, in words, in order, for whatever the ledger holds."""

from __future__ import annotations

import re
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_stable.records.logbook import render
from megatron_stable.stability.events import Drop, Event, Rollback, SecondOpinion, Shift, Spike, SpikeEnd, Stop, parse
from tests.stability.test_events import EVENTS, JSON, LINES

DAY = "2026-11-20T10:00:{:02d}+00:00"
RISE = {"series": "loss", "value": 9.31234, "level": 2.5, "scale": 0.02, "score": 340.3, "onset": 119}
ROLLBACK = {
    "by": "guard", "rule": "divergence", "onset": 119, "rollback_to": 50, "windows": [[51, 219]],
    "learning_rate_factor": 0.5, "clip_factor": 0.8, "reset_loss_scale": True, "reason": "attempt 1 of 3", "id": "abc",
}  # fmt: skip


def event(kind: str, step: int, second: int = 0, **facts: Any) -> Event:
    found = parse({"time": DAY.format(second), "event": kind, "step": step, **facts})
    assert found.model_fields_set >= facts.keys(), "an event of this kind has such facts"
    return found


def drops(count: int, first: int = 120, every: int = 1) -> list[Event]:
    return [
        event("drop", first + i * every, 2, data_step=first + 10 + i * every, rule="spike" if i else "non-finite loss",
              loss=5.0 + i, grad_norm=None if i == 3 else 10.0, consecutive=i + 1, total=i + 1, by="guard")
        for i in range(count)
    ]  # fmt: skip


def state(page: str) -> dict[str, str]:
    """The summary at the top, before the first day."""
    lines = page.split("\n## ")[0].splitlines()
    return dict(re.fullmatch(r"- ([\w ]+): (.*)", line).groups() for line in lines if line.startswith("- "))  # type: ignore[union-attr,misc]


def test_the_top_says_how_the_run_stands() -> None:
    other = {**ROLLBACK, "by": "user", "windows": [[200, 300], [400, 401]], "id": "def"}
    opinion = {"onset": 119, "verdict": "state", "batches": 4, "rise": 1.5, "gap": 0.1, "error": 0.02}
    events = [
        event("spike", 120, **RISE), event("spike", 121, **{**RISE, "series": "grad_norm"}), *drops(4),
        event("divergence", 170, **RISE), event("second_opinion", 170, **opinion), event("rollback", 170, **ROLLBACK),
        event("rollback", 180, **other), event("spike", 300, 9, **{**RISE, "onset": 299}),
    ]  # fmt: skip
    assert state(render(events)) == {
        "last event": "2026-11-20 10:00:09 · " + events[-1].sentence(),
        "not over yet": "spike of the loss since step 299",
        "spikes": "2 of the loss, 1 of the gradient norm",
        "dropped updates": "4 (1 non-finite loss, 3 spike)",
        "second opinions": "1 (1 the state is to blame)",
        "rollbacks": "2 (1 by the guard, 1 by the user)",
        "data steps that rollbacks skip": "51-300, 400-401 (252 in all)",
        "learning rate": "× 0.25",
        "gradient clipping": "× 0.64",
    }
    over = event("spike_end", 310, series="loss", onset=299, duration=3)
    undone = state(render([*events, event("undo", 310, by="user", id="def"), over]))
    assert undone["rollbacks"] == "2 (1 by the guard, 1 by the user); 1 taken back"
    assert undone["data steps that rollbacks skip"] == "51-219 (169 in all)"
    assert undone["learning rate"] == "× 0.5"
    assert "not over yet" not in undone


def test_a_rise_is_over_when_the_data_are_to_blame() -> None:
    rise = event("rise", 130, **RISE)
    assert state(render([rise]))["not over yet"] == "rise of the loss since step 119"
    assert "not over yet" not in state(render([rise, event("shift", 130, onset=119, rise=0.6)]))


def test_giving_up_may_be_a_rollback_as_well() -> None:
    page = render([event("gave_up", 200, **ROLLBACK)])
    assert "guard gave up and rolled back to step 50" in page
    assert state(page)["data steps that rollbacks skip"] == "51-219 (169 in all)"
    assert state(render([event("gave_up", 200, by="guard", rule="divergence")]))["learning rate"] == "× 1"


def test_thirty_dropped_updates_are_one_line() -> None:
    mixed = [
        e
        for drop in drops(30)
        for e in (drop, event("spike_end", drop.step, 2, series="grad_norm", onset=drop.step - 1, duration=1))
    ]
    for events, lines in ((drops(30), 1), (mixed, 2)):
        page = render(events).split("## 2026-11-20")[1]
        assert page.count("\n- ") == lines
        assert (
            "- 10:00:02 · steps 120 to 149 (data steps 130 to 159): guard dropped 30 updates (1 non-finite loss, "
            "29 spike), loss 5 to 34, gradient norm 10 and not finite, up to 30 in a row, 30 recently" in page
        )


def test_spikes_that_come_in_numbers_are_one_line() -> None:
    spikes = [event("spike", 120 + i, **{**RISE, "value": 9.0 + i, "score": 10.0 + i}) for i in range(3)]
    ends = [event("spike_end", 125 + i, series="loss", onset=120, duration=2 + i) for i in range(3)]
    page = render([*spikes, *ends])
    assert "steps 120 to 122: 3 spikes of the loss, the highest 11, 12 MADs above its level" in page
    assert "steps 125 to 127: the loss came back to its level 3 times, after 2 to 4 steps" in page
    worse = event("spike", 123, **{**RISE, "value": None, "score": None})
    assert "4 spikes of the loss, the highest not finite\n" in render([*spikes, worse])


def test_events_that_lie_apart_keep_their_own_lines() -> None:
    assert render(drops(3, every=100)).split("## ")[1].count("dropped the update") == 3
    between = [*drops(2), event("undo", 121, by="user", id="a"), *drops(2, 122)]
    assert render(between).count("dropped 2 updates") == 2
    spikes = [event("spike", 100, **RISE), event("spike", 101, **{**RISE, "series": "grad_norm"})]
    assert render(spikes).split("## ")[1].count("spike of the") == 2, "of two series"


def test_days_are_headings_in_order() -> None:
    late = {"time": "2026-11-21T01:30:00+02:00", "event": "stop", "step": 9, "exit_code": 3, "reason": "x"}  # 23:30 UTC
    after, soon = {**late, "time": "2026-11-21T00:00:01Z"}, {"event": "undo", "time": "soon"}
    page = render([event("spike", 0, **RISE), *map(parse, (late, after, soon))])
    assert re.findall("^## .*", page, re.M) == ["## 2026-11-20", "## 2026-11-21", "## without a date"]
    assert "- 23:30:00 · step 9: stopped" in page
    assert "- soon · undo" in page


def test_what_the_ledger_holds_is_no_markup_and_steers_no_terminal() -> None:
    hostile = "*b* <script> [x](y) | `z` _i_ \x1b[31m \u202e end\n# head\n- item"
    page = render([Stop(step=1, exit_code=3, reason=hostile), parse({"event": "stop", "<k>": "|", "time": "\x1b*"})])
    assert "\x1b" not in page and "\u202e" not in page
    assert not re.search(r"(?<!\\)(<|\||\[|\*b)", page)
    assert not re.search(r"^\s*(# head|- item)", page, re.M)
    assert r"\*b\* \<script\> \[x\](y) \| \`z\` \_i\_" in page


def test_an_empty_ledger() -> None:
    assert "Nothing has happened yet" in render([])


FACTS = st.sampled_from(
    [
        Drop(step=7, rule="spike", loss=None, grad_norm=1, consecutive=1, total=1, by="guard"),
        Spike(step=8, **{**RISE, "score": None}),
        SpikeEnd(step=9, series="grad_norm", onset=8, duration=1),
        Shift(step=9, onset=8, rise=None),
        SecondOpinion(step=9, onset=8, verdict="data", batches=4, rise=1, gap=None, error=None),
        Rollback(step=9, **{**ROLLBACK, "windows": ((1, 2**47),)}),
    ]
)  # fmt: skip
FOREIGN = st.builds(lambda kind, line: parse({**line, "event": kind}), st.sampled_from(EVENTS) | JSON, LINES)


@settings(max_examples=100, deadline=None)
@given(st.lists(FACTS | FOREIGN, max_size=5))
def test_nothing_in_a_ledger_stops_the_page(events: list[Event]) -> None:
    page = render(events)
    assert page.startswith("# Logbook\n") and page.endswith("\n")
