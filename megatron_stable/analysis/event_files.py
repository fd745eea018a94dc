"""Scalars out of TensorBoard's event files, whoever wrote them: a million of them in seconds, without TensorFlow.

An event file is a sequence of TFRecords, each ``length (u64) | CRC of length (u32) | data | CRC of data (u32)``, little
endian, and the data a protobuf ``Event`` of TensorBoard. TensorBoard's own loader computes each checksum byte by byte
in Python. Here the records are framed in one pass, those of other tags are left encoded, and the rest is taken together
for all records of one length: their checksums, and, where they are one plain scalar as nearly all are, their numbers.
What is not plain goes through TensorBoard's protobuf classes.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_stable.errors import DataError
from megatron_stable.files import explain_os_errors

HEADER, FOOTER = 12, 4
DTYPES = (np.intp, np.int64, float, float, bool)  # of which record it is, and of `Scalars`
WALL_TIME, STEP = 0x09, 0x10  # how these two fields of an Event begin; they come first, in this order
START = re.compile(rb":.{1,2}\x08\x01", re.DOTALL)  # a SessionLog whose status is START; may match elsewhere too


class Scalars(NamedTuple):
    """What one file says of a tag, in the order of writing.

    Attributes:
        steps: int64 ``[n]``.
        values: float64 ``[n]``; NaN where `restarts` is set.
        times: Wall time in seconds, float64 ``[n]``.
        restarts: bool ``[n]``: no value, but the word of a restarted run that it supersedes all from this step on.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    times: NDArray[np.float64]
    restarts: NDArray[np.bool_]


class EventFile:
    """One event file.

    Attributes:
        notes: What was left out of what has been read, for the user; filled by reading.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []

    def scalars(self, tag: str) -> Scalars:
        """All scalars of a tag, as simple values or as tensors of one number.

        Raises:
            DataError: The file is not an event file, is damaged, or cannot be read.
        """
        key, forms, damaged = _key(tag), _forms(tag), 0
        records = [record for record in self._records() if key in record or START.search(record)]
        parts: list[tuple[Any, ...]] = []
        others: list[tuple[int, int, float, float, bool]] = []
        for rows, data in _by_length(records):
            left = _intact(data)
            damaged += int((~left).sum())
            for form in forms:
                plain, steps, values, times = _plain(data, form)
                plain &= left
                parts.append((rows[plain], steps[plain], values[plain], times[plain], np.zeros(plain.sum(), bool)))
                left &= ~plain
            for row in rows[left].tolist():
                event = self._decoded(records[row])
                if event.HasField("session_log") and event.session_log.status == event.session_log.START:
                    others.append((row, event.step, np.nan, event.wall_time, True))
                numbers = (_number(value) for value in event.summary.value if value.tag == tag)
                others += [
                    (row, event.step, number, event.wall_time, False) for number in numbers if number is not None
                ]
        if damaged:
            self._note(f"has {damaged:,} records that do not agree with their checksums; they were left out")
        parts.append(tuple(np.array([other[i] for other in others], dtype) for i, dtype in enumerate(DTYPES)))
        row, *fields = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(row, kind="stable")
        return Scalars(*(field[order] for field in fields))

    def mentions(self, tag: str) -> bool:
        """Whether the tag's name is in the file: quick, and true too where the tag holds no scalars."""
        with self._mapped() as data:
            return data is not None and data.find(_key(tag)) >= 0

    def tags(self) -> set[str]:
        """The tags that hold scalars."""
        found: set[str] = set()
        for record in self._records():
            values = self._decoded(record).summary.value
            found.update(value.tag for value in values if value.tag not in found and _number(value) is not None)
        return found

    def _decoded(self, record: bytes) -> Any:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from tensorboard.compat.proto.event_pb2 import Event

        try:
            return Event.FromString(record[:-FOOTER])
        except DecodeError:
            raise DataError(f"{self.path} is not an event file of TensorBoard: a record holds something else") from None

    def _records(self) -> Iterator[bytes]:
        """The data of each whole record, with its checksum behind it."""
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

        with self._mapped() as data:
            if data is None:
                self._note("is empty")
                return
            lengths: dict[bytes, int] = {}  # of the headers seen, of which there are few: each is checked once
            position, size = 0, len(data)
            while size - position >= HEADER:
                header = data[position : position + HEADER]
                length = lengths.get(header)
                if length is None:
                    length, checksum = struct.unpack("<QI", header)
                    if masked_crc32c(header[:8]) != checksum:
                        if position and len(data[position:].rstrip(b"\0")) < HEADER:
                            break  # a crash of the machine can leave zeros where data should have gone
                        raise self._damaged(position)
                    lengths[header] = length
                end = position + HEADER + length + FOOTER
                if end > size:
                    break
                yield data[position + HEADER : end]
                position = end
            if position < size:
                self._note(f"is cut off: its last {size - position:,} bytes are no whole record and were left out")

    def _damaged(self, position: int) -> DataError:
        if not position:
            return DataError(f"{self.path} is no event file of TensorBoard, though it is named like one: move it away")
        return DataError(
            f"{self.path} is damaged at byte {position:,}, where the length of a record does not agree with its "
            "checksum: restore the file from where it was copied, or move it away"
        )

    def _mapped(self) -> _Mapped:
        return _Mapped(self.path)

    def _note(self, text: str) -> None:
        if (note := f"{self.path} {text}") not in self.notes:
            self.notes.append(note)


