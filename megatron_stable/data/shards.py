"""A dataset in shards: many .bin/.idx pairs that are one stream of tokens, one shard after the other.

PREFIX stands for PREFIX-00000-of-00064 .. PREFIX-00063-of-00064, as `preprocess --shards 64` writes them. Opening reads
a few bytes of each index. A .bin is opened when one of its tokens is asked for, and an index is mapped when somebody
asks for documents; at most OPEN and INDEXED of them at a time, of all datasets together.
"""

from __future__ import annotations

import os
import re
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from glob import escape, glob
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np

from megatron_stable.data.indexed import Head, IndexedDataset, dataset_paths, read_head, read_metadata, read_span
from megatron_stable.errors import DataError
from megatron_stable.files import explain_os_errors

OPEN, INDEXED = 256, 4
"""Files of tokens that are open, and indices that are mapped, at a time."""
OPENERS = 16
"""Threads that read headers: on a shared file system that is waiting for most of the time."""
NAME = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})")

T = TypeVar("T")


def shard_prefix(prefix: str | Path, shard: int, shards: int) -> str:
    """Prefix of one of the shards of `prefix`, counted from 0."""
    return f"{prefix}-{shard:05}-of-{shards:05}"


def find_shards(prefix: str | Path) -> list[str]:
    """Prefixes of all shards of `prefix`, in order; none if it has none. Raises DataError if some are missing."""
    found = shards_there(prefix)
    check_complete(found)
    return found


def shards_there(prefix: str | Path) -> list[str]:
    """Prefixes of the shards of `prefix` that are there, in whatever number, in order."""
    folder, name = Path(prefix).parent, Path(prefix).name
    found = (str(path).removesuffix(".idx") for path in folder.glob(f"{escape(name)}-*-of-*.idx"))
    return sorted(path for path in found if (match := NAME.fullmatch(path)) and Path(match[1]).name == name)


def check_complete(prefixes: Iterable[str]) -> None:
    """Check that of each dataset of which there are shards there are all; raises DataError with the missing ones."""
    groups: dict[str, dict[int, set[int]]] = {}
    for prefix in prefixes:
        if name := NAME.fullmatch(prefix):
            groups.setdefault(name[1], {}).setdefault(int(name[3]), set()).add(int(name[2]))
    for prefix, counts in groups.items():
        if len(counts) > 1:
            raise DataError(
                f"dataset {prefix} is there in {' and in '.join(map(str, sorted(counts)))} shards: remove those of one"
            )
        for shards, found in counts.items():
            missing = [shard for shard in range(shards) if shard not in found]
            if missing:
                names = ", ".join(shard_prefix(prefix, shard, shards) for shard in missing[:3])
                more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
                raise DataError(
                    f"dataset {prefix} lacks {len(missing)} of {shards} shards: {names}{more}; run the same preprocess "
                    f"again, it writes what is missing"
                )


class _Recent(Generic[T]):
    """What was opened last by all datasets of the process together, as it may have but so many files open.

    Args:
        limit: How much of it is kept open.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._kept: OrderedDict[tuple[int, int], T] = OrderedDict()

    def get(self, owner: int, number: int, make: Callable[[], T]) -> T:
        """Number so-and-so of an owner, made if it is not open."""
        key = owner, number
        if key not in self._kept:
            while len(self._kept) >= self._limit():
                self._kept.popitem(last=False)
            self._kept[key] = make()
        self._kept.move_to_end(key)
        return self._kept[key]

    def forget(self, owner: int) -> None:
        """Close all of an owner."""
        for key in [key for key in self._kept if key[0] == owner]:
            del self._kept[key]


class _TokenFile:
    """A .bin that is read, not mapped: the first look into a map costs more than a short read."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path, self._dtype = path, dtype
        with explain_os_errors("read", path):
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)

    def read(self, start: int, count: int) -> np.ndarray:
        size = self._dtype.itemsize
        with explain_os_errors("read", self._path):
            parts = [os.pread(self._file, count * size, start * size)]
            while parts[-1] and sum(map(len, parts)) < count * size:  # a read gives at most 2 GB
                done = sum(map(len, parts))
                parts.append(os.pread(self._file, count * size - done, start * size + done))
        found = parts[0] if len(parts) == 1 else b"".join(parts)
        if len(found) != count * size:
            raise DataError(f"{self._path} ends before token {start + count}: it was cut while it was in use")
        return np.frombuffer(found, self._dtype)

    def will_need(self, start: int, count: int) -> None:
        if hasattr(os, "posix_fadvise"):
            size = self._dtype.itemsize
            os.posix_fadvise(self._file, start * size, count * size, os.POSIX_FADV_WILLNEED)


