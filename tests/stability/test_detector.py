"""The spike detector: what it finds, what it does not mistake for a spike, and that it can stop and go on."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_stable.stability.detector import (
    GRAD_NORM,
    HELD,
    LOSS,
    DetectorSettings,
    DetectorState,
    SpikeDetector,
    Verdict,
    find_spikes,
)

NOISE = 0.015  # standard deviation of a loss; its MAD is 0.0101
MAD = 0.67449 * NOISE


def noisy(levels: list[float], seed: int = 0, noise: float = NOISE) -> list[float]:
    random_numbers = random.Random(seed)
    return [level + random_numbers.gauss(0, noise) for level in levels]


def falling(length: int) -> list[float]:
    return [1.7 + 9.3 / (1 + t / 30) ** 0.37 for t in range(length)]


def restored(detector: SpikeDetector) -> DetectorState:
    """Its state, through strict JSON."""
    return DetectorState.model_validate(
        json.loads(json.dumps(detector.state().model_dump(mode="json"), allow_nan=False))
    )


def verdicts(values: list[float], detector: SpikeDetector | None = None, first: int = 0) -> list[Verdict]:
    detector = detector or SpikeDetector()
    return [detector.update(first + i, value) for i, value in enumerate(values)]


def spikes(values: list[float], settings: DetectorSettings = LOSS) -> list[tuple[str, int, int]]:
    return [(s.kind, s.onset, s.duration) for s in find_spikes(range(len(values)), values, settings)]


# The shapes of real runs


def test_bloom_loss() -> None:
    """BLOOM-176B, iterations 31214 to 31250: one spike, with its first step although that fell back once."""
    values = noisy([2.2] * 1000 + [2.2, 2.2, 2.6, 2.2, 2.3, 5.1] + [2.2 + 2.9 * 0.85**t for t in range(1, 32)])
    values += noisy([2.2] * 500, seed=1)
    (spike,) = find_spikes(range(len(values)), values)
    assert (spike.kind, spike.onset, spike.peak_step) == ("spike", 1002, 1005)
    assert spike.peak == values[1005] and spike.score > 200 and abs(spike.level - 2.2) < 0.02
    assert 25 <= spike.duration <= 36


def test_bloom_gradient_norm() -> None:
    norms = [math.log(0.24)] * 1000 + [math.log(x) for x in (0.24, 0.95, 2.4, 16, 145, 960, 30, 2)]
    values = [math.exp(x) for x in noisy(norms + [math.log(0.24)] * 300, noise=0.1)]
    (spike,) = find_spikes(range(len(values)), values, GRAD_NORM)
    assert (spike.kind, spike.onset, spike.peak_step, spike.duration) == ("spike", 1001, 1005, 7)
    assert spike.level == pytest.approx(0.24, rel=0.1)


PATIENCES = [1, 4, 16, 50, 100]


@pytest.mark.parametrize("height", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("patience", PATIENCES)
def test_a_rise_that_stays(patience: int, height: float) -> None:
    """Some tenths up, and on from there: a rise after `patience` values, usual after a window, and then spikes show."""
    curve = falling(3000)
    values = noisy(curve[:2000] + [x + height for x in curve[2000:]])
    for step in range(2500, 2505):
        values[step] += 10 * MAD
    chosen = replace(LOSS, patience=patience)
    found = verdicts(values, SpikeDetector(chosen))
    assert [v.kind for v in found[2000 : 2000 + patience]] == ["spike"] * (patience - 1) + ["rise"]
    assert found[1999 + patience].onset == 2000
    (rise, spike) = find_spikes(range(3000), values, chosen)
    assert (rise.kind, rise.onset) == ("rise", 2000) and 256 <= rise.duration <= 256 + patience
    assert rise.peak is not None and height < rise.peak - rise.level < height + 0.1
    assert spike.onset == 2500 and spike.duration == 5  # with a patience of 4 and less, that is a rise too
    assert spike.kind == "spike" or patience < 5


@pytest.mark.parametrize("steps", [20, 60])
@pytest.mark.parametrize("height", [0.6, 1.0])
@pytest.mark.parametrize("patience", PATIENCES)
def test_a_rise_over_some_steps(patience: int, height: float, steps: int) -> None:
    """Found within `patience` of the step on which it has reached the threshold; told as one event."""
    curve = falling(3000)
    values = noisy([x + height * min(max(i - 1999, 0) / steps, 1) for i, x in enumerate(curve)])
    chosen = replace(LOSS, patience=patience)
    found = verdicts(values, SpikeDetector(chosen))
    risen = next(i for i, v in enumerate(found) if v.kind in ("rise", "divergence"))
    stands_out = 2000 + 8 * MAD / height * steps
    assert 2000 < risen <= stands_out + patience + 3
    assert spikes(values, chosen)[0][1] >= 2000


def test_settled_by_who_knows() -> None:
    """Told that the rise is the data's, the detector takes it for usual: the same again is a rise again."""
    detector = SpikeDetector(replace(LOSS, patience=16))
    verdicts(noisy([3.0] * 600), detector)
    assert verdicts(noisy([3.5] * 16, seed=1), detector, 600)[-1].kind == "rise"
    detector.settle()
    assert {v.kind for v in verdicts(noisy([3.5] * 100, seed=2), detector, 616)} == {"normal"}
    kinds = [v.kind for v in verdicts(noisy([4.0] * 16, seed=3), detector, 716)]
    assert kinds == ["spike"] * 15 + ["rise"]


