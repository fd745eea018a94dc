"""Instabilities of large models, reproduced and foretold on small ones: Wortsman et al., arXiv 2309.14322.

    python examples/studies/wortsman.py                  # trains 582 runs, then writes
    python examples/studies/wortsman.py --from-tables    # writes figures and page from the tables in docs/studies

What it writes: docs/studies/wortsman.md, and docs/studies/wortsman with tables and figures. A sweep that was stopped
goes on where it was. The largest size is trained after it has been foretold from the others.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from claims import by, claims_table, tally
from common import (
    DATA,
    DOCS,
    VOCABULARY,
    asked,
    batch_of,
    groups_table,
    keep,
    lines,
    options,
    prepare_code,
    rounded,
    save,
    scaled,
    suffix,
    table,
    train,
    write,
)
from wortsman_claims import CRITICAL, NO_NORM, Study, bigram_loss, claims

from megatron_stable.analysis.report.figures import Drawn
from megatron_stable.model.transformer import parameter_count
from megatron_stable.study.backtest import BackTest, back_test
from megatron_stable.study.figures import figures
from megatron_stable.study.forecast import percent, shown
from megatron_stable.study.forecast_figures import figures as forecast_figures
from megatron_stable.study.grid import read_grid
from megatron_stable.study.observations import groups, read_measured
from megatron_stable.study.reading import Sweep, open_sweep

SIZES, KNOBS, FORCED, DRIFT = "sizes", "knobs", "forced", "drift"  # below docs/studies/wortsman
PREDICTION, BIGRAM = "prediction.json", "bigram.json"
COLUMNS = ("attention/max_logit", "grad_rms/fc1", "logits/mean", "logits/logsumexp")
TAGS = ("attention/max_logit/layer_00", "grad_rms/fc1/layer_00", "logits/mean", "logits/logsumexp")
TOPICS = {  # variants that are compared with each other
    "warm-up": ("warm-up 2", "reference", "warm-up 67"),
    "weight decay": ("reference", "decay", "coupled decay"),
    "shape": ("reference", "4 x as deep", "twice as wide"),
    "parametrization": ("twice as wide", "mu_simple, twice as wide", "mu_full, half as wide", "mu_full, twice as wide"),
    "eps": ("reference", "eps 1e-4", "eps 1e-2"),
    "length and batch": ("reference", "twice as long", "batch 8", "batch 32"),
}


def train_all(output: Path, args: Namespace) -> None:
    """Train what has not been, and keep the tables; the largest size only when it has been foretold."""
    prepare_code()
    small, prediction = train("wortsman_small", args), output / PREDICTION
    keep([small], output / SIZES, COLUMNS, TAGS)
    if not prediction.is_file():
        largest = read_grid(scaled("wortsman_largest", args.scale)).cells[0].config.model
        size = parameter_count(largest, VOCABULARY)[1]
        sizes = os.path.relpath(output / SIZES / "table.csv")
        prediction.write_text(asked("forecast", sizes, "--parameters", size, "--json"))
    keep([small, train("wortsman_largest", args)], output / SIZES, COLUMNS, TAGS)
    (output / BIGRAM).write_text(json.dumps({"loss": rounded(bigram_loss(DATA))}) + "\n")
    for name, tags in ((FORCED, ()), (DRIFT, ("logits/mean",)), (KNOBS, ())):
        keep([train(f"wortsman_{name}", args)], output / name, COLUMNS, tags)


def study(output: Path) -> Study:
    """What the tables in docs/studies say."""
    sizes, knobs, forced, drift = (open_sweep(output / name / "table.csv") for name in (SIZES, KNOBS, FORCED, DRIFT))
    tests = [back_test(group) for group in groups(sizes.rows, read_measured(output / SIZES))]
    return Study(sizes, knobs, forced, drift, tests, json.loads((output / BIGRAM).read_text())["loss"])


def prediction_table(tests: Sequence[BackTest]) -> list[str]:
    """What was foretold of the largest size, and what came."""
    body = []
    for test in tests:
        for outcome in test.outcomes:
            cell, logit = outcome.cell, outcome.cell.values.get("max_logit")
            runs = [run for run in test.came if run.rate == cell.rate]
            body.append(
                (
                    test.group.where["method"],
                    f"{cell.rate:g}",
                    "–" if cell.risk is None else percent(cell.risk),
                    cell.verdict,
                    f"{sum(run.diverged for run in runs)} of {len(runs)}",
                    "right" if outcome.right else "wrong",
                    shown(logit) if logit else "–",
                    ", ".join(f"{each:.3g}" for each in outcome.logits) or "–",
                )
            )
    heads = (
        "method", "learning rate", "foretold to diverge", "verdict", "diverged, of seeds", "",
        "largest logit, foretold", "measured",
    )  # fmt: skip
    return table(heads, body)


def sizes_and_knobs(sweep: Sweep, *axes: str) -> list[str]:
    """A line for each group of a sweep, by its values on some axes."""
    return groups_table(
        sweep.groups,
        sweep.rates,
        (*axes, "parameters"),
        lambda group: (*(str(group.values[axis]) for axis in axes), f"{group.parameters:,}"),
    )


def knob_figures(knobs: Sweep) -> Iterator[Drawn]:
    """Loss against learning rate, a figure for each knob."""
    variants = by(knobs.groups, "variant")
    for topic, names in TOPICS.items():
        drawn = next(figures(replace(knobs, groups=[variants[name] for name in names])))
        yield drawn._replace(name=topic.replace(" ", "_"), title=f"{drawn.title}: {topic}")


def forecast_pictures(tests: Sequence[BackTest]) -> Iterator[Drawn]:
    """The prediction of the logits of models without QK-norm, as the paper has it."""
    for test in tests:
        if test.group.where["method"] == NO_NORM:
            yield Drawn(
                "prediction",
                "Largest attention logit without QK-norm, foretold from the smaller sizes",
                "A law for each learning rate, fitted to the three smaller sizes; hollow: the largest, as it came. The "
                "band across: the level beyond which runs diverge, as the smaller sizes have it. Crosses: diverged.",
                forecast_figures(test.forecast, test.came)["max_logit"],
            )


def pictures(study: Study) -> Iterator[Drawn]:
    """All figures of the page."""
    yield from figures(study.sizes)
    yield from forecast_pictures(study.tests)
    yield from knob_figures(study.knobs)


def page(study: Study, drawn: Iterable[str]) -> str:
    """docs/studies/wortsman.md."""
    found = [*claims(study)]
    sizes, first = study.sizes, study.sizes.rows[0]
    smallest, largest = (edge(row["parameters"] for row in sizes.rows) for edge in (min, max))
    runs = sum(len(sweep.rows) for sweep in (sizes, study.knobs, study.forced, study.drift))
    return f"""# Instabilities of large models on small ones: arXiv 2309.14322

