"""The verbs: their list, the loading of the one that is called, and how their help is laid out."""

import importlib
import inspect
from enum import Enum
from pathlib import Path
from typing import Any, get_args

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

# In the order in which a newcomer meets them. Each is the function of its name in the module of its name, and this is
# the first paragraph of its docstring: listing the verbs imports none of them.
VERBS = {
    "demo": "Train the same small model twice, at a learning rate far too high: as it is, and with qk_norm_cap.",
    "init": "Write a commented configuration to start from.",
    "tokenizer": "Train a SentencePiece tokenizer that can represent any text.",
    "preprocess": "Tokenize text into Megatron's .bin/.idx format.",
    "data": "Say what is in a dataset: documents, tokens, lengths, duplicates, and with its tokenizer what the text is "
    "like.",
    "plan": "Say what a run will need: memory of each GPU, time, money, checkpoints, and what limits it.",
    "doctor": "Examine machines, links, disks and numerics before a run.",
    "pretrain": "Train a model, or resume training where it stopped.",
    "launch": "Start a run on the machines of a hostfile, after a look at each of them.",
    "status": "Say whether a run is being trained and where, its step, its rate, the time left, and its last events.",
    "stop": "Stop a run: it finishes the step in progress, saves and ends with exit code 0 on all ranks.",
    "evaluate": "Measure loss, perplexity and bits per byte on one or several datasets.",
    "generate": "Sample text from a trained run.",
    "report": "Make one HTML page of a run: loss with events, what was measured in each layer, speed, ledger, "
    "configuration.",
    "sweep": "Train a grid of small runs: learning rates, sizes, recipes, seeds; and make one table of them.",
    "forecast": "Foretell from a sweep over sizes whether a larger model will be stable, and which learning rate to "
    "use.",
    "recommend": "Recommend a configuration for a model size and a number of tokens, with the evidence for each value.",
    "screen": "Say which source of the training data raises the risk of loss spikes.",
    "spikes": "Find the spikes of a run: where each began, its peak, how long it lasted, and whether the gradient norm "
    "led it.",
    "checkpoints": "List a run's checkpoints: step, size, layout, and whether each is complete.",
    "inspect": "Name the documents in a step's batch, and tell whether data or state caused a spike.",
    "skip": "Roll back to a checkpoint before a loss spike and skip the data that caused it.",
    "surgery": "Operate on a checkpoint: add or remove norms, caps and LayerScale, untie, grow vocabulary, length or "
    "depth.",
    "convert": "Rewrite a checkpoint: for Hugging Face's tools, from them, or for another layout.",
}

PLACEHOLDERS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


class PlainHelp:
    """Help with a placeholder for each option's value, in place of typer's Python types and ranges."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, as click asks for them."""
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            parameter.min = parameter.max = None  # only shown: values are checked elsewhere
            shown = parameter.metavar or _placeholder(parameter) if isinstance(parameter, TyperOption) else None
            parameter.display_type_rich = lambda ctx, shown=shown: shown
        return parameters


class Verb(PlainHelp, TyperCommand):
    """A verb."""


class Verbs(PlainHelp, TyperGroup):
    """The group of all verbs. It knows their names and first lines, and loads the one that is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for verb, line in VERBS.items():
            self.add_command(TyperCommand(verb, help=line))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The verb that these arguments name, loaded."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, name and load(name), rest


def load(verb: str) -> Any:
    """Import a verb and make a command of it."""
    function = getattr(importlib.import_module(f"megatron_stable.commands.{verb}"), verb)
    program = typer.Typer(add_completion=False)
    program.command(verb, cls=Verb, help=unbroken(inspect.getdoc(function) or ""))(function)
    return typer.main.get_command(program)


def unbroken(text: str) -> str:
    """A docstring with each paragraph on one line, so that the terminal breaks it; one with indented lines stays."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(part if "\n " in part else part.replace("\n", " ") for part in paragraphs)


def _placeholder(option: Any) -> str | None:
    """What stands for an option's value in the help; nothing for a flag."""
    kind = option.type_descriptor.annotation
    kind = next(iter(get_args(kind)), kind)  # of a list, one of its values
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(choice.value) for choice in kind)
    return PLACEHOLDERS.get(kind)
