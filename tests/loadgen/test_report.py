"""The arithmetic, on samples that are written down here: every figure is worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from xllm_core.errors import ConfigError
from xllm_core.loadgen import plots, report
from xllm_core.loadgen.runner import Run
from xllm_core.loadgen.samples import Sample


def samples() -> list[Sample]:
    """Two good answers, one of a single token, two failures and one that was cut off."""
    return [
        # 5 tokens in 4 chunks: two came together, which the usage tells
        Sample(0, 10, 5, 0.0, 0.25, [0.1, 0.2, 0.2, 0.5], 0.55, 10, 8, 5, "length", "ok", "", 200),
        Sample(1, 20, 4, 1.0, 1.0, [0.4, 0.5, 0.6], 0.75, 20, None, None, "length", "ok", "", 200),
        Sample(2, 30, 1, 1.0, 1.25, [1.0], 1.0, 30, 0, 1, "stop", "ok", "", 200),
        Sample(3, 9, 9, 2.0, 2.0, [], 0.1, None, None, None, None, "failed", "http", 429, "full"),
        Sample(4, 9, 9, 2.0, 2.0, [0.3], 0.4, None, None, None, None, "failed", "stream", 200, "engine died"),
        Sample(5, 9, 9, 2.0, 2.25, [0.3, 0.4]),
    ]


def test_times_of_one_request() -> None:
    """TPOT divides by tokens, gaps count chunks. Dies if one takes the other's count."""
    first, second, third = samples()[:3]
    assert (first.ttft_s, first.tpot_s, first.lag_s) == (0.1, pytest.approx(0.1), 0.25)
    assert first.gaps_s == pytest.approx([0.1, 0.0, 0.3])
    assert (second.num_tokens, second.tpot_s) == (3, pytest.approx(0.1))
    assert (third.tpot_s, third.gaps_s) == (None, [])


def test_every_figure() -> None:
    """Dies if failures bring tokens, the span is taken from the clock of the run, or percentiles jump between samples."""
    run = Run(samples(), duration_s=99.0, client_cpu_s=0.1234567)
    figures = report.summarise(run, {"ttft": 0.4, "e2e": 0.9})
    span = 2.4 - 0.25
    assert (figures["completed"], figures["failed"], figures["unfinished"]) == (3, 2, 1)
    assert figures["duration_s"] == pytest.approx(span)
    assert figures["requests_per_s"] == pytest.approx(3 / span, abs=1e-3)
    assert figures["output_tokens_per_s"] == pytest.approx((5 + 3 + 1) / span, abs=1e-3)
    assert figures["total_tokens_per_s"] == pytest.approx((9 + 60) / span, abs=1e-3)
    assert (figures["prompt_tokens"], figures["cached_tokens"], figures["output_tokens"]) == (60, 8, 9)
    assert (figures["without_usage"], figures["shorter_than_asked"]) == (1, 1)
    # ttft 100, 400, 1000: p90 lies 0.8 of the way from the second to the third
    assert figures["ttft_ms"] == {"mean": 500.0, "p50": 400.0, "p90": 880.0, "p95": 940.0, "p99": 988.0, "max": 1000.0}
    assert figures["tpot_ms"]["mean"] == figures["tpot_ms"]["p99"] == 100.0
    assert figures["itl_ms"]["mean"] == pytest.approx((100 + 0 + 300 + 100 + 100) / 5)
    assert figures["e2e_ms"]["p50"] == 750.0
    assert figures["client_lag_ms"]["max"] == 250.0
    assert figures["client_cpu_s"] == 0.123
    assert figures["errors"] == [
        {"kind": "http", "status": 429, "count": 1, "example": "full"},
        {"kind": "stream", "status": 200, "count": 1, "example": "engine died"},
    ]
    assert figures["goodput"]["share"] == pytest.approx(2 / 5)  # of the five that were not cut off
    assert figures["goodput"]["requests_per_s"] == pytest.approx(2 / span, abs=1e-3)
    json.dumps(figures)