<!-- Generated by `python examples/studies/wortsman.py`; edit that. -->

The paper (2.4M to 4.8B parameters, 100,000 steps of 131,000 tokens) finds that what makes large models unstable can be
seen in small ones at high learning rates, and foretold from them. Here: {runs} runs of {smallest / 1e3:.0f}k to
{largest / 1e3:.0f}k parameters, {first["run.steps"]} steps of {batch_of(first)}, three seeds; its defaults otherwise
(per-head QK-norm, z-loss 1e-4, independent weight decay 1e-4, cosine decay, initialisation), with a warm-up of a tenth
instead of a twentieth. The text is the source of Python's standard library, with a vocabulary of 512.
[sensitivity.md](../sensitivity.md) and [forecast.md](../forecast.md) define every number. In brackets of claims: from
the least to the greatest seed.

```console
python examples/studies/wortsman.py                  # train, then write this page
python examples/studies/wortsman.py --from-tables    # write it from the committed tables
megatron-stable report docs/studies/wortsman/sizes/table.csv --output report.html
megatron-stable forecast docs/studies/wortsman/sizes/table.csv --leave-out-largest
```

## Claims

Comparisons are made seed by seed. A claim that one thing is above another *agrees* where it holds for every seed, and
is *open* where seeds differ. Numbers with # count the published results that [the studies](README.md) check.
{tally(found)}.

{lines(claims_table(found))}
## What was foretold of the largest size

The verdicts were made from the three smaller sizes before the largest was trained
([prediction.json](wortsman/prediction.json)). *Right*: called more likely than not to diverge, and at least half of its
seeds did, or neither. Logits: of the first block, at the end of warm-up.

{lines(prediction_table(study.tests))}
## Sizes

{lines(sizes_and_knobs(sizes, "size", "method"))}
## Knobs

At the size `small`, with QK-norm and z-loss. `decay` and `coupled decay` are 500 times the paper's, as the run has
1/500 of its steps; the coupled one takes as much off the weights as the other at a learning rate of 0.01.

{lines(sizes_and_knobs(study.knobs, "variant"))}
## Figures

{lines(drawn).rstrip()}

## What could not be tested at this size

- Sizes beyond a million parameters, and trainings of more than a few hundred steps: what appears late, or only in large
  models, does not appear. Adam's ε of 1e-8 is far below every gradient here, so ε was raised to where the paper's
  models had it, beside the gradients.
- Runs that are near their end: after some 200,000 tokens the loss still falls steeply, so that whatever gives a model
  more or larger updates (steps, smaller batches, a better learning rate for its width) changes it, and LR sensitivity
  with it.
- Fast spikes (§4 of the paper), the Adafactor-style parametrization, pointwise attention.
- That the logit of {CRITICAL:g} is critical for all sizes: the level belongs to the step at which it is read.
"""


def main() -> None:
    args = options(__doc__)
    output = DOCS / f"wortsman{suffix(args.scale)}"
    if not args.from_tables:
        train_all(output, args)
    found = study(output)
    write(output, page(found, save(pictures(found), output)))


if __name__ == "__main__":
    main()
