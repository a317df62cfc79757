"""Token choice: distributions, filters, determinism, and that a row depends on itself alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from xllm_core.plugins.contracts.sampling import ProcessorContext
from xllm_core.reference.device import ReferenceDevice
from xllm_core.runtime.noise import gumbel, stream_key, stream_keys
from xllm_core.runtime.processors import AllowedTokens, LogitBias, MinTokens, Penalties
from xllm_core.runtime.sampler import GumbelSampler
from xllm_core.runtime.sampling_state import SamplingState
from xllm_core.types import SamplingParams, SlotState

# 99.9 % quantile of chi-square by degrees of freedom.
CHI2 = {4: 18.47, 7: 24.32, 9: 27.88, 15: 37.70}


def slot_state(slot: int, prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> SlotState:
    return SlotState(
        slot, 0, params.pop("seed", 1) or 0, SamplingParams(**params), frozenset(), prompt or [], output or []
    )


def choose(logits: torch.Tensor, position: int = 0, seeds: list[int] | None = None, **params: Any) -> list[int]:
    """One token per row of `logits`, all rows with these parameters."""
    device = ReferenceDevice(0)
    state = SamplingState(device, [], num_slots=len(logits))
    for slot in range(len(logits)):
        state.admit(replace(slot_state(slot, **params), seed=seeds[slot] if seeds else slot))
    slots = list(range(len(logits)))
    return GumbelSampler(device).sample(logits.clone(), state.batch(slots, [position] * len(slots))).tolist()


def counts(logits: torch.Tensor, draws: int = 4000, **params: Any) -> torch.Tensor:
    """How often each token is drawn."""
    drawn = choose(logits.expand(draws, -1), **params)
    return torch.bincount(torch.tensor(drawn), minlength=logits.shape[-1]).float()


def chi2(seen: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * seen.sum()
    alive = expected > 0
    assert seen[~alive].sum() == 0, "a token of probability 0 was drawn"
    return float(((seen - expected)[alive] ** 2 / expected[alive]).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    """χ² over 4,000 draws. Red if noise is uniform instead of Gumbel, or temperature multiplies instead of divides."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5, 0.1, -2.0, 1.5]])
    assert chi2(counts(logits, temperature=temperature), (logits[0] / temperature).softmax(-1)) < CHI2[7]


def test_noise_streams_are_independent_of_each_other() -> None:
    """Neighbouring seeds, indices and positions give unrelated noise, and the three do not stand in for one another."""
    keys = {stream_key(s, i, p) for s in range(10) for i in range(10) for p in range(10)}
    assert len(keys) == 1000
    ids = torch.arange(5000)
    a, b = (
        gumbel(stream_keys([1], [0], [5]).unsqueeze(-1), ids)[0],
        gumbel(stream_keys([1], [0], [6]).unsqueeze(-1), ids)[0],
    )
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.05


def test_noise_of_a_token_does_not_depend_on_which_others_are_asked_for() -> None:
    """The short list and the full vocabulary must see the same noise."""
    keys = stream_keys([3], [1], [9]).unsqueeze(-1)
    whole = gumbel(keys, torch.arange(1000))
    assert torch.equal(whole[:, [7, 500, 999]], gumbel(keys, torch.tensor([[7, 500, 999]])))


def test_noise_has_the_moments_of_a_gumbel() -> None:
    """Mean 0.5772, variance π²/6, and a heavy right tail that float32 does not cut off."""
    noise = gumbel(stream_keys(range(20), [0] * 20, [0] * 20).unsqueeze(-1), torch.arange(50_000))
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(1.6449, abs=0.02)
    assert 11 < float(noise.max()) < 25


