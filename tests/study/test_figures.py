"""The figures of a sweep: what is in which panel, and where."""

from __future__ import annotations

from math import log10
from pathlib import Path
from typing import Any

import pytest

from megatron_stable.analysis.report.figures import Drawn
from megatron_stable.errors import DataError
from megatron_stable.study.figures import LINES, families, figures, split
from megatron_stable.study.outputs import POINTS, contrast, over_time
from megatron_stable.study.panels import short
from megatron_stable.study.reading import open_sweep
from megatron_stable.study.sensitivity import groups_of
from tests.study.made import INITIAL, RATES, SIZES, loss_at, outputs, run, sweep, write_sweep


def drawn(tmp_path: Path, rows: list[dict[str, Any]], measured: Any = None) -> dict[str, Drawn]:
    return {each.name: each for each in figures(open_sweep(write_sweep(tmp_path / "sweep", rows, measured)))}


def marks(axes: Any, marker: str) -> list[tuple[float, float]]:
    """Where an axes has a marker."""
    return [
        (float(x), float(y))
        for line in axes.lines
        if line.get_marker() == marker
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]


def test_a_whole_sweep(tmp_path: Path) -> None:
    rows = [row | {"output_norm/qkv": 1.0} for row in sweep()]
    found = drawn(tmp_path, rows, outputs(rows))
    assert list(found) == ["loss", "sensitivity", "max_logit", "grad_rms", "output_norms"]

    baseline, qk_norm = found["loss"].picture.axes
    assert [axes.get_title(loc="left") for axes in (baseline, qk_norm)] == ["baseline", "qk_norm"]
    assert dict(marks(baseline, "o"))[3e-3] == pytest.approx(loss_at("d64", "baseline", 3e-3, 2))
    d128 = (0.1, INITIAL), (0.3, INITIAL)
    crosses = marks(baseline, "x")
    assert all(crosses.count(place) == count for place, count in zip(d128, (2, 3), strict=True)) and len(crosses) == 6
    assert not {x for x, _ in marks(baseline, "s")} & {0.1, 0.3}  # where all seeds diverged there is a cross alone
    assert marks(qk_norm, "x") == [] and baseline.texts[0].get_text() == "at initialisation" and not qk_norm.texts

    (axes,) = found["sensitivity"].picture.axes
    assert [x for x, _ in marks(axes, "s")] == [*SIZES.values()]
    parabola = sum(0.12 * log10(rate / 3e-3) ** 2 for rate in RATES) / 7
    assert [y for _, y in marks(axes, "s")] == [pytest.approx(parabola)] * 3

    levels = [line.get_ydata()[0] for line in found["grad_rms"].picture.axes[0].lines if line.get_marker() == "None"]
    assert 1e-8 in levels
    (biggest,) = [y for x, y in marks(found["max_logit"].picture.axes[0], "D") if x == SIZES["d256"]]
    assert biggest == pytest.approx(SIZES["d256"] ** 0.5 + 5)  # at a learning rate of 0.01

    assert "Runs: d256-baseline-0.03-1, d256-qk_norm-0.03-1." in found["output_norms"].caption
    last = [line.get_ydata()[-1] for line in found["output_norms"].picture.axes[1].lines if line.get_marker() == "None"]
    assert last[0] == pytest.approx((5 + 1) * 2**5) and last[1] < 8  # proj, of the second layer


def test_one_size_is_drawn_against_learning_rate(tmp_path: Path) -> None:
    found = drawn(tmp_path, sweep(sizes=["d128"], seeds=[1]))
    assert list(found) == ["loss", "max_logit", "grad_rms"]
    assert found["max_logit"].title == "Largest attention logit against learning rate"
    (axes,) = found["max_logit"].picture.axes
    assert [x for x, _ in marks(axes, "s")] == [*RATES] and [x for x, _ in marks(axes, "x")] == [0.1, 0.3]


