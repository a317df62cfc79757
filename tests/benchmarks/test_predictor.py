"""The predictor's error as a target of `make bench`: the command's own figure, met up to 15 %."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import predictor, run
from tests.fixtures.tiny_models import make_tiny

SMALL = ("--device", "core/reference", "--max-num-seqs", "4", "--max-model-len", "128", "--runs", "1")


@pytest.mark.slow
def test_the_figure_is_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a process of its own, whatever the error."""
    root = str(Path(predictor.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", root, prepend=":")
    monkeypatch.chdir(tmp_path)
    figures = predictor.run(str(make_tiny("llama", tmp_path / "model")), *SMALL)
    assert figures["held_out"]["steps"] > 0
    assert predictor.share(figures) == figures["held_out"]["mean_relative_error"] > 0


@pytest.mark.parametrize(("share", "said"), [(0.149, "met"), (0.15, "met"), (0.151, "MISSED")])
def test_the_verdict(share: float, said: str) -> None:
    """By the error on held-out steps, not on those that were fitted or on decode steps alone."""
    rest = {"steps": 9, "mean_error_s": 1e-3, "mean_relative_error": 0.15 if said == "MISSED" else 0.9}
    line = run.predictor_line({"held_out": {**rest, "mean_relative_error": share}, "prefill": rest, "decode": rest})
    assert line.startswith(said), line
    assert f"{share:.1%}" in line and "<= 15 %" in line
