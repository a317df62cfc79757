"""What do xllm-core and xllm-cpu take on the disk, and how long are the kernels built?

Wheels of both are built by `pip wheel` from a copy of the sources that holds nothing built before. The size is that of the files in them, unpacked:
what an installation writes, without byte code and without what the distributions depend on. The seconds are those of xllm-cpu's wheel, pip's own
included; kernels are compiled on all cores. Needs a C++ compiler and hatchling; where one is missing, that is said in place of figures.

    python -m benchmarks.installed | tail -1 | jq .
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from benchmarks.peers.installs import AbsentError
from benchmarks.peers.sizes import OURS, ROOT

SIZE_TARGET_MB = 30.0
BUILD_TARGET_S = 60.0
_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "hatch_build.py", "xllm_core", "native", "src")
"""What a wheel is built from, where a distribution has it."""


def run() -> dict[str, Any]:
    """MB (1e6 bytes) of each wheel's files, the seconds of the build and its conditions; or `absent`, which says what is missing."""
    try:
        figures = measure()
    except AbsentError as error:
        print(f"installed: not measured: {error}", flush=True)
        return {"absent": str(error)}
    machine = f"{figures['cores']} cores, {' '.join(figures['flags']) or 'neither AVX2 nor AVX-512'}"
    print(
        f"installed: {figures['total_mb']} MB ({_said(figures['total_mb'] <= SIZE_TARGET_MB)}: at most {SIZE_TARGET_MB:g}); "
        f"xllm-cpu built in {figures['build_s']} s on {machine} ({_said(figures['build_s'] <= BUILD_TARGET_S)}: at most {BUILD_TARGET_S:g})",
        flush=True,
    )
    return figures


def measure() -> dict[str, Any]:
    """The figures. Raises AbsentError where a wheel with kernels cannot be built."""
    if not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))):
        raise AbsentError("there is no C++ compiler; install g++, or name one in CXX")
    sizes: dict[str, float] = {}
    seconds = 0.0
    with tempfile.TemporaryDirectory(prefix="xllm-installed-") as folder:
        for i, path in enumerate(OURS):
            source = Path(folder) / str(i)
            copy(ROOT / path, source)
            started_s = time.perf_counter()
            wheel = build(source, Path(folder) / f"wheel-{i}")
            seconds = time.perf_counter() - started_s  # the last is xllm-cpu
            sizes[wheel.name.split("-")[0].replace("_", "-")] = unpacked_mb(wheel)
    return {
        "mb": sizes, "total_mb": round(sum(sizes.values()), 1), "build_s": round(seconds, 1),
        "cores": os.cpu_count(), "flags": flags(), "load": [round(x, 2) for x in os.getloadavg()],
    }  # fmt: skip


def copy(distribution: Path, to: Path) -> None:
    """The sources of a distribution, without libraries and byte code that were made from them."""
    to.mkdir()
    for path in (distribution / name for name in _SOURCES):
        if path.is_dir():
            shutil.copytree(path, to / path.name, ignore=shutil.ignore_patterns("lib", "__pycache__"))
        elif path.exists():
            shutil.copy2(path, to)


def build(source: Path, to: Path) -> Path:
    """The wheel of the sources in a folder. Raises AbsentError with the end of pip's error."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "wheel", "--no-deps"]
    command = [*pip, "--no-build-isolation", "--wheel-dir", str(to), str(source)]
    done = subprocess.run(command, cwd=source.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AbsentError(f"a wheel cannot be built: {done.stderr.strip()[-400:]}")
    return next(to.glob("*.whl"))


def unpacked_mb(wheel: Path) -> float:
    """Of all files in it, in MB."""
    with zipfile.ZipFile(wheel) as files:
        return round(sum(file.file_size for file in files.infolist()) / 1e6, 2)


def flags() -> list[str]:
    """Those of this processor that kernels are chosen by."""
    from xllm_cpu.isa import NEEDS, processor_flags

    return sorted(processor_flags() & frozenset().union(*NEEDS.values()))


def _said(is_met: bool) -> str:
    return "met" if is_met else "missed"


if __name__ == "__main__":
    print(json.dumps(run()))
