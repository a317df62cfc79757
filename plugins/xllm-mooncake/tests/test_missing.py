"""What is missing is named, with the command that gets it: at a start, by `xllm doctor`, and in the list of plugins."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from xllm_mooncake import here

HIDE = {
    "wheel": "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'mooncake' else f(n, *a)\n",
    "library": "import ctypes; c = ctypes.CDLL\n"
    "def cdll(n, *a, **k):\n    if 'ibverbs' in str(n): raise OSError(n)\n    return c(n, *a, **k)\nctypes.CDLL = cdll\n",
}
"""Code that hides one thing from a process; put into its `sitecustomize`, so that children have it too."""

REMEDY = {"wheel": "pip install 'xllm-mooncake[host]'", "library": "apt-get install libibverbs1"}


@pytest.fixture(params=sorted(HIDE))
def hidden(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the commands that a test runs do not find."""
    (tmp_path / "sitecustomize.py").write_text(HIDE[request.param])
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *filter(None, sys.path)]))
    return str(request.param)


@pytest.mark.parametrize("command", [["doctor"], ["plugins", "list", "--why"]], ids=" ".join)
def test_reports_name_it(hidden: str, command: list[str]) -> None:
    """And what to do; neither ends with an error, since everything else works."""
    done = subprocess.run(
        [sys.executable, "-m", "xllm_core.cli", *command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and REMEDY[hidden] in done.stdout, done.stdout + done.stderr


def test_a_start_names_it(hidden: str, model: str) -> None:
    """A store that was chosen and cannot be there stops the start, before a weight is read."""
    done = subprocess.run(
        [sys.executable, "-m", "xllm_core.cli", "plan", model, "--use", "kv_store=mooncake/store"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and REMEDY[hidden] in done.stderr, done.stdout + done.stderr


def test_all_is_here() -> None:
    """One finding, with the place."""
    (finding,) = here.findings()
    assert finding.state == "ok" and "mooncake" in finding.detail


def test_a_broken_wheel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there and cannot be imported: the import's own last line says why."""
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake" / "__init__.py").write_text("")
    (tmp_path / "mooncake" / "store.py").write_text("raise ImportError('libnuma.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = here.findings()
    assert finding.state == "warn" and "libnuma.so.1" in finding.detail and finding.remedy


def test_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mooncake's wheels are for Linux; nothing of it is looked for elsewhere."""
    monkeypatch.setattr(sys, "platform", "darwin")

    def refuse(*_: Any) -> None:
        raise AssertionError("looked for")

    monkeypatch.setattr(importlib.util, "find_spec", refuse)
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert "Linux only" in str(here.check())
