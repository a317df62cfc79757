"""Where there is no NPU: nothing heavy is imported, the CPU stays in charge, and every report says what is missing and how to get it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RUN = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from xllm_core.cli import main; sys.exit(main())"


def xllm(path: list[str], *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The command line with that sys.path, without the soft runtime."""
    hidden = ("LD_LIBRARY_PATH", "TORCH_DEVICE_BACKEND_AUTOLOAD", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | more
    command = [sys.executable, "-c", RUN, json.dumps(path), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def without_wheel() -> list[str]:
    """sys.path of the main environment, in which nobody installed torch_npu."""
    return [entry for entry in sys.path if not (Path(entry or ".") / "torch_npu" / "__init__.py").exists()]


def line_of(done: subprocess.CompletedProcess[str], start: str) -> str:
    """The one line of a report about something."""
    (line,) = [line for line in done.stdout.splitlines() if start in line]
    return line


def test_doctor_names_everything_that_is_missing(without_wheel: list[str]) -> None:
    """Wheel, libraries and driver in one line, each with its remedy. Killed by: a probe that stops at the first."""
    done = xllm(without_wheel, "doctor")
    line = line_of(done, "device ascend/npu")
    for words in (
        "torch_npu is not installed; pip install 'xllm-ascend[npu]'",
        "no CANN: libascendcl.so",
        "set_env.sh",
        "no NPU driver",
        "npu-smi",
    ):
        assert words in line, line
    assert done.returncode == 0, done.stdout + done.stderr


def test_doctor_answers_where_torch_cannot_be_imported() -> None:
    """torch_npu without CANN keeps torch itself from starting: that is what somebody who forgot set_env.sh has. Killed by: a traceback."""
    done = xllm(sys.path, "doctor")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "Failed to load the backend extension: torch_npu" in line_of(done, "fail  torch")
    line = line_of(done, "device ascend/npu")
    assert "no CANN" in line and "set_env.sh" in line and "not installed" not in line


def test_list_why_names_what_is_missing() -> None:
    """With the wheel there, the rest is named. Killed by: a list that does not ask the probe."""
    done = xllm(sys.path, "plugins", "list", "--why", "--json")
    reason = {record["id"]: record for record in json.loads(done.stdout)}["ascend"]["unusable"]["npu"]
    assert "no CANN" in reason and "no NPU driver" in reason and "torch_npu is not installed" not in reason


def test_the_reference_stays_in_charge(without_wheel: list[str]) -> None:
    """Installed beside the core it changes nothing; pinned, it stops with its reason. Nothing of it is imported."""
    assert "ascend" not in line_of(xllm(without_wheel, "plugins", "why", "device"), "chosen")
    pinned = xllm(without_wheel, "plugins", "why", "device", "--use", "device=ascend/npu")
    assert pinned.returncode != 0 and "torch_npu is not installed" in pinned.stderr, pinned.stdout + pinned.stderr


def test_it_is_chosen_where_it_can_be_used() -> None:
    """On the soft runtime the probe says yes, and an accelerator comes before the CPU. Killed by: a probe that always has something to say."""
    soft = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TORCH_DEVICE_BACKEND_AUTOLOAD")}
    done = xllm(sys.path, "plugins", "why", "device", **soft)
    assert "chosen   ascend/npu" in done.stdout, done.stdout + done.stderr


def test_another_chip_or_release_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A version that was never tried and a chip without the operator are reasons. Killed by: a probe that only looks whether there is one."""
    import torch
    from xllm_ascend.probe import probe

    assert probe() is None
    monkeypatch.setattr(torch.npu, "get_device_name", lambda index: "Ascend310P3")
    assert "Ascend310P3" in str(probe()) and "Ascend910B*" in str(probe())
    info = tmp_path / "torch_npu-2.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.9.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "torch-npu 2.9.0 is installed, calls were checked with 2.13" in str(probe())


def test_nothing_heavy_before_the_device_is_chosen(without_wheel: list[str]) -> None:
    """Asking for a kernel of the CPU imports none of our modules that need torch_npu. Killed by: a target at the top of plugin.py."""
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from xllm_core.cli import main\n"
        "try: sys.exit(main())\n"
        "finally: print('heavy', sorted({'torch_npu', 'xllm_ascend.device', 'xllm_ascend.fused'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, json.dumps(without_wheel), "plugins", "why", "attention"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert re.search(r"chosen   (core|cpu)/paged", done.stdout) and "heavy []" in done.stdout, done.stdout + done.stderr
