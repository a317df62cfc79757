"""When decode steps are recorded and replayed, on the reference with a recorder that calls the forward again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from xllm_core.plugins.contracts.attention import AttentionGeometry, BatchLayout
from xllm_core.plugins.contracts.graphs import GraphDevice, GraphKernel, NotCapturableError
from xllm_core.plugins.contracts.model import ForwardContext
from xllm_core.reference.attention import ReferenceAttention
from xllm_core.reference.device import ReferenceDevice
from xllm_core.runtime.graphs import RAGGED_BUCKETS, StepGraphs, buckets, why_no_graphs
from xllm_core.runtime.inputs import StepInputs
from xllm_core.types import StepPlan

VOCAB = 11


@dataclass
class Again:
    """A graph that calls what was recorded."""

    run: Callable[[], torch.Tensor]
    logits: torch.Tensor
    arena_bytes: int
    num_ops: int = 3
    asked: list[int] = field(default_factory=list)

    def replay(self, num_rows: int) -> None:
        self.asked.append(num_rows)
        self.logits.copy_(self.run())


class Device(ReferenceDevice):
    """The reference, recording."""

    def __init__(self) -> None:
        super().__init__(0)
        self.graphs: list[Again] = []
        self.refuses = ""

    def capture(self, run: Callable[[], torch.Tensor], max_rows: int) -> tuple[Again, torch.Tensor]:
        if self.refuses:
            raise NotCapturableError(self.refuses)
        graph = Again(run, run().clone(), arena_bytes=1000 * max_rows)
        self.graphs.append(graph)
        return graph, graph.logits


class Kernel(ReferenceAttention):
    """Plans that stay in place: what was laid out last."""

    def graph_plan(self, max_rows: int, max_blocks: int) -> dict[str, Any]:
        return {"rows": max_rows, "blocks": max_blocks}

    def refill(self, plan: dict[str, Any], batch: BatchLayout) -> None:
        plan["lens"] = batch.kv_lens.clone()


class RaggedKernel(Kernel):
    """The same for rows of any length: each token of a row is told its row's length."""

    def refill_ragged(self, plan: dict[str, Any], batch: BatchLayout) -> None:
        plan["lens"] = batch.kv_lens.repeat_interleave(batch.query_starts.diff())


