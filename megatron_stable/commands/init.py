"""`megatron-stable init`: write a commented configuration to start from."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from megatron_stable.config.recipes import RECIPES
from megatron_stable.config.sizes import SIZES
from megatron_stable.errors import ConfigError


def init(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values to start with, by dotted key.")
    ] = None,
    size: Annotated[str, typer.Option(help=f"A named shape: {', '.join(SIZES)}.")] = "tiny",
    recipe: Annotated[str, typer.Option(help=f"A named set of stability knobs: {', '.join(RECIPES)}.")] = "baseline",
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("config.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
) -> None:
    """Write a commented configuration to start from.

    Its data section names the files that the tokenizer and preprocess verbs are then told to write.

    \b
    Example:
      megatron-stable init --size 85m --recipe qk_norm_cap --output config.yaml
      megatron-stable init --size 1b parallel.tensor=2 precision.dtype=bf16
    """
    from megatron_stable.config.load import load_config
    from megatron_stable.config.reference import commented_yaml

    data = ["data.tokenizer=data/tokenizer.model", "data.train=data/train"]
    config = load_config(None, [*data, f"model.size={size}", f"model.recipe={recipe}", *(overrides or [])])
    _write(output, commented_yaml(config), force)

    print(f"Wrote {output}: size {config.model.size}, recipe {config.model.recipe}. Next, with your text in TEXT:\n")
    tokenizer = shlex.quote(str(config.data.tokenizer))
    if config.data.tokenizer is not None:
        vocabulary = config.model.vocab_size or 32000
        print(f"  megatron-stable tokenizer --input TEXT --vocab-size {vocabulary} --output {tokenizer}")
    for prefix in [config.data.train] if isinstance(config.data.train, str) else config.data.train or []:
        print(f"  megatron-stable preprocess --input TEXT --tokenizer {tokenizer} --output {shlex.quote(prefix)}")
    print(f"  megatron-stable pretrain --config {shlex.quote(str(output))}")


def _write(path: Path, text: str, force: bool) -> None:
    """Write the file whole or not at all."""
    if not force and path.exists():
        raise ConfigError(f"{path}: is already there; choose another --output, or --force to replace it")
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written: {(error.strerror or str(error)).lower()}") from error
