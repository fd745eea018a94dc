"""Recommendations: evidence with sources, rules as published, and sweeps with known truth that go over papers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_stable.config.load import load_config
from megatron_stable.config.schema import Config
from megatron_stable.config.sizes import SIZES
from megatron_stable.errors import ConfigError
from megatron_stable.model.transformer import parameter_count
from megatron_stable.study.evidence import SURE, At, Finding, Source, sureness
from megatron_stable.study.grid import read_grid
from megatron_stable.study.known import EVIDENCE, entries
from megatron_stable.study.observations import Group, groups, read_measured
from megatron_stable.study.proxy import proxy_sweep
from megatron_stable.study.published import (
    GPT3_SIZES,
    batch_size,
    deepseek_batch_tokens,
    deepseek_learning_rate,
    gpt3_batch_tokens,
    gpt3_learning_rate,
    short,
    two_digits_below,
)
from megatron_stable.study.recommendation import Recommendation, recommend
from megatron_stable.study.scaling import refusal
from tests.study.sweeps import sweep, write

ROOT = Path(__file__).parents[2]
RATE, EPS, RECIPE = "optimizer.learning_rate", "optimizer.eps", "model.recipe"


def made(size: str, *given: str, tokens: float = 200e9, swept: Sequence[Group] = ()) -> Recommendation:
    model = load_config(None, [f"model.size={size}"]).model
    return recommend(None, [f"model.size={size}", *given], parameter_count(model, 2)[1], tokens, None, swept)


def value(of: Recommendation, key: str) -> Any:
    (found,) = [each for each in of.values if each.key == key]
    return found


def read_back(directory: Path, **fields: Any) -> list[Group]:
    directory = write(directory, *sweep(**fields))
    from megatron_stable.study.table import read_table

    return groups(read_table(directory), read_measured(directory))


def test_every_entry_is_a_field_and_has_a_source_and_what_would_change_it() -> None:
    for entry in EVIDENCE:
        assert entry.key in Config().by_key()
        assert entry.changes
        assert entry.findings or entry.key == RATE  # under a parametrization, of which nothing is known
        for finding in entry.findings:
            work = finding.source.work
            yours = finding.source.how == "yours"
            measured = finding.source.how == "measured"
            assert yours or measured or re.fullmatch(r"arXiv \d{4}\.\d{5}|Gemma 3", work), work


def test_what_we_measured_is_on_the_page_that_is_cited() -> None:
    ours = [finding for entry in EVIDENCE for finding in entry.findings if finding.source.how == "measured"]
    assert ours
    for finding in ours:
        page = (ROOT / finding.source.work).read_text(encoding="utf-8")
        assert isinstance(finding.says, str)
        assert all(number in page for number in re.findall(r"[\d.]+(?:e\d+)?", finding.says))


def test_how_sure_follows_from_the_sources() -> None:
    read, again, other, told = (
        Source("a", "read"),
        Source("a", "code"),
        Source("b", "measured"),
        Source("c", "second-hand"),
    )

    def sure(*sources: Source, against: Source | None = None) -> str:
        findings = [Finding("", source) for source in sources]
        return sureness([*findings, Finding("", against, supports=False)] if against else findings)

    assert sure(read, other) == "strong" and sure(read, again) == sure(read, told) == "paper"
    assert sure(told, told) == "second-hand" and sure() == "convention" == sure(against=read)
    assert sure(read, against=other) == "paper" and sure(read, other, Source("", "yours")) == "yours"


def test_published_rules() -> None:
    """GPT-3's table to within what the text says, the laws at 1e20 FLOPs by hand, and their directions."""
    for layers, width, rate, tokens in GPT3_SIZES:
        parameters = 12 * layers * width**2
        assert abs(gpt3_learning_rate(parameters) / rate - 1) < 0.22
        assert 0.5 < gpt3_batch_tokens(parameters) / tokens < 1.5
    sizes = [10.0**x for x in range(6, 12)]
    assert sorted(map(gpt3_learning_rate, sizes), reverse=True) == [gpt3_learning_rate(size) for size in sizes]
    assert deepseek_learning_rate(1e20) == pytest.approx(0.3118 * 10**-2.5)
    assert deepseek_batch_tokens(1e20) == pytest.approx(0.2920 * 10**6.542)
    assert (two_digits_below(0.001499), two_digits_below(0.03), short(302e6), short(2e12)) == (
        0.0014,
        0.03,
        "302M",
        "2T",
    )


