"""Interpreted kernels on the shim device, visible here and in child processes. Set before anything imports triton."""

from __future__ import annotations

import os
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
SHIM = HERE / "shim"

os.environ["TRITON_INTERPRET"] = "1"


def _write_dist_info(dist: Path, site: Path) -> None:
    """What an installer would write: name, version, entry points."""
    project = tomllib.loads((dist / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\nRequires-Dist: xllm-core\n"
    )
    entries = project["entry-points"]["xllm_core.plugins"]
    body = "\n".join(f"{name} = {target}" for name, target in entries.items())
    (info / "entry_points.txt").write_text(f"[xllm_core.plugins]\n{body}\n")


_site = tempfile.TemporaryDirectory(prefix="xllm-cuda-shim-")
_write_dist_info(SHIM, Path(_site.name))
PATHS = [_site.name, str(SHIM / "src")]
sys.path[:0] = PATHS
