"""`megatron-stable convert`: a checkpoint for another layout, or of and for Hugging Face's tools."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import Progress

from megatron_stable.checkpoint.catalog import Whole, newest_whole
from megatron_stable.config.load import parse_config
from megatron_stable.config.schema import Config
from megatron_stable.convert.huggingface.card import model_card
from megatron_stable.convert.huggingface.export import export
from megatron_stable.convert.huggingface.families import Family
from megatron_stable.convert.huggingface.importing import take
from megatron_stable.convert.huggingface.tokenizer import write_tokenizer
from megatron_stable.convert.reshard import reshard
from megatron_stable.errors import ConfigError
from megatron_stable.files import explain_os_errors, replace_file
from megatron_stable.records.directory import RunDirectory
from megatron_stable.stability.events import Converted

Dtype = Literal["fp32", "bf16", "fp16"]


def convert(
    source: Annotated[Path, typer.Argument(metavar="RUN|DIR", help="The run's directory; with --from, the model's.")],
    output: Annotated[Path, typer.Option(help="The new directory.")],
    to: Annotated[Literal["hf"] | None, typer.Option(help="hf: write a directory of Hugging Face's.")] = None,
    from_: Annotated[Literal["hf"] | None, typer.Option("--from", help="hf: read one, and write a run.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="--to hf: of the weights; default: the run's.")] = None,
    class_: Annotated[
        str | None, typer.Option("--class", help="--to hf: the model_type; default: the first that computes the model.")
    ] = None,
    tokenizer: Annotated[
        bool, typer.Option(help="--to hf: write the tokenizer that the run's configuration names, if it names one.")
    ] = True,
    tensor: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    pipeline: Annotated[int, typer.Option(min=1, help="Pipeline stages.")] = 1,
    data: Annotated[int, typer.Option(min=1, help="Data-parallel replicas that share each parameter's state.")] = 1,
    step: Annotated[int | None, typer.Option(help="The checkpoint; default: the newest complete one.")] = None,
) -> None:
    """Rewrite a checkpoint: for Hugging Face's tools, from them, or for another layout.

    With --to hf the weights become safetensors of the class of `transformers` that computes the model, or where it has
    none, of the one that `import megatron_stable.hf` brings. With --from hf a model becomes a run at step 0, which
    `pretrain`, `evaluate` and `generate` take. Else it is the same run, optimizer state included, for another layout;
    `pretrain` reads any layout, so this is only needed where each rank should find just its own part.

    It runs without a GPU and holds one tensor in memory at a time.

    Example:
      megatron-stable convert runs/first --to hf --output models/first --dtype bf16
      megatron-stable convert models/llama --from hf --output runs/llama
      megatron-stable convert runs/first --output runs/first-tp4 --tensor 4 --data 2
    """
    layout = {"tensor": tensor, "pipeline": pipeline, "data": data}
    _refuse_contradictions(to, from_, dtype, class_, tokenizer, step, layout)
    with explain_os_errors("write", output):
        if to:
            _export(newest_whole(source, step), source, output, dtype, class_, tokenizer)
        elif from_:
            _take(source, output)
        else:
            _reshard(newest_whole(source, step), output, layout)


def _refuse_contradictions(
    to: str | None,
    from_: str | None,
    dtype: str | None,
    class_: str | None,
    tokenizer: bool,
    step: int | None,
    layout: dict[str, int],
) -> None:
    if to and from_:
        raise ConfigError("--to and --from: name one of them")
    if (to or from_) and set(layout.values()) != {1}:
        raise ConfigError("--tensor, --pipeline and --data are for another layout, not for --to and --from")
    if not to and (dtype or class_ or not tokenizer):
        raise ConfigError("--dtype, --class and --no-tokenizer are for --to hf")
    if from_ and step is not None:
        raise ConfigError("--step is of a run; a directory of Hugging Face's has none")


def _export(whole: Whole, run: Path, output: Path, dtype: str | None, class_: str | None, with_tokenizer: bool) -> None:
    def beside(directory: Path, config: Config, family: Family) -> dict[str, Any]:
        named = config.data.tokenizer if with_tokenizer else None
        length = config.model.sequence_length
        keys = write_tokenizer(Path(named), directory, length) if named else {}
        card = model_card(whole, config, family, RunDirectory(run).ledger.read(), output.name, named is not None)
        replace_file(directory / "README.md", card.encode())
        return keys

    with Progress(transient=True) as progress:
        task = progress.add_task(f"step {whole.step} to {output}", total=None)
        done = export(
            whole, output, dtype, class_, beside, lambda now, all_: progress.update(task, completed=now, total=all_)
        )
    size = f"{done.bytes / 1e9:.2f} GB" if done.bytes > 1e8 else f"{done.bytes / 1e6:.2f} MB"
    print(f"{output}: step {done.step} as {done.architecture}, {done.parameters:,} parameters, {done.dtype}, {size}")


def _take(source: Path, output: Path) -> None:
    with Progress(transient=True) as progress:
        task = progress.add_task(f"{source} to {output}", total=None)
        done = take(source, output, lambda now, all_: progress.update(task, completed=now, total=all_))
    print(f"{output}: {done.architecture}, {done.parameters:,} parameters, at step 0; train it on with")
    words = "" if done.tokenizer else " data.tokenizer=TOKENIZER"
    print(f"  megatron-stable pretrain --config {output / 'config.yaml'} data.train=PREFIX{words}")


def _reshard(entry: Whole, output: Path, ranks: dict[str, int]) -> None:
    layout = entry.manifest.layout.model_copy(update=ranks)
    with Progress(transient=True) as progress:
        task = progress.add_task(f"step {entry.step} to {layout.ranks} ranks", total=None)
        final = reshard(
            entry.directory,
            entry.manifest,
            output / "checkpoints",
            layout,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    config = parse_config(entry.manifest.config)
    parallel = config.parallel.model_copy(update={"tensor": layout.tensor, "pipeline": layout.pipeline})
    if layout.pipeline > 1:
        parallel = parallel.model_copy(update={"zero_stage": 1})
    new = config.model_copy(
        update={"parallel": parallel, "run": config.run.model_copy(update={"directory": str(output)})}
    )
    directory = RunDirectory(output)
    directory.claim(new)
    try:
        directory.commit(new)
        directory.ledger.write(Converted(step=entry.step, source=str(entry.directory), **ranks))
    finally:
        directory.release()
    print(f"{final}: step {entry.step} for TP {layout.tensor} x PP {layout.pipeline} x DP {layout.data}; resume with")
    print(f"  megatron-stable pretrain --config {directory.config} --ranks {layout.ranks}")
