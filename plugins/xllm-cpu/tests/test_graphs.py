"""Replaying a decode step by one native call: what is recorded, what it gives, and what is refused."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from xllm_cpu.attention import PagedAttention
from xllm_cpu.device import CpuDevice
from xllm_cpu.ops import AddRmsNorm, Embedding, Linear, LmHead, RmsNorm

from xllm_core.config import Settings
from xllm_core.engine.build import BuiltEngine, build_engine
from xllm_core.engine.process import EngineLoop
from xllm_core.plugins import AttentionGeometry, BatchLayout, NotCapturableError
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.resolve import assemble
from xllm_core.runtime.graphs import RAGGED_BUCKETS
from xllm_core.testing.driving import drive
from xllm_core.testing.tiny import tiny_config, write_tiny
from xllm_core.types import EngineRequest, SamplingParams

SIZE, VOCAB = 48, 70


class Forward:
    """Some ops in a row over inputs that stay where they are."""

    def __init__(self, device: CpuDevice, dtype: torch.dtype, max_rows: int) -> None:
        torch.manual_seed(3)
        self.ids = torch.randint(0, VOCAB, (max_rows,))
        self._table, self._weight = torch.randn(VOCAB, SIZE).to(dtype), torch.randn(SIZE).to(dtype)
        self._embed, self._norm, self._add_norm = Embedding(device), RmsNorm(device), AddRmsNorm(device)
        self._linear, self._head = Linear(device), LmHead(device)
        self._square = self._linear.prepare(torch.randn(SIZE, SIZE).to(dtype), None)
        self._out = self._head.prepare(self._table, None)

    def __call__(self, num_rows: int) -> torch.Tensor:
        h = self._embed(self.ids[:num_rows], self._table)
        for _ in range(3):
            normed, h = self._add_norm(self._linear(h, self._square), h, self._weight, 1e-5)
            heads = self._norm(normed.view(num_rows, 3, -1), self._weight[:16], 1e-5)  # rows beside rows
            h = h + heads.reshape(num_rows, SIZE)
        h = h + self._table.index_select(0, self.ids[:num_rows])
        return self._head(h, self._out)


def test_replay_gives_what_the_forward_gives(device: CpuDevice, dtype: torch.dtype) -> None:
    """To the bit, for fewer rows too, with inputs that changed; and in far less memory than all that was made on the way."""
    forward = Forward(device, dtype, 24)
    with torch.inference_mode():
        graph, logits = device.capture(lambda: forward(24), 24)
        assert torch.equal(logits, forward(24))
        for num_rows in (24, 1, 7, 23):
            forward.ids.random_(0, VOCAB)
            logits.fill_(float("nan"))
            graph.replay(num_rows)
            assert torch.equal(logits[:num_rows], forward(num_rows))
            assert bool(logits[num_rows:].isnan().all()), "rows that nobody asked for were computed"
    one = 24 * SIZE * dtype.itemsize
    assert graph.num_ops == 16 and graph.arena_bytes < 8 * one + 24 * VOCAB * 4 + 64 * 12


def test_graphs_share_their_memory(device: CpuDevice) -> None:
    """A second graph begins where the first does and both stay right. Red if each has memory of its own, whatever is then counted."""
    forward = Forward(device, torch.float32, 16)
    with torch.inference_mode():
        large, of_large = device.capture(lambda: forward(16), 16)
        small, of_small = device.capture(lambda: forward(4), 4)
        large.replay(16)
        assert torch.equal(of_large, forward(16))
        small.replay(3)
        assert torch.equal(of_small[:3], forward(3))
        _, of_another = device.capture(lambda: forward(16), 16)
    assert of_another.data_ptr() == of_large.data_ptr()
    assert small.arena_bytes < large.arena_bytes


@pytest.mark.parametrize(
    ("strange", "words"),
    [
        (lambda h: h.softmax(-1), "aten._softmax"),
        (lambda h: h + 1, "sum of tensors"),
        (lambda h: h.t().contiguous(), "aten.contiguous.default copies"),
        (lambda h: h.t().reshape(-1), "aten.reshape.default copies"),
        (lambda h: h.to(torch.bfloat16), "aten._to_copy|aten.to"),
        (lambda h: h + h[:1], "sum of tensors"),
    ],
)
def test_what_cannot_be_recorded(
    device: CpuDevice, strange: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    """An op that a replay would leave out is refused by name, and afterwards nothing is recorded any more."""
    forward = Forward(device, torch.float32, 4)
    with torch.inference_mode():
        with pytest.raises(NotCapturableError, match=words):
            device.capture(lambda: strange(forward(4)), 4)
        expected = forward(4)
        graph, logits = device.capture(lambda: forward(4), 4)
        graph.replay(4)
        assert torch.equal(logits, expected) and graph.num_ops == 16


@pytest.mark.parametrize("table", [torch.arange(9) * 5, torch.randn(9, 3).half(), torch.arange(36.0).view(9, 2, 2)])
def test_rows_of_any_type_are_looked_up(device: CpuDevice, table: torch.Tensor) -> None:
    """Bytes are copied: a table of places, rows that are no pairs of 2 bytes. Dies if a row of another type is taken for floats or cut."""
    ids, odd = torch.tensor([3, 0, 8, 8]), torch.zeros(9, 3, dtype=torch.uint8)
    with torch.inference_mode():
        graph, found = device.capture(lambda: table.index_select(0, ids), 4)
        assert torch.equal(found, table[ids]) and found.dtype == table.dtype
        ids.copy_(torch.tensor([1, 7, 2, 5]))
        graph.replay(3)
        assert torch.equal(found[:3], table[ids[:3]])
        with pytest.raises(NotCapturableError, match="rows of a contiguous table"):
            device.capture(lambda: odd.index_select(0, ids), 4)
        ids[2] = 9
        with pytest.raises(IndexError, match=r"row 9 is outside 0 \.\. 8"):
            device.capture(lambda: table.index_select(0, ids), 4)


def test_bad_indices(device: CpuDevice) -> None:
    """A token id that is not there stops the replay with the op's name; too many rows never reach it."""
    forward = Forward(device, torch.float32, 4)
    with torch.inference_mode():
        graph, _ = device.capture(lambda: forward(4), 4)
    forward.ids[2] = VOCAB
    with pytest.raises(IndexError, match="embedding, call 1 of 16"):
        graph.replay(4)
    graph.replay(2)
    for num_rows in (0, 5):
        with pytest.raises(ValueError, match="4"):
            graph.replay(num_rows)