def test_batches_are_near_what_is_wanted_and_split_evenly() -> None:
    assert batch_size(2**21, 4096, 4) == 512
    for tokens in range(100_000, 5_000_000, 77_777):
        size = batch_size(tokens, 1024, 2)
        assert abs(size * 1024 / tokens - 1) <= 0.126
        assert size // 2 >> max(0, (size // 2).bit_length() - 3) << max(0, (size // 2).bit_length() - 3) == size // 2


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_a_configuration_that_passes_all_checks(size: str) -> None:
    found = made(size)
    keys = [each.key for each in found.values]
    assert len(keys) == len(set(keys)) == 15
    held = found.config.by_key()
    for each in found.values:
        assert held[each.key] == each.value and each.evidence and each.changes and each.sure in SURE
    steps = found.config.run.steps
    assert 200e9 <= steps * found.config.tokens_per_step < 200e9 + found.config.tokens_per_step
    assert found.config.schedule.warmup_steps == 2000 and value(found, RATE).sure == "second-hand"
    assert (value(found, EPS).value == 1e-15) == (found.at.parameters >= 4.8e9)


def test_the_learning_rate_falls_with_size_and_is_gpt3s() -> None:
    rates = [value(made(size), RATE).value for size in ("85m", "302m", "1b", "3b", "7b", "13b", "30b")]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == len(rates)
    assert rates[1] == 3.2e-4 and "0.0003 (arXiv 2410.16682, second-hand)" in value(made("302m"), RATE).evidence
    assert "OLMo 2 7B is the nearest" in value(made("7b"), RATE).evidence


def test_short_runs_warm_up_for_a_twentieth_and_shorter_ones_are_refused() -> None:
    assert made("830m", tokens=5e9).config.schedule.warmup_steps == round(0.05 * math.ceil(5e9 / 2**19))
    with pytest.raises(ConfigError, match=r"give 52,428,800 or more, or a smaller --batch-tokens"):
        made("830m", tokens=1e7)


def test_what_a_configuration_has_is_respected() -> None:
    """A recipe that bounds logits, norms, tokens of warm-up, independent decay, another rule for output logits."""
    olmo2 = made("7b", "model.recipe=olmo2")
    assert (value(olmo2, RECIPE).value, value(olmo2, RECIPE).sure) == ("olmo2", "yours")
    own = made("1b", "model.norm=rmsnorm", "schedule.warmup_tokens=1000000", "optimizer.independent_weight_decay=true")
    assert own.config.model.qk_norm and (own.config.model.recipe, own.config.model.norm) == ("baseline", "rmsnorm")
    assert (own.config.schedule.warmup_tokens, own.config.optimizer.weight_decay) == (None, 1e-4)
    assert "loss.z_loss" not in [each.key for each in made("1b", "optimizer.mu_centering=true").values]
    scaled = made("1b", "optimizer.parametrization=mu_simple", "optimizer.learning_rate=0.01")
    assert (value(scaled, RATE).value, value(scaled, RATE).sure) == (0.01, "convention")
    with pytest.raises(ConfigError, match="give a positive one"):
        made("1b", "optimizer.learning_rate=0", "schedule.min_learning_rate=0")


def test_no_field_has_two_entries_at_once() -> None:
    for recipe in ("baseline", "olmo2", "peri_ln"):
        at = At(load_config(None, [f"model.recipe={recipe}"]), 1e9, 1e11)
        keys = [entry.key for entry in entries(at)]
        assert len(set(keys)) == len(keys) == 15


def test_a_sweep_goes_over_papers(tmp_path: Path) -> None:
    """Made: qk_norm is stable the farthest; the lowest loss of N is at 10^-2.2 · (N/1e6)^-0.2; gradients near ε."""
    found = made("302m", swept=read_back(tmp_path / "sweep"))
    recipe, rate, eps = (value(found, key) for key in (RECIPE, RATE, EPS))
    assert (recipe.value, recipe.sure, found.config.model.qk_norm) == ("qk_norm", "strong", True)
    assert "140 runs" in recipe.evidence and "model.recipe=baseline" in recipe.evidence
    assert rate.value == pytest.approx(10**-2.2 * 302**-0.2, rel=0.1) and rate.sure == "strong"
    assert "70 runs of 5 sizes, 1e+06 to 2.56e+08" in rate.evidence
    assert (eps.value, eps.sure) == (1e-15, "strong") and "the gradient RMS is foretold as" in eps.evidence
    assert found.config.schedule.min_learning_rate == pytest.approx(rate.value / 10, rel=0.05)
    assert any("differ from this one in" in note and "loss.z_loss" in note for note in found.notes)
    assert any(note.startswith("they have 1,000 steps, this one") for note in found.notes)


