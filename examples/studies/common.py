"""What the studies share: their texts, training, the small tables that are committed, and parts of pages."""

from __future__ import annotations

import argparse
import io
import lzma
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_stable.analysis.drawing import png
from megatron_stable.analysis.report.figures import Drawn
from megatron_stable.data.standard_library import write_standard_library
from megatron_stable.study.table import MEASURED, RATE, RESULTS, SEED, TIMES, axes, labels, read_table, write_table

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "studies"
DATA, PROSE = Path("runs/studies/data"), Path("runs/studies/prose")
VOCABULARY, VALIDATION = 512, 0.05
DIGITS = 5  # significant, of numbers in tables that are committed
DPI = 110
KEPT = (
    "run.steps",
    "guard.collapse",
    "model.qk_norm",
    "model.attention_cap",
    "optimizer.qk_clip",
    "optimizer.eps",
    "schedule.warmup_steps",
)  # fields that readers of a table want though they do not vary


def options(doc: str | None) -> argparse.Namespace:
    """The command line of a study."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from-tables", action="store_true", help="train nothing: figures and page from docs/studies")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: one per core or GPU")
    return parser.parse_args()


def run(*words: object) -> None:
    """One command of ours."""
    _command(words)


def asked(*words: object) -> str:
    """What a command of ours prints."""
    return _command(words, stdout=subprocess.PIPE, encoding="utf-8").stdout


def _command(words: Iterable[object], **how: Any) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run([sys.executable, "-m", "megatron_stable", *map(str, words)], check=False, **how)
    if ended.returncode:
        raise SystemExit(f"failed: megatron-stable {' '.join(map(str, words))}")
    return ended


def prepare(folder: Path, write: Callable[[Path], object]) -> None:
    """A text as token ids.

    Args:
        write: Writes the text, as JSON lines, to a path.
    """
    text, tokenizer = folder / "text.jsonl", folder / "tokenizer.model"
    if (folder / "train_validation.idx").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write(text)
    run("tokenizer", "--input", text, "--vocab-size", VOCABULARY, "--output", tokenizer)
    data = ("--tokenizer", tokenizer, "--output", folder / "train", "--validation-fraction", VALIDATION)
    run("preprocess", "--input", text, *data)


def code() -> None:
    """The first text: the source of Python's standard library."""
    prepare(DATA, write_standard_library)


def prose() -> None:
    """The second text: Moby-Dick, by Herman Melville, a document for each chapter."""
    prepare(PROSE, lambda path: path.write_bytes(lzma.decompress((HERE / "moby_dick.jsonl.xz").read_bytes())))


def train(sweep: Path, jobs: int | None) -> None:
    """Train a sweep, as far as it has not been."""
    run("sweep", sweep, *(("--jobs", jobs) if jobs else ()))


def keep(sweeps: Iterable[Path], output: Path, columns: Collection[str], tags: Collection[str]) -> None:
    """Write the small tables that are committed, of one or more sweeps.

    Args:
        columns: Probes that are kept of each run.
        tags: Series that are kept, of all measured steps.
    """
    found = [*sweeps]
    rows = [row for sweep in found for row in read_table(sweep)]
    wanted = {*RESULTS, *labels(rows), *columns, *axes(rows), RATE, SEED, *KEPT} - {*TIMES, "reason"}
    write_table([{key: rounded(value) for key, value in row.items() if key in wanted} for row in rows], output)
    (output / "table.parquet").unlink()  # the same again
    parts = []
    for sweep in found:
        table = pq.read_table(sweep / MEASURED)
        table = table.filter(pc.is_in(table["tag"].cast(pa.string()), pa.array(sorted(tags))))
        values = pa.array([rounded(value) for value in table["value"].to_pylist()], pa.float64())
        parts.append(table.set_column(table.column_names.index("value"), "value", values))
    data = io.BytesIO()
    pq.write_table(pa.concat_tables(parts).unify_dictionaries(), data, compression="zstd")
    (output / MEASURED).write_bytes(data.getvalue())


def rounded(value: Any) -> Any:
    """A number to so many digits; anything else as it is."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def series(output: Path, tag: str) -> dict[str, dict[int, float]]:
    """By run, the values of a tag by step."""
    table = pq.read_table(output / MEASURED)
    table = table.filter(pc.equal(table["tag"].cast(pa.string()), tag))
    found: dict[str, dict[int, float]] = {}
    for row in table.to_pylist():
        if row["value"] is not None:
            found.setdefault(row["run"], {})[row["step"]] = row["value"]
    return found


def save(drawn: Iterable[Drawn], output: Path) -> list[str]:
    """Write figures; the page's lines that show them."""
    lines = []
    for each in drawn:
        (output / f"{each.name}.png").write_bytes(png(each.picture, DPI))
        lines += [f"![{each.title}]({output.name}/{each.name}.png)", "", each.caption, ""]
    return lines


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """A table as Markdown has it."""
    rows = [head, ["---"] * len(head), *body]
    return [*(f"| {' | '.join(row)} |" for row in rows), ""]
