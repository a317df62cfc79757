"""Which instruction sets there are kernels for, and which of them this processor runs. Standard library only."""

from __future__ import annotations

import platform
from pathlib import Path

FOLDER = Path(__file__).parent / "lib"

_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
NEEDS: dict[str, frozenset[str]] = {
    "avx512_bf16": _AVX512 | {"avx512_bf16", "avx512_vnni"},
    "avx512_vnni": _AVX512 | {"avx512_vnni"},
    "avx512": _AVX512,
    "avx2": _AVX2,
    "portable": frozenset(),
}
"""Best first: the processor's flags that each needs, by Linux's names."""


def library_path(isa: str) -> Path:
    """Where the kernels for an instruction set are, or would be."""
    return FOLDER / f"libxllm_cpu_{isa}.so"


def processor_flags() -> frozenset[str]:
    """The flags of the first processor; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), frozenset())


def runnable() -> list[str]:
    """Instruction sets that were built and that this processor has, best first."""
    flags = processor_flags()
    return [isa for isa, needs in NEEDS.items() if library_path(isa).exists() and needs <= flags]


def why_not(isa: str) -> str | None:
    """Why kernels for `isa` ("auto": any) cannot run here, with what helps; None if they can."""
    if isa == "auto" and runnable():
        return None
    if isa != "auto" and isa in runnable():
        return None
    if isa != "auto" and library_path(isa).exists():
        missing = ", ".join(sorted(NEEDS[isa] - processor_flags()))
        return f"this processor ({platform.machine()}) lacks {missing} for isa {isa!r}; it runs {', '.join(runnable()) or 'none'}"
    return (
        "the native kernels are absent: xllm-cpu was built where no C++ compiler was found;"
        " install g++ and `pip install --force-reinstall --no-deps xllm-cpu`"
    )