class Model:
    """Scores that tell token, position and slot of each row, and the lengths that the kernel was told."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[int], list[int], list[int]]] = []
        self.layers = [self._layer]

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        self._ids = token_ids.tolist()
        return token_ids.unsqueeze(1).float()

    def _layer(self, hidden: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        self.seen.append((self._ids, ctx.positions.tolist(), ctx.kv_slots["full"].tolist()))
        lens = torch.zeros(len(hidden))
        lens[: len(ctx.plans["full"]["lens"])] = ctx.plans["full"]["lens"].float()
        return hidden + 100 * lens.unsqueeze(1)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.expand(-1, VOCAB)


def make(max_rows: int = 20, kernel: type[Kernel] = Kernel) -> tuple[StepGraphs, Device, Model]:
    device, model = Device(), Model()
    geometry = AttentionGeometry(2, 1, 8, 1.0, 16, "float32")
    return (
        StepGraphs(device, model, {"full": kernel(device, geometry)}, max_rows=max_rows, max_blocks=9),
        device,
        model,
    )


def inputs(*token_ids: int) -> StepInputs:
    """A step of single tokens; row i is at position 10 + i and slot 50 + i."""
    count = len(token_ids)
    ones, lens = torch.ones(count, dtype=torch.int32), torch.arange(11, 11 + count, dtype=torch.int32)
    starts = torch.arange(count + 1, dtype=torch.int32)
    layout = BatchLayout(ones, lens, starts, torch.zeros(count, 1, dtype=torch.int32))
    places = torch.arange(count)
    return StepInputs(torch.tensor(token_ids), 10 + places, {"full": 50 + places}, {"full": layout}, starts.numpy())


def ragged(*lengths: int) -> StepInputs:
    """A step of rows of several tokens; flat token i is token i of the vocabulary, at position 10 + i and slot 50 + i."""
    count = sum(lengths)
    lens = torch.tensor(lengths, dtype=torch.int32)
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    starts[1:] = lens.cumsum(0)
    layout = BatchLayout(lens, 20 + lens, starts, torch.zeros(len(lengths), 3, dtype=torch.int32))
    places = torch.arange(count)
    return StepInputs(places, 10 + places, {"full": 50 + places}, {"full": layout}, starts.numpy())


def nobody() -> None:
    """Waits for a launch."""


def test_whoever_waits_for_a_launch_is_called_when_all_is_laid_out() -> None:
    """Before the replay, and after the inputs are in their places."""
    graphs, device, _ = make()
    graphs.logits(inputs(7, 8), nobody)
    seen = []
    graphs.logits(
        inputs(1, 2), lambda: seen.append((list(device.graphs[0].asked), graphs.resident.token_ids[:2].tolist()))
    )
    assert seen == [([], [1, 2])] and device.graphs[0].asked == [2]


def test_buckets() -> None:
    """Fine where few rows are, then by sixteen, and never more than one beyond what can run."""
    assert buckets(1) == (1,) and buckets(3) == (1, 2, 4) and buckets(8) == (1, 2, 4, 8)
    assert buckets(33) == (1, 2, 4, 8, 16, 32, 48) and buckets(48) == buckets(33)


def test_a_bucket_is_recorded_once_and_replayed_with_new_inputs() -> None:
    """The first step of a bucket records, later ones replay what they bring; rows behind theirs are padding that stores nothing."""
    graphs, device, model = make()
    first = graphs.logits(inputs(7, 8, 9), nobody)
    assert first is not None and first[:, 0].tolist() == [1107, 1208, 1309]
    again = graphs.logits(inputs(1, 2, 3), nobody)
    assert again is not None and again.shape == (3, VOCAB) and again[:, 0].tolist() == [1101, 1202, 1303]
    fewer = graphs.logits(inputs(4, 5, 6, 7), nobody)
    assert fewer is not None and fewer[:, 0].tolist() == [1104, 1205, 1306, 1407]
    assert len(device.graphs) == 1 and device.graphs[0].asked == [3, 4]
    assert model.seen[1] == ([1, 2, 3, 0], [10, 11, 12, 0], [50, 51, 52, -1])
    stats = graphs.stats
    assert (stats.num_captures, stats.num_replays, stats.padded_rows, stats.num_ops) == (1, 2, 1, 3)


def test_the_arena_is_that_of_the_largest() -> None:
    """Graphs share it: the greatest counts, not the sum."""
    graphs, _, _ = make()
    for count in (1, 4, 2):
        graphs.logits(inputs(*range(count)), nobody)
    assert graphs.stats.num_captures == 3 and graphs.stats.arena_bytes == 4000


@pytest.mark.parametrize(
    "change",
    [
        {"num_tokens": 3}, {"sample_rows": [0]}, {"sample_rows": [1, 0]}, {"sample_rows": [0, 0]}, {"prompt_logprobs": [(0, 1)]},
    ],
)  # fmt: skip
def test_what_is_no_decode_step(change: dict[str, Any]) -> None:
    """Prompts, rows that are not sampled or sampled twice, and scores of a prompt run op by op."""
    plan = StepPlan(1, slots=[4, 2], num_tokens=2, sample_rows=[0, 1])
    graphs, _, _ = make()
    assert graphs.covers(plan)
    for name, value in change.items():
        setattr(plan, name, value)
    assert not graphs.covers(plan) and graphs.stats.num_eager == 0


def test_a_small_ragged_step_is_replayed_up_to_the_head() -> None:
    """What comes back is the last layer's; padding stores nothing, and decode steps keep graphs of their own."""
    graphs, device, model = make(kernel=RaggedKernel)
    for lengths in ((16,), (1, 5, 2), (32,)):
        hidden = graphs.hidden(ragged(*lengths), nobody)
        assert hidden is not None
        told = [20 + length for length in lengths for _ in range(length)]
        assert hidden[:, 0].tolist() == [i + 100 * told[i] for i in range(sum(lengths))]
    assert len(device.graphs) == 1 and device.graphs[0].asked == [8, 32]
    assert model.seen[1] == (
        [*range(8), *[0] * 24], [*range(10, 18), *[0] * 24], [*range(50, 58), *[-1] * 24]
    )  # fmt: skip
    logits = graphs.logits(inputs(7, 8), nobody)
    assert logits is not None and logits.shape == (2, VOCAB) and len(device.graphs) == 2
    assert graphs.hidden(ragged(33), nobody) is not None and len(device.graphs) == 3
    assert (graphs.stats.num_captures, graphs.stats.num_replays, graphs.stats.padded_rows) == (3, 2, 24)


def test_which_ragged_steps() -> None:
    """Small ones without scores of the prompt, and only where the kernel takes rows of any length."""
    plan = StepPlan(1, slots=[4, 2], num_tokens=20, sample_rows=[1])
    graphs, device, _ = make(kernel=RaggedKernel)
    plain, _, _ = make()
    assert graphs.covers_ragged(plan) and not graphs.covers(plan) and not plain.covers_ragged(plan)
    for name, value in {"num_tokens": RAGGED_BUCKETS[-1] + 1, "prompt_logprobs": [(0, 1)]}.items():
        other = StepPlan(1, slots=[4, 2], num_tokens=20, sample_rows=[1])
        setattr(other, name, value)
        assert not graphs.covers_ragged(other)
    device.refuses = "aten.topk is no op of this device"
    assert graphs.hidden(ragged(5), nobody) is None and not graphs.covers_ragged(plan)


def test_a_forward_that_cannot_be_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """It is tried once; the reason is kept, and later steps are counted."""
    graphs, device, _ = make()
    device.refuses = "aten.topk is no op of this device"
    with caplog.at_level("INFO", logger="xllm.engine"):
        assert graphs.logits(inputs(1), nobody) is None
    assert "aten.topk" in caplog.text and graphs.stats.why_not == device.refuses
    assert not graphs.covers(StepPlan(1, slots=[0], num_tokens=1, sample_rows=[0]))
    assert graphs.stats.num_eager == 2 and graphs.stats.num_captures == 0


def test_who_can() -> None:
    """A device without `capture`, or a kernel without plans that stay, says so."""
    device, geometry = Device(), AttentionGeometry(2, 1, 8, 1.0, 16, "float32")
    kernel, plain = Kernel(device, geometry), ReferenceAttention(device, geometry)
    assert isinstance(device, GraphDevice) and isinstance(kernel, GraphKernel)
    assert why_no_graphs(device, {"full": kernel}) == ""
    assert "'window'" in why_no_graphs(device, {"full": kernel, "window": plain})
    assert "records no graphs" in why_no_graphs(ReferenceDevice(0), {"full": kernel})
