"""The table of a sweep comes back as it was written, and tells what its runs differ in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_stable.config.schema import Config
from megatron_stable.errors import ConfigError
from megatron_stable.study.table import RESULTS, Row, axes, labels, read_table, write_table


def row(name: str, score: float | None, size: str | None = None, **sections: Any) -> Row:
    measured = {"attention/max_logit": 3.5, "noise_scale": None}
    labelled = {} if size is None else {"size": size}
    results = {"name": name, "status": "finished", "score": score}
    return {**results, **labelled, **measured, **Config.model_validate(sections).by_key()}


ROWS = [
    row("a", 1.5, "small", model={"hidden": 64}, optimizer={"learning_rate": 1e-3}),
    row("b", None, "large", model={"hidden": 128, "activation_checkpointing": 2}, optimizer={"learning_rate": 1e-2}),
    row("c", 2.0, "large", model={"hidden": 128, "activation_checkpointing": 2}, optimizer={"learning_rate": 1e-3}),
]


@pytest.mark.parametrize("name", [".", "table.csv", "table.parquet"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    write_table(ROWS, tmp_path)
    found = read_table(tmp_path / name)
    assert list(found[0]) == list(ROWS[0]), "columns keep their order"
    for column in ("name", "score", "size", "attention/max_logit", "noise_scale", "model.hidden", "model.bias"):
        assert [row[column] for row in found] == [row[column] for row in ROWS], column
    assert found[0]["model.activation_checkpointing"] == "none" and found[1]["model.activation_checkpointing"] == "2"
    assert found[0]["optimizer.betas"] == "[0.9, 0.95]", "lists are text"


def test_columns_keep_their_order_whatever_the_first_run_lacks(tmp_path: Path) -> None:
    failed = {key: value for key, value in ROWS[0].items() if key not in ("size", "attention/max_logit", "noise_scale")}
    write_table([failed, *ROWS[1:]], tmp_path)
    assert list(read_table(tmp_path)[0]) == list(ROWS[0])


def test_numbers_that_a_column_cannot_hold_are_text(tmp_path: Path) -> None:
    write_table([{**ROWS[0], "run.seed": 2**70}, {**ROWS[1], "run.seed": 5}], tmp_path)
    assert [row["run.seed"] for row in read_table(tmp_path)] == [str(2**70), "5"]


def test_axes_are_what_runs_differ_in() -> None:
    assert labels(ROWS) == ["size"]
    assert axes(ROWS) == ["size", "optimizer.learning_rate"], "width follows from the size"
    assert axes([{**row, "size": "all"} for row in ROWS]) == [
        "size", "model.hidden", "model.activation_checkpointing", "optimizer.learning_rate"
    ]  # fmt: skip


def test_what_a_recipe_sets_is_no_axis() -> None:
    rows = [
        row(f"{recipe}{width}", 1.0, model={"recipe": recipe, "hidden": width, "qk_norm": recipe == "qk_norm"})
        for recipe in ("baseline", "qk_norm")
        for width in (64, 128)
    ]
    assert axes(rows) == ["model.recipe", "model.hidden"]


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no table of a sweep: name"):
        read_table(tmp_path)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="lacks the columns"):
        read_table(tmp_path / "other.csv")
    (tmp_path / "table.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match="no table"):
        read_table(tmp_path)


def test_the_documentation_has_every_column() -> None:
    text = (Path(__file__).parents[2] / "docs" / "sweep.md").read_text(encoding="utf-8")
    shown = [line for line in text.splitlines() if line.startswith("| `")]
    assert shown == [f"| `{column}` | {meaning} |" for column, meaning in RESULTS.items()]
