"""Mooncake's own API in a process of its own: lends memory, or does something to every value. Arguments: MASTER, METRICS_PORT, what to do.

provide BYTES     lend so much memory, print a line when it is there, until killed
flip | cut | grow | empty | swap
                  change every value: one bit; half of it gone; some bytes more; nothing left but one byte; each under the next key
"""

from __future__ import annotations

import os
import sys
import time
import urllib.request

from mooncake.store import MooncakeDistributedStore


def changed(how: str, values: list[bytes]) -> list[bytes]:
    """What to store instead."""
    if how == "flip":
        return [
            value[: len(value) // 2] + bytes([value[len(value) // 2] ^ 1]) + value[len(value) // 2 + 1 :]
            for value in values
        ]
    if how == "swap":
        return [*values[1:], values[0]]
    edits = {
        "cut": lambda value: value[: len(value) // 2],
        "grow": lambda value: value + b"more",
        "empty": lambda value: b"\\0",
    }
    return [edits[how](value) for value in values]


def main() -> None:
    """Do it."""
    master, metrics_port, how = sys.argv[1:4]
    os.environ.setdefault("MC_TCP_BIND_ADDRESS", "127.0.0.1")
    store = MooncakeDistributedStore()
    lent = int(sys.argv[4]) if how == "provide" else 0
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", lent, 16 << 20, "tcp", "", master) == 0
    if how == "provide":
        print("ready", flush=True)
        time.sleep(600)
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/get_all_keys", timeout=10) as answer:
        keys = [key for key in answer.read().decode().split() if key.startswith("xllm1-")]
    values = [store.get(key) for key in keys]
    assert all(values), "a value cannot be read"
    for key, value in zip(keys, changed(how, values), strict=True):
        assert store.remove(key, True) == 0
        assert store.put(key, value) == 0
    print(len(keys), flush=True)
    os._exit(0)  # closing takes seconds, and there is nothing to give back


if __name__ == "__main__":
    main()