def test_a_step_that_does_not_fit_a_plan(device: CpuDevice) -> None:
    """Too many rows, too many blocks, or more than one token: refused before anything is written."""
    kernel = PagedAttention(device, AttentionGeometry(4, 2, 16, 0.25, 16, "float32"))
    plan = kernel.graph_plan(2, 3)

    def layout(rows: int, blocks: int, tokens: int = 1) -> BatchLayout:
        lens = torch.full((rows,), tokens, dtype=torch.int32)
        starts = torch.arange(rows + 1, dtype=torch.int32) * tokens
        return BatchLayout(lens, lens.clone(), starts, torch.zeros(rows, blocks, dtype=torch.int32))

    kernel.refill(plan, layout(2, 3))
    for bad in (layout(3, 1), layout(1, 4), layout(2, 1, tokens=2), layout(1, 1, tokens=2)):
        with pytest.raises(ValueError, match="do not fit each other, or not 2 rows with 2 new tokens and 3 blocks"):
            kernel.refill(plan, bad)
    kernel.refill_ragged(plan, layout(1, 1, tokens=2))
    for bad in (layout(3, 1), layout(1, 4), layout(1, 1, tokens=3), layout(2, 1, tokens=2)):
        with pytest.raises(ValueError, match="do not fit each other, or not 2 rows with 2 new tokens and 3 blocks"):
            kernel.refill_ragged(plan, bad)


def built(model: str, *, graphs: bool, **flat: Any) -> BuiltEngine:
    """An engine on this device that makes one step after the other."""
    flat = {"device": "cpu/cpu", "num_blocks": 64, "max_num_seqs": 8, "overlap": False, "graphs": graphs, **flat}
    settings = Settings.from_flags(path=model, **flat)
    return build_engine(assemble(settings, PluginManager.discover(settings).load()), settings)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_an_engine_replays_and_counts(tmp_path: Path, architecture: str) -> None:
    """Steady decoding is replayed, its ends too; the tokens are those of an engine without graphs. Qwen3 norms heads that it cuts out."""
    model = str(write_tiny(tiny_config(architecture, head_dim=16), tmp_path / "tiny"))
    requests = [
        EngineRequest(f"{i}", tuple(range(1, 4 + i)), SamplingParams(max_tokens=6 + 3 * i, ignore_eos=True), seed=i)
        for i in range(5)
    ]
    said = {}
    for graphs in (True, False):
        one = built(model, graphs=graphs)
        try:
            said[graphs] = drive(one.engine, requests)
            stats = one.worker.graph_stats()
            if not graphs:
                assert stats is None and one.engine.num_replays == 0
                continue
            assert (
                stats is not None and not stats.why_not and stats.num_captures == 5
            )  # the prompts; 8, 4, 2 and 1 rows
            assert stats.num_replays == one.engine.num_replays == 17 - 4 and stats.num_eager == 0
            assert stats.padded_rows > 0 and stats.num_ops > 15 and stats.arena_bytes > 0
        finally:
            one.engine.close()
    assert said[True] == said[False]


