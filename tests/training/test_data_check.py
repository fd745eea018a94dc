"""The check of the data at the start: shared by the ranks, and remembered."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_stable.data import IndexedWriter
from megatron_stable.data.shards import shard_prefix
from megatron_stable.stability.interventions import Interventions
from tests.harness.ranks import Ranks
from tests.training.runs import VOCAB, Values, layout, settings, train, write_data

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


def opened(values: Values) -> tuple[int, list[list[int]]]:
    """On a rank: how many indices opening the data of a run reads there, and samples of both datasets."""
    from megatron_stable.config.schema import Config
    from megatron_stable.data import Head, shards
    from megatron_stable.parallel.topology import Topology
    from megatron_stable.training.source import Source

    done, read = [0], shards.read_head

    def counting(prefix: str) -> Head:
        done[0] += 1
        return read(prefix)

    shards.read_head = counting
    config = Config.model_validate(values)
    source = Source(config, Topology(config.parallel.tensor))
    source.arrange(None, 0, Interventions())
    batches = [source.step(1), next(source.validation())]
    return done[0], [next(batch).flatten().tolist() for batch in batches]


def test_each_index_is_read_by_one_rank(ranks: Ranks, tmp_path: Path) -> None:
    for i in range(5):
        write_data(tmp_path / shard_prefix("data", i, 5), tokens=1000 + 100 * i, seed=i)
    for i in range(2):
        write_data(tmp_path / shard_prefix("held", i, 2), tokens=1000, seed=9 + i)
    values = settings(tmp_path, data={"validation": str(tmp_path / "held")}, parallel=layout(tensor=4))
    found = ranks.run(4, opened, values)
    assert [count for count, _ in found] == [2, 2, 2, 1]
    (alone,) = ranks.run(1, opened, {**values, "parallel": layout(tensor=1)})
    assert alone[0] == 7 and all(samples == alone[1] for _, samples in found)


def test_a_rank_that_does_not_see_a_shard_is_named(ranks: Ranks, tmp_path: Path) -> None:
    for i in range(2):
        write_data(tmp_path / shard_prefix("data", i, 2), tokens=1000, seed=i)
    for said in ranks.run(4, unseen, settings(tmp_path, parallel=layout(tensor=4))):
        assert "data-00001-of-00002.idx" in said and "on rank 3" in said


def unseen(values: Values) -> str:
    """On a rank: what opening says where rank 3 does not see what it is to look at."""
    from megatron_stable.config.schema import Config
    from megatron_stable.errors import DataError
    from megatron_stable.parallel.topology import Topology
    from megatron_stable.training.source import Source

    topology = Topology(4)
    if topology.rank == 3:
        from megatron_stable.data import indexed

        indexed.dataset_paths = lambda prefix, of=indexed.dataset_paths: of(f"/elsewhere{prefix}")
    try:
        Source(Config.model_validate(values), topology)
    except DataError as error:
        return str(error)
    return ""
