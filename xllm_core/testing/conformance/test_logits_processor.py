"""Logits processors: a row depends on its own slot alone, through entering, forking, leaving and entering again.

The kit tries the parameters that it knows. A processor that answers to something else says to what, in a module given with `-p MODULE`::

    @pytest.fixture
    def xllm_processor_params():
        return [{"logit_bias": {3: 2.0}}, ...]    # fields of SamplingParams under which it applies; at least one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from xllm_core.testing.plugin import Kit, kit_of, optional_fixture
from xllm_core.testing.subject import Part
from xllm_core.types import SamplingParams, SlotState

if TYPE_CHECKING:
    import torch

VOCAB, SLOTS = 60, 8
PARAMS: tuple[Mapping[str, Any], ...] = (
    {"repetition_penalty": 1.4}, {"frequency_penalty": 0.7, "presence_penalty": -0.3}, {"logit_bias": {3: 4.0, 9: -100.0}},
    {"allowed_token_ids": [2, 3, 5, 7, 11]}, {"min_tokens": 9, "stop_token_ids": [4, 6]}, {"repetition_penalty": 0.8, "logit_bias": {1: 1.0}},
    {"allowed_token_ids": [1, 4, 6], "min_tokens": 12, "stop_token_ids": [1]}, {},
)  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every processor."""
    parts = kit_of(metafunc.config).subject.parts("logits_processors")
    metafunc.parametrize("part", parts, ids=[part.offer.name for part in parts])


class Bench:
    """A processor, and the parameters under which it applies."""

    def __init__(self, build: Callable[[], Any], params: Sequence[Mapping[str, Any]]) -> None:
        self.build = build
        self.params = [entry for entry in params if build().admit(state(0, entry))]
        self.refused = [entry for entry in params if entry not in self.params]

    def entered(self, *slots: int, outputs: Sequence[int] = ()) -> Any:
        """A processor with a sequence in each of these slots, each with parameters of its own."""
        processor = self.build()
        for slot in slots:
            assert processor.admit(self.state(slot, outputs)), "it takes a sequence once and not another time"
        return processor

    def state(self, slot: int, outputs: Sequence[int] = ()) -> SlotState:
        """What enters a slot."""
        return state(slot, self.params[slot % len(self.params)], outputs)


def state(slot: int, params: Mapping[str, Any], outputs: Sequence[int] = ()) -> SlotState:
    """A sequence with a prompt of its own."""
    prompt = [(slot * 7 + i * i) % VOCAB for i in range(3 + slot)]
    return SlotState(
        slot, 0, 40 + slot, SamplingParams(**{"max_tokens": 50, **params}), frozenset({2}), prompt, list(outputs)
    )


def logits_for(slots: Sequence[int], extra: int = 0) -> torch.Tensor:
    """Each slot's own row of logits, whatever its place."""
    import torch

    rows = [torch.randn(VOCAB, generator=torch.Generator().manual_seed(slot + extra)) for slot in slots]
    return torch.stack(rows)


def applied(processor: Any, slots: Sequence[int]) -> torch.Tensor:
    """Logits after it, which is called as the core calls it."""
    logits = logits_for(slots)
    answer = processor.apply(logits, list(slots))
    assert answer is None, f"apply returned {type(answer).__name__}; it works in place"
    return logits


@pytest.fixture
def bench(part: Part, xllm_kit: Kit, request: pytest.FixtureRequest) -> Bench:
    """The processor under test; skips where it takes no sequence that the kit can make."""
    from xllm_core.plugins.contracts.sampling import ProcessorContext

    xllm_kit.importable(part)
    context = ProcessorContext(num_slots=SLOTS, vocab_size=VOCAB, torch_device="cpu")
    made = Bench(lambda: part.build(context), optional_fixture(request, "xllm_processor_params") or PARAMS)
    if not made.params:
        pytest.skip("it applies under no parameters that the kit knows; define the fixture xllm_processor_params")
    return made


def equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """To the bit, -inf included."""
    import torch

    return torch.equal(left, right)


