"""Data or state: the verdict on batches of which the answer is known."""

from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest

from megatron_stable.analysis.blame import Level, Measured, blame, level, scores

NOISE = np.random.default_rng(0).normal(0, 0.1, (3, 16))
BEFORE, EARLIER = 3.0 + NOISE[0], 4.0 + NOISE[1]  # what two healthy checkpoints make of ordinary data
BAD = np.array([4, 9])


def raised(losses: np.ndarray, by: float = 3.0) -> np.ndarray:
    losses = losses.copy()
    losses[BAD] += by
    return losses


def test_scores_are_robust_deviations_above_the_median() -> None:
    losses = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 100.0, nan])
    assert scores(losses)[:8] == pytest.approx((losses[:8] - 4.5) / (1.4826 * 2.0))
    assert scores(losses)[8] == inf
    assert not scores(losses[:7]).any(), "too few to tell"
    assert scores(np.append(np.full(9, 2.0), 2.05))[-1] == pytest.approx(2.5), "samples that are alike: 1% of them"


def test_samples_that_are_hard_for_both_are_the_data() -> None:
    verdict = blame(Measured(100, raised(BEFORE)), Measured(50, raised(EARLIER)))
    assert verdict.kind == "data"
    without = np.delete(BEFORE, BAD).mean()
    assert "2 of 16 samples are far above the batch's median under checkpoints 100 and 50" in verdict.findings[0].text
    assert f"is {raised(BEFORE).mean():.4g}, which without them would be {without:.4g}" in verdict.findings[0].text


def test_a_sample_that_is_far_for_one_and_not_near_for_the_other_is_hard_for_both() -> None:
    clear, faint = EARLIER.copy(), BEFORE.copy()
    clear[4], faint[4] = 9.0, np.median(BEFORE) + 0.5
    assert 3 < scores(faint)[4] < 6 < scores(clear)[4]
    assert blame(Measured(100, clear), Measured(50, faint)).findings[0].blames == "data"
    assert blame(Measured(100, faint), Measured(50, clear)).findings[0].blames == "data"


def test_samples_that_are_hard_for_one_are_its_state() -> None:
    verdict = blame(Measured(100, raised(BEFORE)), Measured(50, EARLIER))
    assert verdict.kind == "state"
    assert "under checkpoint 100 only, ordinary under 50" in verdict.findings[0].text
    learnt = blame(Measured(50, raised(EARLIER)), Measured(100, BEFORE))
    assert learnt.kind == "undecided", "a later checkpoint may have learnt them"


def test_ordinary_data_under_ordinary_checkpoints() -> None:
    assert blame(Measured(100, BEFORE), Measured(50, EARLIER)).kind == "neither"
    assert blame(Measured(100, BEFORE), Measured(50, EARLIER), 120, float(BEFORE.mean())).kind == "neither"


def test_a_loss_recorded_far_above_that_of_the_checkpoint_before_is_the_state() -> None:
    for recorded, word in ((9.3, "9.3"), (nan, "not finite"), (inf, "not finite")):
        verdict = blame(Measured(100, BEFORE), None, 120, recorded)
        assert verdict.kind == "state" and word in verdict.findings[0].text
    assert blame(Measured(130, BEFORE), None, 120, 9.3).kind == "undecided", "a checkpoint from after it"
    assert blame(Measured(100, BEFORE), None, 120, None).kind == "undecided"
    assert "20 steps later" in verdict.caveat


def test_a_later_checkpoint_that_is_worse_throughout_is_damaged() -> None:
    assert blame(Measured(100, EARLIER), Measured(50, BEFORE)).kind == "state"
    assert blame(Measured(50, EARLIER), Measured(100, BEFORE)).kind == "neither", "training made it better"
    both = blame(Measured(100, raised(EARLIER)), Measured(50, raised(BEFORE)))
    assert both.kind == "both" and [finding.blames for finding in both.findings] == ["data", "state"]


def test_a_batch_that_is_hard_throughout_shows_against_what_the_run_recorded() -> None:
    hard, usual, other = BEFORE + 2.0, Level(3.0, 0.05), Level(4.0, 0.05)
    assert blame(Measured(100, hard, usual), Measured(50, EARLIER + 2.0, other)).kind == "data"
    assert blame(Measured(100, hard, usual), Measured(50, EARLIER, other), 120).kind == "state"
    assert blame(Measured(100, hard, usual), Measured(120, EARLIER)).kind == "undecided", "no level of the other"
    assert blame(Measured(100, BEFORE, usual), Measured(50, EARLIER, other)).kind == "neither"
    assert level([3.0] * 7 + [None]) is None, "too few"
    assert level([*range(1, 10), None, nan]) == (5.0, pytest.approx(1.4826 * 2.0))


def test_weights_that_are_destroyed() -> None:
    gone = np.full(16, nan)
    assert blame(Measured(100, gone), Measured(50, EARLIER)).kind == "state"
    assert blame(Measured(100, gone)).kind == blame(Measured(100, gone), Measured(50, gone)).kind == "undecided"
    assert blame(Measured(100, BEFORE), Measured(50, gone)).kind == "undecided"
    one = raised(BEFORE, inf)
    assert blame(Measured(100, one), Measured(50, raised(EARLIER, inf))).kind == "data"


def test_few_samples_decide_nothing() -> None:
    few = raised(BEFORE)[:5]
    verdict = blame(Measured(100, few), Measured(50, raised(EARLIER)[:5]))
    assert verdict.kind == "undecided"
    assert "fewer than 8 samples" in verdict.caveat
