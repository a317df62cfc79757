"""Whether an NPU can be used here, and if not, everything that is missing and where to get it. Runs in a child process."""

from __future__ import annotations

import ctypes
import importlib.metadata
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

TORCH = "2.13"
"""Release of torch and torch_npu that every call was checked with; the two must be of one release."""

CHIPS = ("Ascend910B", "Ascend910_93")
"""Names of the Atlas A2 and A3 series, for which CANN has fused-infer attention over a paged cache."""

CANN = ("libascendcl.so", "libhccl.so", "libacl_op_compiler.so", "libge_runner.so", "libgraph.so", "libopapi.so")
"""What torch_npu is linked with, and CANN's library of operators, which it opens when the first one is called."""

_DRIVER = Path("/dev/davinci_manager")


def probe() -> str | None:
    """None if an NPU can be used, else what is missing, all of it, with remedies."""
    missing = list(_missing())
    return "; ".join(missing) if missing else None


def _missing() -> Iterator[str]:
    if not sys.platform.startswith("linux"):
        yield f"this is {sys.platform}: torch_npu has wheels for Linux only"
        return
    wheel = list(_missing_wheel())
    yield from wheel
    libraries = [name for name in CANN if not _is_there(name)]
    if libraries:
        yield (
            f"no CANN: {', '.join(libraries)} not found; install CANN toolkit and its kernels (hiascend.com), then source "
            "/usr/local/Ascend/ascend-toolkit/set_env.sh in this shell"
        )
        if not _DRIVER.exists():
            yield _no_driver()
    elif not wheel:  # without CANN importing torch_npu, and with it torch, would only fail
        yield from _missing_npu()


def _missing_wheel() -> Iterator[str]:
    if find_spec("torch_npu") is None:
        yield "torch_npu is not installed; pip install 'xllm-ascend[npu]' (it keeps torch from starting where CANN is missing: install CANN first)"
        return
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torch-npu")}
    for name, version in versions.items():
        if not f"{version}.".startswith(f"{TORCH}."):
            yield f"{name} {version} is installed, calls were checked with {TORCH}; pip install 'torch==2.13.0' 'torch-npu==2.13.0'"
    if find_spec("yaml") is None:
        yield "torch_npu needs pyyaml and does not say so; pip install pyyaml"


def _is_there(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _no_driver() -> str:
    return (
        f"no NPU driver: {_DRIVER} is not there; install the driver and firmware (does npu-smi info list a chip?), and in a container "
        "give it the devices /dev/davinci0, /dev/davinci_manager, /dev/devmm_svm, /dev/hisi_hdc"
    )


def _missing_npu() -> Iterator[str]:
    import torch
    import torch_npu

    if not torch.npu.is_available():
        yield f"torch_npu {torch_npu.__version__} sees no NPU; is ASCEND_RT_VISIBLE_DEVICES empty?"
        if not _DRIVER.exists():
            yield _no_driver()
        return
    name = torch.npu.get_device_name(0)
    if not name.startswith(CHIPS):
        yield f"{name}: CANN has fused-infer attention over a paged cache for {' and '.join(f'{chip}*' for chip in CHIPS)} only"
