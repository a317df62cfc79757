"""What this machine lacks for Mooncake, in words that help."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from xllm_core.plugins import Finding

_WHEEL = "pip install 'xllm-mooncake[host]'"
_IMPORT_TIMEOUT_S = 20.0


def missing() -> tuple[str, str] | None:
    """(what, how to get it), or None. Loads nothing of Mooncake, but a library that it needs."""
    if sys.platform != "linux":
        return (
            f"Mooncake has wheels for Linux only, this is {sys.platform}",
            "use the core's store: --use kv_store=core/host",
        )
    if find_spec("mooncake") is None:
        return "Mooncake's wheel is not installed", _WHEEL
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError:
        return (
            "the library libibverbs.so.1 is missing",
            "apt-get install libibverbs1 (Debian, Ubuntu), dnf install libibverbs (Fedora)",
        )
    return None


def check(query: object = None) -> str | None:
    """Why the store cannot be used here, and how to get what is missing; None if nothing is."""
    found = missing()
    return None if found is None else f"{found[0]}: {found[1]}"


def findings() -> Iterator[Finding]:
    """For `xllm doctor`. The last word has the import itself, in a process of its own: its libraries run code when they are loaded."""
    if found := missing():
        yield Finding("warn", "mooncake", *found)
        return
    code = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import mooncake.store"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(sys.path)],
        capture_output=True,
        text=True,
        timeout=_IMPORT_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        yield Finding(
            "warn", "mooncake", f"it cannot be imported: {last}", f"install what it names, or reinstall: {_WHEEL}"
        )
        return
    yield Finding("ok", "mooncake", f"{Path(master_binary()).parent}, and the libraries that it loads")


def master_binary() -> str:
    """The path of mooncake_master. Raises FileNotFoundError with what to install."""
    if reason := check():
        raise FileNotFoundError(reason)
    spec = find_spec("mooncake")
    assert spec is not None
    for folder in spec.submodule_search_locations or ():
        path = Path(folder) / "mooncake_master"
        if path.exists():
            return str(path)
    raise FileNotFoundError(f"the installed mooncake brings no mooncake_master: {_WHEEL}")
