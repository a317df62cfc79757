"""Figures of a run, computed from its samples alone, and how they are printed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from xllm_core.errors import ConfigError
from xllm_core.loadgen.runner import Run
from xllm_core.loadgen.samples import Sample

PERCENTILES = (50, 90, 95, 99)
TARGETS = ("ttft", "tpot", "e2e")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}


def parse_targets(texts: Iterable[str]) -> dict[str, float]:
    """{"ttft": 0.5} from "ttft:500ms"; several may stand in one text. Raises ConfigError."""
    targets: dict[str, float] = {}
    for text in re.split(r"[\s,]+", " ".join(texts).strip()):
        if not text:
            continue
        match = re.fullmatch(r"(\w+)[:=](\d+(?:\.\d*)?|\.\d+)(us|ms|s|m)", text)
        if match is None or match[1] not in TARGETS:
            raise ConfigError(
                f"--goodput {text}: write NAME:TIME with NAME of {', '.join(TARGETS)}, e.g. ttft:500ms e2e:2s"
            )
        if match[1] in targets:
            raise ConfigError(f"--goodput names {match[1]} twice")
        targets[match[1]] = float(match[2]) * _UNITS[match[3]]
    return targets


def meets(sample: Sample, targets: Mapping[str, float]) -> bool:
    """True if the request came to its end within every target. An answer of one token has no time per token to miss."""
    times = {"ttft": sample.ttft_s, "tpot": sample.tpot_s, "e2e": sample.end_s}
    is_in_time = all((time_s := times[name]) is None or time_s <= most for name, most in targets.items())
    return sample.outcome == "ok" and bool(sample.chunk_s) and is_in_time


def summarise(run: Run, targets: Mapping[str, float]) -> dict[str, Any]:
    """Every figure. Times in milliseconds; percentiles interpolate linearly between samples.

    Rates divide what completed requests brought by the time from the first request written to the last answer's end.
    Requests cut off by Ctrl-C count nowhere but in `unfinished`.
    """
    done = [sample for sample in run.samples if sample.outcome == "ok"]
    failed = [sample for sample in run.samples if sample.outcome == "failed"]
    span_s = _span_s(run.samples)
    output_tokens = sum(sample.num_tokens for sample in done)
    prompt_tokens = sum(sample.prompt_tokens or sample.asked_input_tokens for sample in done)
    good = sum(meets(sample, targets) for sample in done)
    figures: dict[str, Any] = {
        "completed": len(done),
        "failed": len(failed),
        "unfinished": len(run.samples) - len(done) - len(failed),
        "errors": _errors(failed),
        "duration_s": round(span_s, 6),
        "requests_per_s": _rate(len(done), span_s),
        "output_tokens_per_s": _rate(output_tokens, span_s),
        "total_tokens_per_s": _rate(output_tokens + prompt_tokens, span_s),
        "prompt_tokens": prompt_tokens,
        "cached_tokens": sum(sample.cached_tokens or 0 for sample in done),
        "output_tokens": output_tokens,
        "without_usage": sum(sample.output_tokens is None for sample in done),
        "shorter_than_asked": sum(sample.num_tokens < sample.asked_output_tokens for sample in done),
        "ttft_ms": _spread(sample.ttft_s for sample in done),
        "tpot_ms": _spread(sample.tpot_s for sample in done),
        "itl_ms": _spread(gap for sample in done for gap in sample.gaps_s),
        "e2e_ms": _spread(sample.end_s for sample in done),
        "client_lag_ms": _spread(sample.lag_s for sample in run.samples),
        "client_cpu_s": round(run.client_cpu_s, 3),
    }
    if targets:
        judged = len(done) + len(failed)
        figures["goodput"] = {
            "targets_s": dict(targets),
            "share": round(good / judged, 6) if judged else None,
            "requests_per_s": _rate(good, span_s),
        }
    return figures


def lines(figures: Mapping[str, Any], *, is_sharing_expected: bool = True) -> list[str]:
    """The figures for people. is_sharing_expected: False for prompts that have nothing in common, so that hits in the server's cache are odd."""
    ended = figures["completed"] + figures["failed"]
    shown = [
        f"  requests           {figures['completed']} of {ended} completed, {figures['failed']} failed"
        + (f", {figures['unfinished']} cut off" if figures["unfinished"] else "")
        + f", in {figures['duration_s']:.2f} s",
        *(f"    {error['count']} x {_error_name(error)}: {error['example']}" for error in figures["errors"]),
        f"  requests/s         {_number(figures['requests_per_s'])}",
        f"  output tokens/s    {_number(figures['output_tokens_per_s'])}   with prompts {_number(figures['total_tokens_per_s'])}",
        f"  tokens             {figures['prompt_tokens']} of prompts ({figures['cached_tokens']} cached), {figures['output_tokens']} new",
        "  milliseconds       " + "".join(f"{name:>10}" for name in ("mean", *(f"p{p}" for p in PERCENTILES))),
    ]
    rows = {
        "ttft": "first token",
        "tpot": "per token",
        "itl": "between chunks",
        "e2e": "end to end",
        "client_lag": "sent too late",
    }
    for key, name in rows.items():
        if (spread := figures[f"{key}_ms"]) is not None:
            shown.append(
                f"    {name:<16} "
                + "".join(f"{spread[part]:>10.2f}" for part in ("mean", *(f"p{p}" for p in PERCENTILES)))
            )
    if (goodput := figures.get("goodput")) is not None:
        wanted = ", ".join(f"{name} {most * 1e3:g} ms" for name, most in goodput["targets_s"].items())
        share = "none judged" if goodput["share"] is None else f"{goodput['share']:.1%} of requests"
        shown.append(f"  goodput            {share}, {_number(goodput['requests_per_s'])} requests/s, within {wanted}")
    shown.append(f"  client             {figures['client_cpu_s']:.2f} s of processor time")
    if figures["cached_tokens"] and not is_sharing_expected:
        shown.append(
            "  note: prompts were in the server's cache, as after a run with the same --seed; the first token came sooner for it"
        )
    if figures["shorter_than_asked"]:
        shown.append(f"  note: {figures['shorter_than_asked']} answers are shorter than asked (the model ended them)")
    if figures["without_usage"]:
        shown.append(
            f"  note: {figures['without_usage']} answers without usage; each of their chunks is counted as one token"
        )
    return shown


