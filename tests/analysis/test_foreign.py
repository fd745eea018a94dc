"""Flags of other trainers, against how each of them counts."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_stable.analysis.foreign import flags
from megatron_stable.errors import ConfigError

Window = tuple[int, int]


def texts(windows: list[Window], rollback_to: int) -> dict[str, str]:
    """Trainer to flags."""
    return {entry.trainer: entry.text for entry in flags(windows, rollback_to)}


def pairs(text: str) -> list[Window]:
    """The numbers of a text, two by two."""
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


# What is trained on, as in each one's loop: data steps that are not skipped, given its ranges.


def advancing(windows: list[Window], start: int, end: int) -> list[int]:
    """The iteration advances with a skip, so that it is the data step: Megatron-LM, argonne-lcf."""
    return [step for step in range(start + 1, end) if not any(a <= step <= b for a, b in windows)]


def standing(windows: list[Window], start: int, end: int) -> list[int]:
    """The count of updates stands still while data is dropped: metaseq."""
    left, updates, trained = {a: b - a + 1 for a, b in windows}, start, []
    for step in range(start + 1, end):
        if left.get(updates + 1, 0) > 0:
            left[updates + 1] -= 1
        else:
            updates += 1
            trained.append(step)
    return trained


def half_open(windows: list[Window], start: int, end: int) -> list[int]:
    """``start <= global_step < stop``: OLMo-core."""
    return [step for step in range(start + 1, end) if not any(a <= step < b for a, b in windows)]


@pytest.mark.parametrize(
    ("trainer", "flag", "trains"),
    [
        ("Megatron-LM", "--iterations-to-skip", advancing),
        ("Megatron-DeepSpeed (argonne-lcf)", "--train-range-to-skip", advancing),
        ("metaseq", "--skip-batches", standing),
        ("OLMo-core", "steps_to_skip=", half_open),
    ],
)
@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 9))), st.integers(0, 50))
def test_they_train_on_what_we_would(
    trainer: str,
    flag: str,
    trains: Callable[[list[Window], int, int], list[int]],
    rows: list[Window],
    rollback_to: int,
) -> None:
    windows = [(first, first + more) for first, more in rows]
    found = texts(windows, rollback_to)
    ours = advancing(windows, rollback_to, 100)
    if not found:
        assert ours == list(range(rollback_to + 1, 100))
        return
    assert trains(pairs(found[trainer].split(flag)[1]), rollback_to, 100) == ours


def test_as_they_are_written() -> None:
    found = texts([(3001, 3200), (5000, 5199), (10, 20)], 2900)
    assert found["Megatron-LM"] == "--ckpt-step 2900 --iterations-to-skip $(seq 3001 3200) $(seq 5000 5199)"
    assert found["Megatron-DeepSpeed (bigscience)"] == "--skip-train-iteration-range 3001-3200"
    assert found["Megatron-DeepSpeed (argonne-lcf)"] == "--train-range-to-skip 3001 3200 5000 5199"
    assert found["OLMo-core"] == (
        "steps_to_skip=[StepSkipRange(start=3001, stop=3201), StepSkipRange(start=5000, stop=5200)]"
    )
    assert found["metaseq"] == '--skip-batches "3001-3200,4800-4999"'
    assert found["GPT-NeoX"] == found["Megatron-DeepSpeed (Microsoft)"] == "has no flag for it"


def test_one_range_at_a_start_for_bigscience() -> None:
    (entry,) = [each for each in flags([(11, 20), (31, 40), (51, 60)], 5) if "bigscience" in each.trainer]
    assert entry.text.endswith(" 11-20")
    assert entry.note.endswith("at later starts 21-30, then 31-40")


def test_what_lies_before_the_checkpoint_is_left_out() -> None:
    assert pairs(texts([(11, 20)], 15)["Megatron-DeepSpeed (argonne-lcf)"]) == [(16, 20)]
    assert flags([(11, 20)], 20) == []
    with pytest.raises(ConfigError, match="skip window"):
        flags([(5, 4)], 0)
