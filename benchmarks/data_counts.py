"""What a dataset of 10^12 tokens takes: counted on shards of that size whose files are sparse, so that they fit.

Of each index only what opening reads is written; tokens are zeros. Opening, samples from everywhere, file handles,
memory and sizes are real, reading from a disk is not. Then what it takes to know which source a sample behind the
10^12-th token comes from, by the number of sources and stages. Run: python benchmarks/data_counts.py [--shards 4000]
"""

from __future__ import annotations

import argparse
import gc
import struct
import tempfile
import time
from pathlib import Path

import psutil

from megatron_stable.data import Stage, Stages, Stream, TokenDataset
from megatron_stable.data.shards import shard_prefix

TOKENS, LENGTH, WINDOW = 10**12, 1000, 4096


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--shards", type=int, nargs="+", default=[64, 1000, 4000, 16000], help="how many, one after another"
    )
    parser.add_argument("--samples", type=int, default=20_000, help="how many to read")
    given = parser.parse_args()
    print(f"{TOKENS:.0e} tokens as uint16, documents of {LENGTH} tokens, samples of {WINDOW + 1}")
    print("shards  index GB  open s  open us/shard  handles  memory MB  sample us")
    data: TokenDataset | None = None
    for shards in given.shards:
        with tempfile.TemporaryDirectory() as folder:
            documents = TOKENS // LENGTH // shards
            for i in range(shards):
                write_sparse(Path(folder, shard_prefix("huge", i, shards)), documents, LENGTH)
            index = sum(path.stat().st_size for path in Path(folder).glob("*.idx"))
            process = psutil.Process()
            data = None
            gc.collect()  # what is left of the one before
            handles, memory = process.num_fds(), process.memory_info().rss
            start = time.perf_counter()
            data = TokenDataset(Path(folder, "huge"), WINDOW, seed=1)
            opened = time.perf_counter() - start
            start = time.perf_counter()
            for k in range(given.samples):
                data.sample(k)
            each = (time.perf_counter() - start) / given.samples
            handles, memory = process.num_fds() - handles, process.memory_info().rss - memory
            assert data.indexed.tokens == documents * LENGTH * shards
            print(
                f"{shards:6}  {index / 1e9:8.1f}  {opened:6.2f}  {opened / shards * 1e6:13.0f}  {handles:7}  "
                f"{memory / 1e6:9.1f}  {each * 1e6:9.0f}",
                flush=True,
            )

    print("sources  stages  JSON KB  first question s  a sample's source us")
    for sources, stages in ((3, 1), (10, 10), (100, 10), (100, 100)):
        print_stages(sources, stages, given.samples)


def print_stages(sources: int, stages: int, samples: int) -> None:
    """A row: blends of all sources, each other than the one before."""
    streams = {f"source {i}": Stream(paths=f"data/source_{i}", tokens=10**9, documents=10**6) for i in range(sources)}
    weights = [{name: 1.0 + (i * n) % 7 for i, name in enumerate(streams)} for n in range(stages)]
    end = TOKENS // WINDOW
    blends = [Stage(sample=end * n // stages, weights=each) for n, each in enumerate(weights)]
    start = time.perf_counter()
    known = Stages.begin(streams, blends)
    known.locate(end)
    first = time.perf_counter() - start
    start = time.perf_counter()
    for k in range(end, end + samples):
        known.locate(k)
    each = (time.perf_counter() - start) / samples
    size = len(known.model_dump_json()) / 1e3
    print(f"{sources:7}  {stages:6}  {size:7.1f}  {first:16.4f}  {each * 1e6:20.1f}", flush=True)


def write_sparse(prefix: Path, documents: int, length: int) -> None:
    """A dataset of zeros, uint16, that takes no space: of its index only what is read on opening is there."""
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(2 * documents * length)
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, documents, documents + 1))
        file.truncate(34 + 20 * documents + 8)
        file.seek(34 + 4 * (documents - 1))
        file.write(struct.pack("<i", length))
        file.seek(34 + 12 * documents - 8)
        file.write(struct.pack("<q", 2 * (documents - 1) * length))


if __name__ == "__main__":
    main()
