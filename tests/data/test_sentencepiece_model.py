"""The tokens of a text in parts are those that SentencePiece gives for it as a whole."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_stable.data import Tokenizer, train_tokenizer
from megatron_stable.data import sentencepiece_model as module
from megatron_stable.data.sentencepiece_model import SentencePieceModel

CODE = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py")))
ADVERSARIAL = [
    CODE,
    CODE.replace(" ", ""),
    CODE.replace("    ", "\t"),
    CODE.replace("\n", " \n "),
    " " * 5000 + "x" + " " * 4097,
    "a b" * 30_000,
    "\n" * 70_000,
    ("x" * 65_535 + "\n") * 2,
    "def f(x):\n" * 20_000,
    "漢字 かな\u3000全角 " * 3000,
    "\u00a0nbsp \u2028 line \x85 \x00 nul" * 500,
    "<s></s><0x41> <unk> " * 100,
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    (folder / "code.py").write_text(CODE, encoding="utf-8")
    train_tokenizer([folder / "code.py"], 1500, folder / "tok.model")
    return folder / "tok.model"


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


@pytest.fixture(scope="module")
def whole(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.mark.parametrize("text", ADVERSARIAL, ids=lambda text: repr(text[:12]))
def test_long_texts_have_the_tokens_of_the_whole(tokenizer, whole, text: str) -> None:
    assert tokenizer.encode(text) == whole.encode(text)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.integers(0, len(CODE) - 1).flatmap(lambda a: st.integers(1, 60).map(lambda n: CODE[a : a + n])),
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=5),
            st.sampled_from([" ", "  ", "\n", "\n    ", "\t", " \n", "\u3000", "\xa0"]),
        ),
        max_size=30,
    )
)
def test_any_text_has_the_tokens_of_the_whole(tokenizer, whole, pieces: list[str]) -> None:
    text = "".join(pieces)
    assert tokenizer.encode(text) == whole.encode(text)


def test_texts_are_divided(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SentencePieceModel(path)
    asked: list[str] = []
    assert model._parts is not None
    encode = model._parts._model.encode
    monkeypatch.setattr(
        model._parts, "_model", type("Spy", (), {"encode": lambda _, t: asked.append(t) or encode(t)})()
    )
    model.encode("one two  three one\n two")
    model.encode("one two")
    assert asked == ["one", " two", "  three", " one\n"]


def test_what_is_remembered_is_bounded(path: Path, whole, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_KEPT", 10)
    model = SentencePieceModel(path)
    assert model.encode(CODE).tolist() == whole.encode(CODE)
    assert model._parts is not None and len(model._parts) <= 10
    model.encode("y" * 1000)
    assert "y" * 1000 not in model._parts


FOREIGN = {
    "unigram": {
        "model_type": "unigram",
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
    },
    "llama": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True},
    "rules": {"normalization_rule_tsv": "rules.tsv", "add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "t5": {"model_type": "unigram"},
    "nfkc": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "unknown": {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "across": {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "split_by_whitespace": False,
        "byte_fallback": True,
    },
    "suffix": {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "treat_whitespace_as_suffix": True,
    },
    "symbols": {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["import json", "<|tool call|>"],
        "byte_fallback": True,
    },
}


@pytest.mark.parametrize("name", FOREIGN)
def test_models_of_other_origin_give_their_own_tokens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, options = io.BytesIO(), {"model_type": "bpe", "vocab_size": 700, "hard_vocab_limit": False}
    lines = CODE.splitlines(keepends=True)
    monkeypatch.chdir(tmp_path)
    Path("rules.tsv").write_text("66 20 6A\t6B\n")  # "f j" becomes "k"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, minloglevel=2, **{**options, **FOREIGN[name]}
    )
    (tmp_path / "tok.model").write_bytes(written.getvalue())
    own = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    tokenizer = Tokenizer(tmp_path / "tok.model")
    texts = [
        CODE,
        "héé ĸĸ ßß €€ import json\nimport  json",
        "<|tool call|> a<|tool call|>",
        "ĸ ĸĸ  ĸ",
        "if json",
        CODE * 20,
        *ADVERSARIAL[2:6],
    ]
    for text in texts:
        assert tokenizer.encode(text) == own.encode(text)
