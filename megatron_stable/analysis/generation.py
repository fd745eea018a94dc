"""Text from a trained model, one token at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from megatron_stable.analysis.trained import Trained
from megatron_stable.data import Tokenizer
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.model.backends import choose_backend
from megatron_stable.model.elementwise import soft_cap


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
        raise DataError(
            "the model's logits are not finite: this checkpoint is of a run that diverged; try an earlier --step"
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = (logits.double() / sampling.temperature).softmax(0)
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered  # of all tokens more probable than this one
    ordered[before >= sampling.top_p] = 0.0
    return int(tokens[torch.multinomial(ordered, 1, generator=generator)])


def generate(trained: Trained, prompt: str, tokens: int, sampling: Sampling) -> Iterator[int]:
    """Token ids that continue ``prompt``, which is taken as the beginning of a document.

    Ends after ``tokens`` of them, or at the end-of-document token, which is not given out. The model sees the last
    ``sequence_length`` tokens; there is no cache, each token costs a forward pass over them.

    Raises:
        DataError: There is no tokenizer, it does not fit the model, or (later) the model's logits are not finite.
        ConfigError: The prompt is not text.
    """
    tokenizer = need_tokenizer(trained)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError("the prompt is not UTF-8 text") from None
    # in the data, too, a document follows the end of another
    return _continue(trained, tokenizer, [tokenizer.end_of_document, *tokenizer.encode(prompt)], tokens, sampling)


def _continue(trained: Trained, tokenizer: Tokenizer, ids: list[int], tokens: int, sampling: Sampling) -> Iterator[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    for _ in range(tokens):
        logits = _next_logits(trained, ids[-trained.config.model.sequence_length :])
        token = choose_token(logits[: tokenizer.vocab_size].float().cpu(), sampling, generator)
        if token == tokenizer.end_of_document:
            return
        ids.append(token)
        yield token


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


@torch.no_grad()
def _next_logits(trained: Trained, ids: list[int]) -> Tensor:
    """Logits ``[v]`` of the token after ``ids``."""
    last, config = len(ids) - 1, trained.config.model
    if choose_backend(config, trained.device.type).name == "flex":
        # compiled for one length; what stands behind the last token does not reach it
        ids = ids + [0] * (config.sequence_length - len(ids))
    *body, head = trained.model.layers.values()
    x = torch.tensor([ids], device=trained.device)
    for layer in body:
        x = layer(x)
    logits: Tensor = head(x[:, last])  # of one position, not of all: [1, v]
    return logits[0] if config.final_logit_cap is None else soft_cap(logits[0], config.final_logit_cap)
