"""`megatron-stable convert --to hf` and `--from hf`, on a run that was trained; what is refused, and with what code."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_stable.checkpoint.catalog import newest_whole
from megatron_stable.commands.app import run_verb
from megatron_stable.records.directory import RunDirectory
from tests.commands.conftest import SmallDemo
from tests.convert.models import GATED, our_logits, tokens, write_run

LLAMA = {**GATED}


def verb(*arguments: object) -> int:
    """Exit code of `convert`."""
    return run_verb(["convert", *map(str, arguments)])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of Hugging Face's: Llama's class."""
    write_run(tmp_path / "run", **LLAMA)
    assert verb(tmp_path / "run", "--to", "hf", "--output", tmp_path / "hf") == 0
    return tmp_path / "hf"


def change(model: Path, **keys: object) -> None:
    """Change keys of config.json; `None`: remove."""
    path = model / "config.json"
    body = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({key: value for key, value in body.items() if value is not None}))


def test_a_trained_run_goes_there_and_back_and_on(small: SmallDemo, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import megatron_stable.hf  # noqa: F401

    assert verb(small.run, "--to", "hf", "--output", tmp_path / "hf", "--dtype", "fp32") == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(model).__name__ == "MegatronStableForCausalLM"
    ids = tokenizer("def main():\n", return_tensors="pt")
    said = tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
    assert said.startswith("def main():\n")
    card = (tmp_path / "hf" / "README.md").read_text()
    steps = newest_whole(small.run).step
    assert "`qk_norm_cap`" in card
    assert f"{steps * 8 * 64:,} in {steps} steps" in card
    assert "training started" in card
    assert "attention_cap: 50.0" in card

    assert verb(tmp_path / "hf", "--from", "hf", "--output", tmp_path / "back") == 0
    assert "imported MegatronStableForCausalLM" in (tmp_path / "back" / "logbook.md").read_text()
    text = "def main():\n"
    assert run_verb(["generate", str(tmp_path / "back"), "--prompt", text, "--tokens", "3", "--json"]) == 0
    config = RunDirectory(small.run).config.read_text()
    train = next(line.split(": ")[1] for line in config.splitlines() if line.strip().startswith("train: "))
    overrides = [
        f"data.train={train}",
        "run.steps=2",
        "schedule.warmup_steps=1",
        "batch.global_size=4",
        "logging.tensorboard=false",
    ]
    command = [sys.executable, "-m", "megatron_stable", "pretrain", "--config", tmp_path / "back" / "config.yaml"]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout + done.stderr
    first = json.loads((tmp_path / "back" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1
    assert first["loss"] < 5.6  # it has learnt: ln 400 is 5.99


def test_weights_take_the_type_that_is_asked_for(model: Path, tmp_path: Path) -> None:
    assert verb(tmp_path / "run", "--to", "hf", "--output", tmp_path / "half", "--dtype", "bf16") == 0
    full, half = ((each / "model.safetensors").stat().st_size for each in (model, tmp_path / "half"))
    assert half < 0.65 * full
    assert verb(tmp_path / "half", "--from", "hf", "--output", tmp_path / "back") == 0
    expected = our_logits(tmp_path / "run", tokens())
    torch.testing.assert_close(our_logits(tmp_path / "back", tokens()), expected, rtol=0, atol=0.1)
    assert verb(tmp_path / "back", "--to", "hf", "--output", tmp_path / "again") == 0  # bf16, as the run is
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "half" / "model.safetensors"
    ).read_bytes()


def test_a_class_that_does_not_compute_the_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", recipe="qkv_norm", **GATED)
    assert verb(tmp_path / "run", "--to", "hf", "--output", tmp_path / "hf", "--class", "llama") == 2
    assert "model.attention_input_norm False" in (said := capsys.readouterr().err)
    assert "megatron_stable" in said
    assert not (tmp_path / "hf").exists()
    assert verb(tmp_path / "run", "--to", "hf", "--output", tmp_path / "hf", "--class", "no_such") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("--to", "hf", "--from", "hf"),
        ("--to", "hf", "--tensor", "2"),
        ("--from", "hf", "--dtype", "bf16"),
        ("--from", "hf", "--step", "3"),
        ("--no-tokenizer",),
        ("--to", "gguf"),
    ],
)
def test_options_that_contradict_each_other_are_bad_usage(arguments: tuple[str, ...], tmp_path: Path) -> None:
    assert verb(tmp_path, "--output", tmp_path / "new", *arguments) == 2


@pytest.mark.parametrize("way", ["--to", "--from"])
def test_what_is_there_is_not_written_over(way: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    source = tmp_path / "run" if way == "--to" else model
    assert verb(source, way, "hf", "--output", tmp_path / "mine") == 2
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_file_that_is_cut_off_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model / "model.safetensors"
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 100, 5, 0):
        path.write_bytes(whole[:length])
        assert verb(model, "--from", "hf", "--output", tmp_path / "back") == 5
        assert "cut off" in capsys.readouterr().err
        assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": 3}',
    ],
)
def test_a_header_that_lies_is_refused(header: bytes, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    assert verb(model, "--from", "hf", "--output", tmp_path / "back") == 5


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "mlp_bias"),
        ({"head_dim": 64}, "shape"),
        ({"hidden_size": 33}, "shape"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"rms_norm_eps": {}}, "rms_norm_eps"),
        ({"tie_word_embeddings": "maybe"}, "tied_embeddings"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_hidden_layers": 1}, "model.layers.1"),
        ({"intermediate_size": 47}, "shape"),
        ({"moe_experts": 8}, "moe_experts"),
    ],
)
def test_what_no_knob_says_is_refused_by_its_name(
    keys: dict[str, object], named: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(model, **keys)
    assert verb(model, "--from", "hf", "--output", tmp_path / "back") == 5
    assert named in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_pickles_are_refused_unread(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'exit 1'\ntR.")
    assert verb(model, "--from", "hf", "--output", tmp_path / "back") == 5
    assert "pytorch_model.bin" in capsys.readouterr().err


def test_an_index_that_leaves_the_directory_is_refused(model: Path, tmp_path: Path) -> None:
    shutil.copy(model / "model.safetensors", tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert verb(model, "--from", "hf", "--output", tmp_path / "back") == 5


def test_a_run_that_is_none_is_refused(tmp_path: Path) -> None:
    assert verb(tmp_path / "nowhere", "--to", "hf", "--output", tmp_path / "hf") == 5
    assert verb(tmp_path / "nowhere", "--from", "hf", "--output", tmp_path / "back") == 5


def test_the_layout_that_wrote_the_checkpoint_makes_no_difference(model: Path, tmp_path: Path) -> None:
    assert verb(tmp_path / "run", "--output", tmp_path / "sharded", "--tensor", 2, "--pipeline", 2, "--data", 3) == 0
    assert verb(tmp_path / "sharded", "--to", "hf", "--output", tmp_path / "again") == 0
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (model / weights).read_bytes()
