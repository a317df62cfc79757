"""Shared by every suite: no setting leaks in from outside, one thread per worker, and system tools that are missing say so."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores; must be set before torch is imported

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def clean_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No `XLLM_*` variable of the caller reaches a test. Tests do not run where an xllm.toml lies (see `test_root_is_clean`)."""
    for name in list(os.environ):
        if name.startswith("XLLM_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def require_command() -> Callable[[str, str], str]:
    """require_command("etcd", "etcd-server") -> its path; else the test skips with the command that helps, or fails under CI=true."""

    def require(command: str, package: str) -> str:
        if path := shutil.which(command):
            return path
        message = f"{command} is not installed; apt-get install {package}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)

    return require
