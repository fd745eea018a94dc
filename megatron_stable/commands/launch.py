"""`megatron-stable launch`: look at the machines of a hostfile, and start the ranks of a run on all of them."""

import os
import secrets
import shutil
import socket
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from megatron_stable.config.checks import check
from megatron_stable.config.load import load_config
from megatron_stable.config.schema import Config
from megatron_stable.errors import ConfigError, NotReady
from megatron_stable.launching.asking import Answer, ask
from megatron_stable.launching.checks import master_address, problems
from megatron_stable.launching.command import LAUNCHERS, NEEDS, Start, as_text, for_file, travelling
from megatron_stable.launching.hosts import read_hostfile, span
from megatron_stable.launching.running import run
from megatron_stable.launching.survey import Question, Survey
from megatron_stable.parallel.launcher import PORT


class Launcher(str, Enum):
    """By which machines are reached."""

    pdsh = "pdsh"
    openmpi = "openmpi"
    slurm = "slurm"


def launch(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Fields to override, by dotted key.")
    ] = None,
    config: Annotated[Path, typer.Option(help="The run's YAML, where all machines see it.")] = Path("config.yaml"),
    hostfile: Annotated[Path, typer.Option(help="A line 'HOST slots=RANKS' for each machine.")] = Path("hosts"),
    launcher: Annotated[
        Launcher, typer.Option(help="pdsh (DeepSpeed's), openmpi (mpirun), or slurm (srun).")
    ] = Launcher.pdsh,
    port: Annotated[int, typer.Option(min=1, max=65535, help="On which the ranks meet, on the first machine.")] = PORT,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the command, and start nothing.")] = False,
    checks: Annotated[bool, typer.Option("--checks/--no-checks", help="Look at the machines first.")] = True,
) -> None:
    """Start a run on the machines of a hostfile, after a look at each of them.

    Looks, over ssh: are all reached, with the same versions, source and configuration, on one file system; is the port
    free and let through; do the clocks agree; is there space for the checkpoints; does a run live there already?

    Ctrl-C, SIGTERM or a closed terminal has the run finish its step, save and end with exit code 0, however long that
    takes; once more ends it at once. The same command goes on where it stopped.

    Example:
      megatron-stable launch --config 10b.yaml --hostfile hosts --dry-run
      megatron-stable launch --config 10b.yaml --hostfile hosts run.steps=5000
    """
    given = overrides or []
    loaded = load_config(config, given)
    slots = read_hostfile(hostfile)
    check(loaded, sum(slots.values()))
    if shutil.which(NEEDS[launcher.value]) is None:
        raise ConfigError(f"{NEEDS[launcher.value]}, which --launcher {launcher.value} needs, is not installed here")
    directory = Path(loaded.run.directory).absolute()
    address, cores, on_gpus = next(iter(slots)), os.cpu_count() or 1, False
    if checks:
        surveys = _look(loaded, config.absolute(), directory, slots, port)
        address = master_address(surveys)
        cores, on_gpus = min(each.cores for each in surveys), any(each.gpus for each in surveys)
    start = Start(slots, hostfile.absolute(), address, port, ["--config", str(config.absolute()), *given], on_gpus)
    environment = travelling(max(1, cores // max(slots.values())), named=not dry_run)
    if launcher is Launcher.slurm:
        environment |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    command = LAUNCHERS[launcher.value](start, environment)
    file = for_file(environment) if launcher is Launcher.pdsh else ""
    if dry_run:
        print(as_text(command, environment if launcher is Launcher.slurm else {}, file))
        return
    raise typer.Exit(run(command, environment, file, directory, loaded.run.on_hangup))


def _look(config: Config, path: Path, directory: Path, slots: dict[str, int], port: int) -> list[Survey]:
    """The machines. NotReady: no run would come of it."""
    first, *others = slots
    waits = set(slots)

    def told(answer: Answer) -> None:
        waits.discard(answer.host)
        if sys.stderr.isatty() and waits:
            print(
                f"\r\033[2Klooking at {len(slots)} machines; waiting for {span(sorted(waits))}", end="", file=sys.stderr
            )

    there = next(folder for folder in (directory, *directory.parents) if folder.is_dir())
    token = there / f".megatron-stable-{secrets.token_hex(8)}"
    try:
        token.write_text(f"{socket.gethostname()}\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run.directory {directory} cannot be written to: {error}") from None
    try:
        answers = ask([first], Question(["127.0.0.1"], port, str(token), str(path)), told)
        # what is an alias of ssh's, or a name that not all machines know, is reached by address
        names = [first, *(answers[0].survey.addresses if answers[0].survey else [])]
        answers += ask(others, Question(names, port, str(token), str(path)), told)
    finally:
        token.unlink(missing_ok=True)
        if sys.stderr.isatty():
            print("\r\033[2K", end="", file=sys.stderr)
    found = problems(answers, slots, port, str(directory), _space(config, directory))
    for problem in found:
        print(problem, file=sys.stderr)
    if any(problem.fatal for problem in found):
        raise NotReady("nothing was started; --no-checks would start it all the same")
    names = [f"{host} ({ranks} ranks)" for host, ranks in slots.items()]
    print(f"{span(names)}: alike, reached, on one file system", file=sys.stderr, flush=True)
    return [answer.survey for answer in answers if answer.survey is not None]


def _space(config: Config, directory: Path) -> float:
    """Bytes that checkpoints will take beside those that are there."""
    from megatron_stable.analysis.durability import at_a_time, checkpoint_bytes
    from megatron_stable.data import Tokenizer
    from megatron_stable.training.pretrain import with_vocabulary

    tokenizer = Tokenizer(config.data.tokenizer) if config.data.tokenizer is not None else None
    size = checkpoint_bytes(with_vocabulary(config, tokenizer.vocab_size if tokenizer else None))
    there = len([*(directory / "checkpoints").glob("step_*")])
    return size * max(1, at_a_time(config) - there)
