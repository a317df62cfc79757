"""The header of a GGUF file: metadata and tensor table, every length checked against the file before it is believed.

Long arrays (vocabularies) are walked but not kept, which makes opening a file of 50,000 tokens take a tenth of a second; single items can be
read later. Source: the GGUF specification, ggml project, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from xllm_core.errors import ModelFormatError

Kind = TypeVar("Kind")
Default = TypeVar("Default")

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
# Value type -> struct letter; 7 is a bool in one byte.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_KEPT_ITEMS = 1024
_MAX_DIMENSIONS = 4
_REDO = "download or convert the file again"


@dataclass(frozen=True, slots=True)
class LongArray:
    """An array that was walked and left in the file. item_type: value type id, offset: of its first item."""

    item_type: int
    count: int
    offset: int


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor as stored. shape: torch order (rows first). offset: from the start of the file; num_bytes: packed."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class GGUFHeader:
    """A mapped GGUF file. Raises ModelFormatError for whatever is not as the specification says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        self.size_bytes = path.stat().st_size
        if self.size_bytes < 24:
            raise self.error(f"has {self.size_bytes} bytes, too few for a GGUF header; {_REDO}")
        with path.open("rb") as file:  # copy on write: torch wants buffers it could write to, though nobody does
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._at = 0
        num_tensors, num_pairs = self._read_preamble()
        for _ in range(num_pairs):
            key = self._string("a metadata key")
            if key in self.metadata:
                raise self.error(f"holds the metadata key {key!r} twice; {_REDO}")
            self.metadata[key] = self._value(key, self._number("I", key))
        self._read_tensors(num_tensors)
        self.header_bytes = self._at

    def error(self, problem: str) -> ModelFormatError:
        """The error to raise about this file."""
        return ModelFormatError(f"{self.path}: {problem}")

    def get(self, key: str, kind: type[Kind], default: Default) -> Kind | Default:
        """A metadata value of one kind; `float` takes whole numbers too. Refused if it is of another, `default` if it is absent."""
        value = self.metadata.get(key)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(f"metadata {key!r} is {value!r:.80}, a value of type {kind.__name__} is needed; {_REDO}")
        return value

    def item(self, key: str, index: int) -> Any:
        """One item of an array in the metadata, kept or long; None if there is no such array or item."""
        array = self.metadata.get(key)
        if isinstance(array, list):
            return array[index] if 0 <= index < len(array) else None
        if not isinstance(array, LongArray) or not 0 <= index < array.count:
            return None
        self._at = array.offset
        if array.item_type != _STRING:
            self._at += index * struct.calcsize(_SCALARS[array.item_type])
            return self._number(_SCALARS[array.item_type], key)
        for _ in range(index):
            self._skip_string(key)
        return self._string(key)

    def _read_preamble(self) -> tuple[int, int]:
        magic = self._take(4, "the magic number")
        if magic != _MAGIC:
            raise self.error(f"starts with {magic!r} instead of {_MAGIC!r}: not a GGUF file")
        version = self._number("I", "the version")
        if version not in (2, 3):
            hint = "it was made for big-endian machines" if version & 0xFFFF == 0 else "versions 2 and 3 are read"
            raise self.error(f"is GGUF version {version}: {hint}; convert the model again")
        num_tensors, num_pairs = self._number("Q", "the tensor count"), self._number("Q", "the metadata count")
        # The smallest possible entries bound both counts, so that a damaged one is not looped over.
        if num_tensors * 24 + num_pairs * 13 > self.size_bytes:
            raise self.error(
                f"claims {num_tensors} tensors and {num_pairs} metadata entries, too many for its {self.size_bytes} bytes; {_REDO}"
            )
        return num_tensors, num_pairs

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind in _SCALARS:
            return self._number(_SCALARS[kind], key)
        if kind != _ARRAY:
            raise self.error(f"metadata {key!r} has value type {kind}, which GGUF does not define; {_REDO}")
        item_type, count = self._number("I", key), self._number("Q", key)
        offset = self._at
        if item_type in _SCALARS:
            letter = _SCALARS[item_type]
            raw = self._take(count * struct.calcsize(letter), key)
            return (
                list(struct.unpack(f"<{count}{letter}", raw))
                if count <= _KEPT_ITEMS
                else LongArray(item_type, count, offset)
            )
        if item_type != _STRING:
            raise self.error(
                f"metadata {key!r} is an array of type {item_type}; arrays of numbers and strings are read"
            )
        if count * 8 > self.size_bytes - self._at:
            raise self.error(f"metadata {key!r} claims {count} strings, too many for the rest of the file; {_REDO}")
        if count <= _KEPT_ITEMS:
            return [self._string(key) for _ in range(count)]
        for _ in range(count):
            self._skip_string(key)
        return LongArray(item_type, count, offset)

    def _read_tensors(self, count: int) -> None:
        table = [self._tensor_entry() for _ in range(count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise self.error(f"general.alignment is {alignment!r}, a power of two is needed; {_REDO}")
        start = -(-self._at // alignment) * alignment
        end = start
        for name, kind, shape, offset in sorted(table, key=lambda entry: entry[3]):
            block_items, block_bytes = GGML_QUANT_SIZES[kind]
            if shape[-1] % block_items:
                raise self.error(
                    f"tensor {name!r} has rows of {shape[-1]}, {kind.name} packs {block_items} at a time; {_REDO}"
                )
            tensor = GGUFTensor(name, kind, shape, start + offset, math.prod(shape) // block_items * block_bytes)
            if tensor.offset % alignment or tensor.offset < end:
                raise self.error(
                    f"tensor {name!r} starts at byte {tensor.offset}, inside another or unaligned; {_REDO}"
                )
            end = tensor.offset + tensor.num_bytes
            if end > self.size_bytes:
                raise self.error(
                    f"is truncated: tensor {name!r} ends at byte {end}, the file has {self.size_bytes}; {_REDO}"
                )
            if name in self.tensors:
                raise self.error(f"holds the tensor {name!r} twice; {_REDO}")
            self.tensors[name] = tensor

    def _tensor_entry(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self._string("a tensor name")
        num_dimensions = self._number("I", name)
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self.error(
                f"tensor {name!r} has {num_dimensions} dimensions, 1 to {_MAX_DIMENSIONS} are allowed; {_REDO}"
            )
        shape = tuple(self._number("Q", name) for _ in range(num_dimensions))[::-1]
        if 0 in shape:
            raise self.error(f"tensor {name!r} has shape {list(shape)}, which holds nothing; {_REDO}")
        kind, offset = self._number("I", name), self._number("Q", name)
        try:
            return name, GGMLQuantizationType(kind), shape, offset
        except ValueError:
            raise self.error(
                f"tensor {name!r} has the unknown type number {kind}; a newer gguf package may know it"
            ) from None

    def _take(self, count: int, what: str) -> bytes:
        end = self._at + count
        if end > self.size_bytes:
            raise self.error(
                f"is truncated: {what} needs bytes {self._at} to {end}, the file has {self.size_bytes}; {_REDO}"
            )
        raw = self.data[self._at : end]
        self._at = end
        return raw

    def _number(self, letter: str, what: str) -> Any:
        value = struct.unpack(f"<{letter}", self._take(struct.calcsize(f"<{letter}"), what))[0]
        return _as_written(value) if letter == "f" else value

    def _string(self, what: str) -> str:
        raw = self._take(self._number("Q", what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 at byte {self._at - len(raw) + error.start}; {_REDO}") from None

    def _skip_string(self, what: str) -> None:
        length = self._number("Q", what)
        if length > self.size_bytes - self._at:
            raise self.error(f"is truncated: {what} holds a string of {length} bytes at {self._at}; {_REDO}")
        self._at += length


def _as_written(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, where widening would give 9.999999747378752e-06."""
    exact = struct.pack("<f", value)
    for digits in range(6, 9):
        short = float(f"{value:.{digits}g}")
        if math.isfinite(short) and struct.pack("<f", short) == exact:
            return short
    return value
