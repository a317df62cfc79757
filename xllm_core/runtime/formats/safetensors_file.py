"""One .safetensors file: a checked header and a mapped body.

Nothing in the header is believed before it is compared with the file: sizes, dtypes, shapes, and that the tensors fill the body exactly, without gap
or overlap. Source: the format description of the safetensors project.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from xllm_core.errors import ModelFormatError
from xllm_core.plugins.contracts.weights import TensorInfo

if TYPE_CHECKING:
    import torch

# Name in the header -> (dtype name, bytes per item).
_DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "I64": ("int64", 8), "I32": ("int32", 4),
    "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1), "BOOL": ("bool", 1),
}  # fmt: skip
_MAX_HEADER_BYTES = 100 * 2**20
_REDO = "download or save the file again"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: first byte counted from the start of the file."""

    info: TensorInfo
    offset: int
    num_bytes: int


class SafetensorsFile:
    """An opened file. Raises ModelFormatError for whatever is not as the format says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.size_bytes = path.stat().st_size
            with path.open("rb") as file:
                self.header_bytes = self._read_header(file.read(8), file.read)
                # Copy on write: torch wants buffers it could write to, though nobody does.
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror}); check that the download is complete") from error
        self.tensors = self._parse(self.header_bytes)

    def read(self, name: str) -> torch.Tensor:
        """One tensor; aliases the mapped file."""
        import torch

        stored = self.tensors[name]
        dtype: torch.dtype = getattr(torch, stored.info.dtype)
        if stored.num_bytes == 0:
            return torch.empty(stored.info.shape, dtype=dtype)
        count = stored.num_bytes // dtype.itemsize
        return torch.frombuffer(self._data, dtype=dtype, count=count, offset=stored.offset).view(stored.info.shape)

    def sample(self, stored: StoredTensor, start: int, count: int) -> bytes:
        """Some bytes of a tensor, for fingerprints."""
        return self._data[stored.offset + start : min(stored.offset + start + count, stored.offset + stored.num_bytes)]

    def _error(self, problem: str) -> ModelFormatError:
        return ModelFormatError(f"{self.path}: {problem}")

    def _read_header(self, prefix: bytes, read: Any) -> bytes:
        if len(prefix) < 8:
            raise self._error(f"has {self.size_bytes} bytes, too few for a safetensors header; {_REDO}")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(_MAX_HEADER_BYTES, self.size_bytes - 8):
            raise self._error(
                f"claims a header of {length} bytes in a file of {self.size_bytes}; it is truncated or not safetensors: {_REDO}"
            )
        header: bytes = read(length)
        return header

    def _parse(self, raw: bytes) -> dict[str, StoredTensor]:
        try:
            header = json.loads(raw, object_pairs_hook=self._without_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._error(f"its header is not JSON ({error}); {_REDO}") from error
        if not isinstance(header, dict):
            raise self._error(f"its header is a {type(header).__name__}, an object is needed; {_REDO}")
        header.pop("__metadata__", None)
        start = 8 + len(raw)
        tensors = {name: self._parse_entry(name, entry, start) for name, entry in header.items()}
        end = start
        for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
            if stored.offset != end:
                what = "overlaps another" if stored.offset < end else "leaves a gap before it"
                raise self._error(
                    f"tensor {name!r} starts at byte {stored.offset} and {what} (expected {end}); {_REDO}"
                )
            end += stored.num_bytes
        if end != self.size_bytes:
            what = "is truncated" if end > self.size_bytes else "has bytes after its last tensor"
            raise self._error(f"{what}: the tensors end at byte {end}, the file has {self.size_bytes}; {_REDO}")
        return tensors

    def _without_duplicates(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise self._error(f"its header names a key twice; {_REDO}")
        return entries

    def _parse_entry(self, name: str, entry: Any, start: int) -> StoredTensor:
        if not isinstance(entry, dict):
            raise self._error(f"tensor {name!r} is described by a {type(entry).__name__}, an object is needed; {_REDO}")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if dtype not in _DTYPES:
            raise self._error(f"tensor {name!r} has dtype {dtype!r}; read are {', '.join(_DTYPES)}")
        if not _are_counts(shape):
            raise self._error(f"tensor {name!r} has shape {shape!r}, a list of whole numbers is needed; {_REDO}")
        if not _are_counts(offsets) or len(offsets) != 2:
            raise self._error(f"tensor {name!r} has data_offsets {offsets!r}, two whole numbers are needed; {_REDO}")
        dtype_name, item_bytes = _DTYPES[dtype]
        num_bytes = math.prod(shape) * item_bytes
        if offsets[1] - offsets[0] != num_bytes:
            raise self._error(
                f"tensor {name!r} spans bytes {offsets[0]} to {offsets[1]}, shape {shape} in {dtype} takes {num_bytes}; {_REDO}"
            )
        return StoredTensor(TensorInfo(tuple(shape), dtype_name), start + offsets[0], num_bytes)


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    )
