"""Whether a shard need not be written again: because it is there, and was made of the same by the same rules."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from megatron_stable.data.documents import find_files
from megatron_stable.data.indexed import dataset_paths, read_head, read_metadata
from megatron_stable.data.shards import shards_there
from megatron_stable.data.tokenizer import Tokenizer
from megatron_stable.errors import DataError
from megatron_stable.files import explain_os_errors

END = 1 << 16
"""Bytes at either end of an input file by which it is told from another of its size."""
READERS = 16
"""Threads that read them: on a shared file system that is waiting for most of the time."""
KINDS = {"inputs_sha256": f"inputs (a name, a size, or the first or last {END >> 10} KiB of a file differ)"}


@dataclass(frozen=True)
class Recipe:
    """What decides a shard's content."""

    files: list[tuple[Path, int]]
    """Input files and their sizes."""
    notes: dict[str, Any]
    """What is noted beside each shard."""

    @classmethod
    def of(
        cls,
        inputs: Sequence[str | Path],
        tokenizer: Tokenizer,
        shards: int,
        text_key: str,
        validation_fraction: float,
        skip_undecodable: bool,
    ) -> Recipe:
        """The recipe of these arguments.

        Inputs are told apart by names, sizes, and what they begin and end with: by their names below the directory that
        was given, so that another machine may have it elsewhere. Their times of change are no use: a copy has others.
        """
        found = [(given, *each) for given in inputs for each in find_files([given])]
        if not found:
            raise DataError("no input given")
        files, listed = [(path, size) for _, path, size in found], sha256()
        with ThreadPoolExecutor(READERS) as pool:
            for (given, path, size), ends in zip(found, pool.map(_ends, files), strict=True):
                name = path.relative_to(given) if path != Path(given) else path.name
                listed.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape") + ends)
        notes = {
            "tokenizer_sha256": tokenizer.sha256,
            "shards": shards,
            "inputs_sha256": listed.hexdigest(),
            "text_key": text_key,
            "validation_fraction": validation_fraction,
            "skip_undecodable": skip_undecodable,
        }
        return cls(files, notes)


def _ends(file: tuple[Path, int]) -> bytes:
    """A digest of the first and the last bytes of a file, with its size."""
    path, size = file
    with explain_os_errors("read", path), path.open("rb", buffering=0) as opened:
        first = os.pread(opened.fileno(), END, 0)
        return sha256(first + os.pread(opened.fileno(), END, max(END, size - END))).digest()


def finished(prefixes: Iterable[str], recipe: Recipe) -> bool:
    """Whether a shard, for training and perhaps for validation, is complete.

    Raises DataError if what is there was made otherwise, as then the shards would not be one dataset.
    """
    for prefix in prefixes:
        if not dataset_paths(prefix)[1].exists():
            return False
        metadata = read_metadata(prefix) or {}
        other = next((key for key, value in recipe.notes.items() if metadata.get(key) != value), None)
        if other is not None:
            raise DataError(
                f"shard {prefix} was made with {_other(other, metadata.get(other), recipe.notes[other])}: "
                "remove the shards that are there, or choose another --output"
            )
        read_head(prefix)  # its files have the sizes that they should have
    return True


def _other(key: str, before: Any, now: Any) -> str:
    return f"other {KINDS[key]}" if key in KINDS else f"another {key} ({before}, now {now})"


def refuse_others(name: str, recipe: Recipe) -> None:
    """Raises DataError for a dataset in another number of shards, or in one piece, under the same name: one of
    them would be read in place of the other."""
    there = [f"{name}.idx"] if dataset_paths(name)[1].exists() else []
    there += [path for path in shards_there(name) if int(path.rpartition("-")[2]) != recipe.notes["shards"]]
    if there:
        raise DataError(
            f"{there[0]} is there, and is not one of {recipe.notes['shards']} shards of {name}: remove it, or choose "
            "another --output"
        )
