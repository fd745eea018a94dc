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
import yaml

from megatron_stable.analysis.drawing import png
from megatron_stable.analysis.report.figures import Drawn
from megatron_stable.data.standard_library import write_standard_library
from megatron_stable.study.grid import read_grid
from megatron_stable.study.page import in_words, largest_in_words
from megatron_stable.study.sensitivity import Group, best, largest_stable, sensitivity
from megatron_stable.study.table import MEASURED, RATE, RESULTS, SEED, TIMES, Row, axes, labels, read_table, write_table

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "studies"
TRAINED = Path("runs/studies")
DATA, PROSE = TRAINED / "data", TRAINED / "prose"
VOCABULARY, VALIDATION = 512, 0.05
DIGITS = 5  # significant, of numbers in tables that are committed
DPI = 110
Words = Callable[[Group], Sequence[str]]
SCALED = (".model.hidden", ".model.sequence_length", ".optimizer.base_width")
KEPT = (
    "run.steps",
    "guard.collapse",
    "model.qk_norm",
    "model.attention_cap",
    "optimizer.qk_clip",
    "optimizer.eps",
    "schedule.warmup_steps",
    "model.layers",
    "model.hidden",
    "model.sequence_length",
    "batch.global_size",
)  # fields that readers of a table want though they do not vary


def options(doc: str | None) -> argparse.Namespace:
    """The command line of a study."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from-tables", action="store_true", help="train nothing: figures and page from docs/studies")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: one per core or GPU")
    parser.add_argument(
        "--scale", type=int, default=1, metavar="K",
        help="models and sequences K times as wide and as long, for a GPU; at 4, heads are 64 wide",
    )  # fmt: skip
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


def prepare_code() -> None:
    """The first text: the source of Python's standard library."""
    prepare(DATA, write_standard_library)


def prepare_prose() -> None:
    """The second text: Moby-Dick, by Herman Melville, a document for each chapter."""
    prepare(PROSE, lambda path: path.write_bytes(lzma.decompress((HERE / "moby_dick.jsonl.xz").read_bytes())))


def train(name: str, args: argparse.Namespace) -> Path:
    """Train a sweep, as far as it has not been; its directory."""
    path = scaled(name, args.scale)
    run("sweep", path, *(("--jobs", args.jobs) if args.jobs else ()))
    return read_grid(path).directory


def scaled(name: str, factor: int) -> Path:
    """The file of a sweep, or of one whose models and sequences are so many times as wide and as long."""
    path = HERE / f"{name}.yaml"
    if factor == 1:
        return path
    wider = _wider(yaml.safe_load(path.read_text(encoding="utf-8")), factor)
    if "base" in wider:
        wider["base"] = str(scaled(Path(wider["base"]).stem, factor))
    if "directory" in wider:
        wider["directory"] += suffix(factor)
    output = TRAINED / f"{name}{suffix(factor)}.yaml"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(yaml.safe_dump(wider, sort_keys=False), encoding="utf-8")
    return output


def _wider(fields: Any, factor: int, key: str = "") -> Any:
    if isinstance(fields, dict):
        return {name: _wider(value, factor, f"{key}.{name}") for name, value in fields.items()}
    return fields * factor if key.endswith(SCALED) else fields


def suffix(factor: int) -> str:
    """Of the names of what belongs to a scale."""
    return "" if factor == 1 else f"_x{factor}"


def keep(
    sweeps: Iterable[Path],
    output: Path,
    columns: Collection[str],
    tags: Collection[str] = (),
    of: Callable[[Row], bool] = lambda row: True,
) -> None:
    """Write the small tables that are committed, of one or more sweeps.

    Args:
        columns: Probes that are kept of each run.
        tags: Series that are kept, of all measured steps.
        of: Of which runs these are kept.
    """
    found = [*sweeps]
    rows = [row for sweep in found for row in read_table(sweep)]
    wanted = {*RESULTS, *labels(rows), *columns, *axes(rows), RATE, SEED, *KEPT} - {*TIMES, "reason"}
    write_table([{key: rounded(value) for key, value in row.items() if key in wanted} for row in rows], output)
    (output / "table.parquet").unlink()  # the same again
    (output / MEASURED).unlink(missing_ok=True)
    if not tags:
        return
    parts, runs = [], pa.array([row["name"] for row in rows if of(row)])
    for sweep in found:
        table = pq.read_table(sweep / MEASURED)
        for column, kept in (("tag", pa.array(sorted(tags))), ("run", runs)):
            table = table.filter(pc.is_in(table[column].cast(pa.string()), kept))
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


def write(output: Path, page: str) -> None:
    """Write a study's page beside its tables."""
    path = output.with_suffix(".md")
    path.write_text(page, encoding="utf-8")
    print(path)


def groups_table(found: Iterable[Group], rates: Sequence[float], heads: Sequence[str], of: Words) -> list[str]:
    """A line for each group of a sweep: what it is, in columns of the study's own, and what came of it."""
    body = []
    for group in found:
        lowest = best(group)
        body.append(
            (
                *of(group),
                largest_in_words(largest_stable(group), rates),
                f"{lowest.loss:.3f} at {lowest.rate:g}" if lowest else "–",
                in_words(sensitivity(group)),
            )
        )
    return table((*heads, "largest stable learning rate", "best loss", "LR sensitivity"), body)


def batch_of(row: Row) -> str:
    """What a step of a run takes, in words."""
    return f"{row['batch.global_size']} × {row['model.sequence_length']} tokens"


def lines(each: Iterable[str]) -> str:
    """As a page has them."""
    return "\n".join(each)


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """A table as Markdown has it."""
    rows = [head, ["---"] * len(head), *body]
    return [*(f"| {' | '.join(row)} |" for row in rows), ""]