def test_a_sweep_in_progress(tmp_path: Path) -> None:
    rows = sweep(sizes=["d64"], recipes=["baseline"], seeds=[1, 2])
    for row in rows[10:]:
        row.update(status="unfinished", score=None, loss=None, rise=None, initial_loss=None)
        row.update({"attention/max_logit": None, "grad_rms/fc1": None})
    axes = drawn(tmp_path, rows)["loss"].picture.axes[0]
    (line,) = [line for line in axes.lines if len(line.get_xdata()) == len(RATES)]
    assert [y > 0 for y in line.get_ydata()] == [True] * 5 + [False] * 2
    none = [row | {"status": "unfinished", "score": None} for row in rows[10:]]
    assert drawn(tmp_path / "none", none) == {}


def test_panels_have_room_for_their_lines() -> None:
    def groups(panels: int, lines: int) -> Any:
        return groups_of(
            [run(f"{i}.{j}", 0.1, 3.0, size=f"d{i}", recipe=f"r{j}") for i in range(panels) for j in range(lines)]
        )

    few = split(groups(3, 5))
    assert [*few.panels] == ["d0", "d1", "d2"] and [*few.panels["d0"]] == ["r0", "r1", "r2", "r3", "r4"]
    assert few.legend == "recipe" and few.left_out == ""
    assert [*split(groups(3, 12)).panels] == [f"r{j}" for j in range(12)]  # rather than twelve lines
    one = split(groups_of([run(str(j), 0.1, 3.0, recipe=f"r{j}") for j in range(LINES + 2)]))
    assert len(one.panels[""]) == LINES and "r10, r11" in one.left_out


def test_a_norm_makes_no_size() -> None:
    rows = [
        run(f"{size}-{recipe}", 0.1, 3.0, size=size, recipe=recipe) | {"parameters": parameters + more}
        for size, parameters in (("big", 9000), ("small", 1000))
        for recipe, more in (("a", 0), ("b", 20))
    ]
    found, legend = families(groups_of(rows))
    assert {name: [group.name for group in members] for name, members in found.items()} == {
        "a": ["small · a", "big · a"], "b": ["small · b", "big · b"],
    }  # fmt: skip
    assert legend == "recipe"


def test_which_runs_are_laid_side_by_side() -> None:
    rows = [row | {"output_norm/qkv": 1.0} for row in sweep(seeds=[1])]
    names = [row["name"] for _, row in contrast(groups_of(rows))]
    assert names == ["d256-baseline-0.03-1", "d256-qk_norm-0.03-1"]
    alone = [row for row in rows if row["recipe"] == "baseline" and row["size"] == "d128"]
    assert [row["name"] for _, row in contrast(groups_of(alone))] == ["d128-baseline-0.1-1", "d128-baseline-0.03-1"]
    assert [row["name"] for _, row in contrast(groups_of(alone[:3]))] == ["d128-baseline-0.003-1"]
    assert contrast(groups_of(sweep())) == []  # nothing was measured


def test_series_over_time_are_thinned_to_their_peaks(tmp_path: Path) -> None:
    steps = list(range(1, 5001))
    values = [9.0 if step == 777 else float("nan") if step == 2 else 1.0 for step in steps]
    tags = ["output_norm/qkv/layer_00"] * 5000
    path = write_sweep(tmp_path / "s", sweep(), {"run": ["a"] * 5000, "step": steps, "tag": tags, "value": values})
    found = over_time(path / "probes.parquet", "a")
    assert len(found["qkv"]) <= POINTS and max(point.y for point in found["qkv"]) == 9.0 and found["fc1"] == []
    (tmp_path / "broken").write_text("no parquet")
    with pytest.raises(DataError, match="cannot read"):
        over_time(tmp_path / "broken", "a")


def test_numbers_of_axes() -> None:
    numbers = {3e-4: "3e-4", 1e-8: "1e-8", 0.03: "0.03", 300: "300", 20_000: "20k", 1.5e6: "1.5M", 4.8e9: "4.8B"}
    assert {value: short(value) for value in numbers} == numbers