def test_top_k_keeps_k_and_ties() -> None:
    """k = 3 with a tie at the third place keeps four. Red if ties are cut by order."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 1.0, 0.0, -1.0]]).expand(1, -1)
    seen = counts(logits, temperature=1.0, top_k=3)
    assert (seen > 0).tolist() == [True, True, True, True, False, False]


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.65, 2), (0.9, 3), (1.0, 5)])
def test_top_p_keeps_the_smallest_set(top_p: float, kept: int) -> None:
    """Probabilities 0.6, 0.25, 0.1, 0.04, 0.01: the set is the smallest that reaches top_p."""
    probabilities = torch.tensor([0.6, 0.25, 0.1, 0.04, 0.01])
    seen = counts(probabilities.log().unsqueeze(0), temperature=1.0, top_p=top_p)
    assert int((seen > 0).sum()) == kept
    masked = torch.where(torch.arange(5) < kept, probabilities, torch.zeros(5))
    assert chi2(seen, masked / masked.sum()) < CHI2[4]


def test_min_p_is_relative_to_the_likeliest() -> None:
    """0.6 · 0.2 = 0.12 keeps 0.6 and 0.25."""
    probabilities = torch.tensor([0.6, 0.25, 0.1, 0.04, 0.01])
    seen = counts(probabilities.log().unsqueeze(0), temperature=1.0, min_p=0.2)
    assert (seen > 0).tolist() == [True, True, False, False, False]


def test_short_list_and_full_vocabulary_choose_alike() -> None:
    """top_k = 50 through the candidate list equals the full path on the same row with everything else masked."""
    logits = torch.randn(64, 2000, generator=torch.Generator().manual_seed(0))
    short = choose(logits, temperature=1.0, top_k=50)
    kth = logits.topk(50).values[:, -1:]
    assert short == choose(logits.masked_fill(logits < kth, float("-inf")), temperature=1.0)


@pytest.mark.parametrize("top_k", [3, 100])
def test_more_ties_than_the_short_list_holds(top_k: int) -> None:
    """1,500 equal scores behind one that is higher: all stay, so nothing is filtered. Red if ties beyond the candidate list are dropped."""
    logits = torch.zeros(64, 1500)
    logits[:, 700] = 2.0
    assert choose(logits, temperature=1.0, top_k=top_k) == choose(logits, temperature=1.0)
    never = logits.masked_fill(torch.arange(1500) % 750 != 700, float("-inf"))
    assert choose(never, temperature=1.0, top_k=top_k) == choose(never, temperature=1.0)


def test_what_a_slot_asks_for_comes_and_goes() -> None:
    """Noise and logprobs are looked for where some slot of the step wants them: after a fork too, and no longer when another sequence came."""
    state = SamplingState(ReferenceDevice(0), [], num_slots=3)
    state.admit(slot_state(0, temperature=0.7, logprobs=2))
    state.admit(slot_state(1, temperature=0))
    assert state.batch([1], [4]).is_all_greedy and state.num_logprobs([1]) is None
    state.fork(0, 1, 5)
    forked = state.batch([1], [4])
    assert not forked.is_all_greedy and (forked.indices.tolist(), forked.positions.tolist()) == ([5], [4])
    assert state.num_logprobs([1]) == [2]
    state.admit(slot_state(0, temperature=0))
    assert state.batch([0], [4]).is_all_greedy and state.num_logprobs([0]) is None
    assert not state.batch([0, 1], [4, 4]).is_all_greedy and state.num_logprobs([0, 1]) == [-1, 2]
    state.fork(0, 1, 1)
    assert state.batch([1], [4]).is_all_greedy and state.num_logprobs([1]) is None


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Mixed parameters in one batch give what each row gives alone. Red if one row's top_k decides another's path."""
    logits = torch.randn(6, 3000, generator=torch.Generator().manual_seed(1))
    each = [
        {"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.05}, {"temperature": 0.9, "top_k": 900, "top_p": 0.9},
    ]  # fmt: skip
    device = ReferenceDevice(0)
    state = SamplingState(device, [], num_slots=6)
    for slot, params in enumerate(each):
        state.admit(slot_state(slot, seed=slot + 10, **params))
    sampler = GumbelSampler(device)
    together = sampler.sample(logits.clone(), state.batch(list(range(6)), [3] * 6)).tolist()
    alone = [sampler.sample(logits[i : i + 1].clone(), state.batch([i], [3]))[0].item() for i in range(6)]
    assert together == alone
    assert together[0] == int(logits[0].argmax())


def test_seeds_repeat_and_differ() -> None:
    """The same (seed, index, position) chooses the same; another of any chooses otherwise, nearly always."""
    logits = torch.zeros(50, 1000)
    first = choose(logits, position=4, seeds=list(range(50)), temperature=1.0)
    assert first == choose(logits, position=4, seeds=list(range(50)), temperature=1.0)
    assert (
        sum(
            a == b
            for a, b in zip(first, choose(logits, position=5, seeds=list(range(50)), temperature=1.0), strict=True)
        )
        < 5
    )
    assert (
        sum(
            a == b
            for a, b in zip(first, choose(logits, position=4, seeds=list(range(50, 100)), temperature=1.0), strict=True)
        )
        < 5
    )


def test_the_only_allowed_token_wins_under_any_noise() -> None:
    """The stream whose noise for token 7 would round to -inf in float32. Red without the clamp."""
    keys = torch.tensor([[58535103]])
    assert torch.isfinite(gumbel(keys, torch.arange(100_000))).all()
    many = gumbel(stream_keys(range(400), [0] * 400, [0] * 400).unsqueeze(-1), torch.arange(50_000))
    assert torch.isfinite(many).all()


def test_the_coldest_temperature_is_greedy() -> None:
    """Red if logits are divided before the likeliest is taken off: everything positive overflows."""
    logits = torch.randn(8, 500, generator=torch.Generator().manual_seed(2)) * 5
    assert choose(logits, temperature=1e-38) == logits.argmax(-1).tolist()


# ---- logits processors -----------------------------------------------------------------------------------------------------

CONTEXT = ProcessorContext(num_slots=4, vocab_size=10, torch_device="cpu")


def test_penalties_equal_the_formulas() -> None:
    """Against a loop over tokens written down from the definitions, in a batch with an unlike neighbour, after two more tokens."""
    penalties = Penalties(CONTEXT)
    factors = {0: (1.3, 0.5, 0.2), 2: (0.8, -0.4, 1.0)}
    prompts, outputs = {0: [1, 2, 2], 2: [5]}, {0: [2, 3], 2: []}
    for slot, (r, f, p) in factors.items():
        params = {"repetition_penalty": r, "frequency_penalty": f, "presence_penalty": p}
        assert penalties.admit(slot_state(slot, prompts[slot], list(outputs[slot]), **params))
    penalties.observe([0, 2], [3, 9])
    outputs[0].append(3)
    outputs[2].append(9)
    logits = torch.linspace(-2, 2, 10).repeat(2, 1)
    want = logits.clone()
    for row, slot in enumerate((0, 2)):
        r, f, p = factors[slot]
        for token in range(10):
            count = outputs[slot].count(token)
            if count or token in prompts[slot]:
                want[row, token] = want[row, token] / r if want[row, token] > 0 else want[row, token] * r
            want[row, token] -= f * count + p * (count > 0)
    penalties.apply(logits, [0, 2])
    assert torch.allclose(logits, want)


def test_forked_penalties_go_separate_ways() -> None:
    """Red if a fork shares its counts."""
    penalties = Penalties(CONTEXT)
    penalties.admit(slot_state(0, [1], frequency_penalty=1.0))
    penalties.fork(0, 1)
    penalties.observe([1], [4])
    logits = torch.zeros(2, 10)
    penalties.apply(logits, [0, 1])
    assert logits[0, 4] == 0
    assert logits[1, 4] == -1


def test_bias_allowed_and_minimum() -> None:
    """logit_bias adds, allowed_token_ids forbids the rest, min_tokens holds back stops until enough was said."""
    bias, allowed, minimum = LogitBias(CONTEXT), AllowedTokens(CONTEXT), MinTokens(CONTEXT)
    assert bias.admit(slot_state(0, logit_bias={3: 5.0, 7: -2.0}))
    assert allowed.admit(slot_state(0, allowed_token_ids=[3, 4]))
    assert minimum.admit(slot_state(0, min_tokens=2, stop_token_ids=[3]))
    for processor in (bias, allowed, minimum):
        assert not processor.admit(slot_state(1))
    logits = torch.zeros(1, 10)
    for processor in (bias, allowed, minimum):
        processor.apply(logits, [0])
    assert logits[0].isfinite().nonzero().flatten().tolist() == [4]
    minimum.observe([0, 0], [4, 4])
    logits = torch.zeros(1, 10)
    for processor in (bias, allowed, minimum):
        processor.apply(logits, [0])
    assert logits[0].argmax() == 3
    assert logits[0, 3] == 5.0


def test_tokens_said_before_count_towards_the_minimum() -> None:
    """After a preemption or a failover the count goes on. Red if `admit` starts at the full minimum."""
    minimum = MinTokens(CONTEXT)
    assert not minimum.admit(slot_state(0, [1], [5, 6], min_tokens=2, stop_token_ids=[3]))


def test_a_slot_entered_again_forgets_its_old_sequence() -> None:
    """Red if `SamplingState.admit` keeps the members of the slot."""
    device = ReferenceDevice(0)
    state = SamplingState(device, [LogitBias(CONTEXT)], num_slots=4)
    state.admit(slot_state(0, logit_bias={3: 5.0}))
    state.admit(slot_state(0))
    assert not state.has_processors
    assert state.process(torch.zeros(1, 10), [0]).abs().sum() == 0
