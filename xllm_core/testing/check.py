"""Runs the conformance kit in a child process: a plugin that crashes, hangs or exits takes nobody with it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from xllm_core.errors import PluginError
from xllm_core.testing.report import ConformanceReport

_SETTINGS = Path(__file__).parent / "conformance" / "pytest.ini"


def check_plugin(
    plugin_id: str, *, require_device: bool = False, config: Path | None = None, arguments: Sequence[str] = ()
) -> ConformanceReport:
    """Run every suite for what the plugin offers, and return what was proven. Prints nothing.

    require_device: a device that is missing here fails instead of being skipped. config: the settings file to load the plugin with; no other
    is read. arguments: more for pytest, e.g. ("-k", "attention") or ("-p", "my_fixtures"). Raises PluginError if pytest is not installed.
    """
    return run_kit(plugin_id, require_device=require_device, config=config, arguments=arguments, shows_progress=False)


def run_kit(
    plugin_id: str, *, require_device: bool = False, config: Path | None = None, arguments: Sequence[str] = (), shows_progress: bool
) -> ConformanceReport:  # fmt: skip
    """`check_plugin`, and if asked with pytest's own output while it runs."""
    if find_spec("pytest") is None:
        raise PluginError("the conformance kit needs pytest: pip install xllm-core[testing]")
    with tempfile.TemporaryDirectory(prefix="xllm-conformance-") as folder:
        path = Path(folder) / "report.json"
        command = [
            sys.executable, "-m", "pytest", "-q", "--pyargs", "xllm_core.testing.conformance", "-c", str(_SETTINGS), "-p", "no:xllm",
            "-p", "xllm_core.testing.plugin", "-p", "no:cacheprovider", "--xllm-plugin", plugin_id, "--xllm-report", str(path),
        ]  # fmt: skip
        command += ["--xllm-require-device"] if require_device else []
        command += ["--xllm-config", str(config.absolute())] if config is not None else []
        paths = [entry or os.getcwd() for entry in sys.path]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        environment.setdefault(
            "OMP_WAIT_POLICY", "passive"
        )  # threads that spin for a busy core cost a hundred times the work here
        done = subprocess.run(
            [*command, *arguments], env=environment, text=True, check=False,
            stdout=None if shows_progress else subprocess.PIPE, stderr=None if shows_progress else subprocess.STDOUT,
        )  # fmt: skip
        if path.exists():
            return ConformanceReport.read(path)
    end = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"ended with status {done.returncode}"
    said = "" if shows_progress else "\n" + "\n".join((done.stdout or "").strip().splitlines()[-20:])
    return ConformanceReport(plugin_id, problem=f"the kit's process {end} and left no report{said}")
