"""What one rank decides, all ranks know."""

from __future__ import annotations

import socket

import torch.distributed as dist

from megatron_stable.errors import DataError, MegatronStableError
from megatron_stable.parallel.agreement import decided, together
from tests.harness.ranks import Ranks


def _decide() -> tuple[list[int], int, tuple[str, str, bool]]:
    asked = []

    def word() -> list[int]:
        asked.append(dist.get_rank())
        return [7, dist.get_rank()]

    def refuse() -> None:
        raise DataError("it cannot be written")

    found = decided(word)
    assert decided(lambda: None) is None
    try:
        decided(refuse)
    except MegatronStableError as error:
        return found, len(asked), (type(error).__name__, str(error), error.agreed)
    raise AssertionError("nothing was raised")


def test_rank_0_decides_and_its_errors_are_everybodys(ranks: Ranks) -> None:
    failure = ("DataError", "it cannot be written", True)
    assert ranks.run(2, _decide) == [([7, 0], 1, failure), ([7, 0], 0, failure)]


def _disagree() -> tuple[str, bool]:
    try:
        with together():
            if dist.get_rank() == 1:
                raise DataError("it is not there")
    except DataError as error:
        return str(error), error.agreed
    raise AssertionError("nothing was raised")


def test_an_error_of_any_rank_is_everybodys_and_says_whose_it_is(ranks: Ranks) -> None:
    message = f"it is not there (on rank 1, {socket.gethostname()})"
    assert ranks.run(2, _disagree) == [(message, True)] * 2
