"""The doctor's round: one check after another, on all ranks, in bounded time; rank 0 reports."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_stable.config.checks import conflicts
from megatron_stable.config.schema import Config, RunConfig
from megatron_stable.data import Tokenizer
from megatron_stable.doctor.bounded import Late, within
from megatron_stable.doctor.clocks import check_clocks
from megatron_stable.doctor.crew import Crew, muster
from megatron_stable.doctor.devices import check_cores, check_gpus, check_speed
from megatron_stable.doctor.finding import Finding, Verdict, as_json, exit_code, summary
from megatron_stable.doctor.limits import check_limits
from megatron_stable.doctor.links import check_links
from megatron_stable.doctor.network import check_network
from megatron_stable.doctor.optional import check_optional
from megatron_stable.doctor.report import line, print_report
from megatron_stable.doctor.storage import check_storage
from megatron_stable.doctor.versions import check_versions
from megatron_stable.errors import MegatronStableError
from megatron_stable.parallel.lifeline import SLOW, Lifeline
from megatron_stable.parallel.world import join_world
from megatron_stable.training.pretrain import with_vocabulary

PATIENCE = 60.0  # seconds that a rank may be silent
ALONE = 60.0  # seconds for what a rank looks at by itself


class Section(NamedTuple):
    """A few checks that are made together.

    Attributes:
        check: Collective, unless ``by`` says who makes it.
        seconds: After which a rank that has not come through is given up, and with it the round.
        by: Who makes it, alone: the first rank of each machine, or every rank; ``None``: all together.
    """

    name: str
    check: Callable[[Crew], list[Finding]]
    seconds: float = 2 * ALONE
    by: str | None = None


def _check_numerics(crew: Crew) -> list[Finding]:
    from megatron_stable.doctor.numerics import check_numerics  # DeepSpeed, which speaks unless the world is joined

    return check_numerics(crew)


SECTIONS = (
    Section("versions", lambda crew: check_versions() + check_optional(crew.config, crew.on_gpu), by="machine"),
    Section("devices", lambda crew: check_gpus(crew) + check_cores(crew), by="machine"),
    Section("matrix products", check_speed, by="rank"),
    Section("limits", check_limits, by="machine"),
    Section("network", check_network, by="machine"),
    Section("links between ranks", check_links, seconds=300.0),
    Section("clocks", check_clocks),
    Section("storage", check_storage, seconds=600.0),
    Section("numerics", _check_numerics, seconds=900.0),
)


def examine(config: Config | None, directory: Path | None, wants_json: bool) -> int:
    """Make the round on this rank of whatever launcher started it, alone without one; returns the exit code of all.

    Args:
        config: Of the run to come.
        directory: Whose file system is asked about; ``None``: the run's, or where this process is.

    Raises:
        MegatronStableError: With a message for the user; ``agreed`` if it is the same on all ranks. After any other
            error, here or on another rank, the processes of the other ranks end themselves.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if directory is None:
        directory = Path(config.run.directory) if config is not None else Path()
    run = config.run if config is not None else RunConfig()
    terms: dict[str, Any] = {"--directory": str(directory)}
    if config is not None:
        terms |= config.by_key()
    join_world(PATIENCE + 2 * SLOW, run.join_timeout, terms)
    lifeline = Lifeline(PATIENCE)
    try:
        code = _round(config, directory, wants_json, lifeline)
    except BaseException:
        lifeline.crash()
        raise
    lifeline.leave()
    dist.destroy_process_group()
    return code


def _round(config: Config | None, directory: Path, wants_json: bool, lifeline: Lifeline) -> int:
    config, findings = resolved(config)
    crew = muster(config, directory)
    found = _gathered(crew, [*findings, *_conflicts(crew)] if crew.leads else [])
    try:
        for number, section in enumerate(SECTIONS, start=1):
            lifeline.progress(section.seconds)
            if crew.rank == 0:
                print(f"[{number}/{len(SECTIONS)}] {section.name}", file=sys.stderr, flush=True)
            more = _gathered(crew, _made(section, crew))
            found += more
            if crew.rank == 0:
                _tell(more, crew)
    except BaseException:
        if crew.rank == 0 and not wants_json:
            print_report(summary(found, crew.hosts), crew.hosts)  # so far
        raise
    word = [0]
    if crew.rank == 0:
        rows = summary(found, crew.hosts)
        word = [exit_code(rows)]
        if wants_json:
            print(json.dumps(as_json(rows, crew.hosts), indent=1))
        else:
            print_report(rows, crew.hosts)
        sys.stdout.flush()
    dist.broadcast_object_list(word, src=0)  # nobody leaves, and has a launcher end the others, before that is printed
    return word[0]


def _tell(found: list[tuple[int, Finding]], crew: Crew) -> None:
    """What is wrong, at once: the round may yet come to a bad end."""
    for row in summary(found, crew.hosts):
        if row.verdict is not Verdict.OK:
            print(f"  {row.verdict.word}: {row.check}: {line(row)}", file=sys.stderr, flush=True)


def _made(section: Section, crew: Crew) -> list[Finding]:
    """What a section finds on this rank."""
    if section.by is None:
        return section.check(crew)
    if section.by == "machine" and not crew.leads:
        return []
    try:
        return within(ALONE, lambda: section.check(crew))
    except Late as late:
        return [Finding(section.name, str(late), Verdict.FAILURE, "what it looks at hangs on this machine")]
    except Exception as error:
        text = f"the check itself failed: {type(error).__name__}: {error}".replace("{", "{{").replace("}", "}}")
        return [Finding(section.name, text, Verdict.FAILURE, "please report this")]


def _gathered(crew: Crew, mine: list[Finding]) -> list[tuple[int, Finding]]:
    """All findings with their ranks, on rank 0. Collective."""
    parts: list[Any] = [None] * crew.size
    dist.gather_object(mine, parts if crew.rank == 0 else None)
    return [(rank, finding) for rank, part in enumerate(parts) for finding in part or ()]


def resolved(config: Config | None) -> tuple[Config | None, list[Finding]]:
    """The configuration with its vocabulary, if that can be had, and what stands against it."""
    if config is None:
        return None, []
    try:
        tokenizer = Tokenizer(config.data.tokenizer) if config.data.tokenizer is not None else None
        return with_vocabulary(config, tokenizer.vocab_size if tokenizer else None), []
    except MegatronStableError as error:
        text = str(error).replace("{", "{{").replace("}", "}}")
        return config, [Finding("configuration", text, Verdict.FAILURE, "see the configuration: data.tokenizer")]


def _conflicts(crew: Crew) -> list[Finding]:
    """What of the configuration contradicts itself, or the number of ranks if it is that of the run."""
    if crew.config is None:
        return []
    alone = crew.size == 1  # numerics says what cannot be looked at then
    problems = conflicts(crew.config, None if alone else crew.size)
    texts = [problem.message.replace("{", "{{").replace("}", "}}") for problem in problems]
    return [Finding("configuration", text, Verdict.FAILURE) for text in texts] or [
        Finding("configuration", "no contradiction" + ("" if alone else f", and it fits {crew.size} ranks"))
    ]
