"""Which methods train at which learning rate: Rybakov et al., arXiv 2410.16682, on a small proxy.

    python examples/studies/rybakov.py                  # trains 444 runs, then writes
    python examples/studies/rybakov.py --from-tables    # writes figures and page from the tables in docs/studies

What it writes: docs/studies/rybakov.md, and docs/studies/rybakov with tables and figures. A sweep that was stopped goes
on where it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import log
from operator import truediv
from pathlib import Path
from statistics import fmean, median

from claims import Claim, Spread, by, claims_table, in_words, largest, last_stable, paired, spread, tally
from common import (
    DOCS,
    batch_of,
    groups_table,
    keep,
    lines,
    options,
    prepare_code,
    prepare_prose,
    save,
    series,
    suffix,
    table,
    train,
    write,
)

from megatron_stable.study.criteria import OTHERS, RISE, best_of, diverged
from megatron_stable.study.figures import figures
from megatron_stable.study.outputs import outputs
from megatron_stable.study.reading import Sweep, open_sweep
from megatron_stable.study.sensitivity import Group, robustness, score, verdicts_of

LINEARS, LAYERS = ("qkv", "proj", "fc1", "fc2"), 3
TAGS = {f"output_norm/{linear}/layer_{layer:02}" for linear in LINEARS for layer in range(LAYERS)}
COLUMNS = ("attention/max_logit", "attention/entropy", *(f"output_norm/{linear}" for linear in LINEARS))
PAPER = {  # largest stable learning rate, as others report it of the paper
    "baseline": "6e-3", "soft_temp": "8e-3", "soft_clip": "8e-3", "sigma_reparam": "20e-3", "layer_scale": "20e-3",
    "soft_cap": "40e-3", "qk_norm": "40e-3", "qk_fc_norm": "40e-3", "qkv_norm": "60e-3", "qk_norm_cap": "60e-3",
}  # fmt: skip
ORDER = (  # from the lowest
    ("baseline",), ("soft_temp", "soft_clip"), ("sigma_reparam", "layer_scale"), ("soft_cap", "qk_norm", "qk_fc_norm"),
    ("qkv_norm", "qk_norm_cap"),
)  # fmt: skip
PERPLEXITY = {"baseline": 11.19, "soft_cap": 11.24, "qkv_norm": 10.85, "qk_norm_cap": 11.00, "qk_norm": 10.84}
SURE = 0.1 / 11  # nats: the paper's 95 % interval of a perplexity
GROWN = 2.0  # times the norm of a run that trains


def claims(sweep: Sweep, prose: Sweep) -> Iterator[Claim]:
    """The paper's, each with what we found."""
    recipes, step = by(sweep.groups, "model.recipe"), 1.05 * sweep.rates[1] / sweep.rates[0]
    for name, number, paper in (
        ("qkv_norm", 1, 1.5), ("qk_norm_cap", 1, 1.5), ("baseline", 3, 6 / 40), ("qk_fc_norm", 6, 1.0)
    ):  # fmt: skip
        found = paired(largest(recipes[name], sweep.rates), largest(recipes["qk_norm"], sweep.rates), truediv)
        said = f"the largest stable learning rate of {name} is {paper:.2g} × that of qk_norm"
        least = "≥ " * (max(last_stable(recipes[name]).values()) == len(sweep.rates) - 1)  # the grid ends there
        yield Claim(f"#{number}", said, f"{least}{in_words(found)} ×", _compared(found, paper, step))
    other = by(prose.groups, "model.recipe")
    found = paired(largest(other["qkv_norm"], prose.rates), largest(other["qk_norm"], prose.rates), truediv)
    said = "and so on another text, Moby-Dick: qkv_norm over qk_norm"
    yield Claim("#1", said, f"{in_words(found)} ×", _compared(found, 1.5, step))
    yield _order(recipes)
    for name in ("qk_norm", "qkv_norm", "qk_norm_cap", "soft_cap"):
        yield _low_rate(recipes, name, sweep.rates[0])
    yield _growth(recipes["baseline"], sweep.probes.parent)


def _compared(found: Spread, paper: float, step: float) -> str:
    """Whether ratios of learning rates agree, which come in steps of the grid; or at least their direction."""
    middle, low, high = found
    if low <= paper * step**0.5 and paper / step**0.5 <= high:
        return "agrees" if paper == 1.0 or not low <= 1.0 <= high else "agrees; so would 1"
    if paper == 1.0:
        return "a step of the grid away" if low / step <= 1.0 <= high * step else "disagrees"
    return "direction agrees, size does not" if (middle - 1) * (paper - 1) > 0 else "disagrees"


