"""Whether a GPU can be used here, and if not, everything that is missing and where to get it. Runs in a child process."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import runpy
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

TRITON = "3.7"
"""Release of triton that the kernels were compiled and checked with; it is the one that torch 2.13 is built for."""

MIN_CAPABILITY = (8, 0)
LIBCUDA = "libcuda.so.1"


def probe() -> str | None:
    """None if a GPU can be used, else what is missing, all of it, with remedies."""
    missing = list(_missing())
    return "; ".join(missing) if missing else None


def _missing() -> Iterator[str]:
    if not sys.platform.startswith("linux"):
        yield f"this is {sys.platform}: triton has wheels for Linux only"
        return
    driver = _missing_driver()
    if driver:
        yield driver
    yield from _missing_triton()
    wheel = _missing_wheel()
    if wheel:
        yield wheel
    elif not driver:  # torch would only repeat what the driver said
        yield from _missing_gpu()


def _missing_driver() -> str:
    """The driver is a library that comes with the kernel module, never with pip."""
    try:
        driver = ctypes.CDLL(LIBCUDA)
    except OSError:
        return (
            f"no NVIDIA driver: {LIBCUDA} is not found; install the driver (Ubuntu: sudo ubuntu-drivers install), and in a "
            "container start it with --gpus all"
        )
    if status := driver.cuInit(0):
        return f"the NVIDIA driver answers cuInit with error {status}; does nvidia-smi list a GPU, and may this user open /dev/nvidia*?"
    return ""


def _missing_wheel() -> str:
    """By the file that says what torch was built for: to import torch takes seconds, which every start on a machine without a GPU would wait."""
    spec = find_spec("torch")
    if spec is None or not spec.origin:
        return "torch is not installed; pip install torch, whose wheels for Linux on PyPI are built with CUDA"
    facts = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    if facts["cuda"] is None:
        base = facts["__version__"].partition("+")[0]
        return (
            f"torch {facts['__version__']} is built without CUDA; pip install --force-reinstall torch=={base} from PyPI, or from an index of "
            "CUDA builds that pytorch.org names"
        )
    return ""


def _missing_triton() -> Iterator[str]:
    if find_spec("triton") is None:
        yield "triton is not installed: CUDA builds of torch bring it; pip install 'triton==3.7.1'"
        return
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    if not f"{version}.".startswith(f"{TRITON}."):
        yield f"triton {version} is installed, these kernels were checked with {TRITON}.x; pip install 'triton==3.7.1', with torch 2.13"
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"):
        yield "TRITON_INTERPRET is set, which interprets kernels on the host; unset it"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        yield "no C compiler: triton builds a launcher for each kernel; apt-get install gcc, or set CC"


def _missing_gpu() -> Iterator[str]:
    import torch

    if not torch.cuda.is_available():
        yield f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU; is the driver new enough, CUDA_VISIBLE_DEVICES not empty?"
        return
    best = max(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if best < MIN_CAPABILITY:
        yield f"compute capability {best[0]}.{best[1]}: kernels are compiled for {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} and newer"
