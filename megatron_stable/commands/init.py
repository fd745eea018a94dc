"""`megatron-stable init`: write a commented configuration to start from."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from megatron_stable.config.load import load_config
from megatron_stable.config.recipes import RECIPES
from megatron_stable.config.reference import commented_yaml
from megatron_stable.config.schema import Config
from megatron_stable.config.sizes import SIZES
from megatron_stable.data.sources import is_prefix
from megatron_stable.errors import ConfigError
from megatron_stable.files import write_file

PREPROCESS = "megatron-stable preprocess --input"
# files for the verbs tokenizer and preprocess to write
DATA = ("data.tokenizer=data/tokenizer.model", "data.train=data/train", "data.validation=data/train_validation")


def init(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values to set, by dotted key.")
    ] = None,
    size: Annotated[str, typer.Option(help=f"A named shape: {', '.join(SIZES)}.")] = "tiny",
    recipe: Annotated[str, typer.Option(help=f"A named set of stability knobs: {', '.join(RECIPES)}.")] = "baseline",
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("config.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented configuration to start from.

    Its data section names files for the tokenizer and preprocess verbs to write; the commands are printed.

    Example:
      megatron-stable init --size 85m --recipe qk_norm_cap --output config.yaml
      megatron-stable init --size 1b parallel.tensor=2 precision.dtype=bf16
    """
    config = load_config(None, [*DATA, f"model.size={size}", f"model.recipe={recipe}", *(overrides or [])])
    refuse_existing(output, force)
    write_file(output, commented_yaml(config).encode())

    print(f"Wrote {output}: size {config.model.size}, recipe {config.model.recipe}. Next, with your text in TEXT:\n")
    print_next(config, output)


def refuse_existing(output: Path, force: bool) -> None:
    """ConfigError: there is such a file, and it is not to be replaced."""
    if output.exists() and not force:
        raise ConfigError(f"{output} already exists: choose another --output, or --force to overwrite it")


def print_next(config: Config, output: Path) -> None:
    """The commands from text to a trained model."""
    tokenizer, validation = config.data.tokenizer, config.data.validation
    if tokenizer is not None:
        vocabulary = config.model.vocab_size or 32000
        print(f"  megatron-stable tokenizer --input TEXT --vocab-size {vocabulary} --output {quote(tokenizer)}")
        named = _named(config)
        prefixes = [name for name in named if is_prefix(name)]
        for prefix in prefixes:
            split = " --validation-fraction 0.01" if validation == f"{prefix}_validation" else ""
            print(f"  {PREPROCESS} TEXT --tokenizer {quote(tokenizer)} --output {quote(prefix)}{split}")
        for name in named:
            if name not in prefixes:
                print(f"  {PREPROCESS} TEXT --tokenizer {quote(tokenizer)} --output PREFIX  # each that {name} names")
        made = [f"{prefix}_validation" for prefix in prefixes]
        if isinstance(validation, str) and is_prefix(validation) and validation not in made:
            print(f"  {PREPROCESS} HELD_OUT_TEXT --tokenizer {quote(tokenizer)} --output {quote(validation)}")
    print(f"  megatron-stable pretrain --config {quote(str(output))}")


def _named(config: Config) -> list[str]:
    """What the configuration names as training data, each but once."""
    train = config.data.train
    if train is None:
        return [*dict.fromkeys(name for _, blend in config.data.stages for name in blend)]
    return [train] if isinstance(train, str) else [*dict.fromkeys(train)]
