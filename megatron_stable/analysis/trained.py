"""A trained run, opened to be used, in one process or on several ranks: model, configuration and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_stable.analysis.ranks import Ranks, layout
from megatron_stable.checkpoint.catalog import newest_whole
from megatron_stable.checkpoint.model import fill, load_model, usable_config
from megatron_stable.config.schema import Config
from megatron_stable.data import Tokenizer
from megatron_stable.errors import DataError
from megatron_stable.model import sigma
from megatron_stable.model.documents import DocumentMask
from megatron_stable.model.transformer import Transformer
from megatron_stable.parallel import agreement
from megatron_stable.parallel.lifeline import Lifeline
from megatron_stable.parallel.topology import Topology


class Trained(NamedTuple):
    """A model, or this rank's part of it, how it was trained, and what its token ids mean."""

    config: Config
    model: Transformer
    tokenizer: Tokenizer | None
    step: int
    ranks: Ranks = Ranks()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def end_of_document(self) -> int:
        """The token between documents in what it was trained on: the tokenizer's, if the run does not name another."""
        given = self.config.data.end_of_document
        if given is not None:
            return given
        assert self.tokenizer is not None
        return self.tokenizer.end_of_document

    @contextmanager
    def reading(self, tokens: Tensor) -> Iterator[None]:
        """Within, the model is given the rows ``[b, s]`` of token ids of a data set, and sees documents in them as it
        did in training."""
        data = self.config.data
        if not data.document_mask or data.end_of_document is None:
            yield
            return
        mask = DocumentMask(self.model, self.config.model, data.end_of_document, self.device)
        mask.announce(tokens)
        try:
            yield
        finally:
            mask.forget()


def open_run(run: str | Path, step: int | None = None, tokenizer: str | Path | None = None) -> Trained:
    """The model of a run in fp32 and evaluation mode, on the GPU if there is one.

    Args:
        run: The run's directory.
        step: Of the checkpoint; ``None``: the newest that is whole.
        tokenizer: The SentencePiece model; ``None``: the one that the run's configuration names, if it names one.

    Raises:
        DataError: There is no such run or checkpoint, or the tokenizer cannot be read.
    """
    _refuse_elsewhere(run)
    config, model, step = load_model(run, step, _device())
    return Trained(config, model, _open_tokenizer(tokenizer, config, run), step)


def open_on_ranks(
    run: str | Path,
    step: int | None,
    tokenizer: str | Path | None,
    lifeline: Lifeline,
    given: Sequence[str] = (),
    replicas: bool = True,
) -> Trained:
    """As :func:`open_run`, each rank its own part of the model, of which alone the checksums are compared. Collective.

    Args:
        given: The layout, as `megatron_stable.analysis.ranks.layout` takes it.
        replicas: Whether there may be several copies of the model.

    Raises:
        MegatronStableError: The same on all ranks: as :func:`open_run`; the layout does not suit.
    """
    wanted = agreement.decided(lambda: newest_whole(run, step, verify=False).step)
    with agreement.together():
        whole = newest_whole(run, wanted, verify=False)
        config = usable_config(whole)
        tensor, pipeline = layout(config, dist.get_world_size(), given, replicas)
        opened = _open_tokenizer(tokenizer, config, run)
    topology = Topology(tensor, pipeline)
    with lifeline.slow(), agreement.together(), _or_another(run):
        model = fill(whole, config, _device(), topology)
    sigma.measure(model)
    return Trained(config, model, opened, whole.step, Ranks(topology, lifeline.progress))


@contextmanager
def _or_another(run: str | Path) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        which = f"`megatron-stable checkpoints {run} --verify` says which are whole"
        raise DataError(f"{error}; name another checkpoint with --step: {which}") from None


def _refuse_elsewhere(run: str | Path) -> None:
    if not (Path(run) / "checkpoints").is_dir():
        raise DataError(f"no run in {run}: name the run.directory of a run, the one that holds checkpoints/")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _open_tokenizer(given: str | Path | None, config: Config, run: str | Path) -> Tokenizer | None:
    if given is not None:
        return Tokenizer(given)
    if config.data.tokenizer is None:
        return None
    try:
        return Tokenizer(config.data.tokenizer)
    except DataError as error:
        raise DataError(
            f"{error}. {run} names it in data.tokenizer: "
            "start where the run was started, or name the file with --tokenizer"
        ) from None