def test_the_largest_safe_rate_bounds_that_of_the_lowest_loss(tmp_path: Path) -> None:
    """Made: the baseline alone, which diverges at 302M long before a rate ten times that of its lowest loss."""
    rows, measured = sweep(recipes=("baseline",))
    for row in rows:  # the lowest loss is at the highest rate that is stable
        row["score"] = row["loss"] = 9.0 if row["status"] == "diverged" else 5 - math.log10(row[RATE])
    directory = write(tmp_path / "sweep", rows, measured)
    from megatron_stable.study.forecast import forecast
    from megatron_stable.study.table import read_table

    (group,) = groups(read_table(directory), read_measured(directory))
    found = made("302m", swept=[group])
    safe, optimal = forecast(group, found.at.parameters).safe, forecast(group, found.at.parameters).optimal
    assert safe is not None and optimal is not None and optimal.median > safe
    assert 0.9 * safe < value(found, RATE).value <= safe and "which bounds it" in value(found, RATE).evidence
    assert (value(found, RECIPE).value, value(found, RECIPE).sure) == ("baseline", "yours")


def test_where_a_sweep_does_not_carry_papers_do_and_it_is_said(tmp_path: Path) -> None:
    found = made("302m", swept=read_back(tmp_path / "few", sizes=(1e6, 4e6)))
    assert (value(found, RATE).value, value(found, RATE).sure) == (3.2e-4, "second-hand")
    assert value(found, RECIPE).sure == "strong"
    said = "\n".join(found.notes)
    assert "the learning rate of the lowest loss is not foretold: 2 sizes have it, and a law needs 3" in said
    assert "learning rate 0.00032 is not known to be stable" in said and "the gradient RMS is not foretold" in said


def test_what_the_learning_rate_holds_for_comes_with_it(tmp_path: Path) -> None:
    found = made("302m", swept=read_back(tmp_path / "sweep", **{"optimizer.parametrization": "mu_simple"}))
    assert found.config.optimizer.parametrization == "mu_simple"
    assert value(found, "optimizer.parametrization").evidence.startswith("your sweep")
    assert value(found, RATE).sure == "strong"


def test_groups_without_a_size_in_common_cannot_be_compared(tmp_path: Path) -> None:
    swept = read_back(tmp_path / "one", sizes=(1e6, 4e6)), read_back(tmp_path / "other", sizes=(2e6, 8e6))
    with pytest.raises(ConfigError, match="sweep them at the same sizes"):
        made("302m", swept=[swept[0][0], swept[1][1]])


@pytest.mark.parametrize("size", [size for size, shape in SIZES.items() if shape["heads"] >= 10])
def test_proxies_are_runs_that_a_forecast_can_follow_to_the_target(size: str, tmp_path: Path) -> None:
    found = made(size, *(["model.vocab_size=32000"] if size != "830m" else []))
    base, file = tmp_path / "config.yaml", tmp_path / "proxies.yaml"
    base.write_text(f"model: {{size: {size}, recipe: qk_norm, vocab_size: 32000}}\nparallel: {{tensor: 2}}\n")
    file.write_text(proxy_sweep(found.config, base, file))
    grid = read_grid(file)
    assert {cell.config.run.steps for cell in grid.cells} == {10_000}
    assert len(grid.cells) == 4 * 2 * 7 * 2 and str(grid.directory) == "sweeps/proxies"
    sizes = sorted({parameter_count(cell.config.model, 2)[1] for cell in grid.cells})
    assert len(sizes) == 4 and refusal(sizes, found.at.parameters) is None
    assert {cell.config.model.head_dim for cell in grid.cells} == {found.config.model.head_dim}
    assert {cell.config.model.recipe for cell in grid.cells} == {"qk_norm", "qk_norm_cap"}


def test_proxies_train_no_longer_than_the_target() -> None:
    short_run = made("302m", tokens=1e9)
    assert short_run.config.run.steps == 1908
    text = proxy_sweep(short_run.config, Path("config.yaml"), Path("proxies.yaml"))
    assert "run.steps: 1908\n" in text and "schedule.warmup_steps: 95\n" in text


def test_a_model_of_few_heads_has_no_proxies() -> None:
    with pytest.raises(ConfigError, match="8 heads is too small"):
        proxy_sweep(made("10m").config, Path("config.yaml"), Path("proxies.yaml"))
