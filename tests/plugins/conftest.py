"""Dummy distributions, put on sys.path the way an installer leaves them: their package, and a .dist-info made from their pyproject.toml."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import importlib_metadata
import pytest

from tests.plugins.alone.hiding import seen_distributions

DISTS = Path(__file__).parent / "dists"
ALONE = Path(__file__).parent / "alone"

Install = Callable[..., list[str]]
MakeDist = Callable[..., Path]


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
    monkeypatch.setattr(importlib_metadata, "distributions", seen_distributions)
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
    forget(before)


def forget(before: set[str]) -> None:
    """Dummies that a test imported: the next one imports them anew."""
    for name in set(sys.modules) - before:
        if name.startswith("xllm_") and name.partition(".")[0] not in ("xllm_core", "xllm_example_sjf"):
            del sys.modules[name]


@pytest.fixture
def make_dist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeDist]:
    """make_dist("id", plugin source, {"file.py": source}): a distribution xllm-ID with package xllm_ID, visible here and in child processes.

    The source of its plugin module gets `PluginInfo` and `hookimpl` from us. Returns the folder of the package.
    """

    def do_make(
        plugin_id: str, plugin: str, others: Mapping[str, str] = MappingProxyType({}), *, requires: Sequence[str] = ("xllm-core>=0.1",),
        api: str = ">=0.1",
    ) -> Path:  # fmt: skip
        dist = tmp_path / f"dist_{plugin_id}"
        package = dist / "src" / f"xllm_{plugin_id}"
        package.mkdir(parents=True)
        head = f"from xllm_core.plugins import PluginInfo, hookimpl\nxllm_plugin = PluginInfo(id={plugin_id!r}, xllm_api={api!r})\n"
        for name, source in {"__init__.py": "", "plugin.py": head + plugin, **others}.items():
            (package / name).write_text(source)
        (dist / "pyproject.toml").write_text(
            f'[project]\nname = "xllm-{plugin_id}"\nversion = "1.0"\ndependencies = {json.dumps(list(requires))}\n'
            f'[project.entry-points."xllm_core.plugins"]\n{plugin_id} = "xllm_{plugin_id}.plugin"\n'
        )
        write_dist_info(dist, dist / "site")
        paths = [str(dist / "site"), str(dist / "src")]
        for path in paths:
            monkeypatch.syspath_prepend(path)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]))
        importlib.invalidate_caches()
        return package

    before = set(sys.modules)
    yield do_make
    forget(before)


@pytest.fixture
def xllm() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "xllm_core.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    return run
