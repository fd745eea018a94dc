"""Writing files so that a reader finds them complete or not at all: beside, fsync, rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_stable.errors import ConfigError, DataError


@contextmanager
def explain_os_errors(action: str, path: str | Path) -> Iterator[None]:
    """Turn an OSError inside the block into a DataError: "cannot <action> <path>: <reason>"."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot {action} {path}: {error.strerror or error}") from error


def partial(path: Path) -> Path:
    """Where `path` is written until it is complete; a fixed name, so that a killed run's leftover is overwritten."""
    return path.with_name(path.name + ".partial")


def publish(path: Path) -> None:
    """Rename the complete, fsynced `partial(path)` to `path`, durably."""
    partial(path).replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames within a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_partial(path: Path, data: bytes) -> None:
    """Write and fsync `data` as `partial(path)`."""
    with partial(path).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all. Raises OSError where that fails."""
    try:
        write_partial(path, data)
        publish(path)
    except BaseException:
        partial(path).unlink(missing_ok=True)
        raise


def write_file(path: Path, data: bytes) -> None:
    """:func:`replace_file`, creating the directory. Raises DataError where that fails."""
    with explain_os_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)


@contextmanager
def appearing(output: Path) -> Iterator[Path]:
    """A directory beside ``output``, which becomes it if all goes well. ConfigError: there is something there."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is there and not empty; choose another --output, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.parent / f".{output.name}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        sync_directory(beside)
        beside.rename(output)  # over an empty directory, too
        sync_directory(output.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
