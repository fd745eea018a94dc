"""Texts from a trained model, one token of each at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from megatron_stable.analysis.trained import Trained
from megatron_stable.data import Tokenizer
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.model.cache import Cache, remembering
from megatron_stable.model.elementwise import soft_cap
from megatron_stable.parallel.agreement import agreed

DIVERGED = "the model's logits are not finite: this checkpoint is of a run that diverged; try an earlier --step"
NOT_FINITE = -1  # in place of a token
HEAD = 1024  # tokens that most often hold the nucleus


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises ConfigError for values out of range.

    Attributes:
        temperature: Divides the logits; 0: always the most probable token.
        top_p: Only the most probable tokens that together have this probability (nucleus sampling, arXiv 1904.09751).
        seed: Of the draws; the same seed gives the same text.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not (isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature {self.temperature}: give a number from 0 (the most probable token) up")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p}: give a probability above 0, at most 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed {self.seed}: give an integer from 0 to 2^63 - 1")


def choose_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw a token from logits ``[v]`` on the CPU."""
    if not torch.isfinite(logits).all():
        raise DataError(DIVERGED)
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = (logits.double() / sampling.temperature).softmax(0)
    ordered, tokens = probabilities.topk(min(HEAD, len(probabilities)))
    if ordered.sum() < sampling.top_p:  # which sorts all of a large vocabulary only where it has to
        ordered, tokens = probabilities.sort(descending=True)
    total = ordered.cumsum(0)
    chosen = int((total - ordered < sampling.top_p).sum())  # whose more probable ones have less than that together
    point = torch.rand((), generator=generator, dtype=torch.float64) * total[chosen - 1]
    return int(tokens[min(int(torch.searchsorted(total, point, right=True)), chosen - 1)])


def generate(trained: Trained, prompt: str, tokens: int, sampling: Sampling) -> Iterator[int]:
    """Token ids that continue ``prompt``: :func:`generate_each` of one."""
    return (token for _, token in generate_each(trained, [prompt], tokens, [sampling]))


def generate_each(
    trained: Trained, prompts: Sequence[str], tokens: int, samplings: Sequence[Sampling]
) -> Iterator[tuple[int, int]]:
    """(number of a prompt, the next token id of its continuation), all prompts side by side.

    A prompt is taken as the beginning of a document. Its continuation ends after ``tokens`` tokens, or at the
    end-of-document token, which is not given out. But for rounding it depends on the prompt and its sampling alone, not
    on the others. Keys and values are kept, so that each token is computed once. When a text has filled the window of
    ``sequence_length`` tokens, the model goes on from the last half of it, computed anew: it sees from half a window to
    a whole one.

    Collective over the ranks that hold the model, of which all must be given the same, and see the same.

    Raises:
        DataError: There is no tokenizer, it does not fit the model, or (later) the model's logits are not finite.
        ConfigError: A prompt is not text.
    """
    tokenizer = need_tokenizer(trained)
    texts = []
    for number, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ConfigError("the prompt is not UTF-8 text") from None
        # in the data, too, a document follows the end of another
        ids = [trained.end_of_document, *tokenizer.encode(prompt)]
        texts.append(_Text(number, ids, sampling, trained.config.model.sequence_length))
    return _continue(trained, tokenizer, texts, tokens)


