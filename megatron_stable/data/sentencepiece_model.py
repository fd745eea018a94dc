"""A SentencePiece model as a tokenizer: the tokens of the whole document, found part by part where that is the same.

BPE joins neighbours only into pieces of its vocabulary. So where no piece spans a place, nothing on one side of it
changes what happens on the other: the parts can be encoded alone, and those that come again need not be encoded again.
Such a place is before each run of spaces, if no piece has a space behind anything but spaces.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from megatron_stable.errors import DataError
from megatron_stable.files import explain_os_errors

SPACE = "\u2581"
"""The character that stands for a space in SentencePiece's pieces."""
PART = re.compile(" *[^ ]+| +")
LONGEST_KEPT, MOST_KEPT = 64, 1 << 18
"""Characters of a part, and how many parts, that a tokenizer remembers: at most some 60 MB."""


class SentencePieceModel:
    """A .model file. Raises DataError if `path` is no such file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with explain_os_errors("read the tokenizer", path):
            content = path.read_bytes()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except RuntimeError:
            raise DataError(
                f"{path} is not a SentencePiece model ({len(content)} bytes); make one with `megatron-stable tokenizer`"
            ) from None
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size: int = self._model.vocab_size()
        space_bytes = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        # A model of other origin may put a space before every text; then a text must not be encoded in parts.
        adds_prefix = self._model.encode("a", out_type=str)[0].startswith(SPACE)
        spells = all(map(self._model.is_byte, space_bytes)) and not adds_prefix
        self._space = array("i", space_bytes).tobytes() if spells else None
        self._parts = _Parts(self._model) if _is_divisible(self._model) else None

    @property
    def end_of_document(self) -> int:
        """The model's end of sentence, or its beginning where it has no end."""
        for token in (self._model.eos_id(), self._model.bos_id()):
            if token >= 0:
                return token
        raise DataError(
            f"{self.path} has neither an end-of-sentence nor a beginning-of-sentence token to separate documents"
        )

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32 `[tokens]`."""
        # SentencePiece would take the space's stand-in for a space; as bytes it stays what it is.
        texts = [text] if self._space is None or SPACE not in text else text.split(SPACE)
        return np.frombuffer((self._space or b"").join(map(self._encode, texts)), np.int32)

    def _encode(self, text: str) -> bytes:
        if self._parts is None:
            return array("i", self._model.encode(text)).tobytes()
        return b"".join(map(self._parts.__getitem__, PART.findall(text)))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        text: str = self._model.decode(list(ids))
        return text


class _Parts(dict[str, bytes]):
    """Token ids of parts, int32, encoded when they are first asked for."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def __missing__(self, part: str) -> bytes:
        ids = array("i", self._model.encode(part)).tobytes()
        if len(part) <= LONGEST_KEPT:
            if len(self) >= MOST_KEPT:
                self.clear()
            self[part] = ids
        return ids


def _is_divisible(model: Any) -> bool:
    """Whether a text's tokens are those of its parts: BPE, no normalisation, and no piece that spans two parts.

    Unigram models are not: they add float32 scores from the beginning of the text on, so that what comes first rounds
    what comes later.
    """
    from sentencepiece import sentencepiece_model_pb2  # slow to import; training does without

    proto: Any = sentencepiece_model_pb2

    content = proto.ModelProto.FromString(model.serialized_model_proto())
    normalizer = content.normalizer_spec
    if content.trainer_spec.model_type != proto.TrainerSpec.BPE or content.trainer_spec.treat_whitespace_as_suffix:
        return False
    if normalizer.precompiled_charsmap or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces:
        return False
    if not normalizer.escape_whitespaces:
        return False
    # Neighbours that the model does not know become one token: a space must not be among them.
    known = content.trainer_spec.byte_fallback or any(piece.piece == SPACE for piece in content.pieces)
    return known and not any(re.search(f"[^{SPACE}]{SPACE}| ", piece.piece) for piece in content.pieces)
