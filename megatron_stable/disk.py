"""Reading files: plain ones only, and with patience, for a file system that stumbles damages nothing.

Shared file systems return errors that pass: a stale handle, an entry that does not show yet, a server that fails over.
Only a checksum says what is *in* a file, so there are two kinds of trouble: :class:`Unreadable` and :class:`Damaged`.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from megatron_stable.errors import DataError

T = TypeVar("T")

LARGEST_JSON = 2**26  # bytes: refuse to parse anything absurd; the largest, a manifest, has some 120 bytes per rank
DELAYS = (0.2, 1.0, 4.0, 10.0, 15.0)  # seconds between attempts
FINAL = {errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}  # will not pass
ABSENT = FINAL | {errno.ENOENT}  # nor will this, of a file that need not be there


class Unreadable(DataError):
    """A file cannot be read; what is in it is not known."""


class Damaged(DataError):
    """What a file holds is not what was written."""


def patiently(read: Callable[[], T], path: Path, final: Collection[int] = FINAL) -> T:
    """What ``read`` returns, which is tried again while the file system raises errors that may pass, and that is said.

    Args:
        final: Numbers of the errors that will not pass.

    Raises:
        Unreadable: It goes on, or the error is of a kind that does not pass.
    """
    for delay in (*DELAYS, None):
        try:
            return read()
        except OSError as error:
            what = f"{path}: {error.strerror or error}"
            if delay is None or error.errno in final:
                raise Unreadable(what) from None
            print(f"warning: {what}; trying again in {delay:g} s", file=sys.stderr, flush=True)
            time.sleep(delay)
    raise AssertionError


def open_plain(path: Path) -> BinaryIO:
    """Open a file, unbuffered, by a single look at what it is.

    Raises:
        Unreadable: It is a link, or no plain file.
        OSError: It cannot be opened.
    """
    try:  # without waiting for the other end of a pipe
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Unreadable(f"{path}: a symbolic link, which is not one of ours") from None
        raise
    file = os.fdopen(descriptor, "rb", buffering=0)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise Unreadable(f"{path}: not a plain file")
    return file


def read_bytes(path: Path, final: Collection[int] = FINAL) -> bytes:
    """What a file of sane size holds.

    Args:
        final: As for :func:`patiently`.

    Raises:
        Damaged: It is too large to be one of ours.
        Unreadable: It cannot be read.
    """

    def read() -> bytes:
        with open_plain(path) as file:
            data = file.read(LARGEST_JSON + 1)
        if len(data) > LARGEST_JSON:
            raise Damaged(f"{path}: too large to be one of ours")
        return data

    return patiently(read, path, final)


def parsed(data: bytes, path: Path) -> Any:
    """The JSON value in ``data``, which came from ``path``. Damaged: it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise Damaged(f"{path}: not JSON: the file is damaged or not one of ours") from None
