"""`/metrics`: vLLM's names, so that its boards work, and a few of our own. Counted on the event loop, one call per step and per request."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from xllm_core.engine.info import EngineInfo
from xllm_core.engine.messages import EngineStats
from xllm_core.types import EngineRequest, FinishReason, RequestOutput, TokenOutput

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SHORT = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_LONG = (
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
    1920.0,
)
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
_STEP_TOKENS = tuple(float(1 << e) for e in range(15))
_FEW = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


@dataclass(slots=True)
class _Times:
    """One unfinished request, monotonic seconds."""

    arrival_s: float
    num_prompt: int
    scheduled_s: float | None = None
    first_s: float | None = None
    num_preemptions: int = 0
    last_s: dict[int, float] = field(default_factory=dict)  # of each sequence that has a token


class _TokenTimes(Collector):
    """A histogram under several names. Every token of every stream counts here, so it counts in a list: a family of prometheus_client
    takes locks and a walk over the buckets for each."""

    def __init__(self, names: Mapping[str, str], labels: Mapping[str, str], bounds: Sequence[float]) -> None:
        self._names, self._labels = names, labels
        self._bounds = (*bounds, math.inf)
        self._counts = [0] * len(self._bounds)
        self._sum_s = 0.0

    def observe(self, value_s: float, count: int = 1) -> None:
        """`count` times the same."""
        self._counts[bisect_left(self._bounds, value_s)] += count
        self._sum_s += value_s * count

    def collect(self) -> Iterator[Metric]:
        """The families of now."""
        totals = [float(total) for total in accumulate(self._counts)]
        ends = [*map(str, self._bounds[:-1]), "+Inf"]
        buckets = list(zip(ends, totals, strict=True))
        for name, text in self._names.items():
            family = HistogramMetricFamily(name, text, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), buckets, self._sum_s)
            yield family


class Metrics:
    """A `RequestWatcher`. Label values come from a fixed set: the served name, the engine's number, our own routes and words."""

    def __init__(self, model_name: str, num_engines: int = 1) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a time per series, which no board reads
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._model_name = model_name
        self._requests: dict[str, _Times] = {}
        self._seen = [EngineStats() for _ in range(num_engines)]
        self._last = self._seen.copy()
        self._make_gauges(num_engines)
        self._make_counters(num_engines)
        self._make_histograms()
        self._make_own()

    def text(self) -> bytes:
        """What Prometheus scrapes."""
        for engine in range(len(self._seen)):
            self._show_stats(engine)
        return generate_latest(self.registry)

    # ---- RequestWatcher ----------------------------------------------------------------------------------------------------

    def submitted(self, request: EngineRequest) -> None:
        """A request was handed to an engine."""
        self._requests[request.request_id] = _Times(request.arrival_s, len(request.prompt_token_ids))
        self._params_n.observe(request.params.n)
        if request.params.max_tokens is not None:
            self._params_max_tokens.observe(request.params.max_tokens)

    def admitted(self, request_id: str, now_s: float) -> None:
        """It left the queue for the first time."""
        times = self._requests.get(request_id)
        if times is not None:
            times.scheduled_s = now_s
            self._queue_time.observe(max(0.0, now_s - times.arrival_s))

    def preempted(self, request_id: str) -> None:
        """It lost its place and waits again."""
        times = self._requests.get(request_id)
        if times is not None:
            times.num_preemptions += 1

    def tokens(self, outputs: Sequence[TokenOutput], now_s: float) -> None:
        """What one step brought. A prompt counts in the step that brings its first token."""
        new_tokens = prompt_tokens = 0
        for output in outputs:
            times = self._requests.get(output.request_id)
            new = len(output.new_token_ids)
            if times is None or not new:
                continue
            new_tokens += new
            if times.first_s is None:
                times.first_s = now_s
                prompt_tokens += times.num_prompt
                self._ttft.observe(now_s - times.arrival_s)
            before_s = times.last_s.get(output.index)
            times.last_s[output.index] = now_s
            if before_s is None:
                before_s, new = now_s, new - 1
            if new:
                self._itl.observe((now_s - before_s) / new, new)
        if new_tokens:
            self._generation_tokens.inc(new_tokens)
            self._prompt_tokens.inc(prompt_tokens)
            self._step_tokens.observe(new_tokens + prompt_tokens)

    def finished(self, output: RequestOutput, now_s: float) -> None:
        """It is over, in whatever way."""
        times = self._requests.pop(output.request_id, None)
        if times is None:
            return
        num_tokens = 0
        for sequence in output.outputs:
            num_tokens += len(sequence.token_ids)
            self._success.labels(**self._labels, finished_reason=sequence.finish_reason or "abort").inc()
        if any(sequence.finish_reason == "abort" for sequence in output.outputs):
            self._aborted.inc()
            return
        scheduled_s = times.scheduled_s if times.scheduled_s is not None else times.arrival_s
        first_s = times.first_s if times.first_s is not None else now_s
        self._e2e.observe(now_s - times.arrival_s)
        self._inference.observe(now_s - scheduled_s)
        self._prefill.observe(max(0.0, first_s - scheduled_s))
        self._decode.observe(now_s - first_s)
        if num_tokens > 1:
            self._tpot.observe((now_s - first_s) / (num_tokens - 1))
        self._request_prompt.observe(times.num_prompt)
        self._request_generation.observe(num_tokens)
        self._request_preemptions.observe(times.num_preemptions)

    def engine_stats(self, engine: int, stats: EngineStats) -> None:
        """State of an engine after a step; its totals only grow. Kept until somebody looks: steps are many, looks are few."""
        self._last[engine] = stats

    def _show_stats(self, engine: int) -> None:
        stats, seen = self._last[engine], self._seen[engine]
        self._seen[engine] = stats
        self._running[engine].set(stats.num_running)
        self._waiting[engine].set(stats.num_waiting + stats.num_waiting_for_kv)
        self._waiting_capacity[engine].set(stats.num_waiting)
        self._waiting_kv[engine].set(stats.num_waiting_for_kv)
        share = stats.used_blocks / stats.total_blocks if stats.total_blocks else 0.0
        self._kv_usage[engine].set(share)
        self._gpu_usage[engine].set(share)
        self._preemptions[engine].inc(stats.num_preemptions - seen.num_preemptions)
        self._queries[engine].inc(stats.query_tokens - seen.query_tokens)
        self._hits[engine].inc(stats.hit_tokens - seen.hit_tokens)
        self._replays[engine].inc(stats.num_replays - seen.num_replays)
        self._captures[engine].inc(stats.num_captures - seen.num_captures)
        self._eager[engine].inc(stats.num_eager - seen.num_eager)
        self._padded[engine].inc(stats.padded_rows - seen.padded_rows)
        self._arena[engine].set(stats.arena_bytes)
        for name, count in stats.store.items():
            self._store.labels(self._model_name, str(engine), name).set(count)

    # ---- the server's own ----------------------------------------------------------------------------------------------------

    def responded(self, method: str, handler: str, status: int) -> None:
        """A response went out. handler: the route's path, not what the client typed."""
        self._http.labels(method, handler, str(status)).inc()

    def refused(self, reason: str) -> None:
        """A request was refused; reason is an error code of ours."""
        self._refused.labels(reason).inc()

    def left(self, cause: str) -> None:
        """A client went before its answer was whole."""
        self._left.labels(cause).inc()

    def ignored(self, field: str) -> None:
        """A harmless field was passed over."""
        self._ignored.labels(field).inc()

    def set_draining(self, is_draining: bool) -> None:
        """The server takes no new work."""
        self._draining.set(is_draining)

    def set_info(self, info: EngineInfo) -> None:
        """What is served: a gauge of value 1 whose labels say it."""
        labels = {
            "block_size": str(info.block_size), "num_gpu_blocks": str(info.num_blocks), "kv_cache_size_tokens": str(info.kv_tokens),
            "kv_cache_max_concurrency": f"{info.kv_tokens / info.max_model_len:.2f}", "engine": "0",
        }  # fmt: skip
        gauge = Gauge("vllm:cache_config_info", "KV cache of an engine", list(labels), registry=self.registry)
        gauge.labels(**labels).set(1)

    # ---- making them ---------------------------------------------------------------------------------------------------------

    def _gauges(self, name: str, text: str, num_engines: int, **more: str) -> list[Gauge]:
        gauge = self._gauge_families.get(name)
        if gauge is None:
            gauge = Gauge(name, text, ["model_name", "engine", *more], registry=self.registry)
            self._gauge_families[name] = gauge
        return [gauge.labels(model_name=self._model_name, engine=str(i), **more) for i in range(num_engines)]

    def _make_gauges(self, num_engines: int) -> None:
        self._gauge_families: dict[str, Gauge] = {}
        self._running = self._gauges("vllm:num_requests_running", "Sequences that compute", num_engines)
        self._waiting = self._gauges("vllm:num_requests_waiting", "Sequences that wait", num_engines)
        why = "vllm:num_requests_waiting_by_reason", "Sequences that wait, by what for"
        self._waiting_capacity = self._gauges(*why, num_engines, reason="capacity")
        self._waiting_kv = self._gauges(*why, num_engines, reason="kv_transfer")
        self._kv_usage = self._gauges("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", num_engines)
        self._gpu_usage = self._gauges("vllm:gpu_cache_usage_perc", "As vllm:kv_cache_usage_perc", num_engines)
        self._arena = self._gauges("xllm:graph_arena_bytes", "Memory that recorded graphs share", num_engines)

    def _counters(self, name: str, text: str, num_engines: int) -> list[Counter]:
        counter = Counter(name, text, ["model_name", "engine"], registry=self.registry)
        return [counter.labels(self._model_name, str(i)) for i in range(num_engines)]

    def _make_counters(self, num_engines: int) -> None:
        self._preemptions = self._counters("vllm:num_preemptions", "Sequences that lost their place", num_engines)
        self._queries = self._counters("vllm:prefix_cache_queries", "Prompt tokens looked up", num_engines)
        self._hits = self._counters("vllm:prefix_cache_hits", "Prompt tokens found in the cache", num_engines)
        self._replays = self._counters("xllm:graph_replays", "Steps replayed from recorded graphs", num_engines)
        self._captures = self._counters("xllm:graph_captures", "Graphs recorded", num_engines)
        self._eager = self._counters("xllm:graph_eager_steps", "Decode steps that no graph could serve", num_engines)
        self._padded = self._counters("xllm:graph_padded_rows", "Rows that replays left empty", num_engines)
        self._prompt_tokens = self._counters("vllm:prompt_tokens", "Prompt tokens of requests that began", 1)[0]
        self._generation_tokens = self._counters("vllm:generation_tokens", "Tokens given out", 1)[0]
        self._success = Counter(
            "vllm:request_success",
            "Sequences that ended, by how",
            ["model_name", "engine", "finished_reason"],
            registry=self.registry,
        )
        for reason in get_args(FinishReason):
            self._success.labels(**self._labels, finished_reason=reason)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(f"vllm:{name}", text, ["model_name", "engine"], buckets=buckets, registry=self.registry)
        return family.labels(**self._labels)

    def _make_histograms(self) -> None:
        make = self._histogram
        self._ttft = make("time_to_first_token_seconds", "Arrival to first token", _SHORT)
        itl = "vllm:inter_token_latency_seconds"
        names = {itl: "Between two tokens of a request", "vllm:time_per_output_token_seconds": f"As {itl}"}
        self._itl = _TokenTimes(names, self._labels, _SHORT)
        self.registry.register(self._itl)
        self._tpot = make("request_time_per_output_token_seconds", "Mean per further token of a request", _SHORT)
        self._e2e = make("e2e_request_latency_seconds", "Arrival to end", _LONG)
        self._queue_time = make("request_queue_time_seconds", "Arrival to first step", _LONG)
        self._inference = make("request_inference_time_seconds", "First step to end", _LONG)
        self._prefill = make("request_prefill_time_seconds", "First step to first token", _LONG)
        self._decode = make("request_decode_time_seconds", "First token to end", _LONG)
        self._request_prompt = make("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self._request_generation = make("request_generation_tokens", "New tokens of a request", _TOKENS)
        self._params_n = make("request_params_n", "n of a request", _FEW)
        self._params_max_tokens = make("request_params_max_tokens", "max_tokens of a request", _TOKENS)
        self._request_preemptions = make("request_num_preemptions", "Times a request lost its place", (0.0, *_FEW))
        self._step_tokens = make(
            "iteration_tokens_total", "Tokens of a step, prompts with their first token", _STEP_TOKENS
        )

    def _make_own(self) -> None:
        registry = self.registry
        self._http = Counter("http_requests", "Responses", ["method", "handler", "status"], registry=registry)
        self._refused = Counter(
            "xllm:requests_refused", "Requests refused, by error code", ["reason"], registry=registry
        )
        self._aborted = Counter("xllm:requests_aborted", "Requests that ended early", registry=registry)
        self._left = Counter(
            "xllm:clients_gone", "Clients that went before their answer was whole", ["cause"], registry=registry
        )
        self._ignored = Counter(
            "xllm:fields_ignored", "Harmless fields that were passed over", ["field"], registry=registry
        )
        what = "What the KV store counts, by its own names; empty without a store"
        self._store = Gauge("xllm:kv_store", what, ["model_name", "engine", "stat"], registry=registry)
        self._draining = Gauge("xllm:is_draining", "1 while the server takes no new work", registry=registry)
