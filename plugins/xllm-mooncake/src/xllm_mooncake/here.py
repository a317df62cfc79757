"""What this machine lacks for Mooncake, in words that help."""

from __future__ import annotations

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path

WHEEL = "mooncake-transfer-engine-non-cuda"


def check(query: object = None) -> str | None:
    """Why the store cannot be used here, and how to get what is missing; None if nothing is. Loads nothing of Mooncake."""
    if sys.platform != "linux":
        return f"Mooncake has wheels for Linux only, this is {sys.platform}"
    if find_spec("mooncake") is None:
        return f"Mooncake's wheel is not installed: pip install 'xllm-mooncake[host]', which brings {WHEEL}"
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError:
        return "the library libibverbs.so.1 is missing: apt-get install libibverbs1 (Debian, Ubuntu), or rdma-core"
    return None


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
    raise FileNotFoundError(f"the installed mooncake brings no mooncake_master; pip install --force-reinstall {WHEEL}")
