"""Forecasts of sweeps that never ran, whose truth is known, and of published losses."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from megatron_stable.analysis.drawing import svg
from megatron_stable.errors import ConfigError
from megatron_stable.study.advice import ABOVE_EPS, ADVICE, CRITICAL, DRIFT
from megatron_stable.study.backtest import back_test, score
from megatron_stable.study.forecast import forecast, judge, largest_stable
from megatron_stable.study.forecast_figures import figures
from megatron_stable.study.observations import Group, groups, nearest, read_measured
from megatron_stable.study.scaling import Point, Prediction, fit_laws
from megatron_stable.study.table import RATE, read_table
from tests.study.sweeps import RATES, SIZES, logit, sweep, write

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sweep"), *sweep())


@pytest.fixture(scope="module")
def both(directory: Path) -> list[Group]:
    return groups(read_table(directory), read_measured(directory))


def test_groups_are_what_sizes_rates_and_seeds_do_not_tell_apart(both: list[Group]) -> None:
    assert [group.name for group in both] == ["model.recipe=baseline", "model.recipe=qk_norm"]
    for group in both:
        assert group.sizes == list(SIZES) and group.rates == pytest.approx(list(RATES)) and len(group.runs) == 70
    assert [group.bounded for group in both] == [False, True]


def test_values_are_of_the_step_at_the_end_of_warm_up_and_of_the_last_tenth(directory: Path) -> None:
    rows, measured = read_table(directory), read_measured(directory)
    for settings, shift in (({}, 0.0), ({"at": 250}, 1.5), ({"layers": "largest"}, 0.3)):
        run = groups(rows, measured, **settings)[0].runs[0]
        assert np.log10(run.values["max_logit"]) == pytest.approx(logit(run.size, run.rate) + shift, abs=0.2)
    late = measured[run.row["name"]]["grad_rms/fc1/layer_00"]
    assert run.values["grad_rms"] == pytest.approx(late[1][late[0] > 900].mean())


def test_a_run_that_diverged_before_the_step_is_left_out_and_said(directory: Path) -> None:
    found = forecast(groups(read_table(directory), read_measured(directory), at=400)[0], 1e9)
    high = found.cells[-1]
    assert "no size has it" in high.refused["max_logit"]
    assert "the run diverged before step 400" in high.refused["max_logit"]
    assert "max_logit" in found.cells[0].values and high.verdict == "unstable"  # by the frontier alone


def test_values_that_are_not_finite_are_left_out_and_said() -> None:
    rows, measured = sweep(seeds=1, recipes=("baseline",))
    series = {
        run: {tag: (np.array([100.0]), np.array([np.nan]))}
        for run, _, tag, _ in measured
        if "_00" in tag and "logit" in tag
    }
    cell = forecast(groups(rows, series)[0], 1e9).cells[0]
    assert "no size has it, and a law needs 3" in cell.refused["max_logit"] and "was nan" in cell.refused["max_logit"]


def test_logits_are_foretold_and_the_critical_level_is_found(both: list[Group]) -> None:
    found = forecast(both[0], 1e9)
    for cell in found.cells:
        foretold = cell.values["max_logit"]
        assert np.log10(foretold.median) == pytest.approx(logit(1e9, cell.rate), abs=0.3)
        assert foretold.low < 10 ** logit(1e9, cell.rate) * 1.1 and foretold.high / foretold.low < 5
    assert found.critical is not None and found.critical.low < 1e4 < found.critical.high
    assert [cell.verdict for cell in found.cells[2:]] == ["unstable"] * 5
    assert found.cells[0].verdict != "unstable" and forecast(both[1], 1e9).critical is None


def test_learning_rates_to_use(both: list[Group]) -> None:
    found = forecast(both[1], 1e9)
    assert found.frontier is not None and found.frontier.low < 10 ** (-0.9 - 0.45) < found.frontier.high
    assert found.safe == found.frontier.low
    assert found.optimal is not None and found.optimal.low < 10 ** (-2.2 - 0.6) < found.optimal.high
    assert largest_stable(both[0])[SIZES[-1]] == pytest.approx(1e-3)
    high = forecast(both[1], 1e9, [found.safe * 0.99, 0.2])
    assert [cell.verdict for cell in high.cells] == ["stable", "unstable"]


def test_between_learning_rates_of_the_grid_it_interpolates_and_outside_it_does_not(both: list[Group]) -> None:
    on, between, outside = forecast(both[0], 1e9, [RATES[2], (RATES[2] * RATES[3]) ** 0.5, 1.0]).cells
    assert on.values["max_logit"].high < between.values["max_logit"].median
    assert np.log10(between.values["max_logit"].median) == pytest.approx(logit(1e9, between.rate), abs=0.3)
    assert "outside of the grid" in outside.refused["max_logit"] and outside.verdict == "unstable"


def test_back_tests_are_right_on_nine_in_ten_and_hold_eight_in_ten(tmp_path: Path) -> None:
    tests = []
    for number, noise in enumerate((0.03, 0.05, 0.1)):
        directory = write(tmp_path / str(number), *sweep(random=number, noise=noise))
        tests += [back_test(group) for group in groups(read_table(directory), read_measured(directory))]
    found = score(tests)
    assert found.cells == 3 * 2 * len(RATES) and found.logits == 2 * found.cells
    assert found.right >= 0.9 * found.cells and found.held >= 0.8 * found.logits
    assert found.firm_right >= 0.95 * found.firm and found.firm >= 0.6 * found.cells


def test_a_back_test_does_not_see_what_it_foretells(both: list[Group]) -> None:
    runs = both[0].runs
    other = tuple(
        run if run.size < SIZES[-1] else run.__class__(run.size, run.rate, run.seed, not run.diverged, {}, {}, run.row)
        for run in runs
    )
    found, turned = back_test(both[0]), back_test(Group(both[0].where, other))
    assert [o.cell.risk for o in found.outcomes] == [o.cell.risk for o in turned.outcomes]
    assert [o.right for o in found.outcomes] == [not o.right for o in turned.outcomes]
    assert all(not outcome.held for outcome in turned.outcomes)


def test_a_back_test_of_three_sizes_is_refused() -> None:
    rows, _ = sweep(sizes=SIZES[:3], recipes=("baseline",), seeds=1)
    with pytest.raises(ConfigError, match="has 3 sizes: without the largest, a forecast needs 3; add sizes"):
        back_test(groups(rows, {})[0])


def test_without_probes_the_frontier_speaks_alone() -> None:
    rows, _ = sweep(recipes=("baseline",))
    for cell in forecast(groups(rows, {})[0], 1e9).cells:
        assert cell.logit_risk is None and cell.risk == cell.frontier_risk is not None
        assert "not measured" in cell.refused["max_logit"]


def test_too_few_sizes_or_too_far_is_unknown() -> None:
    rows, _ = sweep(sizes=SIZES[:2], recipes=("baseline",), seeds=1)
    found = forecast(groups(rows, {})[0], 1e8)
    assert {cell.verdict for cell in found.cells} == {"unknown"} and found.safe is None and found.optimal is None
    assert "2 sizes have it, and a law needs 3" in found.cells[0].evidence[1]
    far = forecast(groups(sweep(seeds=1, recipes=("baseline",))[0], {})[0], 1e10)
    assert {cell.verdict for cell in far.cells} == {"unknown"} and "beyond the sizes" in str(far.frontier_refused)
    assert "farther than the 4 times" in far.notes[0]


def test_where_no_run_diverged_or_all_did_the_frontier_is_a_bound() -> None:
    rows, _ = sweep(recipes=("qk_norm",), seeds=1)
    low = [row for row in rows if row[RATE] < 0.004]
    for status, verdict, said in (
        ("finished", "stable", "no run of the sweep diverged, up to 0.00316"),
        ("diverged", "unstable", "all runs of the sweep diverged, down to 0.000316"),
    ):
        found = forecast(groups([row | {"status": status} for row in low], {})[0], 2.6e8)
        assert found.frontier is None and said in found.notes[0] and said in found.cells[1].evidence[1]
        assert found.cells[1].verdict == verdict
        assert (found.safe is None) == (status == "diverged")


def test_order_of_rows_changes_nothing(directory: Path, both: list[Group]) -> None:
    rows = read_table(directory)
    random.Random(0).shuffle(rows)
    mixed = groups(rows, read_measured(directory))
    assert [cell.evidence for cell in forecast(mixed[0], 1e9).cells] == [
        cell.evidence for cell in forecast(both[0], 1e9).cells
    ]


@pytest.mark.parametrize(
    ("logits", "frontier", "verdict"),
    [
        (None, 0.05, "stable"),
        (0.4, 0.05, "stable"),
        (0.01, 0.2, "at risk"),  # low logits alone do not make it stable
        (0.95, 0.05, "at risk"),  # they contradict each other
        (0.05, 0.95, "at risk"),
        (0.95, 0.6, "unstable"),
        (None, 0.95, "unstable"),
        (0.8, 0.8, "at risk"),
        (0.99, None, "unknown"),
        (None, None, "unknown"),
    ],
)
def test_the_verdict_of_two_probabilities(logits: float | None, frontier: float | None, verdict: str) -> None:
    assert judge(logits, frontier) == verdict


def test_advice_follows_the_cause_and_its_pages_exist(both: list[Group]) -> None:
    assert (CRITICAL, DRIFT, ABOVE_EPS) == (1e4, 32.0, 10.0)
    for advice in ADVICE:
        assert all((ROOT / "docs/methods" / f"{page}.md").is_file() for page in advice.pages), advice.change
    unstable, bounded = forecast(both[0], 1e9, [0.03]).cells[0], forecast(both[1], 1e9, [0.3]).cells[0]
    assert "model.recipe=qk_norm" in [advice.change for advice in unstable.advice]
    assert not any("qk" in advice.change for advice in bounded.advice) and bounded.advice
    for eps, said in ((1e-8, True), (1e-15, False)):
        cell = forecast(both[0], 1e9, [RATES[0]], eps).cells[0]
        assert cell.values["grad_rms"].median == pytest.approx(10 ** (-6 - 1.2 + 0.1), rel=0.2)
        assert ("optimizer.eps=1e-15" in [advice.change for advice in cell.advice]) == said
        assert ("ε is too large" in cell.evidence[-1]) == said


def test_the_best_learning_rate_at_the_edge_of_the_grid_is_a_bound() -> None:
    rows, _ = sweep(recipes=("qk_norm",), seeds=1, noise=0.0)
    rows = [row for row in rows if row[RATE] < 0.004]
    found = forecast(groups(rows, {})[0], 1e9)
    assert found.optimal is None and "at 1e+06 it is 0.00316228 or more" in str(found.optimal_refused)


def test_the_nearest_group_of_a_configuration(both: list[Group]) -> None:
    target = dict(both[1].runs[0].row) | {"loss.z_loss": 1e-4, "model.hidden": 4096, RATE: 1.0}
    group, differ = nearest(both, target)
    assert group.name == "model.recipe=qk_norm" and differ == ["loss.z_loss"]


def test_figures_show_laws_target_and_critical_level(both: list[Group]) -> None:
    drawn = {name: svg(figure) for name, figure in figures(forecast(both[0], 1e9)).items()}
    assert set(drawn) == {"max_logit", "grad_rms", "learning_rates"}
    for name, words in (
        ("max_logit", ("learning rate 0.001", "runs diverge beyond", "largest attention logit")),
        ("grad_rms", ("ε = 1e-08", "gradient RMS", "learning rate 0.01: refused")),
        ("learning_rates", ("diverges at", "lowest loss", "diverged")),
    ):
        for word in words:
            assert word in drawn[name], (name, word)


def test_a_figure_of_a_back_test_shows_what_came(both: list[Group]) -> None:
    test = back_test(both[0])
    assert {run.size for run in test.came} == {both[0].sizes[-1]} and test.came
    lines = [figures(test.forecast, came)["max_logit"].axes[0].get_lines() for came in ([], test.came)]
    marked = [{x for line in each if line.get_markerfacecolor() == "none" for x in line.get_xdata()} for each in lines]
    assert marked == [set(), {both[0].sizes[-1]}]


PUBLISHED = """
16  3.961 3.881 3.850 3.841 3.857   3.961 3.878 3.848 3.836 3.841   3.961 3.881 3.849 3.839 3.843
29  3.688 3.614 3.591 3.592 3.596   3.687 3.613 3.585 3.586 3.580   3.688 3.613 3.588 3.590 3.586
57  3.442 3.387 3.372 3.369 3.397   3.442 3.385 3.367 3.366 3.382   3.442 3.387 3.371 3.369 3.381
109 3.261 3.211 3.202 3.208 3.230   3.261 3.211 3.202 3.204 3.230   3.261 3.212 3.202 3.207 3.225
221 3.090 3.050 3.050 3.076 3.153   3.089 3.050 3.049 3.069 3.091   3.090 3.052 3.050 3.075 3.084
"""


def test_published_losses_of_the_largest_size_are_foretold_from_the_others() -> None:
    """flxst/output-embedding-centering, loss_overview_all.csv: baseline, z-loss, μ-loss; 3e-4 to 3e-2, a seed each."""
    table = np.array([list(map(float, line.split())) for line in PUBLISHED.strip().splitlines()])
    sizes, losses = (table[:, 0] * 1e6).tolist(), table[:, 1:].reshape(5, 3, 5)
    held = []
    for recipe in range(3):
        series = {
            float(rate): [Point(n, 0, loss) for n, loss in zip(sizes[:4], losses[:4, recipe, rate], strict=True)]
            for rate in range(5)
        }
        foretold = {rate: Prediction.of(law.draws(sizes[-1])) for rate, law in fit_laws(series).items()}
        held += [foretold[rate].low <= losses[4, recipe, int(rate)] <= foretold[rate].high for rate in foretold]
        assert foretold[0.0].median == pytest.approx(losses[4, recipe, 0], rel=0.01)
    assert np.mean(held) >= 0.8
