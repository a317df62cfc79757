"""Built where there is a compiler and where there is none; and the kernels under the sanitizers of the compiler."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from xllm_cpu import isa, native, probe

from xllm_core.testing.tiny import tiny_config, write_tiny

ROOT = Path(__file__).parent.parent


def build_module() -> Any:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_kernels_the_probe_says_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an installation without a compiler: a reason, not an error."""
    monkeypatch.setattr(isa, "FOLDER", tmp_path)
    assert isa.runnable() == []
    assert "install g++" in (probe.probe() or "")
    (tmp_path / "libxllm_cpu_portable.so").write_bytes(b"not a library")
    assert "do not load" in (probe.probe() or "")


OLDER = {
    "lacks functions": ('extern "C" const char* xllm_isa() { return "portable"; }', r"undefined symbol: xllm_\w+"),
    "takes other arguments": (
        "\n".join(f'extern "C" int xllm_{name}() {{ return 0; }}' for name in native._FUNCTIONS),
        rf"their interface is number 0, not {native.ABI}",
    ),
}


@pytest.fixture(params=OLDER)
def older(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """The plugin beside a library of an older build, which loads, and what is said of it."""
    compiler = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler to build a library with")
    text, reason = OLDER[request.param]
    package = tmp_path / "xllm_cpu"
    shutil.copytree(ROOT / "src" / "xllm_cpu", package, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    (package / "lib").mkdir()
    source = tmp_path / "old.cpp"
    source.write_text(text + "\n")
    library = package / "lib" / "libxllm_cpu_portable.so"
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True, timeout=60)
    return tmp_path, reason


def xllm(first: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, where the plugin is the one that lies in `first`."""
    paths = os.pathsep.join((str(first), *filter(None, (os.environ.get("PYTHONPATH"),))))
    command = [sys.executable, "-m", "xllm_core.cli", *arguments]
    # Where there is a GPU, it would be chosen: here it is not seen.
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "1000", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def test_kernels_of_an_older_build_are_not_chosen(older: tuple[Path, str], tmp_path: Path) -> None:
    """The reference device serves, `plugins why` tells what is wrong with them and what helps, and a pin fails with the same words."""
    first, wrong = older
    reason = rf"of another version than xllm-cpu: .*{wrong}; .*--force-reinstall --no-deps xllm-cpu"
    why = xllm(first, "plugins", "why", "device")
    assert why.returncode == 0, why.stderr
    assert re.search(reason, why.stdout), why.stdout
    model = str(write_tiny(tiny_config("LlamaForCausalLM"), tmp_path / "model"))
    chosen = xllm(first, "plan", model)
    assert chosen.returncode == 0 and "core/reference" in chosen.stdout, chosen.stdout + chosen.stderr
    pinned = xllm(first, "plan", model, "--device", "cpu/cpu")
    assert pinned.returncode != 0 and re.search(reason, pinned.stderr), pinned.stderr


def test_the_number_of_the_interface() -> None:
    """Dies with a change of a function or structure whose number stayed: then raise XLLM_ABI and ABI, and write here what api.h is now."""
    text = (ROOT / "native" / "api.h").read_text()
    (number,) = re.findall(r"^#define XLLM_ABI (\d+)$", text, re.MULTILINE)
    assert int(number) == native.ABI
    code = re.sub(r"\s+", " ", re.sub(r"//.*", "", text))
    assert (
        hashlib.sha256(code.encode()).hexdigest() == "8aa2aa638a04bc6e1df0d85ce9e3c8c38fc1e11833b3849c31a3a2a233212001"
    )


def test_an_instruction_set_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the flags that the processor lacks."""
    monkeypatch.setattr(isa, "processor_flags", lambda: frozenset({"avx2", "fma", "f16c"}))
    assert isa.runnable() == ["avx2", "portable"]
    assert "lacks avx512_bf16" in (isa.why_not("avx512_bf16") or "")


@pytest.mark.slow
def test_the_wheel_of_a_machine_without_a_compiler(tmp_path: Path) -> None:
    """It builds, holds no library, fits every platform and installs; then the reference device serves and the reason is told."""
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns("lib", "__pycache__", "tests"))
    environment = {**os.environ, "PATH": str(tmp_path / "nothing"), "CXX": ""}
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, env=environment, timeout=120)
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.name.endswith("py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, env=environment, timeout=120)
    why = xllm(site, "plugins", "why", "device")
    assert why.returncode == 0 and "the native kernels are absent" in why.stdout, why.stdout + why.stderr
    model = str(write_tiny(tiny_config("LlamaForCausalLM"), tmp_path / "model"))
    chosen = xllm(site, "plan", model)
    assert chosen.returncode == 0 and "core/reference" in chosen.stdout, chosen.stdout + chosen.stderr


KERNEL_TESTS = (
    "test_exactness.py", "test_hostile.py", "test_int8_kv.py", "test_quantized.py", "test_blocks.py", "test_graphs.py", "test_sampler.py",
    "test_experts.py", "test_tied.py", "test_together.py",
)  # fmt: skip

# Weights and caches come from malloc, one by one: beyond an end within the device's own rooms lies memory that may be read.
OVER_SANITIZED = """
import pathlib, torch, xllm_cpu.isa
from xllm_cpu.device import CpuDevice

mapped = CpuDevice.allocate

def allocate(self, shape, dtype):
    size = torch.Size(shape).numel()
    return torch.zeros(tuple(shape), dtype=dtype) if size < 1 << 30 else mapped(self, shape, dtype)

# Before any conftest asks what can be run.
xllm_cpu.isa.FOLDER = pathlib.Path({folder!r})
xllm_cpu.isa.processor_flags = lambda: xllm_cpu.isa.NEEDS[{isa!r}]
CpuDevice.allocate = allocate
CpuDevice.packed_weight = lambda self, num_elements, dtype: torch.zeros(num_elements, dtype=dtype)
"""

KIT = """
import pathlib, sys
from xllm_core.testing import check_plugin
arguments = ("-p", "over_sanitized", "-k", "test_op or test_attention")
report = check_plugin("cpu", require_device=True, config=pathlib.Path(sys.argv[1]), arguments=arguments)
print("ok" if report.ok else report.text)
sys.exit(not report.ok)
"""

SANITIZERS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
EMULATED = {"avx512": [], "avx512_vnni": ["-DEMULATED_VNNI"], "avx512_bf16": ["-DEMULATED_VNNI", "-DEMULATED_BF16"]}


def flags_to_run(name: str, flags: dict[str, list[str]]) -> list[str]:
    """The compiler's flags for a path: its own where the processor runs it, else those that emulate it; the test skips where neither will do."""
    if name in isa.runnable():
        return flags[name]
    reason = isa.why_not(name) or ""
    if name not in EMULATED or "avx2" not in isa.runnable():
        pytest.skip(reason)
    if not Path("/usr/include/simde").exists():
        message = f"{reason}; to emulate it: apt-get install libsimde-dev"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return [*flags["avx2"], *EMULATED[name], "-Wno-psabi", "-include", str(ROOT / "tests" / "emulated_avx512.h")]


@pytest.mark.nightly
@pytest.mark.parametrize("name", isa.NEEDS)
def test_the_kernels_under_sanitizers(name: str, tmp_path: Path) -> None:
    """Addresses and undefined behaviour: tests of the kernels and the conformance kit's, over a library that stops at the first bad access."""
    build = build_module()
    folder = tmp_path / "lib"
    build.COMMON = [*build.COMMON, *SANITIZERS]
    build.LINK = ["-shared", "-pthread", "-fsanitize=address,undefined"]
    build.FLAGS = {name: flags_to_run(name, build.FLAGS)}
    build.compile_all("g++", ROOT / "native", folder)
    runtimes = [
        subprocess.run(
            ["g++", f"-print-file-name=lib{runtime}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for runtime in ("asan", "ubsan")
    ]
    (tmp_path / "over_sanitized.py").write_text(OVER_SANITIZED.format(folder=str(folder), isa=name))
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        # GCC 13 puts vectors of 64 bytes at places of its fake stack that are not multiples of 64.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)]),
    }

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=6000, check=False
        )
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[:6000]}"
        return done.stdout

    # Nothing is captured: who stops a process at a bad access says why on its standard error, which a capture would take along.
    options = ["-q", "-s", "-p", "over_sanitized", "-p", "no:xdist", "-p", "no:cacheprovider"]
    output = run("-m", "pytest", *options, *(str(ROOT / "tests" / file) for file in KERNEL_TESTS))
    assert " passed" in output and f"instruction sets tested: {name}\n" in output
    config = tmp_path / f"{name}.toml"
    config.write_text(f'[plugin.cpu]\nisa = "{name}"\n')
    assert "ok" in run("-c", KIT, str(config))