def test_what_an_engine_tells_of_its_graphs(tmp_path: Path) -> None:
    """Its parent, after a step: steps replayed since it began to serve, and all else since the start, as graphs may be of the warm-up."""
    model = str(write_tiny(tiny_config("LlamaForCausalLM", head_dim=16), tmp_path / "tiny"))
    one = built(model, graphs=True)
    request = EngineRequest("warm-up", (1, 2, 3), SamplingParams(max_tokens=4, ignore_eos=True), seed=1)
    sent: list[Any] = []
    try:
        drive(one.engine, [request])
        stats = one.worker.graph_stats()
        assert stats is not None
        num_before = stats.num_replays
        loop = EngineLoop(one.engine, SimpleNamespace(send=sent.append), None, stats)  # type: ignore[arg-type]
        drive(one.engine, [replace(request, request_id=str(i), seed=i) for i in range(3)])
        stats.num_eager = 2
        loop._tell_stats()
    finally:
        one.engine.close()
    told = sent[0].stats
    assert 0 < told.num_captures == stats.num_captures and 0 < told.padded_rows == stats.padded_rows
    assert 0 < told.arena_bytes == stats.arena_bytes and told.num_eager == 2
    assert 0 < told.num_replays == stats.num_replays - num_before


def test_a_server_shows_what_graphs_count(tmp_path: Path) -> None:
    """In `/metrics`, from an engine in a process of its own."""
    model = str(write_tiny(tiny_config("LlamaForCausalLM", head_dim=16), tmp_path / "tiny"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    flags = ("--port", str(port), "--device", "cpu/cpu", "--num-blocks", "64", "--max-num-seqs", "4")
    process = subprocess.Popen([sys.executable, "-m", "xllm_core.cli", "serve", model, *flags], cwd=tmp_path)

    def get(path: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return str(response.read().decode())

    try:
        deadline_s = time.monotonic() + 60
        while True:
            try:
                get("/health/ready")
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline_s
                time.sleep(0.1)
        get("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 8, "ignore_eos": True})
        found = dict(re.findall(r"^xllm:graph_(\w+)\{[^}]*\} (\S+)$", get("/metrics"), re.MULTILINE))
    finally:
        process.terminate()
        process.wait(timeout=60)
    assert found.keys() == {"replays_total", "captures_total", "eager_steps_total", "padded_rows_total", "arena_bytes"}
    assert float(found["captures_total"]) > 0 and float(found["arena_bytes"]) > 0 and float(found["replays_total"]) > 0


@pytest.mark.parametrize("max_chunk_tokens", [0, 7])
def test_an_engine_replays_the_ends_of_prompts(tmp_path: Path, max_chunk_tokens: int) -> None:
    """Behind a known prefix, in chunks that nothing is sampled of, and beside rows that decode: the tokens are those of a prompt computed at once."""
    model = str(write_tiny(tiny_config("LlamaForCausalLM", head_dim=16), tmp_path / "tiny"))
    prefix = tuple(5 + i % 40 for i in range(230))
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    waves = [[EngineRequest("long", prefix, params, seed=1)]]
    waves += [
        [
            EngineRequest(f"{wave}-{i}", (*prefix[: 150 + 16 * i], *range(20 + i, 31 + 9 * i + wave)), params, seed=i)
            for i in range(3)
        ]
        for wave in range(5)
    ]
    said: dict[bool, list[Any]] = {True: [], False: []}
    for graphs in (True, False):
        one = built(
            model, graphs=graphs, max_chunk_tokens=max_chunk_tokens if graphs else 0, enable_prefix_cache=graphs
        )
        try:
            said[graphs] = [drive(one.engine, wave) for wave in waves]
            if graphs:
                ragged = [
                    r.is_replayed
                    for r in one.engine.step_log.records
                    if r.num_rows < r.num_tokens <= RAGGED_BUCKETS[-1]
                ]
                assert ragged.count(False) <= len(RAGGED_BUCKETS), "more ragged steps ran op by op than were recorded"
                assert sum(ragged) >= 2, f"{sum(ragged)} ragged steps were replayed"
        finally:
            one.engine.close()
    assert said[True] == said[False]


def test_recording_imports_nothing() -> None:
    """In a process of its own: a first step that imports a compiler takes a second."""
    code = """
import sys, torch
from xllm_cpu.device import CpuDevice
from xllm_cpu.ops import RmsNorm
device, x = CpuDevice(0), torch.ones(4, 8)
norm, weight = RmsNorm(device), torch.ones(8)
before = set(sys.modules)
with torch.inference_mode():
    graph, out = device.capture(lambda: (norm(x, weight, 1e-6) + x).reshape(8, 4).view(4, 8), 4)
print(graph.num_ops, sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "2 []", done.stdout + done.stderr
