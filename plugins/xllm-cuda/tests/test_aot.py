"""Kernels compiled for chips that are not here: the checked-in table is about this code, and nothing hot spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from xllm_cuda.aot.table import CHIPS, RooflineRow, Table, fingerprint, render

HOME = Path(__file__).parent.parent
CHECKED_IN = HOME / "aot.json"
REMEDY = "write it again: .venvs/xllm-cuda/bin/python -m xllm_cuda.aot --write plugins/xllm-cuda"


def table() -> Table:
    """As checked in."""
    return Table.from_json(CHECKED_IN.read_text(encoding="utf-8"))


def compiled(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The compiler in a process of its own, where kernels are not interpreted, with a cache of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    del environment["TRITON_INTERPRET"]
    command = [sys.executable, "-m", "xllm_cuda.aot", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=7000, check=False)


def test_the_table_is_about_this_code() -> None:
    """Killed by: any change of a kernel, a tiling or a launch without a new table."""
    assert table().sources == fingerprint(), f"kernels changed since aot.json was written; {REMEDY}"
    assert (HOME / "AOT.md").read_text(encoding="utf-8") == render(table()), f"AOT.md does not show aot.json; {REMEDY}"


def test_nothing_hot_spills() -> None:
    """On no chip, at no shape, in no dtype; and a row that does is found."""
    found = table()
    assert found.spills() == []
    assert {row.capability for row in found.kernels} == {chip.capability for chip in CHIPS}
    assert {row.model for row in found.kernels} == {"Llama-3-8B", "Qwen3-32B", "GLM-4-9B"}
    bad = replace(found, kernels=[replace(found.kernels[0], spill_bytes=8)])
    assert len(bad.spills()) == 1 and "spills 8 bytes on sm_80" in bad.spills()[0]


def test_the_matrix_units_are_used() -> None:
    """16-bit attention goes through each generation's own instruction. Killed by: a tile too small for it, operands in float32."""
    wide = {
        row.capability: row.matrix
        for row in table().kernels
        if row.workload.startswith("attention, prompt") and row.dtype == "bfloat16"
    }
    assert wide == {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    narrow = {row.matrix for row in table().kernels if row.kernel == "attend_tiles" and row.dtype == "bfloat16"}
    assert "" not in narrow
    assert {row.matrix for row in table().kernels if row.dtype == "float32"} == {""}, (
        "float32 must not be rounded to TF32"
    )


def test_the_roofline_s_arithmetic() -> None:
    """By hand: keys and values of 64 sequences of 4096 tokens, read once, on an H100."""
    row = next(r for r in table().rooflines if (r.model, r.workload) == ("Llama-3-8B", "attention, 64 decoding"))
    least_s, bound_by = row.least_s(CHIPS[1])
    by_hand = (64 * 4096 * 8 * 128 * 2 * 2 + 64 * 32 * 128 * 2 * 2) / 3.35e12
    assert bound_by == "bytes" and abs(least_s - by_hand) < 1e-9
    heavy = RooflineRow("m", "bfloat16", "w", ((1,),), ((10**12,),))
    assert heavy.least_s(CHIPS[1]) == (10**12 / 989e12, "operations")


@pytest.mark.slow
def test_some_kernels_compile_to_what_the_table_says(tmp_path: Path) -> None:
    """Attention of decode, its merge, and the fused rope, for sm_90. Killed by: a table written by hand, a kernel that does not compile."""
    names = ("attention, 64 decoding", "rope_kv_write")
    wanted = [
        row for row in table().kernels if row.workload in names and row.capability == 90 and row.model == "GLM-4-9B"
    ]
    assert len(wanted) == 3
    selection = [argument for name in names for argument in ("--workload", name)]
    done = compiled(tmp_path, "--json", "--capability", "90", "--model", "GLM-4-9B", *selection)
    assert done.returncode == 0, done.stderr
    assert Table.from_json(done.stdout).kernels == wanted


def test_the_interpreter_is_refused() -> None:
    """Under TRITON_INTERPRET kernels are Python functions, and there is nothing to compile."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "xllm_cuda.aot"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "unset it" in done.stderr


@pytest.mark.nightly
def test_the_whole_table_comes_out_again(tmp_path: Path) -> None:
    """Every kernel for every chip, compiled anew and written over the checked-in table; a difference is then in the checkout to be looked at."""
    before = CHECKED_IN.read_text(encoding="utf-8")
    done = compiled(tmp_path, "--write", str(HOME))
    assert done.returncode == 0, done.stderr
    after = CHECKED_IN.read_text(encoding="utf-8")
    changed = [line for line in after.splitlines() if line not in before.splitlines()]
    assert json.loads(after) and not changed, "the table was regenerated and differs:\n" + "\n".join(changed)
