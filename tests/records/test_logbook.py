"""The logbook says what the ledger says, in words, in order, for whatever the ledger holds."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_stable.records.logbook import SENTENCES, render, sentence

DAY = "2026-11-20T10:00:{:02d}+00:00"
SPIKE = {"series": "loss", "value": 9.31234, "level": 2.5, "scale": 0.02, "score": 340.3, "onset": 119}
ROLLBACK = {
    "by": "guard", "rule": "divergence", "onset": 119, "rollback_to": 50, "windows": [[51, 219]],
    "learning_rate_factor": 0.5, "clip_factor": 0.8, "reset_loss_scale": True, "reason": "attempt 1 of 3", "id": "abc",
}  # fmt: skip


def event(kind: str, step: int, second: int = 0, **facts: Any) -> dict[str, Any]:
    return {"time": DAY.format(second), "event": kind, "step": step, **facts}


def drops(count: int, first: int = 120, every: int = 1) -> list[dict[str, Any]]:
    return [
        event("drop", first + i * every, 2, data_step=first + 10 + i * every, rule="spike" if i else "non-finite loss",
              loss=5.0 + i, grad_norm=None if i == 3 else 10.0, consecutive=i + 1, total=i + 1, by="guard")
        for i in range(count)
    ]  # fmt: skip


def state(page: str) -> dict[str, str]:
    """The summary at the top, before the first day."""
    lines = page.split("\n## ")[0].splitlines()
    return dict(re.fullmatch(r"- ([\w ]+): (.*)", line).groups() for line in lines if line.startswith("- "))  # type: ignore[union-attr,misc]


@pytest.mark.parametrize(
    ("kind", "facts", "words"),
    [
        (
            "start",
            {"layout": {"tensor": 2, "pipeline": 4, "sequence": False, "zero_stage": 1}, "ranks": 8},
            "training began (ranks 8, TP 2, PP 4, ZeRO 1)",
        ),
        (
            "resume",
            {"ranks": 1, "layout": {}, "changed": {"optimizer.learning_rate": [1e-3, 5e-4]}},
            "training went on (ranks 1); changed: optimizer.learning_rate 0.001 → 0.0005",
        ),
        (
            "spike",
            SPIKE,
            "spike of the loss: 9.312, 340.3 MADs above its level, level 2.5, MAD 0.02, began at step 119",
        ),
        (
            "divergence",
            {"series": "loss", "value": None, "by": "guard"},
            "the loss diverges, it does not fall back: not finite, found by the guard",
        ),
        (
            "shift",
            {"series": "grad_norm", "value": 3.0},
            "the gradient norm has moved to another level, the usual one from here: 3",
        ),
        (
            "spike_end",
            {"onset": 119, "duration": 3, "peak": 9.5},
            "the loss has fallen back: duration 3, began at step 119, peak 9.5",
        ),
        (
            "drop",
            {
                "rule": "non-finite gradient",
                "loss": 2.5,
                "grad_norm": None,
                "consecutive": 2,
                "total": 7,
                "by": "guard",
            },
            "update dropped by the guard: non-finite gradient, loss 2.5, gradient norm not finite, 2 in a row, total 7",
        ),
        (
            "rollback",
            ROLLBACK,
            "went back to step 50 by the guard (divergence, began at step 119): skips data steps 51-219; "
            "learning rate × 0.5; gradient clipping × 0.8; loss scale reset. attempt 1 of 3. id abc",
        ),
        ("undo", {"by": "user", "id": "abc"}, "rollback abc undone by the user"),
        (
            "loss_scale_floor",
            {"scale": 1.0, "module": "blocks.3", "norms": {"embedding": 1.5, "head": None}},
            "the loss scale is at its floor: 1; first module with values that are not finite: blocks.3; "
            "gradient norms: embedding 1.5, head not finite",
        ),
        (
            "gave_up",
            {"rule": "divergence", "attempts": 3, "onset": 119},
            "gave up after 3 attempts (divergence, began at step 119)",
        ),
        ("stop", {"exit_code": 3, "reason": "diverged"}, "stopped: exit code 3, diverged"),
    ],
)
def test_each_event_is_a_sentence_with_its_numbers(kind: str, facts: dict[str, Any], words: str) -> None:
    assert sentence(event(kind, 130, data_step=140, **facts)) == f"step 130 (data step 140): {words}"


def test_what_is_not_known_is_told_as_it_is() -> None:
    assert sentence(event("surgery", 5, what={"cap": 1}, note="ok")) == 'step 5: surgery (what {"cap": 1}; note ok)'
    assert sentence(event("spike", 5, **SPIKE, odd=7)).endswith("began at step 119 (odd 7)")
    assert sentence(event("rollback", 5, rollback_to=1, windows=7)) == "step 5: rollback (rollback_to 1; windows 7)"


def test_the_top_says_how_the_run_stands() -> None:
    other = {**ROLLBACK, "by": "user", "windows": [[200, 300], [400, 401]], "id": "def"}
    events = [
        event("spike", 120, **SPIKE), event("spike", 121, **{**SPIKE, "series": "grad_norm"}), *drops(4),
        event("divergence", 170, **SPIKE), event("rollback", 170, **ROLLBACK), event("rollback", 180, **other),
        event("spike", 300, 9, **{**SPIKE, "onset": 299}),
    ]  # fmt: skip
    assert state(render(events)) == {
        "last event": "2026-11-20 10:00:09 · " + sentence(events[-1]),
        "not over yet": "spike of the loss since step 299",
        "spikes": "2 of the loss, 1 of the gradient norm; 1 became a divergence",
        "dropped updates": "4 (1 non-finite loss, 3 spike)",
        "rollbacks": "2 (1 by the guard, 1 by the user)",
        "data steps that repairs skip": "51-300, 400-401 (252 in all)",
        "learning rate": "× 0.25",
        "gradient clipping": "× 0.64",
    }
    undone = state(render([*events, event("undo", 310, by="user", id="def"), event("spike_end", 310, series="loss")]))
    assert undone["rollbacks"] == "2 (1 by the guard, 1 by the user); 1 undone"
    assert undone["data steps that repairs skip"] == "51-219 (169 in all)"
    assert undone["learning rate"] == "× 0.5"
    assert "not over yet" not in undone


def test_giving_up_may_be_a_rollback_as_well() -> None:
    page = render([event("gave_up", 200, **ROLLBACK)])
    assert "gave up, went back to step 50 by the guard" in page
    assert state(page)["data steps that repairs skip"] == "51-219 (169 in all)"


def test_thirty_dropped_updates_are_one_line() -> None:
    mixed = [
        e for drop in drops(30) for e in (drop, event("spike_end", drop["step"], 2, series="grad_norm", duration=1))
    ]
    for events, lines in ((drops(30), 1), (mixed, 2)):
        page = render(events).split("## 2026-11-20")[1]
        assert page.count("\n- ") == lines
        assert (
            "- 10:00:02 · steps 120 to 149 (data steps 130 to 159): 30 updates dropped by the guard (1 non-finite "
            "loss, 29 spike), loss 5 to 34, gradient norm 10 and not finite, 30 in a row, total 30" in page
        )


def test_events_that_lie_apart_keep_their_own_lines() -> None:
    assert render(drops(3, every=100)).split("## ")[1].count("update dropped") == 3
    between = [*drops(2), event("resume", 121), *drops(2, 122)]
    assert render(between).count("2 updates dropped") == 2
    spikes = [event("spike", 100, **SPIKE), event("spike", 101, **{**SPIKE, "series": "grad_norm"})]
    assert render(spikes).split("## ")[1].count("spike of the") == 2, "of two series"


def test_days_are_headings_in_order() -> None:
    late = {"time": "2026-11-21T01:30:00+02:00", "event": "stop", "step": 9}  # 23:30 UTC on the day before
    page = render(
        [event("start", 0), late, {**late, "time": "2026-11-21T00:00:01Z"}, {"event": "stop", "time": "soon"}]
    )
    assert re.findall("^## .*", page, re.M) == ["## 2026-11-20", "## 2026-11-21", "## without a date"]
    assert "- 23:30:00 · step 9: stopped" in page
    assert "- soon · stopped" in page


def test_what_the_ledger_holds_is_no_markup_and_steers_no_terminal() -> None:
    hostile = "*b* <script> [x](y) | `z` _i_ \x1b[31m \u202e end\n# head\n- item"
    page = render([event("stop", 1, reason=hostile, **{"<k>": "|"})])
    assert "\x1b" not in page and "\u202e" not in page
    assert not re.search(r"(?<!\\)(<|\||\[|\*b)", page)
    assert not re.search(r"^\s*(# head|- item)", page, re.M)
    assert r"\*b\* \<script\> \[x\](y) \| \`z\` \_i\_" in page
    assert "\x1b" not in sentence(event("stop", 1, reason=hostile)) and "*b*" in sentence(
        event("stop", 1, reason=hostile)
    )


def test_numbers_beyond_all_bounds() -> None:
    huge = 10**400  # JSON has it, a float has not
    page = render([*drops(1), {**drops(2)[1], "loss": huge}, event("rollback", 9, rollback_to=1, clip_factor=huge)])
    assert "loss 5 and not finite" in page and state(page)["gradient clipping"] == "× 1"


def test_an_empty_ledger() -> None:
    assert "Nothing has happened yet" in render([])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FACTS = ["time", "step", "data_step", "windows", "changed", "layout", "norms", "series", "value", "score", "loss", "id",
         "rollback_to", "learning_rate_factor", "onset", "duration", "by", "rule", "consecutive", "total"]  # fmt: skip
ANY = st.dictionaries(st.sampled_from(FACTS), JSON, max_size=8)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(SENTENCES)) | JSON, ANY), max_size=4))
def test_nothing_in_a_ledger_stops_the_page(drawn: list[tuple[Any, dict[str, Any]]]) -> None:
    page = render([{**facts, "event": kind} for kind, facts in drawn])
    assert page.startswith("# Logbook\n") and page.endswith("\n")
