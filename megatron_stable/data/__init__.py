"""Text to tokens to batches: tokenizer, .bin/.idx datasets, sample order, skip windows, loader. Needs no torch."""

from megatron_stable.data.check import (
    check_boundaries,
    check_share,
    check_tokenizer,
    check_vocabulary,
    remember,
    unchecked,
)
from megatron_stable.data.course import Course, Era
from megatron_stable.data.dataset import (
    Blend,
    Location,
    Samples,
    TokenDataset,
    list_source,
    open_dataset,
    open_source,
    open_stages,
    stream_of,
)
from megatron_stable.data.documents import DocumentReader, RawDocument, UndecodableError
from megatron_stable.data.indexed import Head, IndexedDataset, IndexedWriter, token_dtype
from megatron_stable.data.interleave import Interleave
from megatron_stable.data.loader import Batches
from megatron_stable.data.order import SampleOrder, permute
from megatron_stable.data.preprocess import PreprocessSummary, preprocess
from megatron_stable.data.repetition import RepetitionFilter, repetition_filter
from megatron_stable.data.shards import Listing, open_listed, read_heads
from megatron_stable.data.skip import SkipWindows
from megatron_stable.data.sources import Wanted, unrecorded, wanted
from megatron_stable.data.stages import Paths, Stage, Stages, Stream
from megatron_stable.data.tokenizer import Tokenizer, TokenizerSummary, train_tokenizer

__all__ = [
    "Batches",
    "Blend",
    "Course",
    "DocumentReader",
    "Era",
    "Head",
    "IndexedDataset",
    "IndexedWriter",
    "Interleave",
    "Listing",
    "Location",
    "Paths",
    "PreprocessSummary",
    "RawDocument",
    "RepetitionFilter",
    "SampleOrder",
    "Samples",
    "SkipWindows",
    "Stage",
    "Stages",
    "Stream",
    "TokenDataset",
    "Tokenizer",
    "TokenizerSummary",
    "UndecodableError",
    "Wanted",
    "check_boundaries",
    "check_share",
    "check_tokenizer",
    "check_vocabulary",
    "list_source",
    "open_dataset",
    "open_listed",
    "open_source",
    "open_stages",
    "permute",
    "preprocess",
    "read_heads",
    "remember",
    "repetition_filter",
    "stream_of",
    "token_dtype",
    "train_tokenizer",
    "unchecked",
    "unrecorded",
    "wanted",
]
