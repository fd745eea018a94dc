"""The check of the data at the start: shared by the ranks, and remembered."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_stable.data import IndexedWriter
from tests.harness.ranks import Ranks
from tests.training.runs import VOCAB, Values, settings, train, write_data

TOKENS = 100_000


def bytes_read(values: Values) -> int:
    """On a rank: what opening the data of a run reads of the .bin files."""
    from megatron_stable.config.schema import Config
    from megatron_stable.data import IndexedDataset
    from megatron_stable.parallel.topology import Topology
    from megatron_stable.training.source import Source

    done, read = [0], IndexedDataset.read

    def counting(self: IndexedDataset, start: int, count: int) -> np.ndarray:
        done[0] += count * self.dtype.itemsize
        return read(self, start, count)

    IndexedDataset.read = counting  # type: ignore[method-assign]
    Source(Config.model_validate(values), Topology())
    return done[0]


def test_ranks_share_the_first_check_and_a_second_start_reads_nothing(ranks: Ranks, tmp_path: Path) -> None:
    for name in ("data", "held"):
        write_data(tmp_path / name, tokens=TOKENS)
    values = settings(tmp_path, data={"validation": str(tmp_path / "held")})
    first = ranks.run(4, bytes_read, values)
    assert sum(first) == 2 * TOKENS * 2, "two datasets of uint16, each token once"
    assert max(first) <= 2 * 7 * 4096 * 2, "of 25 blocks each"
    assert ranks.run(4, bytes_read, values) == [0] * 4
    write_data(tmp_path / "held", tokens=TOKENS, seed=1)
    assert sum(ranks.run(2, bytes_read, values)) == TOKENS * 2, "the one that was made anew"


def test_what_one_rank_finds_ends_all(ranks: Ranks, tmp_path: Path) -> None:
    tokens = np.zeros(TOKENS, np.uint16)
    tokens[4096 * 3] = VOCAB  # in the fourth block, which rank 1 of 2 reads
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        writer.add(tokens)
    assert ranks.run(2, train, settings(tmp_path)) == [5, 5]
    assert not (tmp_path / "data.meta.json").exists(), "what was not found good is not noted as such"
