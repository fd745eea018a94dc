"""The ledger keeps events, and its documentation is that of the events."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from pathlib import Path

from megatron_stable.records.ledger import Ledger
from megatron_stable.records.reference import EXAMPLES, reference_page
from megatron_stable.stability.events import Event, Stop, Undo, Unknown, parse
from tests.stability.test_events import KINDS

PAGE = Path(__file__).parents[2] / "docs" / "ledger.md"


def test_events_are_kept_in_order_with_the_time(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.read() == []
    first, second = Undo(step=1, by="user", id="a"), Stop(step=2, exit_code=3, reason="é", time="never")
    before = datetime.now(timezone.utc).replace(microsecond=0)
    for event in (first, second):
        ledger.write(event)
    found = ledger.read()
    assert [event.model_copy(update={"time": None}) for event in found] == [
        first, second.model_copy(update={"time": None}),
    ]  # fmt: skip
    for event in found:
        assert event.time is not None
        assert before <= datetime.fromisoformat(event.time) <= datetime.now(timezone.utc)
        assert event.time.endswith("+00:00")
    line = ledger.path.read_text().splitlines()[0]
    assert list(json.loads(line)) == ["time", "event", "step", "id", "by"]


def test_a_line_that_a_crash_cut_off_hides_no_other(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.write(Undo(step=1, by="user", id="a"))
    with ledger.path.open("a") as file:
        file.write('{"event": "stop", "st')
    ledger.write(Undo(step=2, by="user", id="b"))
    with ledger.path.open("ab") as file:
        file.write(b'[1]\n{"event": "sto\xff"}\n' + b"[" * 100_000)
    *known, foreign = ledger.read()
    assert [event.step for event in known] == [1, 2]
    assert isinstance(foreign, Unknown) and foreign.event == "sto�"


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference_page(), "run `make docs`"


def test_every_event_is_documented_with_an_example() -> None:
    assert [type(example) for example in EXAMPLES] == list(KINDS)
    for kind in KINDS:
        assert kind.__doc__ and f"## `{kind.model_fields['event'].default}`\n\n{kind.__doc__.splitlines()[0]}" in (
            reference_page()
        )
        for name, field in kind.model_fields.items():
            text = Event.model_fields[name].description if name in Event.model_fields else field.description
            assert (text or "").strip()[-1:] in (".", "…"), f"{kind.__name__}.{name}"


def test_the_examples_are_what_the_ledger_holds() -> None:
    lines = re.findall(r"```json\n(.*)\n```\n\n> (.*)\n", reference_page())
    assert len(lines) == len(EXAMPLES)
    for (line, sentence), example in zip(lines, EXAMPLES, strict=True):
        event = parse(json.loads(line))
        assert event.model_copy(update={"time": None}) == example and event.sentence() == sentence
