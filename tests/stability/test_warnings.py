"""Early warnings: said in time, once, and not in vain, on series of known growth."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_stable.config.load import load_config
from megatron_stable.config.schema import Config
from megatron_stable.records.warnings_reference import warnings_page
from megatron_stable.stability.events import EarlyWarning, parse
from megatron_stable.stability.probes import PROBES, places
from megatron_stable.stability.track_record import TRACK_RECORD
from megatron_stable.stability.warning_rules import RULES
from megatron_stable.stability.warnings import Watch

LAYERS, STEPS = 3, 2000
TAGS = [where.tag for probe in PROBES.values() for where in places(probe, LAYERS)]
USUAL = {
    "attention/max_logit": 8.0, "attention/entropy": 2.0, "logits/logsumexp": 7.0, "grad_rms": 1e-3,
    "moment_surprise": 0.9,
}  # fmt: skip
Law = Callable[[int], float]


def config(**overrides: Any) -> Config:
    """A run of three layers."""
    settings = {"model.layers": LAYERS, "model.vocab_size": 512, "run.steps": STEPS, **overrides}
    return load_config(None, [f"{key}={value}" for key, value in settings.items()])


def records(laws: dict[str, Law], steps: int = STEPS, every: int = 10, seed: int = 0, noise: float = 0.05) -> Any:
    """(step, record): everything as usual, with noise, but for what follows a law."""
    draw = np.random.default_rng(seed)
    for step in range(every, steps + 1, every):
        record: dict[str, Any] = {"step": step, "learning_rate": 1e-3}
        for tag, factor in zip(TAGS, np.exp(noise * draw.standard_normal(len(TAGS))).tolist(), strict=True):
            usual = next((value for name, value in USUAL.items() if tag.startswith(name)), 1.0)
            record[tag] = factor * (laws[tag](step) if tag in laws else usual)
        yield step, record


def said(watch: Watch, given: Any) -> list[EarlyWarning]:
    """All that a watch says."""
    return [warning for step, record in given for warning in watch.update(step, record)]


GROWING = "attention/max_logit/layer_02"


def test_growing_logits_are_foretold_long_before_and_the_interval_holds_the_step() -> None:
    held = []
    for seed in range(6):
        law = {GROWING: lambda step: 8.0 * np.exp(step / 200)}  # 10^3 at step 966
        first = said(Watch(config()), records(law, steps=800, seed=seed))[0]
        assert (first.rule, first.kind, first.tag, first.layers) == ("attention_logits", "ahead", GROWING, (2,))
        assert first.at is not None and first.interval is not None
        assert first.step <= 800, "a sixth of the way ahead"
        assert first.at == pytest.approx(966, rel=0.25)
        held.append(first.interval[0] <= 966 <= first.interval[1])
    assert sum(held) >= 5


def test_a_quiet_run_is_told_nothing() -> None:
    for seed in range(3):
        assert said(Watch(config()), records({}, seed=seed)) == []


@pytest.mark.parametrize(
    ("rule", "tag", "law"),
    [
        ("attention_logits", GROWING, lambda step: 8.0 if step < 500 else 2e3),
        ("attention_entropy", "attention/entropy/layer_00", lambda step: 2.0 if step < 500 else 0.05),
        ("output_logsumexp", "logits/logsumexp", lambda step: 7.0 if step < 500 else -40.0),
        ("gradient_rms", "grad_rms/fc1/layer_00", lambda step: 1e-3 if step < 500 else 5e-8),
        ("moment_surprise", "moment_surprise/head", lambda step: 5.0 if step == 500 else 0.9),
        ("update_rms", "update_rms/qkv/layer_01", lambda step: 9.0 if step == 500 else 1.0),
    ],
)
def test_each_rule_sees_what_it_is_for(rule: str, tag: str, law: Law) -> None:
    warnings = [warning for warning in said(Watch(config()), records({tag: law})) if warning.rule == rule]
    assert warnings and warnings[0].tag == tag
    assert 500 <= warnings[0].step <= 520, "a second measurement at most"
    assert warnings[0].kind in ("past", "jump")


def test_an_output_that_multiplies_is_told_unless_queries_and_keys_are_normalised() -> None:
    law = {"output_norm/proj/layer_01": lambda step: np.exp(step / 150)}
    warnings = said(Watch(config()), records(law))
    assert [(warning.rule, warning.kind) for warning in warnings] == [("output_norm", "growth")]
    assert warnings[0].since is not None and warnings[0].since < warnings[0].step
    assert said(Watch(config(**{"model.recipe": "qk_norm"})), records(law)) == []
    slow = {"output_norm/proj/layer_01": lambda step: float(step)}
    assert said(Watch(config()), records(slow)) == [], "what doubles with the age of the run does not multiply"


def test_a_warning_is_said_once_with_all_its_layers_the_soonest_first() -> None:
    factors = {"attention/max_logit/layer_00": 8.0, "attention/max_logit/layer_01": 8.2, GROWING: 8.1}
    laws = {tag: lambda step, factor=factor: factor * np.exp(step / 200) for tag, factor in factors.items()}
    warnings = said(Watch(config()), records(laws, steps=1050, noise=1e-4))
    logits = [warning for warning in warnings if warning.rule == "attention_logits"]
    assert [warning.kind for warning in logits] == ["ahead", "past"]
    assert [warning.layers for warning in logits] == [(1, 2, 0), (1, 2, 0)]
    assert logits[0].tag == "attention/max_logit/layer_01"


def test_what_comes_sooner_than_was_said_is_said_again() -> None:
    def law(step: int) -> float:
        return float(8.0 * np.exp(step / 80 if step < 305 else 305 / 80 + (step - 305) / 25))

    warnings = said(Watch(config()), records({GROWING: law}, steps=340, every=1, noise=0.005))
    ahead = [warning for warning in warnings if (warning.rule, warning.kind) == ("attention_logits", "ahead")]
    assert len(ahead) == 2
    first, second = (warning.interval for warning in ahead)
    assert first is not None and second is not None and second[1] < first[0]


def test_what_comes_after_the_end_of_the_run_or_too_far_ahead_is_not_said() -> None:
    law = {GROWING: lambda step: 8.0 * np.exp(step / 200)}
    assert said(Watch(config(**{"run.steps": 900})), records(law, steps=900)) == []
    slow = {GROWING: lambda step: 8.0 * np.exp(step / 1200)}  # 10^3 at 5800
    assert said(Watch(config(**{"run.steps": 100_000})), records(slow, steps=2000)) == []


def test_gaps_and_values_that_are_not_finite_are_passed_over() -> None:
    broken = []
    for step, record in records({GROWING: lambda step: 8.0 * np.exp(step / 200)}):
        record |= dict.fromkeys(TAGS[::7]) if step % 30 == 0 else {}
        record[GROWING] = None if step % 50 == 0 else record[GROWING]
        record["logits/logsumexp"] = float("nan") if step % 20 else float("inf")
        record.pop("grad_rms/fc1/layer_00", None)
        broken.append((step, record))
        broken.append((step + 1, {"step": step + 1, "loss": 3.0, "learning_rate": 1e-3}))
    with np.errstate(all="raise"):
        warnings = said(Watch(config()), broken)
    assert [warning.rule for warning in warnings][:1] == ["attention_logits"]
    assert "output_logsumexp" not in {warning.rule for warning in warnings}


def test_a_watch_that_has_learned_the_past_does_not_repeat_it_and_goes_on() -> None:
    given = list(records({GROWING: lambda step: 8.0 * np.exp(step / 200)}))
    straight = said(Watch(config()), given)
    for cut in (60, 110):
        first = Watch(config())
        before = said(first, given[:cut])
        second = Watch(config(), [parse(warning.line()) for warning in before])  # type: ignore[misc]
        for step, record in given[:cut]:
            second.learn(step, record)
        assert before + said(second, given[cut:]) == straight


def test_the_threshold_of_gradients_is_that_of_the_run() -> None:
    law = {"grad_rms/fc1/layer_00": lambda step: 1e-6}
    assert said(Watch(config()), records(law, steps=300)) == []
    assert said(Watch(config(**{"optimizer.eps": "1e-6"})), records(law, steps=300))[0].rule == "gradient_rms"


def test_a_cap_makes_large_logits_no_matter() -> None:
    law = {GROWING: lambda step: 2e4}
    assert {w.rule for w in said(Watch(config()), records(law, steps=300))} == {
        "attention_logits",
        "attention_logits_lost",
    }
    assert said(Watch(config(**{"model.recipe": "soft_cap"})), records(law, steps=300)) == []


def test_every_rule_measures_what_there_is_and_names_a_remedy_that_there_is() -> None:
    for rule in RULES:
        probe = PROBES[rule.probe]
        assert set(rule.points) <= {*probe.points, *probe.outside}, rule.name
        assert Path(f"docs/methods/{rule.page}.md").is_file(), rule.name
        for key, value in re.findall(r"(\S+\.\S+)=(\S+?)(?:,|$| )", rule.remedy):
            load_config(None, [f"{key}={value}", "model.vocab_size=512"])
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "warnings.md"
    assert page.read_text(encoding="utf-8") == warnings_page(), "run `make docs`"


def test_the_track_record_is_of_rules_that_there_are() -> None:
    assert set(TRACK_RECORD) <= {rule.name for rule in RULES}
    assert all(0 <= right <= times and times > 0 for right, times in TRACK_RECORD.values())


def test_the_sentence_says_when_what_it_means_and_what_treats_it() -> None:
    given = records({GROWING: lambda step: 8.0 * np.exp(step / 200)}, noise=0.001)
    sentence = said(Watch(config()), given)[0].sentence()
    assert re.match(
        r"step \d+: early warning: the largest attention logit of layer 2 is [\d.]+, and at this rate reaches 1,000 at "
        r"about step [\d,]+ \([\d,]+–[\d,]+\)\. It means: .* treats it \(docs/methods/qk_norm_cap\.md\)",
        sentence,
    ), sentence
