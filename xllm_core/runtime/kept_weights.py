"""Weights as ops have laid them out, kept on disk: a later start copies them into memory, where the first one unpacked, cast and packed.

A file is `_MAGIC`, the length of its header (8 bytes, little-endian), the header's SHA-256, the header in JSON, and the bytes of each tensor, every
one at a multiple of 64. The header names what was kept and for whom, and holds a CRC-32 of every 4 MiB. What is wrong with a file is told and costs
the time that it would have saved, no more. Files appear whole, whoever else writes the same one; those unused for longest make room for new ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import stat
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from xllm_core.plugins.contracts.weights import Checkpoint, NamesFiles
from xllm_core.runtime.dtypes import torch_dtype
from xllm_core.runtime.formats.gguf_tokenizer import cache_directory
from xllm_core.runtime.parts import CoreParts

__all__ = ["KeptWeights", "cache_directory", "file_marks"]
log = logging.getLogger("xllm.engine")

Progress = Callable[[str, int, int], None]

_MAGIC = b"xLLMkept"
_PREFIX_BYTES = len(_MAGIC) + 8 + hashlib.sha256().digest_size
_REVISION = 1
_LINE = 64
_CHUNK = 4 << 20
_MAX_HEADER_BYTES = 64 << 20
_NUM_READING = 2
_WORTH_BYTES = 32 << 20  # less is unpacked and packed in the time that it takes to look
_SUFFIX, _UNFINISHED = ".weights", ".unfinished"
_ABANDONED_S = 3600.0  # a file that nobody has written to for so long was left by a process that was killed


def file_marks(checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    """(name, size in bytes, ns of the last change) of each of a model's files that may hold tensors.

    A fingerprint samples bytes of each tensor; an edit between the samples shows here alone. Empty where the path is not on this disk.
    """
    path = checkpoint.path
    if isinstance(checkpoint, NamesFiles):
        files = list(checkpoint.files)
    else:
        files = sorted(path.glob("[!.]*")) if path.is_dir() else [path]
    marks = []
    for file in files:
        with contextlib.suppress(OSError):  # gone since, or a link to nothing
            found = file.stat()
            if stat.S_ISREG(found.st_mode):
                marks.append((file.name, found.st_size, found.st_mtime_ns))
    return marks


class _UnusableError(Exception):
    """Why a file cannot be used."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor in a file. offset: from the start of the file. crcs: of every `_CHUNK` bytes."""

    name: str
    field: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    crcs: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class KeptWeights:
    """The file of one model on one device. key: hex, which whatever may change a byte of what is kept must change.

    max_bytes: of all files in the folder. worth_bytes: what is smaller is not kept.
    """

    def __init__(self, folder: Path, key: str, *, max_bytes: int, worth_bytes: int = _WORTH_BYTES) -> None:
        self.path = folder / f"{key[:32]}{_SUFFIX}"
        self._key, self._max_bytes, self._worth_bytes = key, max_bytes, worth_bytes

    # ---- reading ---------------------------------------------------------------------------------------------------------

    def restore(self, parts: CoreParts, *, progress: Progress | None = None) -> bool:
        """Finish `parts` with what was kept. False where nothing is, or nothing that can be used, which is told: `parts` are then as before."""
        started_s = time.monotonic()
        try:
            # Who opens a pipe waits for its other end, which may never come.
            with open(
                self.path, "rb", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)
            ) as file:
                numbers, entries = self._read_header(file)
                self._fill(parts, file, numbers, entries, progress)
        except FileNotFoundError:
            return False
        except (OSError, _UnusableError) as error:
            log.warning("%s: %s; weights are read from the checkpoint, and kept again", self.path, error)
            for tensor in parts.handed_out().values():
                tensor.zero_()
            return False
        with contextlib.suppress(OSError):
            os.utime(self.path)  # it was used now
        log.info("weights were laid out by an earlier start: %s, %.2f s", self.path, time.monotonic() - started_s)
        return True

    def _read_header(self, file: Any) -> tuple[dict[str, dict[str, int]], list[_Entry]]:
        if not stat.S_ISREG((found := os.fstat(file.fileno())).st_mode):
            raise _UnusableError("it is not a regular file")
        size = found.st_size
        prefix = file.read(_PREFIX_BYTES)
        length = int.from_bytes(prefix[len(_MAGIC) : len(_MAGIC) + 8], "little")
        if len(prefix) < _PREFIX_BYTES or prefix[: len(_MAGIC)] != _MAGIC or length > min(_MAX_HEADER_BYTES, size):
            raise _UnusableError(f"its {size} bytes do not begin as such a file does")
        raw = file.read(length)
        if hashlib.sha256(raw).digest() != prefix[len(_MAGIC) + 8 :]:
            raise _UnusableError("its header is damaged")
        try:
            header = json.loads(raw)
            if header["key"] != self._key:
                raise _UnusableError("it was made for another model, device or version")
            entries = [
                _Entry(e["name"], e["field"], torch_dtype(e["dtype"]), tuple(e["shape"]), e["offset"], tuple(e["crcs"]))
                for e in header["tensors"]
            ]
            if size != (end := max((e.offset + e.num_bytes for e in entries), default=0)):
                raise _UnusableError(f"it has {size} bytes, {end} are needed")
            return dict(header["numbers"]), entries
        except (KeyError, TypeError, ValueError) as error:
            raise _UnusableError(f"its header is not understood ({type(error).__name__}: {error})") from error

    def _fill(
        self, parts: CoreParts, file: Any, numbers: dict[str, dict[str, int]], entries: list[_Entry],
        progress: Progress | None,
    ) -> None:  # fmt: skip
        """Read every tensor to where it is to lie: those that a model holds in place, those of ops side by side in one piece of memory."""
        held = {f"parameter {name}": tensor for name, tensor in parts.handed_out().items()}
        of_ops = [entry for entry in entries if entry.name not in held]
        room = parts.device.allocate((sum(_padded(entry.num_bytes) for entry in of_ops),), torch.uint8)
        kept: dict[str, dict[str, Any]] = {name: dict(fields) for name, fields in numbers.items()}
        used = 0
        for entry in entries:
            if (tensor := held.pop(entry.name, None)) is None:
                tensor = room[used : used + entry.num_bytes].view(entry.dtype).view(entry.shape)
                used += _padded(entry.num_bytes)
            elif tensor.shape != entry.shape or tensor.dtype != entry.dtype:
                raise _UnusableError(f"{entry.name!r} is {entry.shape} {entry.dtype} in it")
            kept.setdefault(entry.name, {})[entry.field] = tensor
        if held:
            raise _UnusableError(f"it lacks {', '.join(held)}")
        done, total = 0, sum(entry.num_bytes for entry in entries)
        with ThreadPoolExecutor(_NUM_READING, thread_name_prefix="xllm-weights") as pool:
            reads = [
                (entry, pool.submit(_read, file.fileno(), entry.offset + first, piece, crc))
                for entry in entries
                for (first, piece), crc in zip(_chunks(kept[entry.name][entry.field]), entry.crcs, strict=True)
            ]
            try:
                for entry, read in reads:
                    done += read.result()
                    if progress is not None:
                        progress(entry.name, done, total)
            finally:
                pool.shutdown(cancel_futures=True)
        try:
            parts.finish_with(kept)
        except (KeyError, TypeError) as error:
            raise _UnusableError(f"what it holds is not what ops keep ({type(error).__name__}: {error})") from error

    # ---- writing ---------------------------------------------------------------------------------------------------------

    def keep(self, parts: CoreParts) -> None:
        """Write what `parts`, finished, hold. A disk that is full, or may not be written, is told and nothing more."""
        kept = {**parts.kept(), **{f"parameter {name}": {"tensor": t} for name, t in parts.handed_out().items()}}
        num_bytes = sum(tensor.nbytes for _, _, tensor in _tensors(kept))
        if num_bytes < self._worth_bytes:
            return
        if num_bytes > self._max_bytes:
            log.info(
                "the laid out weights take %d bytes and are not kept for the next start: [model] weight_cache_bytes = %d",
                num_bytes, self._max_bytes,
            )  # fmt: skip
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(num_bytes)
            self._write(kept)
        except OSError as error:
            log.warning(
                "the laid out weights cannot be kept in %s (%s); the next start lays them out again: free %d bytes, set XLLM_CACHE_DIR to a folder"
                " that can be written, or [model] weight_cache_bytes = 0",
                self.path.parent, error, num_bytes,
            )  # fmt: skip

    def _make_room(self, num_bytes: int) -> None:
        """Remove what was used longest ago until so much more fits, and what killed processes have left."""
        files: list[tuple[float, int, Path]] = []
        for path in self.path.parent.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process tidies up as well
                found = path.stat()
                if path.suffix == _UNFINISHED and found.st_mtime < time.time() - _ABANDONED_S:
                    path.unlink()
                elif path.suffix == _SUFFIX and path != self.path:
                    files.append((found.st_mtime, found.st_size, path))
        total = num_bytes + sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            log.info("%s was removed: kept weights take at most [model] weight_cache_bytes = %d", path, self._max_bytes)
            total -= size

    def _write(self, kept: Mapping[str, Mapping[str, Any]]) -> None:
        tensors = list(_tensors(kept))
        with ThreadPoolExecutor(_NUM_READING, thread_name_prefix="xllm-weights") as pool:
            crcs = list(pool.map(lambda item: [zlib.crc32(piece) for _, piece in _chunks(item[2])], tensors))
        header = self._header(kept, tensors, crcs)
        with tempfile.NamedTemporaryFile(dir=self.path.parent, suffix=_UNFINISHED, delete=False) as file:
            unfinished = Path(file.name)
            try:
                self._write_all(file.file, header, [tensor for _, _, tensor in tensors])
                unfinished.replace(self.path)
            finally:
                unfinished.unlink(missing_ok=True)

    def _header(
        self, kept: Mapping[str, Mapping[str, Any]], tensors: list[tuple[str, str, torch.Tensor]], crcs: list[list[int]]
    ) -> bytes:
        numbers = {
            name: {field: value for field, value in fields.items() if not isinstance(value, torch.Tensor)}
            for name, fields in kept.items()
        }

        def with_data_at(first: int) -> bytes:
            entries, offset = [], first
            for (name, field, tensor), of_chunks in zip(tensors, crcs, strict=True):
                dtype = str(tensor.dtype).removeprefix("torch.")
                shape = list(tensor.shape)
                entries.append(
                    {"name": name, "field": field, "dtype": dtype, "shape": shape, "offset": offset, "crcs": of_chunks}
                )
                offset += _padded(tensor.nbytes)
            return json.dumps({"key": self._key, "numbers": numbers, "tensors": entries}).encode()

        first = _padded(_PREFIX_BYTES + len(with_data_at(0)) + 20 * len(tensors))  # offsets have 20 digits at most
        return with_data_at(first).ljust(first - _PREFIX_BYTES)

    def _write_all(self, file: IO[bytes], header: bytes, tensors: list[torch.Tensor]) -> None:
        size = _PREFIX_BYTES + len(header) + sum(_padded(tensor.nbytes) for tensor in tensors[:-1])
        size += tensors[-1].nbytes
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # a disk that cannot hold it says so now
        file.write(_MAGIC + len(header).to_bytes(8, "little") + hashlib.sha256(header).digest() + header)
        for tensor in tensors:
            file.write(_bytes(tensor))
            if tensor is not tensors[-1]:
                file.write(bytes(_padded(tensor.nbytes) - tensor.nbytes))
        file.flush()


def _tensors(kept: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(name, field, tensor)."""
    for name, fields in kept.items():
        yield from ((name, field, value) for field, value in fields.items() if isinstance(value, torch.Tensor))


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _LINE) * _LINE


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _chunks(tensor: torch.Tensor) -> Iterator[tuple[int, memoryview]]:
    """(first byte, memory) of every `_CHUNK` bytes."""
    data = _bytes(tensor)
    return ((first, data[first : first + _CHUNK]) for first in range(0, len(data), _CHUNK))


def _read(fd: int, offset: int, piece: memoryview, crc: int) -> int:
    """Fill `piece` from a place of a file, and return its length. Neither system call nor checksum holds the interpreter."""
    done = 0
    while done < len(piece):
        if not (count := os.preadv(fd, [piece[done:]], offset + done)):
            raise _UnusableError(f"it ends at byte {offset + done}")
        done += count
    if zlib.crc32(piece) != crc:
        raise _UnusableError(f"its bytes from {offset} on are damaged")
    return done