@pytest.mark.parametrize(
    ("targets", "good"),
    [
        ({"ttft": 0.1}, [0]),
        ({"ttft": 0.099}, []),
        ({"ttft": 1.0}, [0, 1, 2]),
        ({"tpot": 0.2}, [0, 1, 2]),
        ({"tpot": 0.05}, [2]),
        ({"e2e": 0.75}, [0, 1]),
        ({"e2e": 0.75, "ttft": 0.2}, [0]),
    ],
)
def test_goodput(targets: dict[str, float], good: list[int]) -> None:
    """All targets must be met, and only answers count. Dies if one target suffices, or the bound itself is a miss."""
    assert [sample.index for sample in samples() if report.meets(sample, targets)] == good


def test_targets() -> None:
    """As they are typed. Dies if a unit is dropped."""
    assert report.parse_targets(["ttft:500ms", "tpot:50ms e2e:2s"]) == {"ttft": 0.5, "tpot": 0.05, "e2e": 2.0}
    assert report.parse_targets(["ttft=1.5s,tpot:.5ms"]) == {"ttft": 1.5, "tpot": 0.0005}
    assert report.parse_targets([]) == {}
    for wrong in ("ttft", "ttft:5", "itl:5ms", "ttft:-5ms", "ttft:5ms ttft:6ms", "5ms"):
        with pytest.raises(ConfigError, match="--goodput"):
            report.parse_targets([wrong])


def test_nothing_measured() -> None:
    """A run in which nothing came back has no figures, and no division by zero."""
    for run in (Run(), Run(samples()[3:])):
        figures = report.summarise(run, {"ttft": 1.0})
        assert (figures["ttft_ms"], figures["completed"]) == (None, 0)
        assert report.lines(figures)
    assert report.summarise(Run(), {"ttft": 1.0})["goodput"]["share"] is None


def test_what_people_read() -> None:
    """Dies if a figure is not shown."""
    text = "\n".join(report.lines(report.summarise(Run(samples()), {"ttft": 0.4})))
    for words in (
        "3 of 5 completed, 2 failed, 1 cut off",
        "1 x HTTP 429: full",
        "1 x stream: engine died",
        "60 of prompts (8 cached), 9 new",
        "40.0% of requests",
        "within ttft 400 ms",
        "1 answers are shorter than asked",
        "1 answers without usage",
    ):
        assert words in text, text


def test_the_timeline_adds_up() -> None:
    """Tokens over all intervals are the tokens that came; running times its length is the time that requests took."""
    begins, tokens, running = report.timeline(samples(), 0.5)
    assert begins.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert tokens.sum() * 0.5 == pytest.approx(5 + 3 + 1 + 1 + 2)
    took = 0.55 + 0.75 + 1.0 + 0.1 + 0.4 + 0.4  # the one cut off is known until its last chunk
    assert running.sum() * 0.5 == pytest.approx(took)
    assert running[0] == pytest.approx(0.25 / 0.5)
    assert tokens[0] * 0.5 == pytest.approx(5 / 4 * 3)  # at 0.35, 0.45 and 0.45


@pytest.mark.slow
def test_plots_are_written(tmp_path: Path) -> None:
    """Of wide and narrow distributions, and of nothing at all. Dies if one of them cannot be drawn, or is left empty."""
    from matplotlib.image import imread

    chance = np.random.default_rng(0)
    many = [
        Sample(
            i,
            8,
            50,
            None,
            float(i) * 0.1,
            np.cumsum(chance.lognormal(-4, 2, 50)).tolist(),
            9.0,
            8,
            0,
            50,
            "length",
            "ok",
        )
        for i in range(40)
    ]
    for name, given in {"hand": samples(), "many": many, "none": []}.items():
        paths = plots.draw(given, report.summarise(Run(given), {}), "a title", tmp_path / name)
        assert [path.name for path in paths] == ["latency.png", "timeline.png"]
        for path in paths:
            image = imread(path)
            assert image.shape[1] == 1500 and image.std() > 0.02


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the run, with the command that helps."""
    plots.check_matplotlib()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'xllm-core\[plots\]'"):
        plots.check_matplotlib()
