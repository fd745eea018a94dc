"""Document boundaries: within a row of tokens, attention and positions stay within a document.

A row is a window of the token stream, and in the stream an end-of-document token stands between two documents. As an
input it begins the document behind it, as a target it ends the one before it, so that every token is predicted, the
first one of a document from the boundary alone, as :mod:`megatron_stable.analysis.generation` begins a text::

    inputs      b  c  #  d  e  f  #  g        #: end of document
    targets     c  #  d  e  f  #  g  h
    starts      0  0  2  2  2  2  6  6        a token sees the row from here to itself
    positions   0  1  0  1  2  3  0  1

Each stage of a pipeline finds the boundaries in the tokens that it reads: nothing is sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_stable.config.schema import ModelConfig
from megatron_stable.model.backends import SEEN, choose_backend
from megatron_stable.model.positions import EmbeddingOutput, Positions, positions_of


@dataclass(frozen=True)
class Documents:
    """The documents of a micro batch, as all layers share them.

    Attributes:
        starts: ``[b, s]`` int64: where in its row the document of each token begins.
        positions: Of the tokens in their documents.
        seen: What each query sees, as the attention backend takes it.
    """

    starts: Tensor
    positions: Positions
    seen: Any


def document_starts(tokens: Tensor, end_of_document: int) -> Tensor:
    """Token ids ``[b, s]`` -> where in its row the document of each begins, ``[b, s]`` int64."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return torch.where(tokens == end_of_document, places, 0).cummax(1).values


class DocumentMask:
    """Tells the layers of a model, or of a stage of it, where the documents of the next micro batch begin.

    Args:
        config: Of the model, with the backend that was chosen for it with documents.
        end_of_document: The token between documents.
        device: Where the model is.
    """

    def __init__(self, module: nn.Module, config: ModelConfig, end_of_document: int, device: torch.device) -> None:
        self.end_of_document, self.device = end_of_document, device
        self.embedding = [layer for layer in module.modules() if isinstance(layer, EmbeddingOutput)]
        self.blocks: list[Any] = [layer for layer in module.modules() if hasattr(layer, "documents")]
        self.see = SEEN[choose_backend(config, device.type, documents=True).name]
        self.config = config

    def announce(self, tokens: Tensor) -> None:
        """What the next forward pass sees: inputs ``[b, s]``; on the CPU, nothing waits for a device."""
        self._tell(self.documents(document_starts(tokens, self.end_of_document)))

    def forget(self) -> None:
        """Rows are single documents again."""
        self._tell(None)

    def documents(self, starts: Tensor) -> Documents:
        """The documents that begin there, ``[b, s]``."""
        length, seen = starts.shape[1], self.see(starts, self.device)
        starts = starts.to(self.device, non_blocking=True)
        each = torch.arange(length, device=self.device) - starts
        return Documents(starts, positions_of(each, length, self.config), seen)

    def _tell(self, documents: Documents | None) -> None:
        for block in self.blocks:
            block.documents = documents
        for layer in self.embedding:
            layer.positions = documents.positions if documents is not None else None
