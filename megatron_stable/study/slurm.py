"""The runs of a sweep as jobs of a Slurm cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_stable.config.notation import parse
from megatron_stable.errors import ConfigError
from megatron_stable.study.grid import read_grid
from megatron_stable.study.pool import places
from megatron_stable.study.sweep import Part, Sweep

LOGS = "jobs"  # in the directory of the sweep: what submitit and the jobs write


def submit(sweep: Sweep, jobs: int, options: Sequence[str], cluster: str = "slurm") -> list[str]:
    """Submit an array of jobs that share the runs of a sweep; where and what each is.

    Args:
        options: ``key=value``, as submitit's executors take them.
        cluster: Another of submitit's, such as ``local``.

    Raises:
        ConfigError: submitit is not installed, or does not take the options, or there is no Slurm.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise ConfigError("--slurm needs submitit: pip install 'megatron-stable[slurm]'") from None
    values: dict[str, Any] = {"name": sweep.directory.name or "sweep", "timeout_min": 24 * 60}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(f"--option {option}: write KEY=VALUE")
        values[key] = parse(value)
    logs = sweep.directory / LOGS
    jobs = min(jobs, max(1, len(sweep.open())))
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
        executor.update_parameters(**values)
        parts = [Part(number, jobs) for number in range(1, jobs + 1)]
        submitted = executor.map_array(train_part, [str(sweep.grid.path.resolve())] * jobs, parts)
    except (RuntimeError, TypeError, NameError, submitit.core.utils.FailedJobError) as error:
        raise ConfigError(f"--slurm: {error}") from error
    return [
        f"job {job.job_id}: part {part.number}/{part.of}, {job.paths.stdout}"
        for job, part in zip(submitted, parts, strict=True)
    ]


def train_part(file: str, part: Part) -> None:
    """What a job does."""
    sweep = Sweep(read_grid(Path(file)), part)
    jobs, devices = places(sweep.grid.ranks, None)
    for _ in sweep.train(jobs, devices):
        pass
