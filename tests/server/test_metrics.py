"""`/metrics`: vLLM's names, exact counts, and series that no client can multiply."""

from __future__ import annotations

import http.client
import json
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import FLAGS
from tests.server.rig import JSON, Server, serving
from xllm_core.engine.messages import EngineStats
from xllm_core.engine.process import _StoreCounters
from xllm_core.server.metrics import Metrics

COMPLETIONS = "/v1/completions"
GAUGES = (
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "gpu_cache_usage_perc",
)
COUNTERS = (
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
)
HISTOGRAMS = (
    "time_to_first_token_seconds", "inter_token_latency_seconds", "time_per_output_token_seconds", "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds", "request_queue_time_seconds", "request_inference_time_seconds", "request_prefill_time_seconds",
    "request_decode_time_seconds", "request_prompt_tokens", "request_generation_tokens", "request_params_n", "request_params_max_tokens",
    "request_num_preemptions", "iteration_tokens_total",
)  # fmt: skip


@pytest.fixture
def grown(server: Server) -> Callable[..., float]:
    """grown("name", label=...): by how much the series have grown since the test began."""
    server.wait_idle()
    before = server.metrics()

    def by_how_much(name: str, **labels: str) -> float:
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        now = server.metrics()
        chosen = [s for s in now if s.partition("{")[0] == name and all(one in s for one in wanted)]
        return sum(now[series] - before.get(series, 0.0) for series in chosen)

    return by_how_much


def assert_quiet(server: Server) -> None:
    """Nothing runs, waits, or is held."""
    server.wait_idle()
    for name in GAUGES:
        assert server.metric(f"vllm:{name}") == 0, name


def test_names_and_kinds(server: Server) -> None:
    """Everything that a board of vLLM's reads, with its labels, before the first request too; the text is what Prometheus parses."""
    answer = server.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(answer.body.decode())}
    expected = {
        f"vllm:{name}": kind
        for kind, names in (("gauge", GAUGES), ("counter", COUNTERS), ("histogram", HISTOGRAMS))
        for name in names
    }
    assert {name: families[name].type for name in expected} == expected
    for name in expected:
        assert families[name].documentation and families[name].samples, name
        assert all(
            {"model_name", "engine"} <= s.labels.keys() and s.labels["model_name"] == "tiny"
            for s in families[name].samples
        ), name
    reasons = {sample.labels["finished_reason"] for sample in families["vllm:request_success"].samples}
    assert reasons == {"stop", "length", "abort", "error"}
    (info,) = families["vllm:cache_config_info"].samples
    assert info.value == 1 and info.labels["num_gpu_blocks"] == "512" and info.labels["block_size"] == "16"
    assert info.labels["kv_cache_size_tokens"] == "8192" and float(info.labels["kv_cache_max_concurrency"]) == 16
    assert families["http_requests"].type == "counter"


def test_what_graphs_count() -> None:
    """Totals of each engine, whenever somebody looks; memory as it is now. Dies where two are mixed up, or are added up twice."""
    metrics = Metrics("tiny", num_engines=2)
    counted = {
        "graph_replays_total": 5,
        "graph_captures_total": 2,
        "graph_eager_steps_total": 3,
        "graph_padded_rows_total": 7,
    }
    fields = ("num_replays", "num_captures", "num_eager", "padded_rows")
    for factor in (1, 2):
        told = {field: factor * count for field, count in zip(fields, counted.values(), strict=True)}
        metrics.engine_stats(1, EngineStats(**told, arena_bytes=1 << 20))
        for _ in range(2):
            lines = metrics.text().decode().splitlines()
        for name, count in counted.items():
            assert f'xllm:{name}{{engine="1",model_name="tiny"}} {factor * count:.1f}' in lines, lines
            assert f'xllm:{name}{{engine="0",model_name="tiny"}} 0.0' in lines, lines
        assert 'xllm:graph_arena_bytes{engine="1",model_name="tiny"} 1.048576e+06' in lines, lines


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("num_at_once", [1, 5])
def test_exact_counts(server: Server, grown: Callable[..., float], is_stream: bool, num_at_once: int) -> None:
    """Ten requests of 20 tokens and 6 new ones: every count is what arithmetic says."""
    num, prompt, new = 10, 20, 6
    fresh = random.Random(10 * num_at_once + is_stream)

    def ask(i: int) -> None:
        ids = [fresh.randrange(5, 264) for _ in range(prompt)]
        body = {"prompt": ids, "max_tokens": new, "ignore_eos": True, "temperature": 0, "stream": is_stream}
        assert server.post(COMPLETIONS, body).status == 200

    with ThreadPoolExecutor(num_at_once) as pool:
        list(pool.map(ask, range(num)))
    server.wait_idle()
    counts = {
        "vllm:time_to_first_token_seconds_count": num, "vllm:inter_token_latency_seconds_count": num * (new - 1),
        "vllm:time_per_output_token_seconds_count": num * (new - 1), "vllm:iteration_tokens_total_sum": num * (prompt + new),
        "vllm:prompt_tokens_total": num * prompt, "vllm:generation_tokens_total": num * new, "vllm:request_success_total": num,
        "vllm:e2e_request_latency_seconds_count": num, "vllm:request_queue_time_seconds_count": num,
        "vllm:request_inference_time_seconds_count": num, "vllm:request_prefill_time_seconds_count": num,
        "vllm:request_decode_time_seconds_count": num, "vllm:request_time_per_output_token_seconds_count": num,
        "vllm:request_prompt_tokens_sum": num * prompt, "vllm:request_prompt_tokens_count": num,
        "vllm:request_generation_tokens_sum": num * new, "vllm:request_generation_tokens_count": num, "vllm:request_params_n_sum": num,
        "vllm:request_params_max_tokens_sum": num * new, "vllm:request_num_preemptions_sum": 0, "vllm:request_num_preemptions_count": num,
        "vllm:prefix_cache_queries_total": num * prompt, "vllm:prefix_cache_hits_total": 0, "vllm:num_preemptions_total": 0,
    }  # fmt: skip
    assert {name: grown(name) for name in counts} == counts
    assert grown("vllm:request_success_total", finished_reason="length") == num
    assert grown("http_requests_total", handler=COMPLETIONS, method="POST", status="200") == num
    assert 0 < grown("vllm:time_to_first_token_seconds_sum") <= grown("vllm:e2e_request_latency_seconds_sum")


