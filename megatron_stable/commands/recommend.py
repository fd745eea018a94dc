"""`megatron-stable recommend`: a configuration for a model size and a number of tokens, with its evidence."""

import json
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from megatron_stable.commands.init import DATA, print_next, refuse_existing
from megatron_stable.commands.plan import token_count
from megatron_stable.config.load import load_config
from megatron_stable.config.notation import inline
from megatron_stable.config.reference import commented_yaml
from megatron_stable.config.schema import Config, ModelConfig
from megatron_stable.config.sizes import SIZES
from megatron_stable.errors import ConfigError
from megatron_stable.files import write_file
from megatron_stable.study.evidence import SURE, Value
from megatron_stable.study.grid import read_grid
from megatron_stable.study.observations import Group, groups, read_measured
from megatron_stable.study.proxy import proxy_sweep
from megatron_stable.study.published import short
from megatron_stable.study.recommendation import Recommendation
from megatron_stable.study.recommendation import recommend as find
from megatron_stable.study.table import read_table

WIDEST = 120
VOCABULARY = 32000  # where the tokenizer is not read
NO_SWEEP = (
    "All of this is from papers, which had other data. A sweep of small models on your own says more, above all about "
    "the learning rate:"
)


def recommend(
    tokens: Annotated[str, typer.Option(metavar="N", help="Tokens to train on, as 300B or 200e9.")],
    size: Annotated[str | None, typer.Option(help=f"A named shape: {', '.join(SIZES)}.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML of your own, for its model and all it sets.")] = None,
    batch_tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens of a step, as 2M. Default: by the size.")
    ] = None,
    sweep: Annotated[
        Path | None, typer.Option(help="A sweep of yours, its directory or its table: it goes over papers.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the configuration, with its evidence as comments.")] = None,
    proxy: Annotated[Path | None, typer.Option(help="Write a sweep of small models for it, too.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Recommend a configuration for a model size and a number of tokens, with the evidence for each value.

    Recipe, learning rate, warm-up, batch, ε, z-loss, clipping, guard: each with numbers, where they are from, how sure
    that is, and what would change it. With a sweep of your own, recipe, learning rate and ε are from it.
    docs/recommend.md says how values come about.

    Example:
      megatron-stable recommend --size 830m --tokens 200B
      megatron-stable recommend --size 7b --tokens 2T --output config.yaml --proxy proxies.yaml
      megatron-stable recommend --config mine.yaml --tokens 300B --sweep sweeps/proxies --output config.yaml
    """
    if (size is None) == (config is None):
        raise ConfigError(f"name one model: --size, one of {', '.join(SIZES)}, or --config FILE")
    if proxy is not None and output is None:
        raise ConfigError("--proxy writes a sweep of what --output holds: give --output FILE, too")
    for path in filter(None, (output, proxy)):
        refuse_existing(path, force)
    from megatron_stable.model.transformer import parameter_count  # imports torch

    given = () if size is None else (*DATA, f"model.size={size}")
    model = load_config(config, given).model
    _, parameters = parameter_count(model, model.vocab_size or 2)
    wanted = token_count(tokens, "--tokens")
    a_step = None if batch_tokens is None else token_count(batch_tokens, "--batch-tokens")
    made = find(config, given, parameters, wanted, a_step, _groups(sweep) if sweep else [])
    if output is not None:
        _write(made, output, proxy)
    if as_json:
        print(json.dumps(_facts(made), indent=1, ensure_ascii=False))
        return
    _print(made, size or str(config))
    again = shlex.join(["megatron-stable", "recommend", *(["--size", size] if size else ["--config", str(config)])])
    again += f" --tokens {tokens}" + (f" --batch-tokens {batch_tokens}" if batch_tokens else "")
    if proxy is not None:
        _print_proxies(made.config, proxy, again)
    elif sweep is None:
        print(f"\n{_wrapped(NO_SWEEP)}\n  {again} --output config.yaml --proxy proxies.yaml")
    if output is not None:
        vocabulary = "" if made.config.model.vocab_size else f" --vocab-size {VOCABULARY}"
        print(f"\nWrote {output}. Next, with your text in TEXT:\n")
        print(f"  megatron-stable plan --config {shlex.quote(str(output))}{vocabulary}")
        print_next(made.config, output)


def _write(made: Recommendation, output: Path, proxy: Path | None) -> None:
    small = None if proxy is None else proxy_sweep(made.config, output, proxy)
    notes = {
        value.key: f"Recommended ({value.sure}): {value.evidence}. To change it: {value.changes}."
        for value in made.values
    }
    write_file(output, commented_yaml(made.config, notes).encode())
    if proxy is not None and small is not None:
        write_file(proxy, small.encode())


def _print_proxies(config: Config, proxy: Path, again: str) -> None:
    from megatron_stable.training.flops import flops_per_token  # imports torch

    grid = read_grid(proxy)
    each = [_flops(cell.config, flops_per_token) for cell in grid.cells]
    share = sum(each) / _flops(config, flops_per_token)
    amount = f"{100 * share:.2g} % of" if share < 1 else f"{share:.1f} times"
    print(f"\nWrote {proxy}: {len(each)} small runs, with {amount} the arithmetic of this one. Then:")
    for command in (f"sweep {proxy}", f"forecast {grid.directory} --leave-out-largest"):
        print(f"  megatron-stable {command}")
    print(f"  {again} --sweep {grid.directory}")


def _flops(config: Config, per_token: Callable[[ModelConfig], float]) -> float:
    model = config.model.model_copy(update={"vocab_size": config.model.vocab_size or VOCABULARY})
    return per_token(model) * config.tokens_per_step * config.run.steps


def _groups(sweep: Path) -> list[Group]:
    found = groups(read_table(sweep), read_measured(sweep))
    if not found:
        raise ConfigError(f"no run of {sweep} has ended: leave out --sweep, or wait for runs that finished or diverged")
    return found


def _print(made: Recommendation, name: str) -> None:
    console = Console(highlight=False, soft_wrap=True)
    at = made.at
    console.print(
        f"{name}: {short(at.parameters)} parameters outside embedding and head, {short(at.tokens)} tokens in "
        f"{made.config.run.steps:,} steps of {made.config.tokens_per_step:,}\n"
    )
    table = Table("field", "value", "how sure", box=None, pad_edge=False)
    for value in made.values:
        table.add_row(value.key, _shown(value), value.sure)
    console.print(table)
    console.print("\nHow sure:")
    for word in dict.fromkeys(value.sure for value in made.values):
        console.print(f"  {word}: {SURE[word]}")
    for value in made.values:
        console.print(f"\n{value.key}: {_shown(value)}")
        for label, text in (("evidence", value.evidence), ("to change it", value.changes)):
            console.print(_wrapped(f"{label}: {text}", "  "))
    for number, note in enumerate(made.notes):
        console.print(("\n" if not number else "") + _wrapped(f"Note: {note}"))


def _shown(value: Value) -> str:
    return inline(value.value)


def _wrapped(text: str, indent: str = "") -> str:
    width = min(Console().width, WIDEST)
    return "\n".join(
        textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)
    )


def _facts(made: Recommendation) -> dict[str, Any]:
    return {
        "parameters": made.at.parameters,
        "tokens": made.at.tokens,
        "values": [value._asdict() for value in made.values],
        "notes": made.notes,
        "config": made.config.model_dump(mode="json"),
    }