def test_it_does_something(part: Part, bench: Bench) -> None:
    """Where it says that it applies, it changes logits (or will, after some tokens)."""
    for slot in range(len(bench.params)):
        processor = bench.entered(slot)
        for token in (3, 3, 5, *(4, 6) * 12):  # in the end it runs in a circle, which is what some wait for
            if not equal(applied(processor, [slot]), logits_for([slot])):
                break
            processor.observe([slot], [token])
        else:
            assert not equal(applied(processor, [slot]), logits_for([slot])), (
                f"it took {bench.params[slot]} and changes nothing"
            )


def test_a_row_depends_on_its_own_slot_alone(part: Part, bench: Bench) -> None:
    """In any order, among others or alone, a row is changed the same way, and no row but its own."""
    slots = list(range(6))
    together = applied(bench.entered(*slots), slots)
    for rows in ([5, 3, 1, 0, 2, 4], [4], [1, 5], [0, 2, 3]):
        found = applied(bench.entered(*slots), rows)
        for place, slot in enumerate(rows):
            assert equal(found[place], together[slot]), f"the row of slot {slot} differs when the batch is {rows}"
        alone = applied(bench.entered(*rows), rows)
        assert equal(alone, found), f"rows {rows} feel sequences that are not in the batch"


def test_rows_outside_the_batch_are_not_touched(part: Part, bench: Bench) -> None:
    """Only the rows given are written, also where they are part of a larger tensor."""
    import torch

    whole = torch.zeros(9, VOCAB)
    bench.entered(0, 1, 2).apply(whole[3:6], [0, 1, 2])
    assert not whole[:3].any() and not whole[6:].any(), "it wrote to rows that it was not given"


def test_tokens_count_for_their_own_slot(part: Part, bench: Bench) -> None:
    """A chosen token is told to the slot it was chosen for, and changes no other row."""
    processor, untold = bench.entered(0, 1, 2), bench.entered(0, 1, 2)
    processor.observe([1], [5])
    processor.observe([1], [9])
    assert equal(applied(processor, [0, 2]), applied(untold, [0, 2])), "a token of slot 1 changes the rows of others"


def test_a_resumed_sequence_goes_on(part: Part, bench: Bench) -> None:
    """Tokens emitted before the sequence entered count exactly as if they had been observed here."""
    told = bench.entered(0, 1)
    for token in (5, 9, 5):
        told.observe([0, 1], [token, token + 1])
    resumed = bench.build()
    for slot in (0, 1):
        assert resumed.admit(bench.state(slot, [5 + slot, 9 + slot, 5 + slot]))
    assert equal(applied(resumed, [0, 1]), applied(told, [0, 1]))


def test_forks_go_separate_ways(part: Part, bench: Bench) -> None:
    """A fork starts as a copy; what is chosen for one afterwards does not reach the other."""
    processor = bench.entered(0, 1)
    processor.observe([0, 1], [5, 9])
    before = applied(processor, [0])
    processor.fork(0, 6)
    copy = logits_for([0])
    processor.apply(copy, [6])
    assert equal(copy, before), "a fork is not a copy of its source"
    processor.observe([6], [8])
    processor.observe([6], [8])
    assert equal(applied(processor, [0]), before), "a token of the fork reached its source"
    processor.release(0)
    after = logits_for([0])
    processor.apply(after, [6])
    single = bench.entered(0)
    for token in (5, 8, 8):
        single.observe([0], [token])
    assert equal(after, applied(single, [0])), "the fork did not survive its source, or forgot what it had"


def test_slots_are_used_again(part: Part, bench: Bench) -> None:
    """A slot that was left and entered again holds nothing of the sequence before."""
    processor = bench.entered(0, 1)
    processor.observe([0, 1], [5, 9])
    processor.release(0)
    assert processor.admit(state(0, bench.params[-1]))
    fresh = bench.build()
    assert fresh.admit(state(0, bench.params[-1]))
    assert equal(applied(processor, [0]), applied(fresh, [0]))
