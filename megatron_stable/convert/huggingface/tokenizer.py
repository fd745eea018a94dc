"""A SentencePiece model as ``tokenizer.json``, which `transformers` and `tokenizers` read without SentencePiece.

Same text, same ids, but for two kinds of text: U+2581, SentencePiece's stand-in for a space, is taken for a space, and
the names of control tokens, ``</s>``, for these tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_stable.data.sentencepiece_model import SPACE
from megatron_stable.data.tokenizer import Tokenizer, tokenizer_file
from megatron_stable.errors import DataError
from megatron_stable.files import replace_file

MODEL = "tokenizer.model"
UNIGRAM, BPE = 1, 2  # of SentencePiece's TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6  # of its SentencePiece.Type


def write_tokenizer(path: Path, directory: Path, length: int) -> dict[str, Any]:
    """Write ``tokenizer.model``, ``tokenizer.json`` and ``tokenizer_config.json``; of a tokenizer.json, itself and what
    lies beside it.

    Args:
        path: The tokenizer.
        length: The most tokens that the model takes.

    Returns:
        The keys of config.json that follow: ``eos_token_id``.

    Raises:
        DataError: It is no SentencePiece model, or normalises text in a way that ``tokenizer.json`` does not have.
    """
    from sentencepiece import sentencepiece_model_pb2 as messages

    tokenizer, path = Tokenizer(path), tokenizer_file(path)
    data = path.read_bytes()
    if path.suffix == ".json":
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (path.parent / name).is_file():
                replace_file(directory / name, (path.parent / name).read_bytes())
        replace_file(directory / "tokenizer.json", data)
        return {"eos_token_id": tokenizer.end_of_document}
    proto = messages.ModelProto.FromString(data)  # type: ignore[attr-defined]
    replace_file(directory / MODEL, data)
    _write(directory / "tokenizer.json", tokenizer_json(proto, path))
    end = proto.pieces[tokenizer.end_of_document].piece
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "unk_token": next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN),
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    _write(directory / "tokenizer_config.json", about)
    return {"eos_token_id": tokenizer.end_of_document}


def tokenizer_json(proto: Any, path: Path) -> dict[str, Any]:
    """What ``tokenizer.json`` holds. DataError: it cannot say what the model does."""
    spec, trained = proto.normalizer_spec, proto.trainer_spec
    if spec.precompiled_charsmap or spec.remove_extra_whitespaces or not spec.escape_whitespaces:
        raise DataError(
            f"{path} normalises text (rule {spec.name!r}), which tokenizer.json does not have; "
            "export without it: --no-tokenizer"
        )
    pieces = proto.pieces
    prefix = [{"type": "Prepend", "prepend": SPACE}] if spec.add_dummy_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if spec.add_dummy_prefix else []
    special = {UNKNOWN, CONTROL}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": number,
                "content": piece.piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": piece.type in special,
            }
            for number, piece in enumerate(pieces)
            if piece.type in {*special, USER}
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": _model(pieces, trained, path),
    }


def _model(pieces: Any, trained: Any, path: Path) -> dict[str, Any]:
    unknown = next(number for number, piece in enumerate(pieces) if piece.type == UNKNOWN)
    if trained.model_type == UNIGRAM:
        vocabulary = [[piece.piece, piece.score] for piece in pieces]
        return {"type": "Unigram", "unk_id": unknown, "vocab": vocabulary, "byte_fallback": trained.byte_fallback}
    if trained.model_type != BPE:
        raise DataError(f"{path} is neither of kind bpe nor unigram; export without it: --no-tokenizer")
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": pieces[unknown].piece,
        "fuse_unk": True,
        "byte_fallback": trained.byte_fallback,
        "vocab": {piece.piece: number for number, piece in enumerate(pieces)},
        "merges": _merges({piece.piece: piece.score for piece in pieces if piece.type == NORMAL}),
    }


def _merges(scores: dict[str, float]) -> list[list[str]]:
    """Pairs of pieces that make a piece, those first that SentencePiece would merge first: by the piece's score."""
    pairs = (
        (score, [piece[:cut], piece[cut:]])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    )
    return [pair for _, pair in sorted(pairs, key=lambda entry: -entry[0])]


def _write(path: Path, body: Any) -> None:
    replace_file(path, (json.dumps(body, ensure_ascii=False, indent=2) + "\n").encode())