def test_settled_where_nothing_has_risen() -> None:
    detector = SpikeDetector()
    verdicts(noisy([3.0] * 300), detector)
    before = detector.state()
    detector.settle()
    assert detector.state() == before


def test_drift_starts_anew_where_it_was_settled() -> None:
    """Slow rises of a fifth above the lowest, one after another; each is news once."""
    detector = SpikeDetector()
    values = noisy([3.0] * 600 + [3.0 + 0.0005 * t for t in range(6000)])
    onsets = []
    for step, value in enumerate(values):
        if (verdict := detector.update(step, value)).kind == "rise":
            assert verdict.onset is not None
            onsets.append(verdict.onset)
            detector.settle()
    assert len(onsets) >= 3 and all(b - a > 1000 for a, b in itertools.pairwise(onsets))


@pytest.mark.parametrize("decay, kind", [(8, "spike"), (25, "spike"), (1000, "rise")])
def test_on_its_way_back(decay: float, kind: str) -> None:
    """What falls by a quarter from half to half has twice the patience; what hardly falls has not."""
    values = noisy([3.0] * 1000 + [3.0 + 0.55 * math.exp(-t / decay) for t in range(16)])
    assert verdicts(values, SpikeDetector(replace(LOSS, patience=16)))[-1].kind == kind


def test_on_its_way_back_for_too_long() -> None:
    values = noisy([3.0] * 1000 + [3.0 + 0.55 * math.exp(-t / 25) for t in range(40)])
    kinds = [v.kind for v in verdicts(values, SpikeDetector(replace(LOSS, patience=16)))[1000:]]
    assert kinds[:31] == ["spike"] * 31 and kinds[31] == "rise"


def test_a_rise_right_after_a_rollback() -> None:
    """Restored from before the rise, it sees the same rise a few steps later, as it did at first."""
    chosen = replace(LOSS, patience=16)
    detector = SpikeDetector(chosen)
    verdicts(noisy([3.0] * 580), detector)
    state = detector.state()
    for calm in (0, 5, 20):
        again = SpikeDetector(chosen)
        again.load(state)
        kinds = [v.kind for v in verdicts(noisy([3.0] * calm + [3.5] * 16, seed=calm), again, 580)]
        assert kinds == ["normal"] * calm + ["spike"] * 15 + ["rise"]


def test_single_steps_that_come_back() -> None:
    """Spikes of one step and 12 MADs, every 300 steps: they are no tail, and the tenth is found like the first."""
    values = noisy([3.0] * 4000)
    for step in range(1000, 4000, 300):
        values[step] = 3.0 + 12 * MAD
    assert [onset for _, onset, _ in spikes(values)] == list(range(1000, 4000, 300))


@pytest.mark.parametrize("period", [2, 3, 4])
def test_spikes_that_alternate_with_usual_values(period: int) -> None:
    """One step of several, again and again: found at once."""
    values = noisy([3.0] * 1500)
    for step in range(1000, 1100, period):
        values[step] = 3.0 + 20 * MAD
    found = spikes(values)
    assert found and found[0][:2] == ("spike", 1000) and found[-1][1] + found[-1][2] > 1095


