"""Compiles the kernels when the distribution is built: once per instruction set, a library each, with no header but the compiler's own.

Where there is no C++ compiler the distribution is built without them; the plugin then says so, and the reference device serves.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]
FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_vnni": [*AVX512, "-mavx512vnni"],
    "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
}
"""Per instruction set; the first is for any processor, the others for x86-64."""

LINK = ["-shared", "-pthread", "-static-libstdc++", "-static-libgcc"]
COMMON = ["-std=c++20", "-O3", "-fPIC", "-pthread", "-ffp-contract=off", "-fvisibility=hidden", "-fno-math-errno"]


class KernelBuild(BuildHookInterface[Any]):
    """The hook that hatchling calls."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile into `src/xllm_cpu/lib`, which the wheel takes and an editable install finds."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            self.app.display_warning(
                "xllm-cpu: no C++ compiler was found; built without kernels. Install g++ and build again."
            )
            return
        libraries = compile_all(compiler, root / "native", root / "src" / "xllm_cpu" / "lib")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"] += [f"/src/xllm_cpu/lib/{library.name}" for library in libraries]


def compile_all(compiler: str, sources: Path, folder: Path) -> list[Path]:
    """A library per instruction set of this kind of processor; those that are newer than every source are kept. Raises on a compiler's error."""
    folder.mkdir(exist_ok=True)
    names = list(FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ["portable"]
    files = sorted(sources.glob("*.cpp"))
    newest = max(path.stat().st_mtime for path in [*sources.iterdir(), Path(__file__)])
    targets = {name: folder / f"libxllm_cpu_{name}.so" for name in names}
    stale = [name for name, path in targets.items() if not path.exists() or path.stat().st_mtime < newest]

    def compile_one(job: tuple[str, Path]) -> None:
        name, source = job
        command = [compiler, *COMMON, *FLAGS[name], "-c", str(source), "-o", str(folder / f"{name}-{source.stem}.o")]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, [(name, source) for source in files for name in stale]))
    for name in stale:
        objects = [folder / f"{name}-{source.stem}.o" for source in files]
        linked = targets[name].with_suffix(".new")
        command = [compiler, *LINK, "-o", str(linked), *map(str, objects)]
        subprocess.run(command, check=True)
        linked.replace(targets[name])  # a process that has the old one loaded keeps it
        for path in objects:
            path.unlink()
    return list(targets.values())
