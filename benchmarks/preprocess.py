"""Tokenizing text, ours beside the loop of Megatron-LM's tools/preprocess_data.py, with the same tokenizer and text.

Its loop is written anew from its description: the lines of a JSON lines file go through `multiprocessing.Pool.imap` in
chunks of 25 to workers that parse and encode a document at a time, and the parent appends each result to a .bin whose
index it keeps as lists. Steady state: tokens behind the first tenth by the seconds that they took, so that neither the
start of processes nor imports count. Pairs of ours and theirs take turns.

The text is Python source of this installation. Run: python benchmarks/preprocess.py [--mb 98] [--pairs 5] [--workers 2]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import struct
import sysconfig
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import sentencepiece

from megatron_stable.data import IndexedDataset, PreprocessSummary, preprocess, train_tokenizer

_model: sentencepiece.SentencePieceProcessor


def main() -> None:
    """Print the times of each pair, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mb", type=float, default=98.0, help="how much text")
    parser.add_argument("--pairs", type=int, default=5, help="how often each is timed")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--vocab-size", type=int, default=32000, help="tokens of the tokenizer")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text, model = Path(folder, "text.jsonl"), Path(folder, "tok.model")
        size = write_text(text, int(given.mb * 1e6))
        train_tokenizer([text], given.vocab_size, model, sample_bytes=8_000_000)
        print(
            f"{size / 1e6:.1f} MB of Python source, {given.workers} workers, vocabulary {given.vocab_size}", flush=True
        )
        rates: dict[str, list[float]] = {"ours": [], "theirs": []}
        for pair in range(given.pairs):
            for name in sorted(rates, reverse=bool(pair % 2)):
                rate = {"ours": ours, "theirs": theirs}[name](text, model, Path(folder, name), given.workers)
                rates[name].append(rate)
            line = ", ".join(f"{name} {values[-1] / 1e6:.2f} M tokens/s" for name, values in rates.items())
            print(f"pair {pair + 1}: {line}, ratio {rates['ours'][-1] / rates['theirs'][-1]:.2f}", flush=True)
        same = IndexedDataset(Path(folder, "ours")), IndexedDataset(Path(folder, "theirs"))
        equal = np.array_equal(*(each.read(0, each.tokens) for each in same))
        ratios = [a / b for a, b in zip(rates["ours"], rates["theirs"], strict=True)]
        print(f"{same[0].tokens:,} tokens, {'the same' if equal else 'NOT the same'} from both")
        print(f"steady state: ours / theirs {median(ratios):.2f} (median; {min(ratios):.2f} .. {max(ratios):.2f})")


def write_text(path: Path, most: int) -> int:
    """Write files of source as JSON lines, until there are `most` bytes of them."""
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for place in ("purelib", "stdlib"):
            for source in sorted(Path(sysconfig.get_paths()[place]).rglob("*.py")):
                try:
                    text = source.read_text(encoding="utf-8")
                except (UnicodeDecodeError, OSError):
                    continue
                # ours spells the stand-in for a space, U+2581, in bytes, where SentencePiece takes it for a space
                if text and "\u2581" not in text and size < most:
                    size += len(text.encode())
                    file.write(json.dumps({"text": text}) + "\n")
    return size


def ours(text: Path, model: Path, output: Path, workers: int) -> float:
    """Tokens per second of `preprocess` in steady state."""
    seen: list[tuple[float, int]] = []

    def note(so_far: PreprocessSummary) -> None:
        seen.append((time.perf_counter(), so_far.tokens))

    preprocess([text], model, output, workers, on_progress=note)
    return _rate(seen)


def theirs(text: Path, model: Path, output: Path, workers: int) -> float:
    """Tokens per second of Megatron-LM's loop in steady state."""
    seen, lengths, tokens = [], [], 0
    with (
        multiprocessing.get_context("spawn").Pool(workers, _start, (str(model),)) as pool,
        text.open(encoding="utf-8") as file,
        Path(f"{output}.bin").open("wb") as out,
    ):
        for ids, _ in pool.imap(_encode, file, 25):
            out.write(np.array(ids, dtype=np.uint16).tobytes(order="C"))
            lengths.append(len(ids))
            tokens += len(ids)
            seen.append((time.perf_counter(), tokens))
    pointers = np.cumsum([0, *lengths[:-1]], dtype=np.int64) * 2
    with Path(f"{output}.idx").open("wb") as file_:
        file_.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1))
        file_.write(np.array(lengths, np.int32).tobytes() + pointers.tobytes())
        file_.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
    seen.append((time.perf_counter(), tokens))
    return _rate(seen)


def _rate(seen: list[tuple[float, int]]) -> float:
    start = next(each for each in seen if each[1] >= seen[-1][1] / 10)
    return (seen[-1][1] - start[1]) / (seen[-1][0] - start[0])


def _start(model: str) -> None:
    global _model
    _model = sentencepiece.SentencePieceProcessor(model_file=model)


def _encode(line: str) -> tuple[list[int], int]:
    document: Any = json.loads(line)
    ids = _model.encode(document["text"])
    return [*ids, _model.eos_id()], len(line)


if __name__ == "__main__":
    main()