@pytest.mark.parametrize("down", [0.1, 1.0])
def test_a_fall_is_never_anything(down: float) -> None:
    curve = falling(3000)
    assert spikes(noisy(curve[:2000] + [x - down for x in curve[2000:]])) == []


@pytest.mark.parametrize("rise", [0.0, 0.01, -0.001], ids=["stays", "rises", "falls slowly"])
def test_a_jump_beyond_what_data_explains_is_a_divergence(rise: float) -> None:
    curve = falling(2000)
    found = verdicts(noisy(curve + [7.0 + rise * t for t in range(600)]))
    assert [v.kind for v in found[2000:2049]] == ["spike"] * 49
    assert {v.kind for v in found[2049:]} == {"divergence"} and {v.onset for v in found[2000:]} == {2000}


def test_a_small_rise_that_goes_on_rising_is_a_divergence() -> None:
    found = verdicts(noisy(falling(2000) + [3.95 + 0.005 * t for t in range(300)]))
    assert [found[i].kind for i in (2048, 2049, 2098, 2099)] == ["spike", "rise", "rise", "divergence"]


def test_a_divergence_that_falls_back_ends() -> None:
    curve = falling(3000)
    found = verdicts(noisy(curve[:2000] + [7.0] * 100 + curve[2100:]))
    assert found[2098].kind == "divergence" and {v.kind for v in found[2100:]} == {"normal"}


@pytest.mark.parametrize("slope, noticed, told", [(1.0, 15, 70), (0.1, 150, 400), (0.02, 3400, 3400)])
def test_a_slow_rise(slope: float, noticed: int, told: int) -> None:
    """The level is slow to follow a rise; where the window follows it nevertheless, the lowest level tells."""
    values = noisy([3.0] * 1000 + [3.0 + slope * MAD * t for t in range(4000)])
    kinds = [v.kind for v in verdicts(values)]
    assert 1000 < next(i for i, kind in enumerate(kinds) if kind != "normal" and i > 100) < 1000 + noticed
    assert next(i for i, kind in enumerate(kinds) if kind in ("rise", "divergence")) < 1000 + told


def test_spikes_in_a_row_do_not_hide_each_other() -> None:
    values = noisy(falling(3000))
    onsets = range(2000, 2500, 20)
    for onset in onsets:
        for step in range(onset, onset + 8):
            values[step] += 12 * MAD
    assert [onset for _, onset, _ in spikes(values)] == list(onsets)


# What is normal


@pytest.mark.parametrize("seed", range(3))
def test_no_alarm_in_noise_and_falls(seed: int) -> None:
    for curve in ([3.0] * 20_000, falling(20_000), falling(1000)):
        assert spikes(noisy(curve, seed)) == []


@pytest.mark.parametrize("value", [0.0, 2.5, -3.0])
def test_a_constant_series_has_no_spikes(value: float) -> None:
    random_numbers = random.Random(0)
    values = [value * (1 + 1e-6 * random_numbers.random()) for _ in range(1000)]
    assert spikes(values) == [] and spikes(values, replace(LOSS, log=True)) == []
    if value > 0:
        assert spikes([*values, 2 * value, *values]) == [("spike", 1000, 1)]


def test_a_loss_rounded_to_two_digits() -> None:
    assert spikes([round(x, 2) for x in noisy([2.2004] * 20_000, noise=0.002)]) == []


@pytest.mark.parametrize("onset, height", [(60, 4.0), (300, 1.2), (1500, 10 * MAD)])
def test_in_a_fall_what_stands_out_of_it_is_found(onset: int, height: float) -> None:
    """In a steep fall the scale is that of the fall; where it flattens, that of the noise."""
    values = noisy(falling(2000))
    for step in range(onset, onset + 5):
        values[step] += height
    assert spikes(values) == [("spike", onset, 5)]


def test_heavy_tails_ask_for_more_than_one_step() -> None:
    """Where single steps stand out now and then, one of 12 MADs is no spike; three are. In quiet noise one is."""
    student = random.Random(0)

    def t() -> float:
        return student.gauss(0, 1) / math.sqrt(sum(student.gauss(0, 1) ** 2 for _ in range(3)) / 3) * MAD / 0.765

    for values, single in (([3 + t() for _ in range(3000)], False), (noisy([3.0] * 3000), True)):
        base = len(spikes(values))
        for step, length in ((2000, 1), (2500, 4)):
            values[step : step + length] = [3 + 14 * MAD] * length
        listed = [onset for _, onset, _ in spikes(values)]
        assert (2000 in listed) == single and 2500 in listed and len(listed) == base + 1 + single


