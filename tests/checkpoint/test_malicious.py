"""Files that somebody else made: refused with DataError (exit code 5); nothing runs, nothing large is allocated."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save as serialized

from megatron_stable.errors import DataError
from tests.checkpoint.stored import rewrite_file, rewrite_index, rewrite_manifest
from tests.harness.ranks import Ranks
from tests.training.runs import ROOT, settings, train, write_data

RANK = "rank_00000.safetensors"


class Exploit:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="module")
def trained(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one step on one rank."""
    folder = tmp_path_factory.mktemp("trained")
    write_data(folder / "data")
    values = settings(folder, steps=1, schedule={"kind": "constant", "warmup_steps": 0})
    assert ranks.run(1, train, values) == [0]
    return folder


@pytest.fixture
def victim(trained: Path, tmp_path: Path) -> Path:
    """A copy of its run; returns the checkpoint's directory."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run/checkpoints/step_00000001"


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header, and the tensors' bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def with_header(header: dict[str, Any], rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def change_embedding(directory: Path, **fields: Any) -> None:
    """Change what the index says of a parameter, with all checksums right."""
    rewrite_index(directory, lambda index: index["parameters"]["embedding.weight"].update(fields))


def whole(numel: int, low: int = 0, high: int = 61) -> list[dict[str, Any]]:
    """The slices of a parameter that rank 0 has all of."""
    return [{"low": low, "high": high, "ranks": [0], "cuts": [0, numel]}]


def pickled_manifest(directory: Path) -> None:
    (directory / "manifest.json").write_bytes(pickle.dumps(Exploit(directory.parents[2] / "proof")))


def pickled_rank_file(directory: Path) -> None:
    rewrite_file(directory, RANK, pickle.dumps(Exploit(directory.parents[2] / "proof")))


def pickled_damage_note(directory: Path) -> None:
    (directory / "damaged.json").write_bytes(pickle.dumps(Exploit(directory.parents[2] / "proof")))


def torch_zip_as_rank_file(directory: Path) -> None:
    import torch

    torch.save(Exploit(directory.parents[2] / "proof"), directory / "x")
    rewrite_file(directory, RANK, (directory / "x").read_bytes())


def _rename_file(directory: Path, name: str) -> None:
    rewrite_index(directory, lambda index: index["files"].update({name: index["files"].pop(RANK)}))


def path_out_of_the_directory(directory: Path) -> None:
    shutil.copy(directory / RANK, directory.parents[2] / "secret.safetensors")
    _rename_file(directory, "../../../secret.safetensors")


def absolute_path(directory: Path) -> None:
    shutil.copy(directory / RANK, directory.parents[2] / "secret.safetensors")
    _rename_file(directory, str(directory.parents[2] / "secret.safetensors"))


def null_byte_in_a_name(directory: Path) -> None:
    _rename_file(directory, "rank_00000\0.safetensors")


def link_to_a_file(directory: Path) -> None:
    (directory / RANK).rename(directory.parents[2] / "elsewhere")
    (directory / RANK).symlink_to(directory.parents[2] / "elsewhere")


def link_to_a_directory(directory: Path) -> None:
    directory.rename(directory.parents[2] / "elsewhere")
    directory.symlink_to(directory.parents[2] / "elsewhere")


def pipe_as_manifest(directory: Path) -> None:
    (directory / "manifest.json").unlink()
    os.mkfifo(directory / "manifest.json")


def manifest_of_a_terabyte(directory: Path) -> None:
    os.truncate(directory / "manifest.json", 2**40)


def manifest_of_nested_lists(directory: Path) -> None:
    (directory / "manifest.json").write_text("[" * 10**6)


def manifest_without_checksum(directory: Path) -> None:
    body = json.loads((directory / "manifest.json").read_text())
    del body["sha256"]
    (directory / "manifest.json").write_text(json.dumps(body))


def state_of_the_wrong_kind(directory: Path) -> None:
    rewrite_manifest(directory, lambda body: body["state"].update(optimizer_steps=[1], course=7))


def state_with_an_unknown_field(directory: Path) -> None:
    rewrite_manifest(directory, lambda body: body["state"].update(note="harmless"))


def absurd_state(directory: Path) -> None:
    rewrite_manifest(directory, lambda body: body["state"].update(optimizer_steps=10**400))


def config_of_the_wrong_kind(directory: Path) -> None:
    rewrite_manifest(directory, lambda body: body["config"].update(model={"layers": "many"}))


def step_of_the_wrong_kind(directory: Path) -> None:
    rewrite_manifest(directory, lambda body: body.update(step="1"))


def absurd_shape(directory: Path) -> None:
    change_embedding(directory, shape=[2**40, 32], slices=whole(2**45, high=2**40))


def absurd_slice(directory: Path) -> None:
    change_embedding(directory, slices=whole(61 * 32, high=2**47))


def slices_with_a_gap(directory: Path) -> None:
    change_embedding(directory, slices=[*whole(30 * 32, high=30), *whole(30 * 32, low=31)])


def absurd_piece(directory: Path) -> None:
    change_embedding(directory, slices=whole(2**40))


def pieces_that_overlap(directory: Path) -> None:
    change_embedding(directory, slices=[{"low": 0, "high": 61, "ranks": [0, 0, 0], "cuts": [0, 900, 800, 61 * 32]}])


def negative_start(directory: Path) -> None:
    change_embedding(directory, slices=[{"low": 0, "high": 61, "ranks": [0, 0], "cuts": [0, -5, 61 * 32]}])


def rank_that_has_no_file(directory: Path) -> None:
    change_embedding(directory, slices=[{"low": 0, "high": 61, "ranks": [7], "cuts": [0, 61 * 32]}])


def index_of_nested_lists(directory: Path) -> None:
    (directory / "index.json").write_text("[" * 10**6)
    rewrite_manifest(directory, lambda body: body.update(index=_sha256(directory / "index.json")))


def index_of_a_list(directory: Path) -> None:
    (directory / "index.json").write_text("[1]")
    rewrite_manifest(directory, lambda body: body.update(index=_sha256(directory / "index.json")))


def header_of_a_list(directory: Path) -> None:
    rewrite_file(directory, RANK, struct.pack("<Q", 8) + b"[1, 2]  ")


def absurd_tensor(directory: Path) -> None:
    header, rest = header_of(directory / RANK)
    header["embedding.weight:weight"].update(shape=[2**45], data_offsets=[0, 2**47])
    rewrite_file(directory, RANK, with_header(header, rest))


def absurd_header(directory: Path) -> None:
    rewrite_file(directory, RANK, struct.pack("<Q", 2**50) + b"{}")


def tensor_of_another_dtype(directory: Path) -> None:
    header, rest = header_of(directory / RANK)
    for key in ("weight", "exp_avg", "exp_avg_sq"):
        header[f"embedding.weight:{key}"]["dtype"] = "I32"
    rewrite_file(directory, RANK, with_header(header, rest))


def offsets_beyond_the_file(directory: Path) -> None:
    header, rest = header_of(directory / RANK)
    header["embedding.weight:weight"].update(data_offsets=[2**40, 2**40 + 61 * 32 * 4])
    rewrite_file(directory, RANK, with_header(header, rest))


def missing_parameter(directory: Path) -> None:
    rewrite_index(directory, lambda index: index["parameters"].pop("embedding.weight"))


def no_checksums(directory: Path) -> None:
    header, rest = header_of(directory / RANK)
    del header["__metadata__"]
    rewrite_file(directory, RANK, with_header(header, rest))


def other_tensors(directory: Path) -> None:
    rewrite_file(directory, RANK, serialized({"embedding.weight": np.zeros(4, np.float32)}))


ATTACKS = [
    pickled_manifest, pickled_rank_file, pickled_damage_note, torch_zip_as_rank_file, path_out_of_the_directory,
    absolute_path, null_byte_in_a_name, link_to_a_file, link_to_a_directory, pipe_as_manifest, manifest_of_a_terabyte,
    manifest_of_nested_lists, manifest_without_checksum, state_of_the_wrong_kind, state_with_an_unknown_field,
    absurd_state, config_of_the_wrong_kind,
    step_of_the_wrong_kind, absurd_shape, absurd_slice, slices_with_a_gap, absurd_piece, pieces_that_overlap,
    negative_start, rank_that_has_no_file, index_of_nested_lists, index_of_a_list, header_of_a_list, absurd_tensor,
    absurd_header, tensor_of_another_dtype, offsets_beyond_the_file, missing_parameter, no_checksums, other_tensors,
]  # fmt: skip


def train_in_little_memory(values: dict[str, Any]) -> tuple[int, int]:
    """On a rank: train with 2 GiB of address space more than now; returns (exit code, growth of the peak in bytes)."""
    import megatron_stable.training.trainer  # noqa: F401 - its imports are no growth

    (pages, *_) = map(int, Path("/proc/self/statm").read_text().split())
    limit = pages * resource.getpagesize() + 2**31
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return train(values), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


@pytest.mark.parametrize("attack", ATTACKS)
def test_resuming_is_refused(
    ranks: Ranks, trained: Path, victim: Path, attack: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    attack(victim)
    values = settings(trained, steps=2, schedule={"kind": "constant", "warmup_steps": 0})
    values["run"]["directory"] = str(victim.parents[1])
    ((code, grown),) = ranks.run(1, train_in_little_memory, values)
    printed = capsys.readouterr().out
    assert code == 5, printed
    assert "error: " in printed and "Traceback" not in printed
    assert grown < 100e6
    assert not (victim.parents[2] / "proof").exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_opening_the_model_is_refused(victim: Path, attack: Callable[[Path], None]) -> None:
    from megatron_stable.checkpoint.model import load_model

    attack(victim)
    with pytest.raises(DataError):
        load_model(victim.parents[1])
    assert not (victim.parents[2] / "proof").exists()


def test_a_model_that_the_checkpoint_cannot_fill_is_not_made(victim: Path) -> None:
    """Its configuration asks for 4 TB."""
    from megatron_stable.checkpoint.model import load_model

    rewrite_manifest(victim, lambda body: body["config"]["model"].update(hidden=2**20, layers=10**6))
    with pytest.raises(DataError, match="a model that it does not hold"):
        load_model(victim.parents[1])


def test_pickle_is_not_even_imported_by_what_reads_checkpoints() -> None:
    folder = ROOT / "megatron_stable"
    for path in [path for room in ("checkpoint", "records", "training") for path in (folder / room).glob("*.py")]:
        source = path.read_text()
        assert "import pickle" not in source and "torch.load" not in source, path


def test_forging_as_these_tests_do_makes_valid_checkpoints(victim: Path) -> None:
    """Else the attacks would be refused for their checksums alone."""
    from megatron_stable.checkpoint.model import load_model

    rewrite_file(victim, RANK, (victim / RANK).read_bytes())
    rewrite_index(victim, lambda index: None)
    rewrite_manifest(victim, lambda body: body["state"].update(bad_steps=[1]))
    assert load_model(victim.parents[1])[2] == 1