def _order(recipes: Mapping[str, Group]) -> Claim:
    """#2: the order of the largest stable rates."""
    ours = {name: fmean(last_stable(recipes[name]).values()) for names in ORDER for name in names}
    rank = {name: i for i, names in enumerate(ORDER) for name in names}
    pairs = [(one, other) for one in rank for other in rank if rank[one] < rank[other]]
    right = sum(ours[one] < ours[other] for one, other in pairs)
    equal = sum(ours[one] == ours[other] for one, other in pairs)
    measured = (
        f"of {len(pairs)} pairs that the paper tells apart, {right} come in its order, {equal} come out equal, "
        f"{len(pairs) - right - equal} the other way round"
    )
    part = right / len(pairs)
    verdict = "agrees" if part >= 0.9 else "agrees in part" if part > 0.5 else "disagrees"
    return Claim("#2", "order: " + " < ".join(" = ".join(names) for names in ORDER), measured, verdict)


def _low_rate(recipes: Mapping[str, Group], name: str, rate: float) -> Claim:
    """#4: the loss at a low learning rate against the baseline's, nats per token, over seeds."""
    base = recipes["baseline"].curves
    pairs = [(score(curve[0]), score(base[seed][0])) for seed, curve in recipes[name].curves.items()]
    middle, low, high = spread([one - other for one, other in pairs if one is not None and other is not None])
    paper = log(PERPLEXITY[name] / PERPLEXITY["baseline"])
    clear = abs(paper) > SURE
    if low <= 0 <= high:
        verdict = "open: the seeds differ by more" if clear else "agrees: no difference"
    else:
        verdict = "agrees" if clear and (low > 0) == (paper > 0) else "disagrees"
    said = f"at a low learning rate, {name} has a loss {paper:+.3f} nats from the baseline's"
    return Claim("#4", said, f"{middle:+.3f} [{low:+.3f}, {high:+.3f}] nats at {rate:g}", verdict)


def _growth(group: Group, tables: Path) -> Claim:
    """#5: outputs of runs at the first learning rate that diverges, over those at the last that trains, by seed."""
    lasts, norms = last_stable(group), {tag: series(tables, tag) for tag in TAGS}
    most: dict[str, list[float]] = {linear: [] for linear in LINEARS}
    firsts = []
    for seed, curve in group.curves.items():
        good, bad = (curve[place] if 0 <= place < len(curve) else None for place in (lasts[seed], lasts[seed] + 1))
        if good is None or bad is None:
            continue
        ratios: dict[tuple[str, int], dict[int, float]] = {}
        for linear in LINEARS:
            for layer in range(LAYERS):
                by_run = norms[f"output_norm/{linear}/layer_{layer:02}"]
                here, there = by_run.get(bad["name"], {}), by_run.get(good["name"], {})
                ratios[linear, layer] = {step: here[step] / there[step] for step in here.keys() & there.keys()}
            most[linear].append(max(max(ratios[linear, layer].values(), default=0.0) for layer in range(LAYERS)))
        past = [(step, place) for place, each in ratios.items() for step, value in each.items() if value > GROWN]
        firsts.append("{} of block {}".format(*min(past)[1]) if past else "none")
    middles = {linear: median(values) for linear, values in most.items() if values}
    grown = {linear for linear, value in middles.items() if value > GROWN}
    least = min((middles[linear] for linear in ("qkv", "proj", "fc2") if linear in middles), default=0.0)
    agrees = {"qkv", "proj", "fc2"} <= grown and middles["fc1"] < least
    said = "in diverging runs the outputs of QKV, Proj and FC2 grow beyond twice those of runs that train, FC1's less"
    measured = ", ".join(f"{linear} {value:.2g} ×" for linear, value in middles.items())
    return Claim(
        "#5",
        said,
        f"{measured} (the first learning rate that diverges over the last that trains; largest over blocks and steps, "
        f"median over seeds). First past twice: {', '.join(firsts)}",
        "agrees" if agrees else f"agrees in part: {', '.join(sorted(grown)) or 'none'} grow so far",
    )