class _Mapped:
    """The bytes of a file as a context; None for a file without any."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: mmap.mmap | None = None

    def __enter__(self) -> mmap.mmap | None:
        with explain_os_errors("read", self.path), self.path.open("rb") as file:
            if file.seek(0, 2):
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self.data

    def __exit__(self, *_: object) -> None:
        if self.data is not None:
            self.data.close()


def _key(tag: str) -> bytes:
    """How a summary's value begins that has this tag."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary.Value(tag=tag).SerializeToString()


def _number(value: Any) -> float | None:
    """The scalar of a summary's value; ``None`` if it holds something else."""
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return value.simple_value
    if kind != "tensor":
        return None
    tensor = value.tensor
    if any(dim.size != 1 for dim in tensor.tensor_shape.dim):
        return None
    if len(tensor.float_val) == 1:
        return tensor.float_val[0]
    from tensorboard.util.tensor_util import make_ndarray

    try:
        array = make_ndarray(tensor)
        return float(array.item()) if array.dtype.kind in "fiub" else None
    except (TypeError, ValueError):
        return None  # a type that TensorBoard cannot show as a scalar either


def _by_length(records: Sequence[bytes]) -> Iterator[tuple[NDArray[np.intp], NDArray[np.uint8]]]:
    """Records of one length, as which of all they are ``[n]`` and their bytes ``[n, length]``."""
    lengths = np.array([len(record) for record in records])
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        together = b"".join(records[row] for row in rows.tolist())
        yield rows, np.frombuffer(together, np.uint8).reshape(len(rows), length)


def _intact(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which records ``[n, length]`` agree with the masked CRC-32C that is their last 4 bytes."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import CRC_TABLE

    table = np.array(CRC_TABLE, np.uint32)
    crc = np.full(len(data), 0xFFFFFFFF, np.uint32)
    for column in data[:, :-FOOTER].T:
        crc = table[(crc ^ column) & 0xFF] ^ (crc >> 8)
    crc = ~crc
    masked = ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)
    return masked == _column(data[:, -FOOTER:], "<u4")


def _forms(tag: str) -> list[NDArray[np.uint8]]:
    """How an event with one scalar of this tag goes on after wall time and step, up to the 4 bytes of the number."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    numbers = ({"tensor_content": bytes(4)}, {"float_val": [1.0]})  # TensorFlow's own, and PyTorch's new style
    shapes: tuple[dict[str, Any], ...] = ({}, {"tensor_shape": TensorShapeProto()})
    tensors = [TensorProto(dtype="DT_FLOAT", **number, **shape) for number in numbers for shape in shapes]
    values = [Summary.Value(tag=tag, simple_value=1), *(Summary.Value(tag=tag, tensor=tensor) for tensor in tensors)]
    events = [Event(summary=Summary(value=[value])) for value in values]
    return [np.frombuffer(event.SerializeToString()[:-4], np.uint8) for event in events]


def _plain(data: NDArray[np.uint8], form: NDArray[np.uint8]) -> tuple[NDArray[Any], ...]:
    """Which records ``[n, length]`` are ``wall time | step | form | number``, and their steps, numbers, wall times.

    Where a record is not, the numbers mean nothing.
    """
    data = data[:, :-FOOTER]
    end = data.shape[1] - 4 - len(form)
    if not 1 <= end - 10 <= 9:  # the bytes of the step: 7 bits each, the lowest first, the last without the high bit
        return tuple(np.zeros(len(data), dtype) for dtype in (bool, np.int64, float, float))
    digits = data[:, 10:end]
    plain = (data[:, 0] == WALL_TIME) & (data[:, 9] == STEP) & (data[:, end:-4] == form).all(1)
    plain &= (digits[:, :-1] >= 0x80).all(1) & (digits[:, -1] < 0x80)
    steps = sum((digits[:, i] & 0x7F).astype(np.int64) << 7 * i for i in range(end - 10))
    return plain, np.asarray(steps), _column(data[:, -4:], "<f4").astype(float), _column(data[:, 1:9], "<f8")


def _column(data: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    """Bytes ``[n, size]`` as ``[n]`` numbers of that size."""
    return np.ascontiguousarray(data).view(dtype)[:, 0]
