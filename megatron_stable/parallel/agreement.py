"""All ranks agree before any of them acts."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch.distributed as dist

from megatron_stable.errors import MegatronStableError

T = TypeVar("T")


@contextmanager
def together() -> Iterator[None]:
    """If the body raises a user's error on any rank, every rank raises the first of them, as ``agreed``, and with the
    rank and its host unless rank 0 has it, too. Collective."""
    mine: MegatronStableError | None = None
    try:
        yield
    except MegatronStableError as error:
        mine = error
    said = everywhere((type(mine), str(mine), socket.gethostname()) if mine else None)
    for rank, verdict in enumerate(said):
        if verdict is not None:
            kind, message, host = verdict
            raise agreed(kind, message if rank == 0 else f"{message} (on rank {rank}, {host})") from None


def decided(decide: Callable[[], T]) -> T:
    """What ``decide`` makes on rank 0, known to all; a user's error there is raised on every rank, as ``agreed``.

    Collective.
    """
    word: list[Any] = [None, None]  # result, failure
    if dist.get_rank() == 0:
        try:
            word[0] = decide()
        except MegatronStableError as error:
            word[1] = (type(error), str(error))
    dist.broadcast_object_list(word, src=0)
    if word[1] is not None:
        raise agreed(*word[1])
    return cast(T, word[0])


def everywhere(here: T) -> list[T]:
    """What it is on each rank. Collective."""
    words = [here] * dist.get_world_size()
    dist.all_gather_object(words, here)
    return words


def anywhere(here: bool) -> bool:
    """Whether it is so on any rank. Collective."""
    return any(everywhere(here))


def agreed(kind: type[MegatronStableError], message: str) -> MegatronStableError:
    """An error that every rank raises."""
    error = kind(message)
    error.agreed = True
    return error
