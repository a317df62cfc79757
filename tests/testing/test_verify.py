"""The matrix itself: green on a correct engine, red under one planted bug per row."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tests.fixtures.tiny_models import make_tiny
from xllm_core import LLM, SamplingParams
from xllm_core.commands.verify import command
from xllm_core.engine import build
from xllm_core.engine.flight import Flight
from xllm_core.engine.scheduler import Scheduler
from xllm_core.engine.sequence import Sequence as EngineSequence
from xllm_core.engine.sequence import Status
from xllm_core.kv.keys import BlockKeys
from xllm_core.kv.manager import KVManager
from xllm_core.reference import attention
from xllm_core.reference.attention import ReferenceAttention
from xllm_core.reference.device import ReferenceDevice
from xllm_core.reference.ops import BlockCopy, KvWrite, Linear, LmHead
from xllm_core.runtime.graphs import StepGraphs
from xllm_core.runtime.kv_cache import KVCache
from xllm_core.runtime.sampling_state import SamplingState
from xllm_core.testing.verify import FULL, ROWS, Scale, Verifier, unequal_scores
from xllm_core.types import StepResult, TokenOutput

SMALL = Scale((1, 17, 33, 70), 12)
Install = Callable[..., list[str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Large enough a context for the full matrix, and a spread of logits that makes near ties rare."""
    return str(
        make_tiny(
            "llama", tmp_path_factory.mktemp("verify") / "tiny", max_position_embeddings=1024, initializer_range=0.5
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_matrix_on_a_tiny_model(model: str, dtype: str) -> None:
    """16 prompts of 1 to 600 tokens, 64 new, greedy and seeded: every row identical and active."""
    report = Verifier(model, dtype=dtype, scale=FULL, memory_bytes=1 << 26, device="core/reference").run()
    assert [row.feature for row in report.rows] == list(ROWS)
    assert report.has_passed, [
        (row.feature, row.differences, row.activity) for row in report.rows if not row.has_passed
    ]
    idle = [row for row in report.rows if row.activity == 0 or row.num_tokens == 0]
    assert [row.feature for row in idle] == ["log probabilities", "plugin's store", "graph replay"]
    reasons = [row.not_applicable for row in idle]
    assert "does not promise" in reasons[0] and "--use kv_store" in reasons[1] and "records no graphs" in reasons[2]


def test_the_command_takes_what_a_cache_holds(model: str) -> None:
    """As `serve` does. Killed by: flags of the cache that verify does not know, or leaves out."""
    common = [
        model,
        "--quick",
        "--row",
        "batch mates",
        "--dtype",
        "float32",
        "--device",
        "core/reference",
        "--num-blocks",
        "256",
    ]
    done = CliRunner().invoke(command, [*common, "--kv-cache-dtype", "int8"])
    assert done.exit_code == 0 and "passed" in done.output, done.output
    refused = CliRunner().invoke(command, [*common, "--kv-cache-dtype", "int4"])
    assert refused.exit_code != 0 and "'auto' or 'int8'" in str(refused.exception)


@pytest.mark.parametrize("block_size", [32, 128])
def test_large_blocks_are_outgrown_too(model: str, block_size: int) -> None:
    """Where an answer fits into the block that its prompt has begun, preemption needs prompts that nearly fill one. Dies without them."""
    rows = ("preemption", "overlap, preemption")
    report = Verifier(model, scale=SMALL, memory_bytes=1 << 26, block_size=block_size, device="core/reference").run(
        only=rows
    )
    assert [row.activity > 0 for row in report.rows] == [True, True] and report.has_passed


@pytest.mark.parametrize("block_size", [16, 128])
def test_full_and_windowed_layers_in_one_model(tmp_path: Path, block_size: int) -> None:
    """The window's pool is the smaller one, and still holds the longest sequence. Dies if the pool is sized for the first KV group alone."""
    layers = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    mixed = make_tiny("qwen2", tmp_path / "m", max_position_embeddings=1024, initializer_range=0.5, **layers)
    rows = ("prefix cache", "preemption", "overlap, preemption")
    report = Verifier(
        str(mixed), scale=SMALL, memory_bytes=1 << 26, block_size=block_size, device="core/reference"
    ).run(only=rows)
    assert report.has_passed, report.rows
    assert all(row.activity > 0 for row in report.rows)


def test_a_window_takes_a_long_prompt_alone(tmp_path: Path) -> None:
    """One sequence at a time, a window of 8, a prompt of 100 in one step: served. Dies if the window's pool forgets what a step brings."""
    layers = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    mixed = make_tiny("qwen2", tmp_path / "m", **layers)
    settings = {"use": {"device": "core/reference"}, "block_size": 4, "memory_bytes": 1 << 22, "dtype": "float32"}
    answers = []
    for max_num_seqs in (1, 64):
        with LLM(str(mixed), max_num_seqs=max_num_seqs, **settings) as llm:
            (answer,) = llm.generate(
                [{"prompt_token_ids": [3 + i % 90 for i in range(100)]}],
                SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
                use_tqdm=False,
            )
            answers.append(answer.outputs[0].token_ids)
    assert len(answers[0]) == 8 and answers[0] == answers[1]


# ---- planted bugs: each turns its row red ---------------------------------------------------------------------------------------


def mixed_up_rows(patch: pytest.MonkeyPatch) -> None:
    """Two decode rows of a step get each other's attention."""
    run = ReferenceAttention.run

    def wrong(self: Any, q: torch.Tensor, kv: Any, plan: Any, out: torch.Tensor) -> None:
        run(self, q, kv, plan, out)
        for group in plan:
            if group.num_rows > 1:
                out[group.tokens] = out[group.tokens].roll(1, 0)

    patch.setattr(ReferenceAttention, "run", wrong)


def chunk_forgets_its_past(patch: pytest.MonkeyPatch) -> None:
    """A later chunk of a prompt sees itself only."""
    plan = ReferenceAttention._plan_prefill

    def wrong(self: Any, start: int, num_queries: int, num_keys: int, table: Any) -> Any:
        group = plan(self, start, num_queries, num_keys, table)
        if num_keys > num_queries and group.visible is not None:
            group.visible[..., : num_keys - num_queries] = False
        return group

    patch.setattr(ReferenceAttention, "_plan_prefill", wrong)


def long_prompts_lose_their_last_slot(patch: pytest.MonkeyPatch) -> None:
    """The last token of a prompt computed whole is stored nowhere."""
    write = KvWrite.__call__

    def wrong(self: Any, new: Any, caches: Any, slots: torch.Tensor) -> None:
        if len(slots) > 64:
            slots = slots.clone()
            slots[16::33] = -1
        write(self, new, caches, slots)

    patch.setattr(KvWrite, "__call__", wrong)


def cache_ignores_the_tokens(patch: pytest.MonkeyPatch) -> None:
    """Blocks are found by their place alone: different texts share a key."""
    key = BlockKeys.key
    patch.setattr(BlockKeys, "key", lambda self, parent, tokens, suffix: key(self, parent, [0] * len(tokens), suffix))


def preempted_sequences_say_a_token_again(patch: pytest.MonkeyPatch) -> None:
    """A sequence that gives way forgets the token it gave out last."""
    preempt = Scheduler._preempt

    def wrong(self: Scheduler, victim: EngineSequence) -> None:
        preempt(self, victim)
        if len(victim.tokens) > victim.num_prompt:
            victim.tokens.pop()

    patch.setattr(Scheduler, "_preempt", wrong)


def store_brings_other_bytes(patch: pytest.MonkeyPatch) -> None:
    """Half of a restored block is lost on the way."""
    write = KVCache.write_block

    def wrong(self: KVCache, group: int, block_id: int, data: torch.Tensor) -> None:
        data = data.clone()
        data[: len(data) // 2] = 0
        write(self, group, block_id, data)

    patch.setattr(KVCache, "write_block", wrong)


def forks_share_their_tail(patch: pytest.MonkeyPatch) -> None:
    """Copy on write hands out a block and copies nothing into it."""
    patch.setattr(BlockCopy, "__call__", lambda self, caches, src, dst: None)


def resumed_noise_starts_again(patch: pytest.MonkeyPatch) -> None:
    """Emitted tokens are taken, but the last one is dropped."""
    init = EngineSequence.__init__

    def wrong(self: EngineSequence, request: Any, index: int, **options: Any) -> None:
        init(self, request, index, **options)
        if request.emitted and len(request.emitted[index]) > 1:
            self.tokens[-1] = (self.tokens[-1] + 1) % 100

    patch.setattr(EngineSequence, "__init__", wrong)


def leaving_clears_the_next_slot(patch: pytest.MonkeyPatch) -> None:
    """When a sequence leaves, the one in the slot beside it loses its seed."""
    release = SamplingState.release

    def wrong(self: SamplingState, slots: Sequence[int]) -> None:
        release(self, slots)
        for slot in slots:
            self._seed[(slot - 1) % len(self._seed)] = 0

    patch.setattr(SamplingState, "release", wrong)


def late_tokens_are_given_out(patch: pytest.MonkeyPatch) -> None:
    """What was sampled beyond the end of a sequence reaches the caller after all."""
    update = Scheduler.update

    def wrong(self: Scheduler, result: StepResult) -> list[TokenOutput]:
        late = [
            TokenOutput(sequence.request_id, sequence.index, tokens)
            for (sequence, kv), tokens in zip(self._in_flight[0].samples, result.token_ids, strict=True)
            if sequence.kv is not kv
        ]
        return update(self, result) + late

    patch.setattr(Scheduler, "update", wrong)


def siblings_follow_the_first(patch: pytest.MonkeyPatch) -> None:
    """A forked sequence takes the token of the one it was forked from, where its own is not known yet."""
    add_sample = Flight.add_sample

    def wrong(self: Flight, sequence: EngineSequence, kv: Any, row: int) -> None:
        add_sample(self, sequence, kv, row)
        sequence.sample_index = self.plan.sample_rows.index(row)

    patch.setattr(Flight, "add_sample", wrong)


def dropped_results_move_the_others_up(patch: pytest.MonkeyPatch) -> None:
    """Who has gone while the step ran is taken out of the list of those who wait, but its token is not taken out of the tokens."""
    update = Scheduler.update

    def wrong(self: Scheduler, result: StepResult) -> list[TokenOutput]:
        flight = self._in_flight[0]
        flight.samples = [(sequence, kv) for sequence, kv in flight.samples if sequence.kv is kv]
        result.token_ids = result.token_ids[: len(flight.samples)]
        num_dropped = len(flight.plan.sample_rows) - len(flight.samples)
        outputs = update(self, result)
        self.stats.num_wasted_rows += num_dropped
        return outputs

    patch.setattr(Scheduler, "update", wrong)


def preempted_sequences_keep_late_tokens(patch: pytest.MonkeyPatch) -> None:
    """The token that came after a sequence gave way is added to what it knows, and nobody is told."""
    update = Scheduler.update

    def wrong(self: Scheduler, result: StepResult) -> list[TokenOutput]:
        for (sequence, kv), tokens in zip(self._in_flight[0].samples, result.token_ids, strict=True):
            if sequence.kv is not kv and sequence.status is Status.WAITING:
                sequence.tokens.extend(tokens)
        return update(self, result)

    patch.setattr(Scheduler, "update", wrong)


class _Again:
    """A graph that calls what was recorded."""

    num_ops, arena_bytes = 1, 0

    def __init__(self, run: Callable[[], torch.Tensor], result: torch.Tensor) -> None:
        self._run, self._result = run, result

    def replay(self, num_rows: int) -> None:
        self._result.copy_(self._run())


def let_the_reference_record(patch: pytest.MonkeyPatch) -> None:
    """It has nothing to gain from it; a device that has is a plugin, and here are none."""

    def capture(self: ReferenceDevice, run: Callable[[], torch.Tensor], max_rows: int) -> tuple[_Again, torch.Tensor]:
        result = run().clone()
        return _Again(run, result), result

    def refill(self: ReferenceAttention, plan: list[Any], batch: Any) -> None:
        plan[:] = self.plan(batch)

    patch.setattr(ReferenceDevice, "capture", capture, raising=False)
    patch.setattr(ReferenceAttention, "graph_plan", lambda self, max_rows, max_blocks: [], raising=False)
    patch.setattr(ReferenceAttention, "refill", refill, raising=False)


def let_the_reference_promise(patch: pytest.MonkeyPatch) -> None:
    """Products and attention row by row: what it says of a row then depends on nothing beside it."""
    facts = ReferenceDevice.facts
    patch.setattr(attention, "_MAX_GATHERED", 1)
    patch.setattr(ReferenceDevice, "facts", lambda self: replace(facts(self), is_row_invariant=True))
    for op in (Linear, LmHead):
        patch.setattr(op, "__call__", by_rows(op.__call__))


def by_rows(call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same product, a row at a time."""
    return lambda self, x, prepared: torch.cat([call(self, row, prepared) for row in x.split(1)])


def products_differ_in_their_last_bits(patch: pytest.MonkeyPatch) -> None:
    """A sum in another order where there are more rows: no token changes, and no near tie tells."""
    call = Linear.__call__

    def wrong(self: Linear, x: torch.Tensor, prepared: Any) -> torch.Tensor:
        out = call(self, x, prepared)
        return out * (1 + 2**-22) if len(x) > 1 else out

    patch.setattr(Linear, "__call__", wrong)


def replays_store_where_the_first_step_did(patch: pytest.MonkeyPatch) -> None:
    """A graph whose slots stay those that it was recorded with."""
    load = StepGraphs._load

    recorded: dict[tuple[StepGraphs, int, str], Any] = {}

    def wrong(self: StepGraphs, inputs: Any, num_rows: int, bucket: int) -> None:
        load(self, inputs, num_rows, bucket)
        for group, slots in self.resident.kv_slots.items():
            kept = recorded.setdefault((self, bucket, group), slots.clone())
            if bucket in self._recorded:
                slots.copy_(kept)

    patch.setattr(StepGraphs, "_load", wrong)


BUGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "batch mates": mixed_up_rows,
    "log probabilities": products_differ_in_their_last_bits,
    "chunk 16": chunk_forgets_its_past,
    "chunk 64": chunk_forgets_its_past,
    "chunk off": long_prompts_lose_their_last_slot,
    "prefix cache": cache_ignores_the_tokens,
    "preemption": preempted_sequences_say_a_token_again,
    "host store": store_brings_other_bytes,
    "plugin's store": store_brings_other_bytes,
    "n > 1 forks": forks_share_their_tail,
    "resume": resumed_noise_starts_again,
    "neighbours aborted": leaving_clears_the_next_slot,
    "graph replay": replays_store_where_the_first_step_did,
    "overlap, stops": late_tokens_are_given_out,
    "overlap, n > 1": siblings_follow_the_first,
    "overlap, aborts": dropped_results_move_the_others_up,
    "overlap, preemption": preempted_sequences_keep_late_tokens,
}


class _PlainFirst(Verifier):
    """Plants its bug after the plain run, so that the row is wrong and the baseline is not."""

    plant: Callable[[], None]

    def built(self, **settings: Any) -> Any:
        self.plant()
        return super().built(**settings)


@pytest.mark.parametrize("row", list(ROWS))
def test_a_planted_bug_turns_its_row_red(
    model: str, row: str, monkeypatch: pytest.MonkeyPatch, install: Install
) -> None:
    """Every row has a bug that it alone is there to find; without it the same run is green."""
    settings: dict[str, Any] = {"memory_bytes": 1 << 25, "block_size": 4, "use": {"device": "core/reference"}}
    if row == "graph replay":
        let_the_reference_record(monkeypatch)
    if row == "log probabilities":
        let_the_reference_promise(monkeypatch)
    if row == "plugin's store":
        install("good")
        settings["use"] = {"device": "core/reference", "kv_store": "good/host"}
    clean = Verifier(model, scale=SMALL, **settings).run(only=[row])
    assert clean.has_passed and not clean.rows[0].not_applicable, clean.rows
    broken = _PlainFirst(model, scale=SMALL, **settings)
    broken.plant = lambda: BUGS[row](monkeypatch)
    report = broken.run(only=[row])
    assert not report.has_passed, f"{BUGS[row].__name__} went unnoticed"
    assert report.rows[0].differences, "red for want of activity, not for a difference"


def test_log_probabilities_are_told_with_their_numbers(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are the same all along, which alone no row would find; all of chosen and likeliest are counted."""
    let_the_reference_promise(monkeypatch)
    broken = _PlainFirst(model, scale=SMALL, memory_bytes=1 << 25, block_size=4, device="core/reference")
    broken.plant = lambda: products_differ_in_their_last_bits(monkeypatch)
    (row,) = broken.run(only=["log probabilities"]).rows
    assert row.num_compared == row.num_tokens == len(SMALL.lengths) * SMALL.new_tokens // 2
    assert row.activity == row.num_tokens * 5
    assert len(row.differences) == len(SMALL.lengths) and not row.has_passed
    number = r"-?\d\.\d{6,}(?:e-\d+)?"
    found = re.search(rf"greedy-17 token \d: .* is ({number}) alone, ({number}) with others", row.differences[1])
    assert found, row.differences
    assert float(found[1]) == pytest.approx(float(found[2]), abs=1e-4) and found[1] != found[2]


def test_log_probabilities_that_do_not_come_are_told() -> None:
    """A device's sampler that leaves them out beside others is not taken for one that agrees."""
    scores = {("a", 0): [[(7, -0.5), (7, -0.5)], [(3, -1.0), (3, -1.0)]]}
    assert not unequal_scores(scores, scores)
    assert unequal_scores(scores, {("a", 0): scores["a", 0][:1]}) == [
        "a: 2 tokens have log probabilities alone, 1 with others"
    ]
    others = {("a", 0): [scores["a", 0][0], [(3, -1.0), (4, -1.0)]]}
    assert "token 1: log probability of token 3 and token 4" in unequal_scores(scores, others)[0]


def test_a_row_without_activity_is_red(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that never hits leaves every answer right, and proves nothing."""
    lookup = KVManager.lookup

    def blind(self: KVManager, token_ids: Sequence[int], **options: Any) -> Any:
        return lookup(self, token_ids, **{**options, "use_cache": False})

    monkeypatch.setattr(KVManager, "lookup", blind)
    report = Verifier(model, scale=SMALL, memory_bytes=1 << 25, block_size=4, device="core/reference").run(
        only=["prefix cache"]
    )
    assert report.rows[0].is_identical
    assert report.rows[0].activity == 0
    assert not report.has_passed


def test_a_model_that_cannot_overlap_says_so(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows count for nothing, with the reason. Red if they pass as proven, or fail."""
    monkeypatch.setattr(build, "plans_in_flight", lambda groups, **options: 1)
    report = Verifier(model, scale=SMALL, memory_bytes=1 << 25, block_size=4, device="core/reference").run(
        only=["overlap, stops"]
    )
    assert report.has_passed
    assert "one after the other" in report.rows[0].not_applicable
    assert report.rows[0].num_compared == report.rows[0].activity == 0


def test_unknown_rows_are_refused(tmp_path: Path) -> None:
    """With the list of those there are."""
    with pytest.raises(ValueError, match="batch mates"):
        Verifier(str(tmp_path)).run(only=["no such row"])
