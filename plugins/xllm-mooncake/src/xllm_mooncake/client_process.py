"""The process that holds Mooncake's client, so that what it blocks, holds or crashes is not the engine.

Why a process: `setup` and `close` keep the interpreter's lock for seconds when no master answers, any call can block for more than four, and
its sockets let whoever reaches them read and write the memory that it has registered.

It imports nothing but the standard library and `mooncake`. Requests come as JSON lines over a socket, answers go back the same way; blocks
lie in memory that both processes map. It ends with its socket.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import queue
import signal
import socket
import sys
import threading
from typing import Any

_CLOSE_S = 5


class Client:
    """Mooncake's store, and the memory that it reads from and writes to."""

    def __init__(self, memory_fd: int, memory_bytes: int) -> None:
        from mooncake.store import MooncakeDistributedStore, ReplicateConfig

        self._map = mmap.mmap(memory_fd, memory_bytes)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._num_bytes = memory_bytes
        self._store = MooncakeDistributedStore()
        self._config = ReplicateConfig()

    def setup(self, host: str, master: str, segment_bytes: int, replicas: int) -> list[int]:
        """Connect, lend memory, register ours. Codes as Mooncake gives them, 0 for success."""
        self._config.replica_num = replicas
        local_bytes = 16 << 20  # for Mooncake's own copies; ours go through registered memory
        code = self._store.setup(host, "P2PHANDSHAKE", segment_bytes, local_bytes, "tcp", "", master)
        return [code, self._store.register_buffer(self._base, self._num_bytes) if code == 0 else 0]

    def exist(self, keys: list[str]) -> list[int]:
        """1 held, 0 not held, negative: not known. Grants a lease."""
        return list(self._store.batch_is_exist(keys))

    def put(self, keys: list[str], offsets: list[list[int]], sizes: list[list[int]]) -> list[int]:
        """0 for each that is stored; a key that is held already keeps its value, and answers 0."""
        return list(self._store.batch_put_from_multi_buffers(keys, self._at(offsets), sizes, self._config))

    def get(self, keys: list[str], offsets: list[list[int]], sizes: list[list[int]]) -> list[int]:
        """Bytes read, or a negative code."""
        return list(self._store.batch_get_into_multi_buffers(keys, self._at(offsets), sizes))

    def size(self, keys: list[str]) -> list[int]:
        """Bytes of each value, or a negative code."""
        return [self._store.get_size(key) for key in keys]

    def remove(self, keys: list[str]) -> list[int]:
        """Take values out, also leased ones."""
        return list(self._store.batch_remove(keys, True))

    def close(self) -> list[int]:
        """Give the lent memory back to whom it belongs. It can take seconds, and no longer than the alarm allows."""
        signal.alarm(_CLOSE_S)
        return [self._store.close()]

    def _at(self, offsets: list[list[int]]) -> list[list[int]]:
        return [[self._base + offset for offset in row] for row in offsets]


def main() -> None:
    """Answer until the socket ends. Arguments: file numbers of socket and memory, and the memory's bytes."""
    socket_fd, memory_fd, memory_bytes = map(int, sys.argv[1:4])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the engine says when to end
    line = socket.socket(fileno=socket_fd)
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    client = Client(memory_fd, memory_bytes)
    threading.Thread(target=_listen, args=(line, requests), daemon=True).start()
    while True:
        request = requests.get()
        number, name = request.pop("number"), request.pop("do")
        try:
            answer: dict[str, Any] = {"codes": getattr(client, name)(**request)}
        except Exception as error:  # noqa: BLE001  whatever the binding raises, the engine hears of it
            answer = {"codes": [], "error": f"{type(error).__name__}: {error}"}
        try:
            line.sendall(json.dumps({"number": number, **answer}).encode() + b"\n")
        except OSError:
            os._exit(0)
        if name == "close":
            os._exit(0)


def _listen(line: socket.socket, requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    """On a thread of its own, so that the end of the engine is heard while a call blocks."""
    is_closing = False
    try:
        for text in line.makefile("rb"):
            request = json.loads(text)
            is_closing = is_closing or request["do"] == "close"
            requests.put(request)
    finally:  # an engine that was killed with an answer unread resets the line instead of ending it
        if not is_closing:
            os._exit(0)


if __name__ == "__main__":
    main()
