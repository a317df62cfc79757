"""The kernels as Python calls them: one library per instruction set, plain C functions. See `native/api.h` for what each expects."""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from xllm_cpu.isa import library_path, runnable, why_not

_P, _I64, _I32, _F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float

ABI = 1
"""Of the functions and structures below; `XLLM_ABI` of `native/api.h`."""

_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "abi": (_I32, []),
    "isa": (ctypes.c_char_p, []),
    "set_threads": (None, [_I32]),
    "threads": (_I32, []),
    "packed_elements": (_I64, [_I64, _I64, _I32, _I32]),
    "packed_columns": (_I64, [_I64, _I32]),
    "pack": (_I32, [_P, _I64, _I64, _I32, _I32, _P]),
    "pack_bias": (_I32, [_P, _I64, _I32, _P]),
    "linear": (_I32, [_P, _P, _P, _P, _I64, _I64, _I64, _I64, _I64, _I32, _I32, _I32]),
    "int8_bytes": (_I64, [_I64, _I64, _I32]),
    "int8_room": (_I64, [_I64]),
    "pack_int8": (_I32, [_P, _P, _I64, _I64, _I32, _P]),
    "linear_int8": (_I32, [*[_P] * 5, *[_I64] * 5, _I32, _I32, _I32]),
    "blocks_bytes": (_I64, [_I64, _I64, _I32, _I32, _I32]),
    "blocks_room": (_I64, [_I64]),
    "pack_blocks": (_I32, [_P, _P, _P, _I64, _I64, _I32, _I32, _P]),
    "linear_blocks": (_I32, [*[_P] * 5, *[_I64] * 5, *[_I32] * 5]),
    "experts": (_I32, [*[_P] * 7, *[_I64] * 5, _I32]),
    "moe_route": (_I32, [_P, _I64, _P, _P, _P, *[_I64] * 5, _I32, _F32]),
    "rms_norm": (_I32, [_P, _I64, _I64, _P, _F32, _P, _I64, _I64, _I32]),
    "add_rms_norm": (_I32, [_P, _P, _P, _F32, _P, _P, _I64, _I64, _I32]),
    "silu_mul": (_I32, [_P, _I64, _P, _I64, _I64, _I32]),
    "embedding": (_I32, [_P, _P, _P, _I64, _I64, _I64, _I32]),
    "packed_rows": (_I32, [_P, _P, _P, _I64, _I64, _I64, _I32]),
    "rope": (_I32, [_P, _I64, _P, _P, _P, _I64, _I64, _I64, _I64, _I32]),
    "kv_write": (_I32, [_P, _I64, _P, _P, _I64, _I64, _I64, _I64]),
    "rope_kv_write": (_I32, [_P, _P, _P, _I64, _I64, _I64, _P, _P, _P, _P, _P, _P, *[_I64] * 7, _I32]),
    "kv_write_int8": (_I32, [_P, _I64, _P, _P, _P, *[_I64] * 4, _I32]),
    "rope_kv_write_int8": (_I32, [*[_P] * 3, *[_I64] * 3, *[_P] * 8, *[_I64] * 6, _I32]),
    "block_copy": (_I32, [_P, _P, _P, _I64, _I64, _I64, _P]),
    "populate": (None, [_P, _I64]),
    "attention_lay_out": (_I64, [*[_P] * 4, *[_I64] * 4, _I32]),
    "attention": (_I32, [*[_P] * 7, _I64]),
    "widen": (_I32, [_P, _I64, _P, _I64, _I64]),
    "add": (_I32, [_P, _P, _P, _I64, _I64, _I32]),
    "sample": (_I32, [_P, _I64, _I64, _P, _P]),
    "replay_op": (_I32, [ctypes.c_char_p]),
    "replay": (_I64, [_P, _I64, _I64]),
}

MAX_ARGUMENTS = 22


class AttentionStep(ctypes.Structure):
    """`XllmAttention` of `native/api.h`."""

    _fields_ = [
        *((name, _P) for name in ("query_starts", "kv_lens", "tables", "tasks")),
        *((name, _I64) for name in ("num_tasks", "table_width", "highest_block")),
        *((name, _I32) for name in ("num_rows", "num_heads", "num_kv_heads", "head_size", "block_size", "window")),
        *((name, _F32) for name in ("scale", "soft_cap")),
        *((name, _I32) for name in ("is_bf16", "is_int8", "max_kv_len")),
    ]


class SamplingColumns(ctypes.Structure):
    """`XllmSampling` of `native/api.h`."""

    _fields_ = [(name, _P) for name in ("temperature", "top_k", "top_p", "min_p", "seeds", "indices", "positions")]


class RecordedCall(ctypes.Structure):
    """`XllmCall` of `native/api.h`."""

    _fields_ = [
        ("op", ctypes.c_int32), ("rows_at", ctypes.c_int32), ("rows_factor", _I64), ("arguments", ctypes.c_uint64 * MAX_ARGUMENTS),
    ]  # fmt: skip


class UnusableError(Exception):
    """Why no kernels can be called, and what would help."""


class Library:
    """The functions of one library, without their prefix. One per instruction set and process: its threads are shared.

    Raises OSError where the file cannot be loaded, AttributeError where it lacks a function.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, isa: str) -> None:
        loaded = ctypes.CDLL(str(library_path(isa)))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(loaded, f"xllm_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.name = isa

    @cached_property
    def build(self) -> str:
        """Tells one build of the kernels from another."""
        return hashlib.sha256(library_path(self.name).read_bytes()).hexdigest()


def open_library(isa: str) -> Library:
    """The library for an instruction set, or for the best that runs here ("auto"), with all that this plugin calls. Raises UnusableError."""
    if reason := why_not(isa):
        raise UnusableError(reason)
    again = "build them again: `pip install --force-reinstall --no-deps xllm-cpu`"
    version = "the native kernels are of another version than xllm-cpu"
    try:
        library = Library(runnable()[0] if isa == "auto" else isa)
    except OSError as error:
        raise UnusableError(f"the native kernels do not load: {error}; {again}") from error
    except AttributeError as error:
        raise UnusableError(f"{version}: {error}; {again}") from error
    if (found := library.abi()) != ABI:
        raise UnusableError(f"{version}: their interface is number {found}, not {ABI}; {again}")
    return library


@cache
def load(isa: str) -> Library:
    """What `open_library` gives. Raises ConfigError with what would help."""
    from xllm_core.plugins import ConfigError  # here, for the probe must be quick and needs nothing of the core

    try:
        return open_library(isa)
    except UnusableError as error:
        raise ConfigError(f"[plugin.cpu] isa = {isa!r}: {error}") from error
