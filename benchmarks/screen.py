"""Is the poisoned source found, and no other accused? Screenings of real text, of which one source in six is spoiled.

    python benchmarks/screen.py --trials 2                       # two of each kind, and two without poison
    python benchmarks/screen.py --trials 20 --output runs/screen # goes on where it stopped; hours on two cores

Text that `make setup` leaves on any machine, in six natural sources: Python of the standard library, C++ headers,
manuals, type stubs, tests, style sheets and HTML. In a trial, half of the documents of one of them are spoiled:

repeated   one byte, drawn for each document, again and again
random     tokens drawn evenly from the vocabulary
utf8       letters in two and three bytes of UTF-8, of every second of which the last byte is cut off
none       nothing is spoiled: whoever is accused is accused falsely

Trial n of a kind has its own documents, its own victim and its own seeds. The learning rate is found once, by the
search that the verb has, on unspoiled text. Found: the victim is called suspect. False: any other source is.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_stable.config.notation import dump
from megatron_stable.data import IndexedWriter, Tokenizer, token_dtype, train_tokenizer
from megatron_stable.files import write_file
from megatron_stable.study.screening import NEAR, arms, ask, edge, search
from megatron_stable.study.suspects import Found, judge
from megatron_stable.study.sweep import Sweep

PATHS = {name: Path(path) for name, path in sysconfig.get_paths().items()}
SITE = PATHS["purelib"]
TEXTS = {
    "library": (PATHS["stdlib"], ("*.py",)),
    "headers": (SITE / "torch" / "include", ("ATen/*.h", "ATen/core/*.h", "c10/**/*.h")),
    "manuals": (SITE, ("*.dist-info/METADATA", "*.dist-info/**/*.md")),
    "stubs": (SITE / "mypy" / "typeshed" / "stdlib", ("**/*.pyi",)),
    "tests": (SITE / "numpy", ("**/tests/*.py",)),
    "styles": (SITE, ("**/*.css", "**/*.html")),
}
KINDS = ("repeated", "random", "utf8", "none")
VOCAB, PIECE, DOCUMENTS, PIECES = 768, 1500, 200, 20  # characters of a document, documents of a source, of a file
SPOILED = 0.5  # of the victim's documents
WINDOWS, SEEDS, STEPS = 128, 2, 72
PROXY = {
    "run": {"steps": STEPS},
    "model": {"layers": 2, "hidden": 32, "heads": 2, "sequence_length": 64, "vocab_size": VOCAB},
    "precision": {"dtype": "fp32"},
    "batch": {"global_size": 16, "micro_size": 16},
    "optimizer": {"learning_rate": 3.0e-3},
    "schedule": {"warmup_steps": 12, "kind": "constant"},
    "guard": {"patience": 8},
}
# other alphabets, in two bytes and in three
FOREIGN = {ord("a") + i: 0x3B1 + i % 24 for i in range(26)} | {ord("A") + i: 0x4E00 + 37 * i for i in range(26)}


class Trial(NamedTuple):
    """A trial, and what came of it."""

    kind: str
    number: int
    victim: str | None
    suspects: tuple[str, ...]
    shares: dict[str, float]
    seconds: float

    @property
    def found(self) -> bool:
        """Whether the victim was."""
        return self.victim in self.suspects

    @property
    def false(self) -> int:
        """Sources accused that were not spoiled."""
        return sum(name != self.victim for name in self.suspects)


def documents(name: str, draw: random.Random) -> list[str]:
    """Pieces of the files of a source, at random."""
    root, patterns = TEXTS[name]
    files = sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()})
    draw.shuffle(files)
    found: list[str] = []
    for path in files:
        text = path.read_bytes()[: PIECE * PIECES].decode("utf-8", "ignore")
        found += [text[i : i + PIECE] for i in range(0, len(text) - PIECE // 2, PIECE)]
        if len(found) >= DOCUMENTS:
            break
    draw.shuffle(found)
    return found[:DOCUMENTS]


def spoilt(kind: str, text: str, tokenizer: Tokenizer, draw: random.Random) -> list[int]:
    """Tokens in place of those of a document."""
    length = len(tokenizer.encode(text))
    if kind == "random":
        return [draw.randrange(3, VOCAB) for _ in range(length)]
    if kind == "repeated":
        return [3 + draw.randrange(1, 256)] * length
    cut = bytearray()
    for character in text.translate(FOREIGN):
        code = character.encode()
        cut += code[:-1] if len(code) > 1 and draw.random() < 0.5 else code
    return [3 + byte for byte in cut]  # SentencePiece's byte pieces follow <unk>, <s> and </s>


def write_source(
    prefix: Path, texts: Sequence[str], kind: str | None, tokenizer: Tokenizer, draw: random.Random
) -> None:
    """A dataset, some of whose documents are spoiled if a kind is given."""
    with IndexedWriter(str(prefix), token_dtype(VOCAB)) as writer:
        for text in texts:
            bad = kind is not None and draw.random() < SPOILED
            tokens = spoilt(str(kind), text, tokenizer, draw) if bad else tokenizer.encode(text)
            writer.add(np.array([*tokens, tokenizer.end_of_document], token_dtype(VOCAB)))


def write_blend(folder: Path, kind: str, victim: str | None, tokenizer: Tokenizer, draw: random.Random) -> Path:
    """The six sources of a trial, and the file that names them."""
    for name in TEXTS:
        write_source(folder / "data" / name, documents(name, draw), kind if name == victim else None, tokenizer, draw)
    listed = {name: {"path": f"data/{name}", "weight": 1.0} for name in TEXTS}
    write_file(folder / "blend.yaml", dump({"sources": listed}).encode())
    return folder / "blend.yaml"


def prepare(root: Path) -> Tokenizer:
    """A tokenizer of unspoiled text, which can write any byte."""
    path = root / "tok.model"
    if not path.is_file():
        draw = random.Random(0)
        lines = [json.dumps({"text": text}) for name in TEXTS for text in documents(name, draw)]
        write_file(root / "text.jsonl", "\n".join(lines).encode())
        train_tokenizer([root / "text.jsonl"], VOCAB, path, character_coverage=0.98)
    return Tokenizer(path)


def learning_rate(root: Path, tokenizer: Tokenizer) -> float:
    """A fifth of the largest stable one on unspoiled text, as the verb has it."""
    folder = root / "edge"
    if not (folder / "blend.yaml").is_file():
        write_blend(folder, "none", None, tokenizer, random.Random(1))
    work = Sweep(search(ask(folder / "screen", root / "proxy.yaml", [f"data.train={folder / 'blend.yaml'}"])))
    for _ in work.train(jobs=1):
        pass
    return NEAR * edge(work.rows())


def trial(root: Path, kind: str, number: int, rate: float, tokenizer: Tokenizer) -> Trial:
    """Do a trial, unless it is done."""
    folder = root / f"{kind}-{number}"
    done = folder / "trial.json"
    if not done.is_file():
        began, draw = time.monotonic(), random.Random(f"{kind} {number}")
        shutil.rmtree(folder, ignore_errors=True)
        victim = None if kind == "none" else draw.choice(list(TEXTS))
        blend = write_blend(folder, kind, victim, tokenizer, draw)
        record, steps, losses = _screen(folder, root / "proxy.yaml", blend, rate, seed=draw.randrange(10**6))
        made = Trial(
            kind, number, victim,
            tuple(source.name for source in record.sources if source.verdict == "suspect"),
            {source.name: source.odd.value for source in record.sources},
            time.monotonic() - began,
        )  # fmt: skip
        write_file(folder / "screening.json", record.model_dump_json(indent=1).encode())
        np.savez(folder / "windows.npz", steps=np.concatenate(steps), losses=np.concatenate(losses))
        shutil.rmtree(folder / "screen" / "runs")
        write_file(done, json.dumps(made._asdict()).encode())
    read: dict[str, Any] = json.loads(done.read_bytes())
    return Trial(**{**read, "suspects": tuple(read["suspects"])})


def _screen(folder: Path, proxy: Path, blend: Path, rate: float, seed: int) -> Found:
    asked = ask(folder / "screen", proxy, [f"data.train={blend}", f"run.seed={seed}"], seeds=SEEDS)
    work = Sweep(arms(asked, rate))
    for _ in work.train(jobs=1):
        pass
    return judge(asked, work.grid, WINDOWS)


def trials(root: Path, kinds: Sequence[str], numbers: range, rate: float | None = None) -> Iterator[Trial]:
    """The trials, one after another, of all kinds in turn."""
    tokenizer = prepare(root)
    write_file(root / "proxy.yaml", dump(PROXY).encode())
    rate = learning_rate(root, tokenizer) if rate is None else rate
    print(f"learning rate {rate:g}", flush=True)
    for number in numbers:
        for kind in kinds:
            made = trial(root, kind, number, rate, tokenizer)
            shares = ", ".join(f"{name} {share:.0%}" for name, share in made.shares.items())
            accused = ", ".join(made.suspects) or "nobody"
            print(
                f"{kind} {number}: victim {made.victim}, accused {accused}; {shares}; {made.seconds:.0f} s", flush=True
            )
            yield made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2, help="of each kind")
    parser.add_argument("--first", type=int, default=1, help="number of the first")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--lr", type=float, help="learning rate, in place of the search")
    parser.add_argument("--output", type=Path, default=Path("runs/screen"))
    parser.add_argument("--json", type=Path, help="write the trials there")
    given = parser.parse_args()
    done = list(trials(given.output, given.kinds, range(given.first, given.first + given.trials), given.lr))
    print("\n| poison | trials | found | false accusations |\n|---|---|---|---|")
    for kind in given.kinds:
        these = [each for each in done if each.kind == kind]
        found = "" if kind == "none" else f"{sum(each.found for each in these)} of {len(these)}"
        wrong = sum(each.false > 0 for each in these)
        print(f"| {kind} | {len(these)} | {found} | in {wrong} of {len(these)} trials |")
    if given.json:
        write_file(given.json, json.dumps([each._asdict() for each in done], indent=1).encode())


if __name__ == "__main__":
    main()
