"""A tokenizer.json gives the tokens of the library; what ends a document is found; data of another are refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_stable.data import IndexedDataset, TokenDataset, Tokenizer, check_tokenizer, preprocess
from megatron_stable.errors import ConfigError, DataError

tokenizers = pytest.importorskip("tokenizers")

SOURCE = Path(json.__file__).read_text(encoding="utf-8")
TEXTS = ["", " ", "def f():\n\treturn  1\n", "emoji 😀 漢字 \u202e\0", SOURCE * 8, "x" * 70_000]


def trained(end: str | None = "<|endoftext|>") -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer like GPT-2's, with a post-processor that puts a token before each text."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|start|>", *([end] if end else [])],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([SOURCE], trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", made.token_to_id("<|start|>"))]
    )
    return made


def fallback() -> tokenizers.Tokenizer:
    """A BPE tokenizer like Llama's: bytes for what it lacks, and a space before each text."""
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"<0x{i:02X}>": 2 + i for i in range(256)}, "▁": 258, "a": 259, "▁a": 260}
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    made.add_special_tokens(["<unk>", "</s>"])
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    trained().save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("make", [trained, fallback])
def test_tokens_are_those_of_the_library(tmp_path: Path, make: Callable[[], tokenizers.Tokenizer]) -> None:
    own = make()
    own.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    for text in TEXTS:
        assert tokenizer.encode(text) == own.encode(text, add_special_tokens=False).ids
    assert tokenizer.vocab_size == own.get_vocab_size()


def test_any_text_comes_back(path: Path) -> None:
    tokenizer = Tokenizer(path)
    for text in TEXTS:
        assert tokenizer.decode([*tokenizer.encode(text), tokenizer.end_of_document]) == text


def test_truncation_and_padding_of_the_file_are_not_ours(path: Path) -> None:
    own = trained()
    own.enable_truncation(4)
    own.enable_padding(length=10_000)
    own.save(str(path))
    assert Tokenizer(path).encode(SOURCE) == trained().encode(SOURCE, add_special_tokens=False).ids


def test_special_tokens_in_a_text_are_special(path: Path) -> None:
    tokenizer = Tokenizer(path)
    assert tokenizer.encode("a<|start|>b")[1] == trained().token_to_id("<|start|>")


def test_a_directory_names_the_end_of_a_document(path: Path) -> None:
    usual = Tokenizer(path)
    assert usual.end_of_document == trained().token_to_id("<|endoftext|>")
    (path.parent / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|start|>"}}))
    named = Tokenizer(path.parent)
    assert named.end_of_document == trained().token_to_id("<|start|>")
    assert named.sha256 != usual.sha256  # data that other tokens separate are other data
    assert Tokenizer(path).sha256 == named.sha256
    (path.parent / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "chat_template": "{"}))
    assert Tokenizer(path.parent).end_of_document == usual.end_of_document


def test_ids_with_holes(path: Path) -> None:
    content = json.loads(path.read_text())
    content["added_tokens"][1]["id"] = 1000
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer(path)
    assert tokenizer.vocab_size >= max(tokenizer.encode(SOURCE)) + 1
    assert tokenizer.end_of_document < tokenizer.vocab_size


def test_data_know_their_tokenizer(path: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text(SOURCE)
    preprocess([tmp_path / "a.txt"], path.parent, tmp_path / "a", workers=2)
    dataset, own = TokenDataset(tmp_path / "a", 32, 0), Tokenizer(path)
    found = IndexedDataset(tmp_path / "a")
    assert found.read(0, found.tokens).tolist() == [*own.encode(SOURCE), own.end_of_document]
    check_tokenizer(dataset, own)
    with pytest.raises(DataError, match="was made with another tokenizer") as caught:
        check_tokenizer(dataset, tokenizer)
    assert caught.value.exit_code == 5


# Bad input


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff", b'{"model": 3}'])
def test_file_that_is_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer\.json"):
        Tokenizer(tmp_path)


def test_no_end_of_document(tmp_path: Path) -> None:
    trained(None).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"name one as eos_token in a tokenizer_config\.json"):
        _ = Tokenizer(tmp_path).end_of_document
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "nothing"}')
    with pytest.raises(DataError, match=r"has the eos_token 'nothing', .* does not"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token": 3}'])
def test_description_that_is_none(path: Path, content: str) -> None:
    (path.parent / "tokenizer_config.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        Tokenizer(path)


def test_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has neither a tokenizer\.json nor a tokenizer\.model"):
        Tokenizer(tmp_path)


def test_without_the_package(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron-stable\[tokenizers\]'"):
        Tokenizer(path)