def timeline(
    samples: Sequence[Sample], step_s: float
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(begin of each interval, new tokens/s in it, mean number of requests that ran in it). A chunk's tokens are its share of the answer's."""
    sent = [sample for sample in samples if sample.sent_s is not None]
    ends = [(s.sent_s or 0.0) + (s.end_s if s.end_s is not None else max(s.chunk_s, default=0.0)) for s in sent]
    num = max(1, int(np.ceil(max(ends, default=0.0) / step_s)))
    edges = np.arange(num + 1) * step_s
    tokens, running = np.zeros(num), np.zeros(num)
    for sample, end_s in zip(sent, ends, strict=True):
        if sample.chunk_s:
            moments = (sample.sent_s or 0.0) + np.asarray(sample.chunk_s)
            tokens += np.histogram(moments, edges)[0] * (sample.num_tokens / len(sample.chunk_s))
        inside = np.minimum(edges[1:], end_s) - np.maximum(edges[:-1], sample.sent_s or 0.0)
        running += np.clip(inside, 0.0, None)
    return edges[:-1], tokens / step_s, running / step_s


def _span_s(samples: Sequence[Sample]) -> float:
    ended = [
        (sample.sent_s, sample.sent_s + sample.end_s)
        for sample in samples
        if sample.sent_s is not None and sample.end_s is not None
    ]
    return max(end for _, end in ended) - min(begin for begin, _ in ended) if ended else 0.0


def _errors(failed: Sequence[Sample]) -> list[dict[str, Any]]:
    counts = Counter((sample.error, sample.status) for sample in failed)
    examples = {(sample.error, sample.status): sample.message for sample in reversed(failed)}
    return [
        {"kind": kind, "status": status, "count": count, "example": examples[kind, status]}
        for (kind, status), count in counts.most_common()
    ]


def _error_name(error: Mapping[str, Any]) -> str:
    return f"HTTP {error['status']}" if error["kind"] == "http" else error["kind"]


def _spread(values: Iterable[float | None]) -> dict[str, float] | None:
    present = np.array([value for value in values if value is not None]) * 1e3
    if not present.size:
        return None
    parts = {f"p{p}": float(np.percentile(present, p)) for p in PERCENTILES}
    return {
        key: round(value, 3)
        for key, value in {"mean": float(present.mean()), **parts, "max": float(present.max())}.items()
    }


def _rate(count: float, span_s: float) -> float | None:
    return round(count / span_s, 3) if span_s > 0 else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
