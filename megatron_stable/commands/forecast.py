"""`megatron-stable forecast`: what the small models of a sweep say of a large one."""

import json
import math
import re
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from megatron_stable.analysis.drawing import png
from megatron_stable.config.load import load_config
from megatron_stable.errors import ConfigError
from megatron_stable.files import explain_os_errors, write_file
from megatron_stable.study.backtest import BackTest, back_test, score
from megatron_stable.study.forecast import Cell, Forecast, largest_stable, one_sided, percent, shown
from megatron_stable.study.forecast import forecast as foretell
from megatron_stable.study.forecast_figures import figures
from megatron_stable.study.observations import QUANTITIES, Group, Run, groups, nearest, read_measured
from megatron_stable.study.scaling import Prediction
from megatron_stable.study.table import read_table

console = Console(highlight=False, soft_wrap=True)


class Layers(str, Enum):
    """Of which layers the attention logit is."""

    first = "first"
    largest = "largest"


def forecast(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep's directory, or its table.")],
    parameters: Annotated[
        float | None, typer.Option(metavar="N", help="Of the target, without embedding and head, as 1.2e9.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The target's YAML: parameters, learning rate, ε and recipe follow.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: each of the sweep's grid.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only runs with this, as recipe=qk_norm.")
    ] = None,
    at: Annotated[
        int | None, typer.Option(min=1, metavar="STEP", help="Read logits here. Default: the end of warm-up.")
    ] = None,
    layers: Annotated[Layers, typer.Option(help="Attention logits of the first layer, or the largest.")] = Layers.first,
    leave_out_largest: Annotated[
        bool, typer.Option("--leave-out-largest", help="Foretell the largest size from the others, and compare.")
    ] = False,
    pictures: Annotated[Path | None, typer.Option("--figures", metavar="DIR", help="Draw laws and intervals.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Foretell from a sweep over sizes whether a larger model will be stable, and which learning rate to use.

    For each learning rate: the largest attention logit, the gradient RMS, the loss, and a verdict: stable, at risk or
    unstable, with its evidence and what to change; or unknown, where the sweep does not carry so far. Then the learning
    rates of the lowest loss and of stability. Intervals hold nine in ten. docs/forecast.md explains every number.

    Example:
      megatron-stable forecast sweeps/first --parameters 1.2e9
      megatron-stable forecast sweeps/first --config big.yaml --figures pictures
      megatron-stable forecast sweeps/first --leave-out-largest
    """
    if sum((parameters is not None, config is not None, leave_out_largest)) != 1:
        raise ConfigError("name one target: --parameters N, --config FILE or --leave-out-largest")
    if leave_out_largest and learning_rate is not None:
        raise ConfigError("--leave-out-largest goes through the whole grid: leave out --learning-rate")
    for name, value in (("--parameters", parameters), ("--learning-rate", learning_rate)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} {value:g} is not a positive number")
    found = _groups(sweep, where or [], at, layers)
    if leave_out_largest:
        tests = [back_test(group) for group in found]
        drawn = [(test.forecast, test.came) for test in tests]
    else:
        forecasts = _foretold(found, parameters, config, learning_rate)
        drawn = [(each, []) for each in forecasts]
    if pictures is not None:
        _draw(drawn, pictures)
    if as_json:
        whole = _tests_facts(tests) if leave_out_largest else {"forecasts": list(map(_facts, forecasts))}
        print(json.dumps({"sweep": str(sweep), **whole}, indent=1, allow_nan=False))
    elif leave_out_largest:
        _print_tests(tests)
    else:
        for each in forecasts:
            _print(each)


def _groups(sweep: Path, where: list[str], at: int | None, layers: Layers) -> list[Group]:
    rows = read_table(sweep)
    for text in where:
        key, _, value = text.partition("=")
        columns = [column for column in (rows[0] if rows else {}) if column == key or column.endswith(f".{key}")]
        if not columns:
            raise ConfigError(f"--where {text}: the sweep has no column {key}; `head -1` of its table.csv names them")
        held = sorted({_text(row.get(columns[0])) for row in rows})
        if value not in held:
            raise ConfigError(f"--where {text}: no run has it; {columns[0]} is {', '.join(held[:12])}")
        rows = [row for row in rows if _text(row.get(columns[0])) == value]
    found = groups(rows, read_measured(sweep), at, layers.value)
    if not found:
        raise ConfigError(f"no run of {sweep} has ended: a forecast needs runs that finished or diverged")
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _foretold(
    found: list[Group], parameters: float | None, config: Path | None, learning_rate: float | None
) -> list[Forecast]:
    rates = None if learning_rate is None else [learning_rate]
    if config is None:
        assert parameters is not None
        return [foretell(group, parameters, rates) for group in found]
    from megatron_stable.model.transformer import parameter_count  # imports torch

    target = load_config(config)
    group, differ = nearest(found, target.by_key())
    _, inner = parameter_count(target.model, target.model.vocab_size or 2)
    rate = target.optimizer.learning_rate if learning_rate is None else learning_rate
    if rate <= 0:
        raise ConfigError(f"{config}: optimizer.learning_rate is {rate:g}; give a target a positive one")
    made = foretell(group, inner, [rate], target.optimizer.eps)
    if differ:
        made.notes.append(f"the target differs from the runs that it is foretold from: {', '.join(differ)}")
    return [made]


def _draw(forecasts: list[tuple[Forecast, list[Run]]], directory: Path) -> None:
    with explain_os_errors("create", directory):
        directory.mkdir(parents=True, exist_ok=True)
    for each, came in forecasts:
        stem = re.sub(r"[^\w.=-]+", "_", each.group.name)
        for name, figure in figures(each, came).items():
            write_file(directory / f"{stem}_{name}.png", png(figure))


def _print(made: Forecast) -> None:
    console.print(f"{made.group.name}: {made.size:.4g} parameters, from {_sizes(made.group)}")
    table = Table("learning rate", "largest logit", "gradient RMS / ε", "loss", "diverges", "verdict")
    for cell in made.cells:
        gradient = _over(cell.values.get("grad_rms"), made.eps)
        values = [_cell(cell.values.get("max_logit")), _cell(gradient), _cell(cell.values.get("loss"))]
        table.add_row(f"{cell.rate:.4g}", *values, "" if cell.risk is None else percent(cell.risk), cell.verdict)
    console.print(table)
    for cell in made.cells:
        console.print(f"{cell.rate:.4g} {cell.verdict}: {'; '.join(cell.evidence)}")
    measured = (f"{rate or 0:.3g} at {size:.3g}" for size, rate in largest_stable(made.group).items())
    console.print(f"\nLargest stable learning rate of each size, as measured: {', '.join(measured)}")
    optimal = f"not foretold, {made.optimal_refused}" if made.optimal is None else shown(made.optimal)
    console.print(f"Learning rate of the lowest loss: {optimal}")
    console.print(f"Largest safe learning rate: {_safe(made)}")
    for note in made.notes:
        console.print(f"Note: {note}")
    changes: dict[str, list[int]] = {}
    for number, cell in enumerate(made.cells):
        for advice in cell.advice:
            changes.setdefault(str(advice), []).append(number)
    if any(cell.verdict in ("at risk", "unstable") for cell in made.cells) and made.safe is not None:
        console.print(f"What to change: optimizer.learning_rate={made.safe:.2g} or less, or")
    elif changes:
        console.print("What to change:")
    for change, cells in changes.items():
        rates = [f"{made.cells[number].rate:.4g}" for number in cells]
        in_a_row = len(rates) > 2 and cells[-1] - cells[0] == len(cells) - 1
        console.print(f"  at {f'{rates[0]} to {rates[-1]}' if in_a_row else ', '.join(rates)}: {change}")
    scaled = _scaled(made)
    if scaled is not None:
        console.print("\nWhat grows how: the power of parameters, and the value foretold")
        console.print(scaled)
    console.print()


def _safe(made: Forecast) -> str:
    if made.frontier_refused:
        return f"not foretold, {made.frontier_refused}"
    if made.safe is None or made.frontier is None:
        return "none of the grid" if made.safe is None else f"{made.safe:.3g}; {one_sided(made.group)}"
    if made.safe < made.frontier.low:
        return f"{made.safe:.3g} at least: the largest of the grid, and runs diverge at {shown(made.frontier)}"
    return f"{made.safe:.3g}; runs diverge at {shown(made.frontier)}"


def _scaled(made: Forecast) -> Table | None:
    names = [name for name in QUANTITIES if any(name in cell.values for cell in made.cells)]
    if not names:
        return None
    table = Table("learning rate", *(QUANTITIES[name].what for name in names))
    for cell in made.cells:
        told = []
        for name in names:
            value, law = cell.values.get(name), made.laws[name].get(cell.rate)
            told.append(_cell(value) if value is None or law is None else f"N^{law.exponent:.2g}: {shown(value)}")
        table.add_row(f"{cell.rate:.4g}", *told)
    return table


def _print_tests(tests: list[BackTest]) -> None:
    for test in tests:
        made = test.forecast
        console.print(f"{test.group.name}: {made.size:.4g} parameters, foretold from {_sizes(made.group)}")
        table = Table("learning rate", "diverges", "verdict", "did", "", "largest logit, foretold", "measured", "held")
        for outcome in test.outcomes:
            cell = outcome.cell
            table.add_row(
                f"{cell.rate:.4g}",
                "" if cell.risk is None else percent(cell.risk),
                cell.verdict,
                f"{percent(outcome.diverged)} diverged" if 0 < outcome.diverged < 1 else _became(outcome.diverged),
                "right" if outcome.right else "wrong",
                _cell(cell.values.get("max_logit")),
                ", ".join(f"{logit:.3g}" for logit in outcome.logits),
                f"{sum(outcome.held)} of {len(outcome.held)}" if outcome.held else "",
            )
        console.print(table)
    total = score(tests)
    console.print(f"Stability: {_of(total.right, total.cells)} right, called by what is more likely")
    console.print(f"  of those with a firm verdict, stable or unstable: {_of(total.firm_right, total.firm)} right")
    console.print(f"Largest attention logit: {_of(total.held, total.logits)} within their interval of 90 %")


def _became(diverged: float) -> str:
    return "diverged" if diverged else "stable"


def _of(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.0f} %)" if whole else "none of none"


def _sizes(group: Group) -> str:
    return f"{len(group.sizes)} sizes, {group.sizes[0]:.3g} to {group.sizes[-1]:.3g}, {len(group.runs)} runs"


def _cell(value: Prediction | None) -> str:
    return "" if value is None else shown(value)


def _over(value: Prediction | None, eps: float) -> Prediction | None:
    return None if value is None else Prediction(*(each / eps for each in value))


def _tests_facts(tests: list[BackTest]) -> dict[str, Any]:
    facts = []
    for test in tests:
        cells = [
            {"did_diverge": each.diverged, "right": each.right, "max_logit": each.logits, "held": each.held}
            | {"forecast": _cell_facts(each.cell)}
            for each in test.outcomes
        ]
        facts.append({"group": test.group.where, "parameters": test.forecast.size, "cells": cells})
    return {"back_tests": facts, "score": score(tests)._asdict()}


def _facts(made: Forecast) -> dict[str, Any]:
    return {
        "group": made.group.where,
        "parameters": made.size,
        "eps": made.eps,
        "cells": list(map(_cell_facts, made.cells)),
        "largest_stable_measured": {f"{size:.0f}": rate for size, rate in largest_stable(made.group).items()},
        "diverges_at": made.frontier and made.frontier._asdict(),
        "diverges_at_refused": made.frontier_refused or (one_sided(made.group) if made.frontier is None else None),
        "largest_safe": made.safe,
        "critical_logit": made.critical and made.critical._asdict(),
        "lowest_loss": made.optimal and made.optimal._asdict(),
        "lowest_loss_refused": made.optimal_refused,
        "notes": made.notes,
    }


def _cell_facts(cell: Cell) -> dict[str, Any]:
    return {
        "learning_rate": cell.rate,
        "verdict": cell.verdict,
        "risk": cell.risk,
        "logit_risk": cell.logit_risk,
        "frontier_risk": cell.frontier_risk,
        "values": {name: value._asdict() for name, value in cell.values.items()},
        "refused": cell.refused,
        "evidence": cell.evidence,
        "advice": list(map(str, cell.advice)),
    }