def test_warmup_judges_nothing_but_non_finite_values() -> None:
    found = verdicts([3.0, 100.0, math.nan, 3.0, *noisy([3.0] * 100)])
    assert [v.kind for v in found[:5]] == ["warmup", "warmup", "spike", "warmup", "warmup"]
    assert {v.kind for v in found[60:]} == {"normal"}


# Values that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("chosen", [LOSS, GRAD_NORM], ids=["loss", "norm"])
def test_not_finite(bad: float, chosen: DetectorSettings) -> None:
    """A spike at once, a divergence if it stays, and what follows is judged by the level before."""
    values, rest = noisy([3.0] * 500), noisy([3.0] * 300, seed=1)
    detector = SpikeDetector(chosen)
    verdicts(values, detector)
    found = verdicts([bad] * 60, detector)
    assert [v.kind for v in found] == ["spike"] * 49 + ["divergence"] * 11
    assert all(v.score == math.inf and v.onset == 0 for v in found)
    assert {v.kind for v in verdicts(rest, detector)} == {"normal"}
    assert detector.update(300, 6.0).kind == "spike"
    listed = find_spikes(range(561), [*values, *[bad] * 60, 3.0], chosen)
    assert [(s.onset, s.peak_step, s.peak, s.duration) for s in listed] == [(500, 500, None, 60)]


def test_not_finite_from_the_start() -> None:
    found = verdicts([math.nan] * 60)
    assert found[0].kind == "spike" and found[-1].kind == "divergence"


def test_a_norm_of_zero_is_passed_over() -> None:
    values = noisy([0.0] * 400, noise=0.1)
    norms = [math.exp(x) for x in values]
    norms[200:210] = [0.0, -1.0] * 5
    assert spikes(norms, GRAD_NORM) == []


series = st.lists(
    st.one_of(st.floats(-2, 2), st.floats(-2, 2), st.sampled_from([math.nan, math.inf, 50.0, -50.0])),
    min_size=100,
    max_size=250,
)


@settings(max_examples=50, deadline=None)
@given(series, st.integers(0, 250), st.sampled_from([LOSS, GRAD_NORM, replace(LOSS, patience=3, warmup=5, window=20)]))
def test_state_and_load(values: list[float], cut: int, chosen: DetectorSettings) -> None:
    """Stopped anywhere, it goes on with the same verdicts bit for bit, through strict JSON."""
    values = [math.exp(x) for x in values] if chosen.log else values
    whole, first, second = (SpikeDetector(chosen) for _ in range(3))
    verdicts(values[:cut], first)
    second.load(restored(first))
    assert repr(verdicts(values, whole)[cut:]) == repr(verdicts(values[cut:], second, first=cut))
    assert whole.state() == second.state()


def test_a_spike_right_after_resume() -> None:
    first, second = SpikeDetector(), SpikeDetector()
    verdicts(noisy(falling(1000)), first)
    second.load(restored(first))
    assert second.update(1000, 6.0).kind == "spike"


def test_stopped_while_a_spike_falls_back() -> None:
    """Three usual values end an excursion, though the run stopped in between."""
    first, second = SpikeDetector(), SpikeDetector()
    verdicts([*noisy([3.0] * 300), 4.0, 3.0, 3.0], first)
    second.load(restored(first))
    assert [v.onset for v in verdicts([3.0, 4.0], second, first=303)] == [None, 304]


@settings(max_examples=30, deadline=None)
@given(series)
def test_non_finite_values_never_enter(values: list[float]) -> None:
    detector = SpikeDetector(replace(LOSS, window=40, warmup=20))
    verdicts(values, detector)
    state = detector.state()
    assert all(map(math.isfinite, (*state.values, *state.gaps)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.25, 4.0, 1024.0]))
def test_scale_invariance(seed: int, factor: float) -> None:
    """A loss in other units gets the same verdicts (powers of two: to the bit)."""
    values = with_spikes(seed)
    plain, scaled = verdicts(values), verdicts([factor * x for x in values])
    assert [(v.kind, v.score, v.onset) for v in plain] == [(v.kind, v.score, v.onset) for v in scaled]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(-1.5, 3))