def test_sequences_of_one_request(server: Server, grown: Callable[..., float]) -> None:
    """n = 3 over two prompts: a first token per prompt, gaps within each sequence, an end of each sequence, a prompt counted once."""
    body = {"prompt": [[5, 6, 7], [8, 9]], "n": 3, "max_tokens": 4, "ignore_eos": True, "seed": 1, "cache_salt": "n"}
    assert server.post(COMPLETIONS, body).status == 200
    server.wait_idle()
    assert grown("vllm:time_to_first_token_seconds_count") == grown("vllm:e2e_request_latency_seconds_count") == 2
    assert grown("vllm:inter_token_latency_seconds_count") == 6 * 3
    assert grown("vllm:request_success_total") == 6 and grown("vllm:prompt_tokens_total") == 5
    assert grown("vllm:generation_tokens_total") == grown("vllm:request_generation_tokens_sum") == 24


def test_reasons_of_an_end(server: Server, grown: Callable[..., float]) -> None:
    """By a stop token and by the limit."""
    body = {"prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0, "allowed_token_ids": [70]}
    assert server.post(COMPLETIONS, {**body, "stop_token_ids": [70]}).json["choices"][0]["finish_reason"] == "stop"
    assert server.post(COMPLETIONS, body).json["choices"][0]["finish_reason"] == "length"
    assert {r: grown("vllm:request_success_total", finished_reason=r) for r in ("stop", "length", "abort", "error")} == {
        "stop": 1, "length": 1, "abort": 0, "error": 0,
    }  # fmt: skip


def test_prefix_cache(server: Server, grown: Callable[..., float]) -> None:
    """The second of two equal prompts finds its full blocks, but for the token that must be computed."""
    body = {"prompt": [100 + i for i in range(64)], "max_tokens": 1, "cache_salt": "metrics"}
    for _ in range(2):
        server.post(COMPLETIONS, body)
    server.wait_idle()
    assert grown("vllm:prefix_cache_queries_total") == 128 and grown("vllm:prefix_cache_hits_total") == 63


def test_labels_are_ours(server: Server, grown: Callable[..., float]) -> None:
    """Two hundred model names, paths, methods, fields and keys of a client make no series of their own."""

    def knock(i: int) -> None:
        server.post(COMPLETIONS, {"prompt": "a", "model": f"model-{i}"})
        server.get(f"/path-{i}", headers={"X-Request-Id": f"id-{i}", "User-Agent": f"agent-{i}"})
        server.request(f"METHOD{i}", "/v1/models")
        server.post(COMPLETIONS, {"prompt": "a", f"field_{i}": 1})
        server.post(COMPLETIONS, {"prompt": "a", "user": f"user-{i}", "max_tokens": 1})

    knock(-1)
    before = set(server.metrics())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(knock, range(200)))
    assert set(server.metrics()) == before
    assert grown("http_requests_total", handler="other", status="404") == 201
    assert grown("http_requests_total", method="other", status="405") == 201
    assert grown("xllm:requests_refused_total", reason="model_not_found") == 201
    assert grown("xllm:fields_ignored_total", field="user") == 201


