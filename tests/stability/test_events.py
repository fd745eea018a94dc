"""Events come back from the ledger as they were, say what happened in one line, and no line of a ledger is an error."""

from __future__ import annotations

import json
from math import inf, nan
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_stable.config.schema import ParallelConfig
from megatron_stable.stability.events import (
    AnyEvent,
    Blend,
    Converted,
    Divergence,
    Drop,
    EarlyWarning,
    Event,
    FlightRecorded,
    GaveUp,
    Imported,
    LossScaleFloor,
    Resume,
    Rise,
    Rollback,
    SaveFailed,
    SecondOpinion,
    Shift,
    Spike,
    SpikeEnd,
    Start,
    Stop,
    Surgery,
    Undo,
    Unknown,
    Waiting,
    WentOn,
    parse,
)
from megatron_stable.stability.interventions import Intervention

KINDS: tuple[type[Event], ...] = get_args(get_args(AnyEvent)[0])
AT: dict[str, Any] = {"step": 130, "data_step": 140}
RISE: dict[str, Any] = {"series": "loss", "value": 9.31234, "level": 2.5, "scale": 0.02, "score": 340.31, "onset": 119}
LAYOUT = ParallelConfig(tensor=2, pipeline=4, sequence=True)
INTERVENTION = Intervention(
    id="abc", time="2026-01-01T00:00:00+00:00", by="guard", rule="divergence", onset=119, rollback_to=50,
    windows=((51, 219),), samples=((50, 219),), learning_rate_factor=0.5, clip_factor=0.8, reset_loss_scale=True,
    reason="attempt 1 of 3",
)  # fmt: skip
WARNING: Any = {"rule": "r", "what": "the largest logit", "meaning": "trouble", "remedy": "x=1", "page": "docs/x.md"}
TOLD: list[tuple[Event, str]] = [
    (Start(**AT, ranks=1, layout=ParallelConfig()), "training started on 1 rank (TP 1, PP 1, ZeRO 1)"),
    (
        Resume(
            **AT, ranks=8, layout=LAYOUT, changed={"optimizer.learning_rate": (1e-3, 5e-4), "data.train": ("a", None)}
        ),
        "training resumed on 8 ranks (TP 2, PP 4, SP, ZeRO 1); "
        "changed: optimizer.learning_rate 0.001 → 0.0005, data.train a → null",
    ),
    (
        Blend(
            **AT, sample=40, shares={"a": 0.25, "b": 0.7495, "c": 5e-4}, added=("b", "c"), removed=("d",), read={"c": 3}
        ),
        "another blend from sample 40 on: 75 % b (new), 25 % a, 0.05 % c (from its sample 3 on); no more of d",
    ),
    (Converted(**AT, source="runs/a", tensor=2, pipeline=1, data=4), "converted from runs/a to TP 2, PP 1, DP 4"),
    (Imported(**AT, source="a", architecture="LlamaForCausalLM"), "imported LlamaForCausalLM from a"),
    (Spike(**AT, **RISE), "spike of the loss: 9.312, 340.3 MADs of 0.02 above its level of 2.5, began at step 119"),
    (
        Rise(**AT, **{**RISE, "series": "grad_norm"}),
        "the gradient norm has risen and stays up: 9.312, 340.3 MADs of 0.02 (log) above its level of 2.5, "
        "began at step 119",
    ),
    (
        Divergence(**AT, **{**RISE, "value": nan, "score": inf}),
        "the loss diverges: not finite, up from a level of 2.5, began at step 119",
    ),
    (
        SpikeEnd(**AT, series="loss", onset=119, duration=1),
        "the loss is back at its level after 1 step, up since step 119",
    ),
    (
        SecondOpinion(**AT, onset=119, verdict="state", batches=4, rise=0.62, gap=0.04, error=0.031),
        "second opinion: the state is to blame. The loss has risen by 0.62 nats since step 119; asked about 4 batches "
        "from before and 4 since, the model finds the recent ones harder by 0.04 ± 0.031",
    ),
    (
        SecondOpinion(
            **AT, onset=119, verdict="data", batches=4, rise=0.62, gap=0.1, error=0.03, healthy_gap=0.6, checkpoint=100
        ),
        "second opinion: the data are to blame. The loss has risen by 0.62 nats since step 119; asked about 4 batches "
        "from before and 4 since, the model finds the recent ones harder by 0.1 ± 0.03, the checkpoint of step 100 by "
        "0.6",
    ),
    (
        Shift(**AT, onset=119, rise=0.62, sources=("code", "wiki")),
        "the data changed: the loss is up by 0.62 nats since step 119; recent data come from code, wiki",
    ),
    (
        Drop(**AT, rule="non-finite gradient", loss=2.5, grad_norm=inf, consecutive=2, total=7, by="guard"),
        "guard dropped the update: non-finite gradient (loss 2.5, gradient norm not finite), 2 in a row, 7 recently",
    ),
    (
        Rollback.of(INTERVENTION, 130).model_copy(update=AT),
        "guard rolled back to step 50 (divergence, began at step 119): skips data steps 51-219; learning rate × 0.5; "
        "gradient clipping × 0.8; loss scale reset. attempt 1 of 3. id abc",
    ),
    (
        GaveUp.of(INTERVENTION, 130).model_copy(update=AT),
        "guard gave up and rolled back to step 50 (divergence, began at step 119). attempt 1 of 3",
    ),
    (GaveUp(**AT, by="guard", rule="divergence"), "guard gave up (divergence)"),
    (
        Surgery.of(
            INTERVENTION.model_copy(update={"changes": {"model.qk_norm": (False, True)}}), 130, "kept"
        ).model_copy(update={**AT, "before": 2.5, "after": 2.75, "verdict": "continuous"}),
        "guard operated on the checkpoint of step 50 (divergence, began at step 119): model.qk_norm false → true; "
        "loss 2.5 → 2.75, continuous. attempt 1 of 3",
    ),
    (
        Surgery(**AT, by="user", rule="named by the user", source="a", rollback_to=7, changes={"model.layers": (2, 4)}),
        "user operated on the checkpoint of step 7 (named by the user): model.layers 2 → 4",
    ),
    (Undo(**AT, by="user", id="abc"), "user took back rollback abc"),
    (
        LossScaleFloor(**AT, scale=1.0, module=None, norms={"embedding": 1.5, "head": inf}),
        "the loss scale is at its floor, 1; first module with values that are not finite: none in a replay; "
        "gradient norms: embedding 1.5, head not finite",
    ),
    (
        FlightRecorded(**AT, file="flight/step_00000007.jsonl", first=2, last=6),
        "measurements of steps 2 to 6 are in flight/step_00000007.jsonl",
    ),
    (
        EarlyWarning(
            **AT,
            **WARNING,
            kind="ahead",
            tag="attention/max_logit/layer_07",
            layers=(7, 5),
            value=412.34,
            threshold=1e3,
            at=1140,
            interval=(990, 1600),
            track_record=(38, 41),
        ),
        "early warning: the largest logit of layer 7 is 412.3, and at this rate reaches 1,000 at about step 1,140 "
        "(990–1,600); likewise layer 5. It means: trouble. x=1 treats it (docs/x.md); in 38 of 41 runs of our "
        "back-test in which it was said, the loss rose",
    ),
    (
        EarlyWarning(
            **AT,
            **WARNING,
            kind="past",
            tag="grad_rms/fc1/layer_00",
            layers=(0,),
            value=5e-8,
            threshold=1e-7,
            falls=True,
        ),
        "early warning: the largest logit of FC1 in layer 0 is 5e-08, below 1e-07. It means: trouble. x=1 treats it "
        "(docs/x.md)",
    ),
    (
        EarlyWarning(**AT, **WARNING, kind="past", tag="logits/max", layers=(), value=12480.3, threshold=1e4),
        "early warning: the largest logit is 12,480, above 10,000. It means: trouble. x=1 treats it (docs/x.md)",
    ),
    (
        EarlyWarning(
            **AT, **WARNING, kind="growth", tag="logits/logsumexp", layers=(), value=inf, threshold=4.0, since=65
        ),
        "early warning: the largest logit is not finite, more than 4 times what it was at step 65, and grows on. It "
        "means: trouble. x=1 treats it (docs/x.md)",
    ),
    (
        EarlyWarning(**AT, **WARNING, kind="jump", tag="update_rms/head", layers=(2, 0, 1), value=0.1, threshold=4.0),
        "early warning: the largest logit of the head is 0.1, for its learning rate more than 4 times its usual level; "
        "likewise layers 2, 0, 1. It means: trouble. x=1 treats it (docs/x.md)",
    ),
    (SaveFailed(**AT, reason="no room", consecutive=2), "no room; 2 in a row"),
    (
        Waiting(**AT, seconds=33.6, ranks=(5,), who="rank 5 on node2 (silent for 30 s)"),
        "has taken 34 s; waiting for rank 5 on node2 (silent for 30 s)",
    ),
    (
        Waiting(**AT, after=True, seconds=33.6, ranks=(), who=""),
        "what follows it has taken 34 s; no rank stands out",
    ),
    (WentOn(**AT, seconds=47.1), "went on after 47 s"),
    (Stop(**AT, exit_code=3, reason="diverged"), "stopped with exit code 3: diverged"),
    (Stop(**AT, exit_code=1, reason="lost", stacks={"rank 5": "  File"}), "stopped with exit code 1: lost"),
]


