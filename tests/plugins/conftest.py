"""Dummy distributions, put on sys.path the way an installer leaves them: their package, and a .dist-info made from their pyproject.toml."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import importlib_metadata
import pytest

from tests.plugins.alone.hiding import hide_installed

DISTS = Path(__file__).parent / "dists"
ALONE = Path(__file__).parent / "alone"

Install = Callable[..., list[str]]


def write_dist_info(dist: Path, site: Path) -> None:
    """What pip would write for a project: name, version, requirements and entry points."""
    project = tomllib.loads((dist / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in project["dependencies"]]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    entries = project["entry-points"]["xllm_core.plugins"]
    body = "\n".join(f"{name} = {target}" for name, target in entries.items())
    (info / "entry_points.txt").write_text(f"[xllm_core.plugins]\n{body}\n")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else is installed here is not seen, in this process and in children: reports are compared whole."""
    monkeypatch.setattr(importlib_metadata, "entry_points", hide_installed)
    monkeypatch.setenv("PYTHONPATH", str(ALONE))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """install("good", "twin_a") puts these dummies on sys.path, here and in child processes; returns the paths. Undone after the test."""

    def do_install(*names: str) -> list[str]:
        paths = []
        for name in names:
            site = tmp_path / f"site_{name}"
            write_dist_info(DISTS / name, site)
            paths += [str(site), str(DISTS / name / "src")]
        for path in paths:
            monkeypatch.syspath_prepend(path)
        monkeypatch.setenv("PYTHONPATH", ":".join([str(ALONE), *paths]))
        importlib.invalidate_caches()
        return paths

    before = set(sys.modules)
    yield do_install
    for name in set(sys.modules) - before:
        if name.startswith(
            (
                "xllm_good",
                "xllm_twin",
                "xllm_broken",
                "xllm_unknown",
                "xllm_wrong",
                "xllm_too_new",
                "xllm_exits",
                "xllm_hangs",
            )
        ):
            del sys.modules[name]


@pytest.fixture
def xllm() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "xllm_core.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    return run
