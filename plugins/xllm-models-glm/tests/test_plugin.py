"""The plugin as users and authors meet it: conformance, the commands, and its wheel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from xllm_core.testing.check import check_plugin

DIST = Path(__file__).parent.parent
ROOT = DIST.parent.parent


def xllm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, in a process of its own."""
    command = [sys.executable, "-m", "xllm_core.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_conformance() -> None:
    """All three families in both dtypes, cut over ranks, planned without torch."""
    report = check_plugin("glm")
    assert report.ok, report.text()
    names = {component.name for component in report.components if component.ran}
    assert names == {"model glm/glm", "model glm/glm4", "model glm/glm4-moe"}


def test_what_the_commands_say(tiny: Callable[..., Path]) -> None:
    """Listed as loaded; chosen before the core's fallback, which would serve it too; its ops chosen with it."""
    listed = xllm("plugins", "list", "--why")
    assert re.search(r"glm +loaded +xllm-models-glm 0\.1\.0\n +models +glm, glm4, glm4-moe", listed.stdout), (
        listed.stdout + listed.stderr
    )
    for kind, name in (("glm", "glm"), ("glm4", "glm4"), ("moe", "glm4-moe")):
        done = xllm("plugins", "why", "model", "--model", str(tiny(kind)), "--device", "core/reference")
        assert f"chosen   glm/{name}" in done.stdout, done.stdout + done.stderr
        assert "rejected core/transformers  not asked" in done.stdout
    done = xllm("plugins", "why", "op.moe_experts", "--model", str(tiny("moe")), "--device", "core/reference")
    assert "chosen   core/moe_experts" in done.stdout, done.stdout + done.stderr
    assert xllm("doctor").returncode == 0


@pytest.mark.nightly
def test_wheels_generate_in_a_fresh_environment(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Core and plugin from their wheels, away from the checkout; a tiny model of each family answers. Minutes, and a gigabyte."""
    for source in (ROOT, DIST):
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)],
            check=True, timeout=300,
        )  # fmt: skip
    wheels = sorted(map(str, tmp_path.glob("*.whl")))
    assert len(wheels) == 2
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True, timeout=120)
    python = str(tmp_path / "env" / "bin" / "python")
    # What is on PYTHONPATH here would count as installed there.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    constraints = ROOT / "constraints.txt"
    (torch,) = re.findall(r"^torch==\S+", constraints.read_text(), re.MULTILINE)
    for packages in ([torch], ["-c", str(constraints), *wheels]):
        subprocess.run([python, "-m", "pip", "install", "-qq", *packages], check=True, timeout=1200, env=environment)
    code = (
        "import sys, xllm_models_glm; from xllm_core import LLM, SamplingParams\n"
        "params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)\n"
        "with LLM(sys.argv[1], dtype='float32', num_blocks=16, use={'device': 'core/reference'}) as llm:\n"
        "    print(xllm_models_glm.__file__, llm.generate([{'prompt_token_ids': [3, 1, 4]}], params, use_tqdm=False)[0].outputs[0].token_ids)\n"
    )
    for kind in ("glm", "glm4", "moe"):
        said = []
        for interpreter, extra in ((python, environment), (sys.executable, dict(os.environ))):
            done = subprocess.run(
                [interpreter, "-c", code, str(tiny(kind))],
                cwd=tmp_path,
                env=extra,
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            said.append(done.stdout.strip().splitlines()[-1].partition(" ")[::2])
        assert said[0][0].startswith(str(tmp_path / "env")), said
        assert said[0][1] == said[1][1], said
