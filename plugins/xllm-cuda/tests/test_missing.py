"""Where there is no GPU: nothing heavy is imported, the CPU stays in charge, and every report says what is missing and how to get it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RUN = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from xllm_core.cli import main; sys.exit(main())"

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="this machine has a GPU: run `python -m benchmarks.cuda` instead"
)


def xllm(path: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line with that sys.path, away from the checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    command = [sys.executable, "-c", RUN, json.dumps(path), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_doctor_names_everything_that_is_missing(without_triton: list[str]) -> None:
    """Driver, wheel and compiler in one line, each with its remedy. Killed by: a probe that stops at the first."""
    done = xllm(without_triton, "doctor")
    (line,) = [line for line in done.stdout.splitlines() if "device cuda/cuda" in line]
    for words in (
        "no NVIDIA driver",
        "install the driver",
        "triton is not installed",
        "pip install 'triton==3.7.1'",
        "built without CUDA",
    ):
        assert words in line, line
    assert done.returncode == 0, done.stdout + done.stderr


def test_list_why_names_what_is_missing(without_shim: list[str]) -> None:
    """With triton there, the rest is named. Killed by: a list that does not ask the probe."""
    done = xllm(without_shim, "plugins", "list", "--why", "--json")
    reason = {record["id"]: record for record in json.loads(done.stdout)}["cuda"]["unusable"]["cuda"]
    assert "no NVIDIA driver" in reason and "built without CUDA" in reason and "triton" not in reason


def test_the_reference_stays_in_charge(without_shim: list[str]) -> None:
    """Installed beside the core it changes nothing; pinned, it stops with its reason."""
    assert re.search(r"chosen   (core/reference|cpu/cpu)", xllm(without_shim, "plugins", "why", "device").stdout)
    pinned = xllm(without_shim, "plugins", "why", "device", "--use", "device=cuda/cuda")
    assert pinned.returncode != 0 and "no NVIDIA driver" in pinned.stderr, pinned.stdout + pinned.stderr


def test_nothing_heavy_before_the_device_is_chosen(without_shim: list[str]) -> None:
    """Loading all plugins and asking for a kernel of the CPU imports no triton, and torch.cuda is not started. Killed by: a target at the top."""
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from xllm_core.cli import main\n"
        "try: sys.exit(main())\n"
        "finally: print('heavy', sorted({'triton', 'xllm_cuda.ops', 'xllm_cuda.device'} & set(sys.modules)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, json.dumps(without_shim), "plugins", "why", "attention"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert re.search(r"chosen   (core|cpu)/paged", done.stdout) and "heavy []" in done.stdout, done.stdout + done.stderr


def test_modules_import_anywhere(without_shim: list[str]) -> None:
    """The device's module needs no GPU to be imported, and building it says how many there are."""
    from xllm_cuda.device import CudaDevice

    from xllm_core.plugins import ConfigError

    with pytest.raises(ConfigError, match="no CUDA device"):
        CudaDevice(0)
    assert without_shim


def test_another_triton_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that was never tried is a reason, with the one that was. Killed by: a probe that only looks whether there is one."""
    from xllm_cuda.probe import probe

    assert "unset it" in str(probe()), "TRITON_INTERPRET is set in these tests, which would serve from the interpreter"
    info = tmp_path / "triton-9.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 9.9.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "triton 9.9.9 is installed, these kernels were checked with 3.7" in str(probe())


@pytest.mark.parametrize("number", [0, 24, 100, 1 << 20])
def test_settings(number: int) -> None:
    """A split that is no power of two, or absurd, is refused. Killed by: a kernel that then loops over the wrong keys."""
    from pydantic import ValidationError
    from xllm_cuda.settings import PluginTable

    assert PluginTable().kv_split_tokens == 512
    with pytest.raises(ValidationError):
        PluginTable(kv_split_tokens=number)


def test_the_probe_imports_no_torch(without_shim: list[str]) -> None:
    """Every start on a machine without a GPU waits for it. Killed by: asking torch itself what it was built for."""
    code = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from xllm_cuda.probe import probe; print(probe()); "
    code += "print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, json.dumps(without_shim)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    reason, is_imported = done.stdout.splitlines()
    assert "built without CUDA" in reason and is_imported == "False", done.stdout + done.stderr
