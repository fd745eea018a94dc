"""A tokenizer.json, the format of the `tokenizers` library, alone or in a Hugging Face directory.

Its text is encoded as the library does it, without the tokens of its post-processor (a beginning of sentence, a chat
template); special tokens that are written out in a text become those tokens. transformers is not needed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_stable.errors import ConfigError, DataError
from megatron_stable.files import explain_os_errors

DESCRIPTIONS = ("tokenizer_config.json", "special_tokens_map.json")
"""Files beside a tokenizer.json that may say which token ends a text."""
USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>")
"""What it is where nothing says so, if the tokenizer has it as a special token; the first of them."""


class TokenizerJson:
    """A tokenizer.json. Raises DataError if `path` is none, ConfigError where the package tokenizers is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with explain_os_errors("read the tokenizer", path):
            content = path.read_bytes()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes of `preprocess` are the parallelism
        try:
            import tokenizers
        except ImportError:
            raise ConfigError(
                f"reading {path} needs the package tokenizers: pip install 'megatron-stable[tokenizers]'"
            ) from None
        try:
            self._model = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{path} is not a tokenizer.json ({error})") from None
        self._model.no_truncation()
        self._model.no_padding()
        self.vocab_size = 1 + max(self._model.get_vocab(with_added_tokens=True).values(), default=-1)
        if not self.vocab_size:
            raise DataError(f"{path} has an empty vocabulary")
        self._end = self._find_end()
        # Data separated by another token are other data.
        self.sha256 = hashlib.sha256(content + f"\0{self._end}".encode()).hexdigest()

    @property
    def end_of_document(self) -> int:
        """The token that the files beside the tokenizer.json name as `eos_token`, or a usual one."""
        if self._end is None:
            raise DataError(
                f"{self.path} has no token to separate documents: name one as eos_token in a {DESCRIPTIONS[0]} beside "
                f"it, or give it one of {', '.join(USUAL_ENDS)} as a special token"
            )
        return self._end

    def _find_end(self) -> int | None:
        for name in DESCRIPTIONS:
            token = _eos_token(self.path.with_name(name))
            if token is not None:
                found: int | None = self._model.token_to_id(token)
                if found is None:
                    raise DataError(f"{self.path.with_name(name)} has the eos_token {token!r}, {self.path} does not")
                return found
        special = {token.content: id for id, token in self._model.get_added_tokens_decoder().items() if token.special}
        return next((special[token] for token in USUAL_ENDS if token in special), None)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32 `[tokens]`."""
        return np.asarray(self._model.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens have none."""
        text: str = self._model.decode(list(ids), skip_special_tokens=True)
        return text


def _eos_token(path: Path) -> str | None:
    """The `eos_token` of a description, a text or an object with the text as `content`; None: it names none."""
    if not path.is_file():
        return None
    try:
        found: Any = json.loads(path.read_bytes()).get("eos_token")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is unreadable ({error}); mend or remove it") from error
    token = found.get("content") if isinstance(found, dict) else found
    if not isinstance(token, str | None):
        raise DataError(f"{path} has the eos_token {found!r}, which is not a text")
    return token