def through_json(event: Event) -> Event:
    return parse(json.loads(json.dumps(event.line(), allow_nan=False)))


@pytest.mark.parametrize(("event", "words"), TOLD)
def test_each_event_is_a_sentence_with_its_numbers(event: Event, words: str) -> None:
    assert event.sentence() == f"step 130 (data step 140): {words}"


def test_no_event_is_without_its_sentence() -> None:
    assert {type(event) for event, _ in TOLD} == set(KINDS)


@pytest.mark.parametrize("event", [event for event, _ in TOLD])
def test_events_come_back_as_they_were(event: Event) -> None:
    assert through_json(event) == event


def test_a_number_that_is_not_finite_is_null_and_what_there_is_nothing_to_say_about_is_left_out() -> None:
    opinion = SecondOpinion(step=1, onset=1, verdict="undecided", batches=4, rise=nan, gap=-inf, error=0.5)
    assert opinion.line() == {
        "event": "second_opinion", "step": 1, "onset": 1, "verdict": "undecided", "batches": 4,
        "rise": None, "gap": None, "error": 0.5,
    }  # fmt: skip


def test_the_sentence_of_a_step_without_a_data_step() -> None:
    assert Undo(step=3, by="user", id="a").sentence() == "step 3: user took back rollback a"


@pytest.mark.parametrize("wrong", [{"series": "z_loss"}, {"onset": -1}, {"step": None}, {"peak": 3}, {"level": "high"}])
def test_an_event_of_other_facts_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Spike(**{**AT, **RISE, **wrong})
    assert isinstance(parse({"event": "spike", **AT, **RISE, **wrong}), Unknown)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            {"event": "surgery", "step": 5, "what": {"cap": 1}, "note": "ok"},
            'step 5: surgery (what {"cap": 1}; note ok)',
        ),
        ({"event": "undo", "step": "x", "data_step": nan}, "step x, data step not finite: undo"),
        ({"event": "drop", "loss": 10**400}, f"drop (loss 1{'0' * 400})"),
        ({"sentence": 1, "self": 2, "model_config": 3}, "an event without a name (sentence 1; self 2; model_config 3)"),
        ({}, "an event without a name"),
    ],
)
def test_what_is_not_known_is_told_as_it_is(line: dict[str, Any], told: str) -> None:
    event = parse(line)
    assert isinstance(event, Unknown) and event.sentence() == told
    assert event.line() == line


def test_a_sentence_steers_no_terminal() -> None:
    hostile = "\x1b[31m \u202e end\n# head"
    assert Stop(step=1, exit_code=3, reason=hostile).sentence().endswith(r"code 3: \x1b[31m \u202e end # head")
    assert parse({"event": hostile}).sentence() == r"\x1b[31m \u202e end # head"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
NAMES = sorted({name for kind in KINDS for name in kind.model_fields})
LINES = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), JSON, max_size=8)
EVENTS = sorted(kind.model_fields["event"].default for kind in KINDS)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(EVENTS) | JSON, LINES)
def test_no_line_is_an_error(kind: Any, line: dict[str, Any]) -> None:
    told = parse({**line, "event": kind}).sentence()
    assert told.isprintable()