def start_stream(server: Server, body: dict[str, object]) -> http.client.HTTPConnection:
    """A stream of which the first bytes have come."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
    connection.request("POST", COMPLETIONS, json.dumps({**body, "stream": True}), JSON)
    response = connection.getresponse()
    assert response.status == 200 and response.read1(10)
    return connection


def test_aborted_requests(server: Server, grown: Callable[..., float]) -> None:
    """A client that leaves is counted, its request ends as "abort", and it counts among no latencies; the gauges fall to zero."""
    start_stream(server, {"prompt": [5] * 40, "max_tokens": 450, "ignore_eos": True, "n": 2}).close()
    deadline = time.monotonic() + 20
    while not grown("xllm:clients_gone_total", cause="disconnect"):
        assert time.monotonic() < deadline
    assert_quiet(server)
    assert (
        grown("xllm:requests_aborted_total") == 1 and grown("vllm:request_success_total", finished_reason="abort") == 2
    )
    assert grown("vllm:e2e_request_latency_seconds_count") == 0 and grown("vllm:time_to_first_token_seconds_count") == 1


def test_gauges_while_something_runs(server: Server) -> None:
    """Running, waiting and the share of KV in use are seen from outside; then all is quiet."""
    long = {"prompt": [5] * 30, "max_tokens": 450, "ignore_eos": True, "n": 8}
    connections = [start_stream(server, long) for _ in range(2)]  # sixteen sequences: nobody else gets in
    third = http.client.HTTPConnection(server.host, server.port, timeout=30)
    third.request("POST", COMPLETIONS, json.dumps(long), JSON)
    seen = dict.fromkeys(GAUGES, 0.0)
    deadline = time.monotonic() + 20
    while not all(seen.values()):
        assert time.monotonic() < deadline, seen
        seen = {name: max(value, server.metric(f"vllm:{name}")) for name, value in seen.items()}
    assert seen["num_requests_running"] == 16 and 0 < seen["kv_cache_usage_perc"] <= 1
    for connection in (*connections, third):
        connection.close()
    assert_quiet(server)


@pytest.fixture(scope="module")
def tight(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Twelve blocks of 16 tokens: two requests of 100 tokens are too much."""
    log: Path = tmp_path_factory.mktemp("tight") / "log.txt"
    with serving(tiny_model, log, *FLAGS, "--num-blocks", "12", "--disable-prefix-cache") as running:
        yield running


@pytest.mark.slow
def test_preemptions(tight: Server) -> None:
    """A pool that is too small preempts, all the same everybody gets the whole answer, and both counts of it agree."""
    body = {
        "prompt": [5, 6, 7, 8] * 10,
        "max_tokens": 90,
        "ignore_eos": True,
        "temperature": 0,
        "return_token_ids": True,
    }
    alone = tight.post(COMPLETIONS, body).json["choices"][0]["token_ids"]
    assert tight.metric("vllm:num_preemptions_total") == 0
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: tight.post(COMPLETIONS, body), range(8)))
    assert all(answer.json["choices"][0]["token_ids"] == alone for answer in answers)
    preemptions = tight.metric("vllm:num_preemptions_total")
    assert preemptions > 0 and tight.metric("vllm:request_num_preemptions_sum") == preemptions
    assert tight.metric("vllm:request_success_total", finished_reason="length") == 9
    assert tight.metric("vllm:generation_tokens_total") == 9 * 90, "a token that is computed again is given out once"
    assert_quiet(tight)


@pytest.mark.slow
def test_what_the_store_counts_is_told(tiny_model: str, tmp_path: Path) -> None:
    """Also what it counts after the last request, while the engine sleeps; without a store there is no such series. Killed by: counters that
    stay in the engine's process, or are told with the next request only.
    """
    with serving(tiny_model, tmp_path / "log.txt", *FLAGS, "--use", "kv_store=core/host") as stored:
        body = {"prompt": [5, 6, 7, 8] * 12, "max_tokens": 2, "temperature": 0}
        stored.post(COMPLETIONS, body)
        deadline = time.monotonic() + 20
        while (blocks := stored.metric("xllm:kv_store", stat="stored_blocks", model_name="tiny", engine="0")) != 3:
            assert time.monotonic() < deadline, f"{blocks} of 3 blocks are told to be stored"
            time.sleep(0.05)
        assert stored.metric("xllm:kv_store", stat="used_bytes") > 0
        assert stored.metric("xllm:kv_store", stat="loaded_blocks") == 0


def test_without_a_store_nothing_is_told_of_one(server: Server) -> None:
    """Killed by: zeros that look like a store."""
    assert not [series for series in server.metrics() if series.startswith("xllm:kv_store")]


def test_a_store_that_cannot_count_is_asked_once(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and the engine goes on. Killed by: an engine that ends with its store's counters."""
    asked = []

    class Broken:
        def stats(self) -> dict[str, int]:
            asked.append(1)
            raise RuntimeError("no counters today")

    counters = _StoreCounters(Broken())  # type: ignore[arg-type]
    assert (counters.read(), counters.read(), len(asked)) == ({}, {}, 1) and "no counters today" in caplog.text
