"""Interpreted kernels on the shim device, visible here and in child processes. Set before anything imports triton."""

from __future__ import annotations

import os
import sys
import tempfile
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHIM = HERE / "shim"

os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure() -> None:
    """Nothing of this can run without the compiler, so nothing is skipped for want of it."""
    if find_spec("triton") is None:
        raise pytest.UsageError(
            "these tests need triton==3.7.1 (no GPU): `make suite` runs them in .venvs/xllm-cuda, which it makes from environment.txt"
        )


def write_dist_info(dist: Path, site: Path) -> None:
    """What an installer would write: name, version, requirements, entry points."""
    project = tomllib.loads((dist / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in project["dependencies"]]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    entries = project["entry-points"]["xllm_core.plugins"]
    body = "\n".join(f"{name} = {target}" for name, target in entries.items())
    (info / "entry_points.txt").write_text(f"[xllm_core.plugins]\n{body}\n")


# Under pytest-xdist each worker makes its own. The object keeps the folder until the process ends.
_site = tempfile.TemporaryDirectory(prefix="xllm-cuda-shim-")
write_dist_info(SHIM, Path(_site.name))
sys.path[:0] = [_site.name, str(SHIM / "src")]


@pytest.fixture(scope="session")
def without_shim() -> list[str]:
    """sys.path of somebody who has the plugin and not our shim."""
    mine = {_site.name, str(SHIM / "src")}
    return [entry for entry in sys.path if entry not in mine]


@pytest.fixture(scope="session")
def without_triton(without_shim: list[str]) -> list[str]:
    """sys.path of the main environment, in which nobody installed triton."""
    return [entry for entry in without_shim if not (Path(entry or ".") / "triton" / "__init__.py").exists()]
