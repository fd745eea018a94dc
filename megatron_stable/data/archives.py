"""The texts of tar archives as WebDataset lays them out: members that share a name up to its first dot are a sample."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from megatron_stable.errors import DataError


def read_archive(path: Path, stream: IO[bytes]) -> Iterator[tuple[str, bytes, bool]]:
    """The text of each sample that has one, in order: (member, bytes, whether they are a JSON object with the text).

    That is the sample's .txt, or else its .json. Raises DataError for what is no tar archive or has no such member.
    """
    sample, members = None, 0
    texts: dict[str, tuple[str, bytes]] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                key, _, kind = PurePosixPath(member.name).name.partition(".")
                name = str(PurePosixPath(member.name).with_name(key or member.name))
                if name != sample:
                    yield from _text(texts)
                    sample, texts = name, {}
                if kind in ("txt", "json"):
                    file = archive.extractfile(member)
                    texts[kind] = (member.name, file.read() if file else b"")
                    members += 1
            yield from _text(texts)
    except tarfile.TarError as error:
        raise DataError(f"{path}: broken tar archive ({error})") from error
    if not members:
        raise DataError(f"{path} has no text: its samples have neither a .txt nor a .json")


def _text(texts: dict[str, tuple[str, bytes]]) -> Iterator[tuple[str, bytes, bool]]:
    for kind in ("txt", "json"):
        if kind in texts:
            name, raw = texts[kind]
            yield name, raw, kind == "json"
            return