_FILES: _Recent[_TokenFile] = _Recent(lambda: OPEN)
_INDICES: _Recent[IndexedDataset] = _Recent(lambda: INDEXED)


def read_heads(prefixes: Sequence[str]) -> list[Head]:
    """What opening reads of each shard. Raises DataError, naming the shard and what is wrong with it."""
    with ThreadPoolExecutor(OPENERS) as pool:
        return list(pool.map(read_head, prefixes))


class ShardSet:
    """Shards as one stream of tokens, documents in order, with the interface of :class:`IndexedDataset`.

    Of each shard it is known that the size of its files is what the index says; the index itself is checked when it is
    first used. Shards may be empty, but not all. Raises DataError, naming the shard and what is wrong with it.

    Args:
        prefix: What the whole is called in messages.
        heads: Of the shards, in order.
        notes: Where to note what is found out about the whole, if anywhere.
    """

    def __init__(self, prefix: str, heads: Sequence[Head], notes: Path | None = None) -> None:
        self.prefix, self.notes = prefix, notes
        self.shards = [head for head in heads if head.tokens]
        """Heads of the shards that are not empty."""
        if not self.shards:
            raise DataError(f"dataset {prefix} holds no tokens in any of its {len(heads)} shards")
        self.dtype = self.shards[0].dtype
        for head in self.shards:
            if head.dtype != self.dtype:
                raise DataError(
                    f"dataset {prefix}: {head.prefix} has tokens of type {head.dtype}, {self.shards[0].prefix} of type "
                    f"{self.dtype}: they were made with different tokenizers, and cannot be one dataset"
                )
        self._ends = list(accumulate(head.tokens for head in self.shards))
        self._document_ends = list(accumulate(head.documents for head in self.shards))
        self.tokens, self.documents = self._ends[-1], self._document_ends[-1]
        for opened in (_FILES, _INDICES):
            weakref.finalize(self, opened.forget, id(self))

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start .. start + count - 1` of the stream, `[count]` of the files' dtype."""
        if not 0 <= start <= start + count <= self.tokens:
            raise IndexError(f"tokens {start} .. {start + count - 1} of {self.tokens}")
        parts = [self._file(i).read(first, length) for i, first, length in self._pieces(start, count)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def will_need(self, start: int, count: int) -> None:
        """Tell the operating system to fetch these tokens in the background; has no other effect."""
        for i, first, length in self._pieces(start, count):
            self._file(i).will_need(first, length)

    def _pieces(self, start: int, count: int) -> Iterable[tuple[int, int, int]]:
        """Where tokens lie: shard, first token in it, how many."""
        i, stop = bisect_right(self._ends, start), start + count
        while start < stop:
            begin = self._ends[i] - self.shards[i].tokens
            length = min(stop, self._ends[i]) - start
            yield i, start - begin, length
            start, i = start + length, i + 1

    def _file(self, i: int) -> _TokenFile:
        return _FILES.get(id(self), i, lambda: _TokenFile(dataset_paths(self.shards[i].prefix)[0], self.dtype))

    def _index(self, i: int) -> IndexedDataset:
        return _INDICES.get(id(self), i, lambda: IndexedDataset(self.shards[i].prefix))

    def document_at(self, token: int) -> int:
        """The document (from 0) to which the stream's token number `token` belongs."""
        if not 0 <= token < self.tokens:
            raise IndexError(f"token {token} of {self.tokens}")
        i = bisect_right(self._ends, token)
        own = self._index(i).document_at(token - self._ends[i] + self.shards[i].tokens)
        return self._document_ends[i] - self.shards[i].documents + own

    def document_span(self, document: int) -> tuple[int, int]:
        """First token of a document, and the first behind it."""
        return self._span(document, lambda i, own: self._index(i).document_span(own))

    def glance(self, document: int) -> tuple[int, int]:
        """The same for the price of a few bytes of the index, which is not checked."""
        return self._span(document, lambda i, own: read_span(self.shards[i], own))

    def _span(self, document: int, of: Callable[[int, int], tuple[int, int]]) -> tuple[int, int]:
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} of {self.documents}")
        i = bisect_right(self._document_ends, document)
        head, begin = self.shards[i], self._ends[i] - self.shards[i].tokens
        start, stop = of(i, document - self._document_ends[i] + head.documents)
        return begin + start, begin + stop

    @property
    def metadata(self) -> dict[str, Any] | None:
        """The tokenizer that `preprocess` noted, and what was noted about the whole. Raises DataError for two."""
        whole = read_metadata(self.prefix) if self.notes is not None else None
        return {**(whole or {}), **self._tokenizer} or None

    @cached_property
    def _tokenizer(self) -> dict[str, Any]:
        named: dict[str, Any] = {}
        prefixes = [head.prefix for head in self.shards]
        with ThreadPoolExecutor(OPENERS) as pool:
            notes = list(pool.map(read_metadata, prefixes))
        for prefix, found in zip(prefixes, notes, strict=True):
            if found is None or "tokenizer_sha256" not in found:
                continue
            named = named or {"shard": prefix, **found}
            if found["tokenizer_sha256"] != named["tokenizer_sha256"]:
                raise DataError(
                    f"dataset {self.prefix}: {named['shard']} and {prefix} were made with different tokenizers; "
                    "run preprocess again with one"
                )
        return {key: named[key] for key in ("tokenizer_sha256", "vocab_size") if key in named}

    @property
    def stamp(self) -> dict[str, int]:
        """What changes when the tokens do."""
        sizes, times = zip(*((head.bytes, head.mtime_ns) for head in self.shards), strict=True)
        return {"bytes": sum(sizes), "mtime_ns": max(times), "shards": len(sizes)}


Tokens: TypeAlias = IndexedDataset | ShardSet
"""A stream of tokens."""


def open_tokens(source: str | Path | Sequence[str], name: str | None = None) -> Tokens:
    """Open a prefix of a .bin/.idx or of shards, a glob of such files, or a list of these in order.

    Args:
        name: What it is called in messages; by default what it is.

    Raises:
        DataError: There is no such dataset, a shard is missing, or what is there is unusable.
    """
    return open_listed(list_tokens(source, name))


class Listing(NamedTuple):
    """What a dataset consists of, by what its directories hold.

    Attributes:
        name: What it is called in messages; ``None``: it is a single pair, called by its prefix.
        prefixes: Of its pairs, in order.
        notes: Where to note what is found out about the whole, if anywhere.
    """

    name: str | None
    prefixes: list[str]
    notes: Path | None = None


def list_tokens(source: str | Path | Sequence[str], name: str | None = None) -> Listing:
    """What :func:`open_tokens` would open. Raises DataError: there is none, or a shard is missing."""
    if isinstance(source, str | Path):
        shards = _shards(str(source))
        if shards is None:
            return Listing(None, [str(source)])
        has_prefix = name is None and not _is_glob(str(source))
        return Listing(name or str(source), shards, dataset_paths(source)[2] if has_prefix else None)
    found = [shard for each in source for shard in _shards(each) or [each]]
    if len(found) == 1 and name is None:
        return Listing(None, found)
    more = f" and {len(source) - 1} more" if len(source) > 1 else ""
    return Listing(name or f"{source[0]}{more}", found)


def open_listed(listing: Listing, heads: Sequence[Head] | None = None) -> Tokens:
    """Open what was listed; ``heads``: of its pairs, if somebody has read them."""
    if listing.name is None:
        return IndexedDataset(listing.prefixes[0])
    return ShardSet(listing.name, read_heads(listing.prefixes) if heads is None else heads, listing.notes)


def _is_glob(source: str) -> bool:
    return any(character in source for character in "*?[") and not dataset_paths(source)[1].exists()


def _shards(source: str) -> list[str] | None:
    """The shards behind a prefix or glob; None: it is the prefix of a single pair, or of nothing."""
    if _is_glob(source):
        pattern = source if source.endswith(".idx") else f"{source}.idx"
        found = sorted(path.removesuffix(".idx") for path in glob(pattern, recursive=True))  # noqa: PTH207 (absolute)
        if not found:
            raise DataError(f"no dataset {source}: no file is called {pattern}")
        check_complete(found)
        return found
    if dataset_paths(source)[1].exists():
        return None
    return find_shards(source) or None
