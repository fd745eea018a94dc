"""Text to .bin/.idx: the same bytes whatever the workers, and nothing left behind when it fails."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_stable.data import IndexedDataset, PreprocessSummary, Tokenizer, preprocess, train_tokenizer
from megatron_stable.data.shards import open_tokens
from megatron_stable.errors import ConfigError, DataError
from tests.data.conftest import words


@pytest.fixture(scope="module")
def mixed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Inputs of several kinds, some 1500 documents, several batches."""
    folder = tmp_path_factory.mktemp("mixed")
    lines = (json.dumps({"text": words(i, 5 + i % 90)}) for i in range(1500))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "empty.txt").write_text("")
    (folder / "long.txt").write_text(words(77, 200_000))
    return [folder, corpus]


def texts(prefix: Path, tokenizer: Tokenizer) -> list[str]:
    """Decode a dataset's documents, each of which must end with the end-of-document token and have no other."""
    dataset, found = open_tokens(prefix), []
    for document in range(dataset.documents):
        start, stop = dataset.document_span(document)
        *tokens, last = dataset.read(start, stop - start).tolist()
        assert last == tokenizer.end_of_document
        assert tokenizer.end_of_document not in tokens
        found.append(tokenizer.decode(tokens))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_documents_come_back_in_order(corpus: Path, tokenizer_path: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []

    def note(so_far: PreprocessSummary) -> None:
        progress.append((so_far.documents, so_far.input_bytes))

    summary = preprocess([corpus], tokenizer_path, tmp_path / "new" / "a", on_progress=note)
    expected = [path.read_text() for path in sorted(corpus.iterdir())]
    assert texts(tmp_path / "new" / "a", tokenizer) == expected
    dataset = IndexedDataset(tmp_path / "new" / "a")
    size = sum(len(text.encode()) for text in expected)
    assert (summary.documents, summary.tokens, summary.bytes) == (30, dataset.tokens, size)
    assert progress[-1] == (30, summary.input_total)
    assert sorted(summary.files) == sorted(map(str, (tmp_path / "new").iterdir()))
    assert dataset.dtype == "uint16"
    assert dataset.metadata == {
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": 400,
        "documents": 30,
        "tokens": dataset.tokens,
    }


def test_same_bytes_whatever_the_workers(mixed: list[Path], tokenizer_path: Path, tmp_path: Path) -> None:
    results = []
    for workers in (1, 2, 3):
        summary = preprocess(mixed, tokenizer_path, tmp_path / f"{workers}" / "a", workers, validation_fraction=0.1)
        results.append(contents(tmp_path / f"{workers}"))
        assert (summary.documents, summary.empty) == (1531, 1)
    assert results[0] == results[1] == results[2]
    assert len(results[0]) == 6


def test_batches_do_not_show(mixed: list[Path], tokenizer_path: Path, tmp_path: Path, monkeypatch) -> None:
    preprocess(mixed, tokenizer_path, tmp_path / "1" / "a", validation_fraction=0.1)
    module = importlib.import_module("megatron_stable.data.preprocess")  # the package's attribute is the function
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 7)
    preprocess(mixed, tokenizer_path, tmp_path / "2" / "a", validation_fraction=0.1)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_validation_split(mixed: list[Path], tokenizer_path: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    summary = preprocess(mixed, tokenizer_path, tmp_path / "a", validation_fraction=0.1)
    preprocess(mixed, tokenizer_path, tmp_path / "whole")
    train, held_out = texts(tmp_path / "a", tokenizer), texts(tmp_path / "a_validation", tokenizer)
    assert sorted(train + held_out) == sorted(texts(tmp_path / "whole", tokenizer))
    assert len(held_out) == summary.validation_documents
    assert 110 < len(held_out) < 200  # binomial: 153 +- 12


def test_large_vocabulary_is_int32(corpus: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Tokenizer, "vocab_size", property(lambda self: 65500, lambda self, value: None), raising=False)
    preprocess([corpus], tokenizer_path, tmp_path / "a")
    assert IndexedDataset(tmp_path / "a").dtype == "int32"


def test_workers_do_not_import_torch() -> None:
    code = "import sys, megatron_stable.data.preprocess; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# Shards


def stream_of(prefix: Path) -> list[int]:
    """All tokens of a dataset."""
    tokens = open_tokens(prefix)
    return tokens.read(0, tokens.tokens).tolist()


@pytest.fixture(scope="module")
def divisible(mixed: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """`mixed`, and files that shards cut within."""
    folder = tmp_path_factory.mktemp("divisible")
    texts = [words(1000 + i, 5 + i % 90) for i in range(900)]
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pq.write_table(pa.table({"text": texts}), folder / "c.parquet", row_group_size=70)
    with pa.OSFile(str(folder / "d.arrow"), "wb") as file, pa.ipc.new_stream(file, pa.schema({"text": "str"})) as out:
        for first in range(0, 900, 90):
            out.write_batch(pa.record_batch({"text": texts[first : first + 90]}))
    return [*mixed, folder]


def test_shards_are_the_same_stream(divisible: list[Path], tokenizer_path: Path, tmp_path: Path) -> None:
    preprocess(divisible, tokenizer_path, tmp_path / "one")
    whole = stream_of(tmp_path / "one")
    written = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        summary = preprocess(divisible, tokenizer_path, folder / "a", workers, shards=7)
        assert (summary.shards_written, summary.documents) == (7, 4231)
        assert summary.tokens == len(whole)
        assert summary.input_bytes == summary.input_total
        assert stream_of(folder / "a") == whole
        written.append(contents(folder))
    assert written[0] == written[1]
    sizes = [len(content) for name, content in written[0].items() if name.endswith(".bin")]
    assert len(sizes) == 7 and sum(size > 0 for size in sizes) >= 4


def test_machines_write_their_own_shards(divisible: list[Path], tokenizer_path: Path, tmp_path: Path) -> None:
    preprocess(divisible, tokenizer_path, tmp_path / "all" / "a", validation_fraction=0.1, shards=5)
    for machine in (1, 0):
        assert not (tmp_path / "two" / "a-00000-of-00005.idx").exists()
        preprocess(divisible, tokenizer_path, tmp_path / "two" / "a", 1, 0.1, shards=5, share=(machine, 2))
    assert contents(tmp_path / "two") == contents(tmp_path / "all")
    assert len(contents(tmp_path / "two")) == 5 * 2 * 3
    every = texts(tmp_path / "two" / "a", Tokenizer(tokenizer_path))
    every += texts(tmp_path / "two" / "a_validation", Tokenizer(tokenizer_path))
    preprocess(divisible, tokenizer_path, tmp_path / "one")
    assert sorted(every) == sorted(texts(tmp_path / "one", Tokenizer(tokenizer_path)))


def test_finished_shards_are_kept(divisible: list[Path], tokenizer_path: Path, tmp_path: Path) -> None:
    def run() -> PreprocessSummary:
        return preprocess(divisible, tokenizer_path, tmp_path / "a", 1, 0.1, shards=4)

    assert (run().shards_written, before := contents(tmp_path)) == (4, contents(tmp_path))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = run()
    assert (again.shards_written, again.shards_kept, again.documents, again.input_total) == (0, 4, 0, 0)
    (tmp_path / "a-00002-of-00004.idx").unlink()
    (tmp_path / "a_validation-00003-of-00004.idx").unlink()
    (tmp_path / "a-00001-of-00004.bin.partial").write_bytes(b"left behind")
    again = run()
    assert (again.shards_written, again.shards_kept) == (2, 2)
    (tmp_path / "a-00001-of-00004.bin.partial").unlink()
    assert contents(tmp_path) == before
    changed = {path.name for path in tmp_path.iterdir() if path.stat().st_mtime_ns != times[path]}
    assert all("00002" in name or "00003" in name for name in changed)


def test_a_killed_run_loses_one_shard(tokenizer_path: Path, tmp_path: Path) -> None:
    process = started(tmp_path, tokenizer_path, tmp_path / "out" / "a", "shards=50, share=(0, 1)", "a-00000-of-00050")
    for _ in range(600):
        finished = sorted((tmp_path / "out").glob("*.idx"))
        if len(finished) >= 3:
            break
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)
    wait_until_group_is_gone(process.pid)
    finished = sorted((tmp_path / "out").glob("*.idx"))
    assert 3 <= len(finished) < 50
    assert [path.name for path in finished] == [f"a-{i:05}-of-00050.idx" for i in range(len(finished))]
    summary = preprocess([tmp_path / "text.jsonl"], tokenizer_path, tmp_path / "out" / "a", 1, shards=50)
    assert (summary.shards_kept, summary.shards_written) == (len(finished), 50 - len(finished))
    preprocess([tmp_path / "text.jsonl"], tokenizer_path, tmp_path / "one")
    assert stream_of(tmp_path / "out" / "a") == stream_of(tmp_path / "one")
    assert len(contents(tmp_path / "out")) == 3 * 50  # and nothing of the killed one


def test_two_processes_that_write_the_same_shard(tokenizer_path: Path, tmp_path: Path) -> None:
    """Both end well, and what is there is what one would have written."""
    first = started(tmp_path / "first", tokenizer_path, tmp_path / "out" / "a", "shards=1", "a-00000-of-00001")
    os.killpg(first.pid, signal.SIGSTOP)  # until the other is at it, too
    try:
        second = started(tmp_path / "second", tokenizer_path, tmp_path / "out" / "a", "shards=1", "a-00000-of-00001")
        assert len(list((tmp_path / "out").glob("a-00000-of-00001.bin.*.partial"))) == 2
    finally:
        os.killpg(first.pid, signal.SIGCONT)
    for process in (first, second):
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
    preprocess([tmp_path / "first" / "text.jsonl"], tokenizer_path, tmp_path / "alone" / "a", 1, shards=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.mark.parametrize("moment", ["before publishing", "while writing"])
def test_a_shard_that_another_process_completes_meanwhile_is_left_alone(
    divisible: list[Path], tokenizer_path: Path, tmp_path: Path, moment: str
) -> None:
    times: dict[str, int] = {}

    def other(so_far: PreprocessSummary) -> None:
        if not times:
            preprocess(divisible, tokenizer_path, tmp_path / "a", 1, 0.1, shards=2)
            times.update(
                {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if "partial" not in path.name}
            )
            if moment == "while writing":  # where other machines' locks are not seen
                for path in tmp_path.glob("*.partial"):
                    path.unlink()
                raise DataError("cannot write: Stale file handle")  # as NFS has it then

    summary = preprocess(divisible, tokenizer_path, tmp_path / "a", 1, 0.1, on_progress=other, shards=2)
    assert (summary.shards_kept, summary.shards_written, summary.documents, summary.files) == (2, 0, 0, [])
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    assert len(times) == 2 * 2 * 3


@pytest.mark.parametrize("place", [0, 1 << 16, -1])
def test_an_input_that_was_changed_in_place_is_noticed(tokenizer_path: Path, tmp_path: Path, place: int) -> None:
    text = bytearray(words(3, 60_000).encode())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(text)
    (tmp_path / "in" / "b.txt").write_text("b")
    preprocess([tmp_path / "in"], tokenizer_path, tmp_path / "a", shards=2)
    (tmp_path / "in" / "b.txt").touch()
    assert preprocess([tmp_path / "in"], tokenizer_path, tmp_path / "a", shards=2).shards_kept == 2
    assert len(text) > 1 << 18
    text[place] ^= 1
    (tmp_path / "in" / "a.txt").write_bytes(text)
    if place == 1 << 16:  # in the middle: size and ends are all that is looked at, as docs/data.md says
        assert preprocess([tmp_path / "in"], tokenizer_path, tmp_path / "a", shards=2).shards_kept == 2
        return
    with pytest.raises(DataError, match=r"other inputs .*first or last 64 KiB"):
        preprocess([tmp_path / "in"], tokenizer_path, tmp_path / "a", shards=2)


def test_other_shards_are_refused(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    preprocess([corpus], tokenizer_path, tmp_path / "a", shards=3)
    before = contents(tmp_path)

    def refused(message: str, **changes: object) -> None:
        given = {"inputs": [corpus], "tokenizer": tokenizer_path, "output_prefix": tmp_path / "a", "shards": 3}
        with pytest.raises(DataError, match=message) as caught:
            preprocess(**{**given, **changes})  # type: ignore[arg-type]
        assert caught.value.exit_code == 5
        assert contents(tmp_path) == before

    refused("made with other inputs", inputs=[corpus / "00.txt", corpus / "01.txt", corpus / "02.txt"])
    refused("made with another validation_fraction", validation_fraction=0.5)
    refused("made with another text_key", text_key="body")
    refused("made with another skip_undecodable", skip_undecodable=True)
    refused("is there, and is not one of 4 shards of", shards=4)
    other = tmp_path.parent / "other.model"
    train_tokenizer([corpus], 300, other)
    refused("made with another tokenizer_sha256", tokenizer=other)
    (tmp_path / "a-00001-of-00003.bin").write_bytes(b"")
    before = contents(tmp_path)
    refused(r"a-00001-of-00003\.bin is truncated")


def test_a_dataset_in_one_piece_is_in_the_way_of_shards(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    preprocess([corpus], tokenizer_path, tmp_path / "a")
    with pytest.raises(DataError, match=r"a\.idx is there, and is not one of 3 shards"):
        preprocess([corpus], tokenizer_path, tmp_path / "a", shards=3)


def test_inputs_elsewhere_are_the_same_inputs(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    preprocess([corpus], tokenizer_path, tmp_path / "a", shards=2)
    shutil.copytree(corpus, tmp_path / "elsewhere")
    assert preprocess([tmp_path / "elsewhere"], tokenizer_path, tmp_path / "a", shards=2).shards_kept == 2


@pytest.mark.parametrize(
    "shards, share", [(0, (0, 1)), (-1, (0, 1)), (3, (3, 3)), (3, (0, 4)), (3, (-1, 3)), (None, (0, 2))]
)
def test_bad_shards(corpus: Path, tokenizer_path: Path, tmp_path: Path, shards: int, share: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"shards|share"):
        preprocess([corpus], tokenizer_path, tmp_path / "a", shards=shards, share=share)
    assert list(tmp_path.iterdir()) == []


# Bad input


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """An input directory with a good, a Latin-1 and a binary file."""
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "a.txt").write_text("good")
    (folder / "b.txt").write_bytes(b"caf\xe9")
    (folder / "c.pyc").write_bytes(b"\0\1\2")
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_undecodable_text(bad: Path, tokenizer_path: Path, tmp_path: Path, workers: int) -> None:
    with pytest.raises(DataError, match=r"b\.txt: not UTF-8 at byte 3; convert or remove it, or skip [^;]*$"):
        preprocess([bad], tokenizer_path, tmp_path / "out" / "a", workers)
    assert list((tmp_path / "out").iterdir()) == []


def test_skipping_undecodable_text(bad: Path, tokenizer_path: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    summary = preprocess([bad], tokenizer_path, tmp_path / "a", skip_undecodable=True)
    assert (summary.documents, summary.skipped) == (1, 2)
    assert summary.skipped_first[0] == f"{bad / 'b.txt'}: not UTF-8 at byte 3"
    assert "c.pyc: binary" in summary.skipped_first[1]
    assert texts(tmp_path / "a", tokenizer) == ["good"]


def test_nothing_to_write(bad: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    (bad / "a.txt").write_text("")
    with pytest.raises(DataError, match="no documents for training data: 0 documents with text, 1 empty, 2 skipped"):
        preprocess([bad], tokenizer_path, tmp_path / "out" / "a", skip_undecodable=True)
    assert list((tmp_path / "out").iterdir()) == []


def test_validation_fraction_too_small_for_the_documents(bad: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no documents for validation data: .*validation fraction 0\.01"):
        preprocess([bad / "a.txt"], tokenizer_path, tmp_path / "out" / "a", validation_fraction=0.01)
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_arguments(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="workers 0"):
        preprocess([corpus], tokenizer_path, tmp_path / "a", workers=0)
    for fraction in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="validation fraction"):
            preprocess([corpus], tokenizer_path, tmp_path / "a", validation_fraction=fraction)
    with pytest.raises(DataError, match=r"cannot read .*nowhere"):
        preprocess([tmp_path / "nowhere"], tokenizer_path, tmp_path / "a")
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        preprocess([corpus], corpus / "00.txt", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_output_directory(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*a\.bin"):
        preprocess([corpus], tokenizer_path, tmp_path / "file" / "a")
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(DataError, match=r"cannot write .*Permission denied"):
            preprocess([corpus], tokenizer_path, tmp_path / "locked" / "a")


@pytest.fixture
def file_size_limit():
    """Lets this process write at most 20 kB into any file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk(mixed: list[Path], tokenizer_path: Path, tmp_path: Path, workers: int, file_size_limit) -> None:
    with pytest.raises(DataError, match=r"cannot write .*a\.bin: File too large"):
        preprocess(mixed, tokenizer_path, tmp_path / "out" / "a", workers)
    assert list((tmp_path / "out").iterdir()) == []


def test_really_full_disk(mixed: list[Path], tokenizer_path: Path, tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mount], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root; test_full_disk covers the rest")
    try:
        with pytest.raises(DataError, match=r"cannot write .*a\.bin: No space left on device"):
            preprocess(mixed, tokenizer_path, mount / "a")
        assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["umount", mount], check=True)


SCRIPT = """
import sys
from megatron_stable.data import preprocess
if __name__ == "__main__":
    show = lambda s: print(s.documents, flush=True)
    preprocess([sys.argv[1]], sys.argv[2], sys.argv[3], workers=2, on_progress=show, MORE)
"""


def started(
    folder: Path, tokenizer_path: Path, output: Path, more: str = "", first: str = "a"
) -> subprocess.Popen[str]:
    """`preprocess` with two workers on much text, in a process group of its own, at work."""
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(SCRIPT.replace("MORE", more))
    source = folder / "text.jsonl"
    line = json.dumps({"text": words(1, 2000)}) + "\n"
    source.write_text(line * 1_000)
    process = subprocess.Popen(
        [sys.executable, script, source, tokenizer_path, output],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip().isdigit()
    assert any(output.parent.glob(f"{first}.bin*"))
    return process


def wait_until_group_is_gone(group: int) -> None:
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("worker processes outlived their parent")


def test_ctrl_c_leaves_nothing(tokenizer_path: Path, tmp_path: Path) -> None:
    process = started(tmp_path, tokenizer_path, tmp_path / "out" / "a")
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors.count("KeyboardInterrupt") == 1, errors  # no traceback of any worker
    assert list((tmp_path / "out").iterdir()) == []
    wait_until_group_is_gone(process.pid)


def test_workers_leave_ctrl_c_to_their_parent(tokenizer_path: Path, tmp_path: Path) -> None:
    process = started(tmp_path, tokenizer_path, tmp_path / "out" / "a")
    for worker in psutil.Process(process.pid).children():
        worker.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert IndexedDataset(tmp_path / "out" / "a").documents == 1000


def test_workers_end_with_a_killed_parent(tokenizer_path: Path, tmp_path: Path) -> None:
    process = started(tmp_path, tokenizer_path, tmp_path / "out" / "a")
    process.kill()
    process.communicate(timeout=60)
    wait_until_group_is_gone(process.pid)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(left) == 2 and all(name.endswith(".partial") for name in left)  # nothing that looks complete
    with pytest.raises(DataError, match="does not exist"):
        IndexedDataset(tmp_path / "out" / "a")
