"""Errors a user can mend, each with the exit code the command line promises."""

from __future__ import annotations

import socket
import sys


class MegatronStableError(Exception):
    """Base of all errors whose message is for the user: printed without a traceback."""

    exit_code = 1
    agreed = False  # set where every rank of a run raises the same, so that they can leave in order


class ConfigError(MegatronStableError):
    """Bad usage or configuration."""

    exit_code = 2


class JoinError(ConfigError):
    """The ranks did not come together; without a process group, each machine's first rank says so."""


class InUseError(ConfigError):
    """Another process has the run's directory."""


class NotReady(MegatronStableError):
    """Machines, not the configuration, are in the way of a start; it may come right by itself."""


class DivergenceError(MegatronStableError):
    """Training diverged and could not be recovered."""

    exit_code = 3


class LossScaleError(MegatronStableError):
    """The fp16 loss scale reached its floor."""

    exit_code = 4


class DataError(MegatronStableError):
    """Data or checkpoint unusable."""

    exit_code = 5


def not_installed(error: ModuleNotFoundError) -> str:
    """What to do about a module that is missing, most often as another Python was started than was meant."""
    return (
        f"{socket.gethostname()}: {error}: is {sys.executable} the Python that megatron-stable is installed in? name "
        "that one by its absolute path"
    )
