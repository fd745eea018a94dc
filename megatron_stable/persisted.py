"""What is written to be read again: typed, versioned, and trusted only as far as its type.

Everything is JSON. A reader checks that a file is a plain one of sane size, parses it, and validates it against a
model; whatever is wrong becomes one :class:`DataError` that names the file and the first wrong field.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from megatron_stable.disk import ABSENT, parsed, read_bytes
from megatron_stable.errors import DataError

LARGEST = 2**48  # of a count: elements, steps
T = TypeVar("T")

Count = Annotated[int, Field(strict=True, ge=0, lt=LARGEST)]
Positive = Annotated[int, Field(strict=True, ge=1, lt=LARGEST)]


class Persisted(BaseModel):
    """Base of what is persisted: immutable, finite, and without fields that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FormatError(DataError):
    """Written in a format that this version does not know: not damaged, so nothing may be done about it here."""


class Stamp(BaseModel):
    """Who wrote something, and in which format: the part that every version of the program can read.

    Attributes:
        version: Of the format.
        written_by: Version of megatron-stable.
    """

    model_config = ConfigDict(frozen=True)

    version: Positive
    written_by: str


def package_version() -> str:
    """Of megatron-stable, as installed."""
    try:
        return version("megatron-stable")
    except PackageNotFoundError:
        return "unknown"


def refuse_unknown_format(what: str | Path, body: Any, known: int) -> None:
    """See that this version of the program can read something, before anything else in it is looked at.

    Args:
        what: For the message.
        body: Holds a :class:`Stamp`.
        known: The newest format that this version reads.

    Raises:
        FormatError: It was written in a newer one.
        DataError: It does not say in which.
    """
    stamp = validated(Stamp, body, what)
    if stamp.version > known:
        writer = f"megatron-stable {stamp.written_by}"
        raise FormatError(
            f"{what} was written in format {stamp.version} by {writer}; this is {package_version()}, which reads "
            f"formats up to {known}: use {writer} or newer"
        )


def read_json(path: Path) -> Any:
    """A JSON value from a plain file of sane size.

    Raises:
        Unreadable: It is missing, no plain file, or cannot be read.
        Damaged: It is too large, or no JSON.
    """
    return parsed(read_bytes(path, final=ABSENT), path)


def read_as(kind: type[T], path: Path) -> T:
    """What a file holds, as a value of type ``kind``. DataError: it is none."""
    return validated(kind, read_json(path), path)


def validated(kind: type[T], value: Any, source: str | Path) -> T:
    """A plain value as one of type ``kind``, a model or any type that pydantic knows.

    Raises:
        DataError: It is none; the message names ``source`` and the first wrong field.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "the whole"
        raise DataError(f"{source}: {field}: {first['msg'].removeprefix('Value error, ')}") from None
