"""A SentencePiece model as tokenizer.json: the same ids for the same text, through `transformers`."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_stable.convert.huggingface.tokenizer import write_tokenizer
from megatron_stable.data.tokenizer import Tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers")
TEXTS = [
    "def f(x):\n    return x  # 1234\n",
    "  two spaces, a tab\t, and an end \n\n",
    "Grüße, 你好, 🙂 and \x00",
    "",
    " ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaa",
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, object]:
    folder = tmp_path_factory.mktemp(request.param)
    train_tokenizer([__file__, transformers.models.llama.__file__], 420, folder / "t.model", kind=request.param)
    assert write_tokenizer(folder / "t.model", folder, 64) == {"eos_token_id": 1}
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id == 1
    assert theirs.model_max_length == 64
    return Tokenizer(folder / "t.model"), theirs


def test_texts_have_the_same_ids_and_come_back(pair: tuple[Tokenizer, transformers.PreTrainedTokenizerBase]) -> None:
    ours, theirs = pair
    for text in [*TEXTS, Path(__file__).read_text()]:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=40))
def test_any_text_has_the_same_ids(pair: tuple[Tokenizer, transformers.PreTrainedTokenizerBase], text: str) -> None:
    ours, theirs = pair
    assert theirs(text)["input_ids"] == ours.encode(text)
