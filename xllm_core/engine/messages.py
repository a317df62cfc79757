"""What crosses between a front end and an engine process: typed msgspec structs, length-prefixed msgpack over one socket pair.

To the engine: `Start` first, then `Submit`, `Abort`, `Ping`, `Stop`. From it: `Phase`s while it starts, `Planned` if it made the plan, `TextFiles`,
then `Ready` or `Failed`, then one `Stepped` per step, `Refused` for a request that it did not take, `Pong`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from xllm_core.engine.info import EngineInfo
from xllm_core.errors import IntegrityError
from xllm_core.types import EngineRequest, TokenOutput

MAX_MESSAGE_BYTES = 1 << 30  # a prompt of a million tokens takes five megabytes; a length beyond this is a torn stream
_PREFIX_BYTES = 4


class Planned(msgspec.Struct, tag=True):
    """What was decided: `AssemblyPlan.to_json()` and its hash. Holds no secret."""

    plan: dict[str, Any]
    hash: str


class Start(msgspec.Struct, tag=True):
    """tables: `Settings.tables()`. planned: what to build; None: find plugins and decide."""

    tables: dict[str, Any]
    planned: Planned | None = None


class Submit(msgspec.Struct, tag=True):
    """Queue this request."""

    request: EngineRequest


class Abort(msgspec.Struct, tag=True):
    """Drop a request, or one of its sequences."""

    request_id: str
    index: int | None = None


class Ping(msgspec.Struct, tag=True):
    """Answered between two steps."""


class Stop(msgspec.Struct, tag=True):
    """End now; what is unfinished is dropped."""


class Phase(msgspec.Struct, tag=True):
    """A part of the start that has ended. detail: for people, may be empty."""

    name: str
    seconds: float
    detail: str = ""


class Loading(msgspec.Struct, tag=True):
    """Weights read so far."""

    done_bytes: int
    total_bytes: int


class TextFiles(msgspec.Struct, tag=True):
    """What the text side needs of a checkpoint, told while weights are read; paths are of files that exist.

    tokenizer_json: None if the model has no tokenizer.
    """

    tokenizer_json: str | None
    bos_token: str | None
    eos_token: str | None
    eos_token_ids: list[int]
    adds_bos: bool | None
    chat_template: str | None
    generation_config: dict[str, Any]
    warnings: list[str]


class Ready(msgspec.Struct, tag=True):
    """The engine serves."""

    info: EngineInfo


class Failed(msgspec.Struct, tag=True):
    """The engine ends: it could not start, or a step failed. kind: name of the error's class. is_ours: its message was written for people."""

    kind: str
    message: str
    is_ours: bool


class EngineStats(msgspec.Struct, array_like=True):
    """State after a step. Counts marked "since start" only grow.

    num_waiting: sequences in the queue; num_waiting_for_kv: set aside until a store answers. used_blocks: by unfinished sequences.
    Since start: preemptions; prompt tokens looked up in the prefix cache and found there; steps replayed from recorded graphs. Of graphs, with what
    the warm-up did: those recorded, decode steps that none could serve, rows that replays left empty, bytes of the memory that they share.
    store: what the KV store counts, by its own names (`KVStore.stats`), a second old at most; empty without one.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_for_kv: int = 0
    used_blocks: int = 0
    total_blocks: int = 0
    num_preemptions: int = 0
    query_tokens: int = 0
    hit_tokens: int = 0
    num_replays: int = 0
    num_captures: int = 0
    num_eager: int = 0
    padded_rows: int = 0
    arena_bytes: int = 0
    store: dict[str, int] = {}


class Stepped(msgspec.Struct, tag=True):
    """What one step brought. admitted: (request id, monotonic seconds) of those that left the queue for the first time."""

    outputs: list[TokenOutput]
    stats: EngineStats
    admitted: list[tuple[str, float]] = []
    preempted: list[str] = []


class Refused(msgspec.Struct, tag=True):
    """A request was not taken. kind: class of the RequestError."""

    request_id: str
    kind: str
    message: str
    param: str | None = None


class Pong(msgspec.Struct, tag=True):
    """The loop turns."""

    stats: EngineStats


ToEngine = Start | Submit | Abort | Ping | Stop
FromEngine = Phase | Loading | Planned | TextFiles | Ready | Failed | Stepped | Refused | Pong

_encoder = msgspec.msgpack.Encoder()
to_engine = msgspec.msgpack.Decoder(ToEngine)
from_engine = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """One frame: four bytes of length, little endian, then the message."""
    body = _encoder.encode(message)
    return len(body).to_bytes(_PREFIX_BYTES, "little") + body


class Frames:
    """Cuts a stream of bytes into messages, whatever pieces it comes in."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Bodies that are whole now. Raises IntegrityError for a length that no message has: nothing after it can be read."""
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= _PREFIX_BYTES:
            size = int.from_bytes(self._buffer[at : at + _PREFIX_BYTES], "little")
            if size > MAX_MESSAGE_BYTES:
                raise IntegrityError(f"a message of {size} bytes between front end and engine; the stream is torn")
            if len(self._buffer) - at - _PREFIX_BYTES < size:
                break
            yield bytes(self._buffer[at + _PREFIX_BYTES : at + _PREFIX_BYTES + size])
            at += _PREFIX_BYTES + size
        del self._buffer[:at]