class _Text:
    """A prompt and what has been generated of its continuation.

    Attributes:
        seen: The tokens that the model is to see: at most a window.
        cached: How many of them the cache holds.
    """

    def __init__(self, number: int, ids: list[int], sampling: Sampling, window: int) -> None:
        self.number, self.sampling, self.window = number, sampling, window
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.seen, self.cached, self.made = ids[-window:], 0, 0

    def add(self, token: int) -> None:
        if len(self.seen) == self.window:
            # keys know their positions: none of them can be moved
            self.seen, self.cached = self.seen[-max(1, self.window // 2) :], 0
        self.seen.append(token)
        self.made += 1


def _continue(trained: Trained, tokenizer: Tokenizer, texts: list[_Text], tokens: int) -> Iterator[tuple[int, int]]:
    config, ranks = trained.config.model, trained.ranks
    room = min(config.sequence_length, max(len(text.seen) for text in texts) + tokens)
    with remembering(trained.model, config, len(texts), room) as cache:
        while texts:
            logits = _next_logits(trained, cache, texts)
            chosen = None if logits is None else _choose(logits[:, : tokenizer.vocab_size], texts)
            words = ranks.told(chosen, len(texts), trained.device)
            if NOT_FINITE in words:
                raise agreed(DataError, DIVERGED)
            going = []
            for row, (text, token) in enumerate(zip(texts, words, strict=True)):
                if token == trained.end_of_document:
                    continue
                text.add(token)
                yield text.number, token
                if text.made < tokens:
                    going.append(row)
            if len(going) < len(texts):
                texts = [texts[row] for row in going]
                cache.keep(going)


def _choose(logits: Tensor, texts: list[_Text]) -> list[int]:
    try:
        rows = zip(logits.float().cpu(), texts, strict=True)
        return [choose_token(row, text.sampling, text.generator) for row, text in rows]
    except DataError:  # for all ranks to hear
        return [NOT_FINITE] * len(texts)


@torch.no_grad()
def _next_logits(trained: Trained, cache: Cache, texts: list[_Text]) -> Tensor | None:
    """Logits ``[texts, v]`` of the token after each text, where the decision is made."""
    found: dict[int, Tensor] = {}
    # prompts, and windows that begin anew, are read apart from texts that only wait for their next token
    begun = [row for row, text in enumerate(texts) if text.cached]
    fresh = [row for row, text in enumerate(texts) if not text.cached]
    for rows in filter(None, (fresh, begun)):
        chosen = [texts[row] for row in rows]
        logits = _pass(trained, cache, rows, chosen)
        if logits is not None:
            found |= dict(zip(rows, logits, strict=True))
        for text in chosen:
            text.cached = len(text.seen)
    return torch.stack([found[row] for row in range(len(texts))]) if found else None


def _pass(trained: Trained, cache: Cache, rows: list[int], texts: list[_Text]) -> Tensor | None:
    """One pass over what the cache does not hold of these texts."""
    news = [text.seen[text.cached :] for text in texts]
    width, config = max(map(len, news)), trained.config.model
    cache.at(rows, [text.cached for text in texts], width)
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in news], device=trained.device)
    layers = list(trained.model.layers.values())
    body, head = (layers[:-1], layers[-1]) if trained.ranks.last_stage else (layers, None)
    x = trained.ranks.hand_on(tokens, body, config.hidden)
    if head is None or x is None:
        return None
    last = torch.tensor([len(ids) - 1 for ids in news], device=trained.device)
    logits = head(x[torch.arange(len(x), device=x.device), last].unsqueeze(1))[:, 0]  # [texts, v/tp]
    if config.final_logit_cap is not None:
        logits = soft_cap(logits, config.final_logit_cap)
    return trained.ranks.whole(logits)


def need_tokenizer(trained: Trained) -> Tokenizer:
    """The tokenizer; raises DataError if there is none, or one with more tokens than the model knows."""
    tokenizer, vocab_size = trained.tokenizer, trained.config.model.vocab_size
    if tokenizer is None:
        raise DataError("the run was trained without data.tokenizer: name the SentencePiece model with --tokenizer")
    assert vocab_size is not None
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{tokenizer.path} has {tokenizer.vocab_size} tokens, the model {vocab_size}: they do not belong together; "
            "name the tokenizer that the run was trained with"
        )
    return tokenizer


def text_pieces(tokenizer: Tokenizer, prompt: str, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come, in whole characters: a character of several byte tokens comes with its last."""
    ids = tokenizer.encode(prompt)
    text = shown = tokenizer.decode(ids)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        # an unfinished character is at most three bytes, each of which decodes to U+FFFD
        kept = len(text)
        while kept > len(text) - 3 and text[:kept].endswith("\ufffd"):
            kept -= 1
        if kept > len(shown):
            yield text[len(shown) : kept]
            shown = text[:kept]
    if len(text) > len(shown):
        yield text[len(shown) :]
