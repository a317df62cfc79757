"""Recording a forward: native calls with their arguments, over memory that stays where it is.

While one is recorded, torch's own ops pass through a dispatch mode. Allocations come from an arena, views are free, and the few ops that models
use between ours become native ones; any other is something that a replay would leave out, and is refused by name.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xllm_core.plugins import NotCapturableError
from xllm_cpu.native import Library, RecordedCall

aten = torch.ops.aten

# Native functions that can be recorded -> which argument is the number of rows.
_ROWS_AT: Mapping[str, int | None] = {
    "linear": 4, "rms_norm": 6, "add_rms_norm": 6, "silu_mul": 3, "embedding": 3, "rope": 5, "kv_write": 4, "rope_kv_write": 12, "attention": None,
    "add": 3, "experts": 7, "linear_int8": 5, "linear_blocks": 5, "packed_rows": 3, "kv_write_int8": 5, "rope_kv_write_int8": 14,
    "moe_route": 5, "widen": 3,
}  # fmt: skip
_SEGMENT_BYTES = 8 << 20
_LINE = 64


class Arena:
    """Memory of everything that a forward makes on its way, the same for all graphs: only one runs at a time.

    Places are taken again as soon as a tensor is gone, as an allocator would: what a layer wrote is still in the processor's cache for the next.
    """

    def __init__(self, allocate: Callable[..., torch.Tensor]) -> None:
        self._allocate = allocate
        self._segments: list[np.ndarray[Any, Any]] = []
        self._kept: list[torch.Tensor] = []
        self.begin()

    def begin(self) -> None:
        """A new graph starts at the first byte."""
        self._segment = self._used = self.num_bytes = 0
        self._free: dict[int, list[np.ndarray[Any, Any]]] = defaultdict(list)

    def tensor(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Contiguous, with whatever is there."""
        size = max(_LINE, -(-shape.numel() * dtype.itemsize // _LINE) * _LINE)
        room = self._free[size].pop() if self._free[size] else self._take(size)
        owner = room[:]  # lives as long as the tensor's storage
        weakref.finalize(owner, self._free[size].append, room)
        return torch.from_numpy(owner)[: shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def _take(self, size: int) -> np.ndarray[Any, Any]:
        while self._segment < len(self._segments) and self._used + size > len(self._segments[self._segment]):
            self._segment, self._used = self._segment + 1, 0
        if self._segment == len(self._segments):
            memory = self._allocate((max(size, _SEGMENT_BYTES),), torch.uint8)
            self._kept.append(memory)
            self._segments.append(memory.numpy())
        room = self._segments[self._segment][self._used : self._used + size]
        self._used += size
        self.num_bytes += size
        return room


class CpuGraph:
    """A `Graph`: calls in a row. Owned by whoever replays it."""

    def __init__(
        self, native: Library, calls: list[tuple[str, tuple[Any, ...]]], max_rows: int, arena_bytes: int
    ) -> None:
        self.num_ops, self.arena_bytes, self._max_rows = len(calls), arena_bytes, max_rows
        self._native, self._names = native, [name for name, _ in calls]
        self._calls = (RecordedCall * len(calls))(*(_recorded(native, *call, max_rows) for call in calls))
        self._address = ctypes.addressof(self._calls)

    def replay(self, num_rows: int) -> None:
        """One native call."""
        if not 0 < num_rows <= self._max_rows:
            raise ValueError(f"{num_rows} rows do not fit a graph of {self._max_rows}")
        if failed := self._native.replay(self._address, self.num_ops, num_rows):
            raise IndexError(
                f"{self._names[failed - 1]}, call {failed} of {self.num_ops}: an index is outside its table or cache"
            )


def _recorded(native: Library, name: str, arguments: tuple[Any, ...], max_rows: int) -> RecordedCall:
    kinds = getattr(native, name).argtypes
    call = RecordedCall(op=native.replay_op(name.encode()), rows_at=-1)
    for i, (kind, value) in enumerate(zip(kinds, arguments, strict=True)):
        call.arguments[i] = (
            struct.unpack("<I", struct.pack("<f", value))[0]
            if kind is ctypes.c_float
            else int(value or 0) & 0xFFFF_FFFF_FFFF_FFFF
        )
    if (at := _ROWS_AT[name]) is not None:
        rows = arguments[at]
        if rows % max_rows:
            raise NotCapturableError(f"{name} over {rows} rows, in a step of {max_rows}")
        call.rows_at, call.rows_factor = at, rows // max_rows
    return call


class Recorder(TorchDispatchMode):
    """Records what this thread calls while it is entered."""

    def __init__(self, native: Library, arena: Arena) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._native, self._arena, self._thread = native, arena, threading.get_ident()
        self._originals: dict[str, Any] = {}

    def __enter__(self) -> Recorder:
        if not self._originals:
            for name in _ROWS_AT:
                self._originals[name] = getattr(self._native, name)
                setattr(self._native, name, partial(self._call, name, self._originals[name]))
        super().__enter__()
        return self

    def stop(self) -> None:
        """Give the native functions back."""
        for name, original in self._originals.items():
            setattr(self._native, name, original)

    def _call(self, name: str, function: Any, *arguments: Any) -> Any:
        answer = function(*arguments)
        if threading.get_ident() == self._thread:
            self.calls.append((name, arguments))
        return answer

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to skip a compiler that nobody uses here, torch would import it, which takes a second at the first step."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if handler := _HANDLERS.get(func):
            return handler(self, *args, **kwargs)
        if _is_view(func):
            seen = func(*args, **kwargs)
            if not all(_shares_memory(view, args[0]) for view in (seen if isinstance(seen, list | tuple) else (seen,))):
                raise NotCapturableError(f"{func} copies here, which is no op of this device")
            return seen
        with self:
            inner = func.decompose(*args, **kwargs)
        if inner is NotImplemented:
            raise NotCapturableError(f"{func} is no op of this device, so a replay would leave it out")
        return inner

    def empty(self, shape: Any, *, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
        """aten.empty."""
        return self._arena.tensor(torch.Size(shape), dtype or torch.get_default_dtype())

    def empty_like(self, x: torch.Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
        """aten.empty_like; always contiguous."""
        return self._arena.tensor(x.shape, dtype or x.dtype)

    def new_empty(self, x: torch.Tensor, shape: Any, *, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
        """aten.new_empty."""
        return self._arena.tensor(torch.Size(shape), dtype or x.dtype)

    def add(self, a: torch.Tensor, b: Any, *, alpha: float = 1) -> torch.Tensor:
        """aten.add of two like tensors."""
        is_like = isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype and alpha == 1
        if not is_like or not (a.is_contiguous() and b.is_contiguous()) or a.dim() < 2:
            raise NotCapturableError("a sum of tensors that differ in shape, dtype or order is no op of this device")
        out = self._arena.tensor(a.shape, a.dtype)
        rows = len(a)
        self._native.add(a.data_ptr(), b.data_ptr(), out.data_ptr(), rows, a.numel() // max(1, rows), _is_bf16(a))
        return out

    def index_select(self, table: torch.Tensor, axis: int, ids: torch.Tensor) -> torch.Tensor:
        """aten.index_select of rows."""
        is_right = axis == 0 and table.dim() > 0 and table.is_contiguous() and ids.is_contiguous()
        row_bytes = table.shape[1:].numel() * table.itemsize
        if not is_right or ids.dtype != torch.int64 or row_bytes % 2:
            raise NotCapturableError("index_select of anything but rows of a contiguous table is no op of this device")
        out = self._arena.tensor(torch.Size((len(ids), *table.shape[1:])), table.dtype)
        is_in_pairs = row_bytes % 4 != 0  # rows are copied whatever their type is, by 2 bytes or by 4
        bad = self._native.embedding(
            ids.data_ptr(), table.data_ptr(), out.data_ptr(), len(ids), len(table), row_bytes // (2 if is_in_pairs else 4), is_in_pairs
        )  # fmt: skip
        if bad:
            raise IndexError(f"row {int(ids[bad - 1])} is outside 0 .. {len(table) - 1}")
        return out


_HANDLERS: Mapping[Any, Callable[..., torch.Tensor]] = {
    aten.empty.memory_format: Recorder.empty,
    aten.empty_like.default: Recorder.empty_like,
    aten.new_empty.default: Recorder.new_empty,
    aten.add.Tensor: Recorder.add,
    aten.index_select.default: Recorder.index_select,
}


def _is_bf16(tensor: torch.Tensor) -> int:
    if tensor.dtype not in (torch.bfloat16, torch.float32):
        raise NotCapturableError(f"{tensor.dtype} is neither float32 nor bfloat16")
    return int(tensor.dtype == torch.bfloat16)


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _shares_memory(view: torch.Tensor, of: torch.Tensor) -> bool:
    """Ops such as `contiguous` and `reshape` give a view where they can, and else a copy."""
    return view.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()


class _Turn:
    """Who records: one at a time, for a recorder stands in for functions that every engine of the process calls."""

    def __init__(self) -> None:
        self.begin()
        os.register_at_fork(after_in_child=self.begin)

    def begin(self) -> None:
        """Also in a forked child, which has none of its parent's other threads: what one of them was recording is given back."""
        if recorder := getattr(self, "recorder", None):
            recorder.stop()
        self.lock = threading.RLock()
        self.recorder: Recorder | None = None


_turn = _Turn()


def capture(
    native: Library, arena: Arena, run: Callable[[], torch.Tensor], max_rows: int
) -> tuple[CpuGraph, torch.Tensor]:
    """As `GraphDevice.capture`."""
    with _turn.lock:
        if _turn.recorder is not None:
            raise NotCapturableError("a forward is recorded within another's recording")
        arena.begin()
        recorder = _turn.recorder = Recorder(native, arena)
        try:
            with recorder:
                result = run()
            if _turn.recorder is not recorder:
                raise NotCapturableError("this process was forked while a forward was recorded")
        finally:
            recorder.stop()
            _turn.recorder = None
        return CpuGraph(native, recorder.calls, max_rows, arena.num_bytes), result
