"""Builds the libraries that torch_npu wants from CANN, so that the real wheel can be imported: our runtime, and a function that returns 0
for every other name that is missing. Which names those are is read from the wheel.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = (HERE / "runtime.c", HERE / "recorder.c", HERE / "build.py")
RUNTIME = "libascendcl.so"
OPERATORS = "libopapi.so"
_SYSTEM = re.compile(
    r"lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)\.so|ld-linux|libtorch|libc10|libnpu_profiler|libtensorpipe|_\w*\.so"
)
_C_FUNCTION = re.compile(r"^(?:int|size_t|const char) \*?(\w+)\(", re.M)


def build() -> Path:
    """The folder with the libraries; made once for a wheel and these sources, beside the environment's packages."""
    digest = hashlib.sha256(version("torch-npu").encode() + b"".join(path.read_bytes() for path in SOURCES)).hexdigest()
    folder = Path(sys.prefix) / "soft-npu" / digest[:16]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        _make(made)
        made.rename(folder)  # two test processes may build at once: the first one's stays
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _make(folder: Path) -> None:
    wheel = _package("torch_npu")
    libraries = sorted(wheel.rglob("*.so"))
    needed = {name for library in libraries for name in _needed(library)}
    cann = sorted(name for name in needed - {path.name for path in libraries} if not _SYSTEM.match(name))
    names = missing_symbols(libraries)
    runtime = (HERE / "runtime.c").read_text(encoding="utf-8")
    stubs = sorted(names - set(_C_FUNCTION.findall(runtime)))
    _compile(folder, RUNTIME, [HERE / "runtime.c"], (f"long {name}(void) {{ return 0; }}" for name in stubs))
    kernels = aclnn_names(wheel / "lib" / "libtorch_npu.so")
    lines = ["int soft_launch(const char *);"]
    lines += [
        f'int {name}GetWorkspaceSize(void) {{ return 0; }} int {name}(void) {{ return soft_launch("{name}"); }}'
        for name in kernels
    ]
    _compile(folder, OPERATORS, [HERE / "recorder.c"], lines)
    for name in cann:
        if name != RUNTIME:
            _compile(folder, name, [], ())


def missing_symbols(libraries: Iterable[Path]) -> set[str]:
    """What the wheel's libraries ask for and neither they, nor torch, nor the system give."""
    libraries = list(libraries)
    given = [*libraries, *(_package("torch") / "lib").glob("*.so*")]
    provided = {name for library in given for _, name in _symbols(library, "--defined-only")}
    # Weak names may stay away, names with a version belong to the system's libraries, Py... to the interpreter.
    wanted = {name for library in libraries for kind, name in _symbols(library, "--undefined-only") if kind == "U"}
    return {name for name in wanted - provided if "@" not in name and not name.startswith(("Py", "_Py"))}


def aclnn_names(library: Path) -> list[str]:
    """Kernels that torch_npu looks up by name when it runs: its strings that have a twin with GetWorkspaceSize."""
    found = {text.decode() for text in re.findall(rb"aclnn[A-Z]\w{2,80}(?=\x00)", library.read_bytes())}
    suffix = "GetWorkspaceSize"
    return sorted(name for name in found if not name.endswith(suffix) and name + suffix in found)


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{name} is not installed")
    return Path(spec.origin).parent


def _symbols(library: Path, which: str) -> list[tuple[str, str]]:
    lines = subprocess.run(
        ["nm", "-D", which, str(library)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    fields = [line.split() for line in lines]
    if which == "--defined-only":
        return [(field[-2], field[-1].split("@")[0]) for field in fields if len(field) > 1]
    return [(field[-2], field[-1]) for field in fields if len(field) > 1]


def _needed(library: Path) -> list[str]:
    text = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", text)


def _compile(folder: Path, name: str, sources: list[Path], lines: Iterable[str]) -> None:
    generated = folder / f"{name}.c"
    generated.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [
        os.environ.get("CC", "gcc"),
        "-w",
        "-O1",
        "-shared",
        "-fPIC",
        f"-Wl,-soname,{name}",
        "-o",
        str(folder / name),
    ]
    # torch_npu looks functions up in the library where CANN has them: each of the others leads on to the runtime.
    more = [] if name == RUNTIME else [f"-L{folder}", "-Wl,--no-as-needed", f"-l:{RUNTIME}", "-Wl,-rpath,$ORIGIN"]
    subprocess.run([*command, str(generated), *map(str, sources), *more], check=True)
