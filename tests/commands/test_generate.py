"""`megatron-stable generate`: against the model's own logits, whole characters, determinism, errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_stable.analysis import generation
from megatron_stable.analysis.generation import Sampling, choose_token, generate, generate_each, text_pieces
from megatron_stable.analysis.prompts import read_prompts
from megatron_stable.analysis.trained import Trained, open_run
from megatron_stable.checkpoint.model import load_model
from megatron_stable.commands.app import run_verb
from megatron_stable.config.load import load_config
from megatron_stable.config.schema import Config
from megatron_stable.data import Tokenizer
from megatron_stable.errors import ConfigError, DataError
from tests.commands.conftest import SmallDemo

GREEDY = Sampling(temperature=0)


def verb(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_stable", "generate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def trained(small: SmallDemo) -> Trained:
    return open_run(small.run)


@pytest.fixture(scope="module")
def tokenizer(trained: Trained) -> Tokenizer:
    assert trained.tokenizer is not None
    return trained.tokenizer


class Said(torch.nn.Module):
    """What looks like a model, but says the tokens of a script."""

    def __init__(self, script: list[int]) -> None:
        super().__init__()
        said = iter(script)

        def head(x: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(torch.tensor([[next(said)]]), 512).float()

        self.layers = {"body": lambda tokens: torch.zeros(*tokens.shape, 4), "head": head}
        self.weight = torch.nn.Parameter(torch.zeros(1))


def scripted(tokenizer: Tokenizer, script: list[int]) -> Trained:
    model: Any = Said(script)
    return Trained(load_config(None, ["model.sequence_length=8", "model.vocab_size=500"]), model, tokenizer, 1)


def windows(config: Config, ids: list[int], tokens: int) -> list[int]:
    """Where the window of each of the next tokens begins, by the rule that is written down."""
    length, starts, begin = config.model.sequence_length, [], max(0, len(ids) - config.model.sequence_length)
    for end in range(len(ids), len(ids) + tokens):
        if end - begin > length:
            begin = end - 1 - length // 2
        starts.append(begin)
    return starts


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["def ", "", "import os\n" * 60])  # the last is longer than the window
def test_greedy_takes_the_models_most_probable_token(small: SmallDemo, trained: Trained, prompt: str) -> None:
    config, model, _ = load_model(small.run)
    tokenizer = Tokenizer(small.directory / "tokenizer.model")
    ids = [tokenizer.end_of_document, *tokenizer.encode(prompt)]
    begun = len(ids)
    for begin in windows(config, ids, 110):  # past the window, twice
        ids.append(int(model(torch.tensor([ids[begin:]]))[0, -1, :400].argmax()))
        if ids[-1] == tokenizer.end_of_document:
            ids.pop()
            break
    assert list(generate(trained, prompt, 110, GREEDY)) == ids[begun:]


def test_a_text_does_not_depend_on_what_it_is_generated_beside(
    trained: Trained,
) -> None:
    prompts = ["def ", "", "import os\n" * 60, "class A:\n    def __init__(self", "def "]
    samplings = [Sampling(1.0, 0.9, seed) for seed in (3, 4, 5, 6, 7)]

    def both(trained: Trained) -> tuple[list[list[int]], list[list[int]]]:
        beside: list[list[int]] = [[] for _ in prompts]
        for number, token in generate_each(trained, prompts, 80, samplings):
            beside[number].append(token)
        return beside, [list(generate(trained, *each)) for each in zip(prompts, [80] * 5, samplings, strict=True)]

    beside, alone = both(trained)
    assert beside == alone
    assert alone[0] != alone[4]  # the same prompt, another seed
    frequent = max(set(alone[0]), key=[token for ids in alone for token in ids].count)
    data = trained.config.data.model_copy(update={"end_of_document": frequent})
    beside, alone = both(trained._replace(config=trained.config.model_copy(update={"data": data})))
    assert beside == alone
    assert len({len(ids) for ids in alone}) > 1  # documents that end make the batch smaller


def test_the_same_seed_gives_the_same_text(trained: Trained) -> None:
    first, again, other = (list(generate(trained, "def ", 40, Sampling(1.0, 1.0, seed))) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_only_the_nucleus_is_drawn_from_and_in_proportion() -> None:
    logits = torch.tensor([0.1, 0.5, 0.3, 0.1]).log()
    generator = torch.Generator().manual_seed(0)

    def counts(sampling: Sampling, draws: int = 4000) -> list[float]:
        drawn = [choose_token(logits, sampling, generator) for _ in range(draws)]
        return [drawn.count(token) / draws for token in range(4)]

    assert counts(Sampling(1.0, 1.0)) == pytest.approx([0.1, 0.5, 0.3, 0.1], abs=0.03)
    assert counts(Sampling(1.0, 0.7)) == pytest.approx([0, 0.625, 0.375, 0], abs=0.03)
    assert counts(Sampling(1.0, 0.4), 50) == [0, 1, 0, 0]
    squared = torch.tensor([0.01, 0.25, 0.09, 0.01])
    assert counts(Sampling(0.5, 1.0)) == pytest.approx((squared / squared.sum()).tolist(), abs=0.03)
    assert counts(Sampling(1e-9, 1.0), 50) == [0, 1, 0, 0]


def test_a_nucleus_is_the_same_whether_or_not_the_vocabulary_is_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(1))

    def draws(head: int, top_p: float) -> list[int]:
        monkeypatch.setattr(generation, "HEAD", head)
        generator = torch.Generator().manual_seed(2)
        return [choose_token(logits, Sampling(1.0, top_p), generator) for _ in range(300)]

    for top_p in (0.1, 0.6, 1.0):  # of which 40 tokens hold the first, not the others
        assert draws(40, top_p) == draws(300, top_p)


def test_ends_with_the_document_or_after_so_many_tokens(tokenizer: Tokenizer) -> None:
    end = tokenizer.end_of_document
    assert list(generate(scripted(tokenizer, [300, 301, end, 302]), "x", 10, GREEDY)) == [300, 301]
    assert list(generate(scripted(tokenizer, [300, 301, end, 302]), "x", 2, GREEDY)) == [300, 301]


def test_tokens_that_only_the_model_has_are_never_chosen(tokenizer: Tokenizer) -> None:
    (token,) = generate(scripted(tokenizer, [450]), "x", 1, GREEDY)  # of 500, the tokenizer has 400
    assert token < tokenizer.vocab_size == 400


def test_characters_come_whole(tokenizer: Tokenizer) -> None:
    text = "é€ 😀!"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # some are spelled in bytes
    pieces = list(text_pieces(tokenizer, "naïve ", iter(ids)))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    half = tokenizer.encode("😀")[:-1]
    assert "".join(text_pieces(tokenizer, "", iter(half))) == tokenizer.decode(half)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_pieces_make_up_the_text_whatever_the_tokens(small: SmallDemo, data: st.DataObject) -> None:
    tokenizer = Tokenizer(small.directory / "tokenizer.model")
    ids = data.draw(st.lists(st.integers(0, 270) | st.integers(0, 399), max_size=30))  # the first 258 are mostly bytes
    assert "def " + "".join(text_pieces(tokenizer, "def ", ids)) == tokenizer.decode([*tokenizer.encode("def "), *ids])


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}])
def test_sampling_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_a_diverged_model_is_named_as_such() -> None:
    with pytest.raises(DataError, match="diverged"):
        choose_token(torch.tensor([0.0, float("nan")]), GREEDY, torch.Generator())


def test_a_tokenizer_larger_than_the_model(trained: Trained) -> None:
    smaller = trained.config.model.model_copy(update={"vocab_size": 300})
    other = trained._replace(config=trained.config.model_copy(update={"model": smaller}))
    with pytest.raises(DataError, match="400 tokens, the model 300"):
        generate(other, "x", 1, GREEDY)


def test_prompt_that_is_not_text(trained: Trained) -> None:
    with pytest.raises(ConfigError, match="not UTF-8"):
        generate(trained, "\udcff", 1, GREEDY)


def test_the_verb_prints_prompt_and_continuation(small: SmallDemo, trained: Trained, tokenizer: Tokenizer) -> None:
    arguments = (small.run, "--prompt", "import ", "--tokens", 12, "--seed", 5)
    plain, structured = verb(*arguments), verb(*arguments, "--json")
    ids = list(generate(trained, "import ", 12, Sampling(seed=5)))  # the verb's defaults are the library's
    text = tokenizer.decode([*tokenizer.encode("import "), *ids])
    assert (plain.returncode, plain.stdout, plain.stderr) == (0, text + "\n", "")
    facts = json.loads(structured.stdout)
    assert facts["prompt"] + facts["text"] == text
    assert (facts["tokens"], facts["step"], facts["ended"]) == (len(ids), 12, "length")


def test_several_prompts_from_a_file_with_seeds_of_their_own(
    small: SmallDemo, trained: Trained, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ['{"prompt": "import ", "seed": 5}', "", '"def "', '{"prompt": "é \\n"}']
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    given = ["--prompts", str(tmp_path / "prompts.jsonl"), "--tokens", "9", "--seed", "2", "--batch", "2"]
    assert run_verb(["generate", str(small.run), *given, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    asked = [("import ", 5), ("def ", 2), ("é \n", 2)]
    assert [each["prompt"] for each in found] == [prompt for prompt, _ in asked]
    texts = []
    for prompt, seed in asked:
        ids = list(generate(trained, prompt, 9, Sampling(seed=seed)))
        texts.append(prompt + "".join(text_pieces(tokenizer, prompt, ids)))
    assert [each["prompt"] + each["text"] for each in found] == texts
    assert run_verb(["generate", str(small.run), *given]) == 0
    shown = "".join(f"--- {number} of 3\n{text}\n" for number, text in enumerate(texts, start=1))
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no prompts"),
        ('{"prompt": 1}', ":1: neither a string"),
        ('"a"\n{"prompt": "x", "seed": -1}', ":2: seed -1"),
        ('"a"\n{', ":2: no JSON"),
        (None, "No such file"),
    ],
)
def test_prompts_that_are_none(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "prompts").write_text(text)
    with pytest.raises(DataError, match=words):
        read_prompts(tmp_path / "prompts")


def test_unusable_input_ends_with_a_message_and_its_exit_code(
    small: SmallDemo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small.run, tmp_path / "run")
    # the newest alone: an older one must not be passed off as what the run has come to
    weights = sorted((tmp_path / "run" / "checkpoints").rglob("*.safetensors"))[-1]
    weights.write_bytes(weights.read_bytes()[:-1])
    for arguments, code, words in [
        ((tmp_path / "nothing",), 5, ["no run in", "run.directory"]),
        ((small.run, "--step", 7), 5, ["no checkpoint of step 7"]),
        ((small.run, "--tokenizer", tmp_path / "no.model"), 5, ["no.model"]),
        ((tmp_path / "run",), 5, ["bytes", "newest that is whole: step"]),
        ((small.run, "--temperature", -1), 2, ["temperature -1"]),
        ((small.run, "--tokens", 0), 2, ["--tokens"]),
        ((small.run, "--prompt", "a", "--prompts", "b"), 2, ["exclude each other"]),
        ((small.run, "--prompts", tmp_path / "none"), 5, ["none: No such file"]),
        ((small.run, "parallel.tensor=2"), 2, ["parallel.tensor=2", "--ranks"]),
    ]:
        ended = run_verb(["generate", *map(str, arguments)])
        said = capsys.readouterr()
        assert ended == code, said.err
        assert all(word in said.err for word in words), said.err
        assert "Traceback" not in said.err and said.out == ""


def test_a_tokenizer_that_is_not_where_the_run_says(small: SmallDemo, tmp_path: Path) -> None:
    shutil.copytree(small.run, tmp_path / "run")
    moved = small.directory / "tokenizer.moved"
    (small.directory / "tokenizer.model").rename(moved)
    try:
        with pytest.raises(DataError, match=r"data\.tokenizer: start where the run was started, or .* --tokenizer"):
            open_run(small.run)
        assert open_run(small.run, tokenizer=moved).tokenizer is not None
    finally:
        moved.rename(small.directory / "tokenizer.model")


def test_it_starts_without_the_compiler() -> None:
    modules = "megatron_stable.commands.generate, megatron_stable.commands.evaluate"
    code = f"import sys, {modules}; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.strip() == "False"