def recipes_table(sweep: Sweep) -> list[str]:
    """A line for each recipe."""
    heads = ("recipe", "largest stable learning rate, paper")
    return groups_table(sweep.groups, sweep.rates, heads, lambda group: (f"`{recipe(group)}`", PAPER[recipe(group)]))


def recipe(group: Group) -> str:
    """Of a group's runs."""
    return str(group.values["model.recipe"])


def verdicts_table(sweep: Sweep) -> list[str]:
    """Of each recipe and rate, how many seeds diverged."""
    body = []
    for name, group in by(sweep.groups, "model.recipe").items():
        cells = zip(*verdicts_of(group), strict=True)
        body.append((f"`{name}`", *(f"{sum(map(bool, cell))}/{len(cell)}" for cell in cells)))
    return table(("diverged, of seeds", *(f"{rate:g}" for rate in sweep.rates)), body)


def criteria_table(sweep: Sweep) -> list[str]:
    """What hangs on the criterion of divergence."""
    found = [robustness(sweep.groups, criterion) for criterion in OTHERS]
    body = [
        (each.criterion.name, f"{each.apart - each.reversed - each.alike}", f"{each.reversed}", f"{each.alike}")
        for each in found
    ]
    return table((f"criterion: of {found[0].apart} pairs", "same order", "other order", "not told apart"), body)


def how(sweep: Sweep) -> str:
    """How the runs diverged, in words."""
    runs = [row for group in sweep.groups for row in group.rows if diverged(row, best_of(group.rows))]
    lost = sum((row["rise"] or 0) >= RISE for row in runs)
    return (
        f"Of {len(runs)} runs that diverged, {lost} had lost a tenth of what they had learnt; the others lack a third "
        "of what the best one learns."
    )


def page(sweep: Sweep, prose: Sweep) -> str:
    """docs/studies/rybakov.md."""
    found = [*claims(sweep, prose)]
    baseline = by(sweep.groups, "model.recipe")["baseline"]
    drawn = [*figures(sweep), *outputs([baseline], sweep.probes)]
    first, seeds = sweep.rows[0], len({row["run.seed"] for row in sweep.rows})
    return f"""# Methods against divergence: arXiv 2410.16682 on a small model

<!-- Generated by `python examples/studies/rybakov.py`; edit that. -->

The paper (830M parameters, 24 blocks of width 1024, one seed, divergence judged by eye) compares ten methods over
learning rates from 6e-3 to 80e-3. Here: {len(sweep.rows)} runs of {first["parameters"]:,} parameters in {LAYERS} blocks
of width {first["model.hidden"]}, {first["run.steps"]} steps of {batch_of(first)}, a warm-up of a tenth and a
constant learning rate after it, {seeds} seeds; the text is the source of Python's standard library, with a vocabulary
of 512. [sensitivity.md](../sensitivity.md) defines every number. In brackets: from the least to the greatest seed.

```console
python examples/studies/rybakov.py                  # train, then write this page
python examples/studies/rybakov.py --from-tables    # write it from the committed tables
megatron-stable report docs/studies/rybakov/table.csv --output report.html
```

## Claims

Numbers with # count the published results that [the studies](README.md) check. Learning rates of the grid are 1.5 ×
apart, so ratios of them come in such steps; they are taken seed by seed. ≥: the grid ends first. {tally(found)}.

{lines(claims_table(found))}
## Recipes

{lines(recipes_table(sweep))}
{lines(verdicts_table(sweep))}
## What hangs on the criterion

A run *diverged* if it lost a tenth of what it had learnt, or lacks a third of what the best learning rate learns. By
other criteria, pairs of recipes that this one tells apart by their largest stable learning rate come out so.
{how(sweep)}

{lines(criteria_table(sweep))}
## On another text

Three of the recipes on Moby-Dick instead of code, with a tokenizer of its own:

{lines(recipes_table(prose))}
## Figures

{lines(save(drawn, sweep.probes.parent)).rstrip()}
"""


def main() -> None:
    args = options(__doc__)
    output = DOCS / f"rybakov{suffix(args.scale)}"
    prose_output = output / "prose"
    if not args.from_tables:
        prepare_code()
        keep([train("rybakov", args)], output, COLUMNS, TAGS, lambda row: row["model.recipe"] == "baseline")
        prepare_prose()
        keep([train("rybakov_prose", args)], prose_output, ("attention/max_logit",))
    write(output, page(*(open_sweep(each / "table.csv") for each in (output, prose_output))))


if __name__ == "__main__":
    main()
