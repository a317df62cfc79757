"""Verdicts of `make bench` at the edge of their targets."""

from __future__ import annotations

import pytest

from benchmarks import host_bookkeeping, run


@pytest.mark.parametrize(("seconds", "said"), [(3.0, "met"), (3.01, "MISSED")])
def test_first_token_of_a_warm_start(seconds: float, said: str) -> None:
    """Three seconds are enough, more are not."""
    figures = {
        "throughput": {"ratio": 1.0, "interval": [0.9, 1.1]},
        "start": {"median": {"live_s": 0.5, "first_token_s": seconds}},
    }
    assert run.serving_lines(figures)[-1].startswith(said)


@pytest.mark.parametrize(("size", "seconds", "said"), [(30.0, 60.0, "met"), (30.1, 60.1, "MISSED")])
def test_installed(size: float, seconds: float, said: str) -> None:
    """Each by its own target."""
    lines = run.installed_lines({"total_mb": size, "build_s": seconds, "cores": 2})
    assert len(lines) == 2 and all(line.startswith(said) for line in lines), lines


def test_no_compiler() -> None:
    """No figure is judged, and the reason is printed."""
    assert run.installed_lines({"absent": "there is no C++ compiler"}) == [
        "not measured  installed size and build time: there is no C++ compiler"
    ]


def test_bookkeeping_without_a_model() -> None:
    """The runner takes the model that computes nothing. Red if it asks more of a model than that one has."""
    figures = host_bookkeeping.measure(3, input_len=4, output_len=5)
    assert figures["num_steps"] == 4 and figures["median"] > 0