def test_shift_invariance(seed: int, offset: float) -> None:
    """Up to what is measured as a part of the level: floor, what data explains, drift."""
    chosen = replace(LOSS, floor=1e-9, explained=10.0, drift=math.inf)
    values = with_spikes(seed)
    plain, moved = (verdicts(x, SpikeDetector(chosen)) for x in (values, [v + offset for v in values]))
    assert [(v.kind, v.onset) for v in plain] == [(v.kind, v.onset) for v in moved]
    for one, other in zip(plain[20:], moved[20:], strict=True):  # the first scales are those of one or two values
        assert other.score == pytest.approx(one.score, rel=1e-6, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.tuples(st.integers(100, 590), st.floats(0.1, 3)), max_size=30))
def test_one_sided(seed: int, falls: list[tuple[int, float]]) -> None:
    """No fall of single steps is an alarm."""
    values = noisy([3.0] * 600, seed)
    for step, depth in falls:
        values[step] -= depth
    assert spikes(values) == []


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(300, 900), st.floats(10, 1000), st.integers(3, 30))
def test_ten_mads_are_found_within_three_steps(seed: int, onset: int, height: float, length: int) -> None:
    values = noisy([3.0] * 1000, seed)
    for step in range(onset, onset + length):
        values[step] += height * MAD
    found = verdicts(values)
    first = next(i for i, v in enumerate(found) if v.kind == "spike")
    assert onset <= first < onset + 3 and onset - HELD <= (found[first].onset or 0) <= first
    assert all(v.kind == "normal" for v in found[onset + length + 3 :])


def with_spikes(seed: int) -> list[float]:
    """600 steps with two spikes, a rise and values that are not finite."""
    values = noisy([3.0] * 350 + [3.2] * 250, seed)
    for step in (*range(150, 155), *range(200, 220)):
        values[step] += 0.4
    values[500] = math.nan
    return values


def test_state_does_not_grow() -> None:
    sizes = []
    detector = SpikeDetector()
    for length in (3000, 20_000):
        verdicts(noisy([3.0] * length), detector)
        verdicts([9.0] * length, detector)
        state = detector.state()
        assert state.excursion is not None
        sizes.append((len(state.values), len(state.gaps), len(state.held), len(state.excursion.recent)))
        detector = SpikeDetector()
    assert sizes[0] == sizes[1]


EXCURSION = {"kind": "spike", "onset": 1, "level": 3.0, "scale": 0.1, "limit": 3.4}


@pytest.mark.parametrize(
    "change",
    [
        {"values": None},
        {"values": ["1"]},
        {"values": [True]},
        {"values": [math.nan]},
        {"gaps": []},
        {"held": [[1, 2.0]]},
        {"held": [[1, 2.0, 0.0, 0.0]] * (HELD + 1)},
        {"low": "x"},
        {"low": math.inf},
        {"excursion": {"kind": "spike"}},
        {"excursion": 3},
        {"excursion": EXCURSION | {"kind": "shift"}},
        {"excursion": EXCURSION | {"scale": 0.0}},
        {"excursion": EXCURSION | {"count": -1}},
        {"excursion": EXCURSION | {"recent": [math.inf]}},
        {"unknown": 1},
    ],
)
def test_garbage_is_refused(change: dict[str, Any]) -> None:
    detector = SpikeDetector()
    verdicts(noisy([3.0] * 100), detector)
    state = detector.state().model_dump(mode="json")
    DetectorState.model_validate(state | {"excursion": EXCURSION})
    with pytest.raises(ValidationError):
        DetectorState.model_validate({**state, **change})


@pytest.mark.parametrize("change", [{"window": 3}, {"warmup": 300}, {"patience": 0}, {"threshold": 0.0}, {"floor": -1}])
def test_settings_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        replace(LOSS, **change)


def test_find_spikes_counts_in_steps() -> None:
    """A series that was recorded every tenth step."""
    values = noisy([3.0] * 200)
    values[100:104] = [4.0, 5.0, 6.0, 4.5]
    (spike,) = find_spikes(range(10, 2010, 10), values)
    assert (spike.onset, spike.peak_step, spike.peak, spike.duration) == (1010, 1030, 6.0, 31)
    with pytest.raises(ValueError):
        find_spikes([1, 2], [1.0])
