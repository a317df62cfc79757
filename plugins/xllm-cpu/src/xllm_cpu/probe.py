"""Whether the kernels can run here. Run in a child process at assembly."""

from __future__ import annotations

import ctypes

from xllm_cpu.isa import library_path, runnable, why_not


def probe() -> str | None:
    """None if some built instruction set runs on this processor and its library loads, else the reason."""
    if reason := why_not("auto"):
        return reason
    try:
        ctypes.CDLL(str(library_path(runnable()[0])))
    except OSError as error:
        return f"the native kernels do not load: {error}"
    return None
