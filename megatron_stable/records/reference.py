"""The documentation of the ledger, made from the types of its events.

``python -m megatron_stable.records.reference FILE`` writes the page.
"""

from __future__ import annotations

import json
import sys
from inspect import getdoc
from pathlib import Path
from types import NoneType
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_stable.config.describe import describe
from megatron_stable.config.schema import ParallelConfig
from megatron_stable.persisted import LARGEST
from megatron_stable.stability import events as types
from megatron_stable.stability.events import Event

_INTRODUCTION = """\
# The ledger

<!-- Generated from megatron_stable/stability/events.py by `make docs`; edit the docstrings there. -->

`RUN/ledger.jsonl` records what happened to a run: when, why, and who decided. It is for programs; `RUN/logbook.md` says
the same to people. This page is a contract.

- **Format.** UTF-8, one JSON object per line, strict JSON: a number that was not finite is `null`.
- **Append-only.** Lines are in the order in which things happened, and none is ever changed. After a rollback or a
  resume, steps come again, and what was said of them before stays on record.
- **Fields.** A field that is marked *optional* is absent where there is nothing to say. Losses are in nats per token,
  norms are global and before clipping, steps count optimizer steps from 1.
- **Reading it.** Dispatch on `event`. Leave out a line that is no whole object: a crash may have cut it off. Pass over
  events and fields that you do not know. `RUN/interventions.json` holds the rollbacks in force; in the ledger, they
  are the `rollback` and `gave_up` events with an `id` that no `undo` names.
- **Versions.** `RUN/format.json` says which version a run's directory has. Within a version, events and fields may be
  added; none changes its name, type, unit or meaning.

In Python, the events are types:

```python
from megatron_stable.records.ledger import Ledger
from megatron_stable.stability.events import Rollback

for event in Ledger(run / "ledger.jsonl").read():
    print(event.time, event.sentence())
    if isinstance(event, Rollback):
        print("data skipped:", event.windows)
```

An event that this version does not know is read as `Unknown`, with all it holds.
"""
_LAYOUT = ParallelConfig(tensor=2, pipeline=2)
_OPINION = {"onset": 80, "batches": 4, "rise": 0.62, "error": 0.03}
_SPIKE = {"level": 3.481, "scale": 0.1529, "onset": 157}
EXAMPLES: tuple[Event, ...] = (
    types.Start(step=0, ranks=8, layout=_LAYOUT),
    types.Resume(step=60, ranks=8, layout=_LAYOUT, changed={"optimizer.learning_rate": (0.001, 0.0005)}),
    types.Blend(
        step=126, data_step=126, sample=1000, shares={"web": 0.5, "code": 0.3, "math": 0.2}, added=("math",),
        removed=("books",), read={"web": 700, "code": 200, "books": 100},
    ),
    types.Converted(step=200, source="runs/first/checkpoints/step_00000200", tensor=4, pipeline=1, data=2),
    types.Imported(step=0, source="models/llama", architecture="LlamaForCausalLM"),
    types.Spike(step=159, data_step=159, series="loss", value=5.358, score=12.27, **_SPIKE),
    types.Rise(step=173, data_step=173, series="loss", value=4.925, score=9.444, **_SPIKE),
    types.Divergence(step=190, data_step=190, series="loss", value=None, score=None, **_SPIKE),
    types.SpikeEnd(step=193, data_step=193, series="loss", onset=157, duration=34),
    types.SecondOpinion(step=96, data_step=96, verdict="state", gap=0.04, healthy_gap=0.02, checkpoint=60, **_OPINION),
    types.Shift(step=96, data_step=96, onset=80, rise=0.62, sources=("data/code",)),
    types.Drop(
        step=131, data_step=131, rule="non-finite gradient", loss=3.512, grad_norm=None, consecutive=2, total=7,
        by="guard",
    ),
    types.Rollback(
        step=96, data_step=96, id="5f0c81d2a9e4", by="guard", rule="divergence", onset=80, rollback_to=60,
        windows=((61, 129),), samples=((480, 1032),), learning_rate_factor=0.5,
        reason="attempt 1 of 3: the loss rose by 0.62 nats",
    ),
    types.GaveUp(
        step=140, data_step=209, id="77b1c3f09ad2", by="guard", rule="divergence", onset=121, rollback_to=60,
        reason="gave up: the loss rose by 0.71 nats",
    ),
    types.Surgery(
        step=140, id="c08652522960", by="guard", rule="divergence", onset=121, rollback_to=60,
        source="runs/first/before_surgery/step_00000060", before=4.737, after=4.741, verdict="continuous",
        changes={"model.qk_norm": (False, True), "schedule.rewarm": (None, [60, 100])},
        reason="3 attempts did not help: the loss rose by 0.71 nats",
    ),
    types.Undo(step=60, id="5f0c81d2a9e4", by="user"),
    types.LossScaleFloor(step=88, data_step=88, scale=1.0, module="blocks.3", norms={"embedding": 1.5, "head": None}),
    types.FlightRecorded(step=159, data_step=159, file="flight/step_00000159.jsonl", first=1, last=150),
    types.EarlyWarning(
        step=21400, data_step=21400, rule="attention_logits", kind="ahead", tag="attention/max_logit/layer_07",
        layers=(7, 5), what="the largest attention logit", value=412.3, threshold=1000.0, at=29500,
        interval=(27800, 33100), meaning="softmax nears an argmax, whose gradient vanishes",
        remedy="model.recipe=qk_norm_cap in a new run, optimizer.qk_clip=100 in this one",
        page="docs/methods/qk_norm_cap.md", track_record=(38, 41),
    ),
    types.SaveFailed(
        step=300, consecutive=2,
        reason="the checkpoint of step 300 could not be written: rank 5: [Errno 28] No space left on device",
    ),
    types.Waiting(step=321, seconds=34.2, ranks=(5,), who="rank 5 on node2 (in read, loader.py:31)"),
    types.WentOn(step=321, seconds=47.0),
    types.Stop(step=140, exit_code=3, reason="the loss rose by 0.71 nats since step 121"),
)  # fmt: skip


def reference_page() -> str:
    """The page, as Markdown: the format, then each event with its fields and an example."""
    shared = _fields(Event)
    parts = [_INTRODUCTION, "## What all events have\n", shared]
    for example in EXAMPLES:
        kind = type(example)
        line = example.model_copy(update={"time": "2026-11-21T03:57:00+00:00"}).line()
        parts += [f"## `{example.event}`\n", f"{getdoc(kind)}\n", _fields(kind, besides=Event)]
        parts += [f"```json\n{json.dumps(line)}\n```\n", f"> {example.sentence()}\n"]
    return "\n".join(parts)


def _fields(kind: type[BaseModel], besides: type[BaseModel] | None = None) -> str:
    known = () if besides is None else besides.model_fields
    rows = ["| field | type | meaning |", "|---|---|---|"]
    for name, info in kind.model_fields.items():
        if name not in known:
            meaning = " ".join((info.description or "").split())
            rows.append(f"| `{name}` | {_type(info)} | {meaning} |")
    return "\n".join(rows) + "\n"


def _type(info: FieldInfo) -> str:
    words = describe(info.annotation, info.metadata).replace(f" and < {LARGEST:g}", "")  # which only stops nonsense
    absent = not info.is_required() and NoneType in get_args(info.annotation)
    return words.removesuffix(" or null") + ", optional" if absent else words


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference_page(), encoding="utf-8")
