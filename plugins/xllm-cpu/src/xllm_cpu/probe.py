"""Whether the kernels can run here. Run in a child process at assembly."""

from __future__ import annotations

from xllm_cpu.native import UnusableError, open_library


def probe() -> str | None:
    """None if some built instruction set runs on this processor and its library has what this plugin calls, else the reason."""
    try:
        open_library("auto")
    except UnusableError as error:
        return str(error)
    return None
