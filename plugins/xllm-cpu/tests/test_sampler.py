"""Token choice by the native call, beside the core's definition: many shapes of logits, every filter, every instruction set."""

from __future__ import annotations

import random

import pytest
import torch
from xllm_cpu.device import CpuDevice
from xllm_cpu.sampler import NativeSampler

from xllm_core.plugins import SamplingBatch, gumbel, stream_keys
from xllm_core.reference.device import ReferenceDevice
from xllm_core.runtime.sampler import GumbelSampler

ROWS = 48


def draw(chance: random.Random, vocab: int) -> tuple[torch.Tensor, SamplingBatch]:
    """Rows of every kind: peaked and flat, with ties, with forbidden tokens; filters that keep one token, some, or all."""
    generator = torch.Generator().manual_seed(chance.randrange(1 << 30))
    logits = torch.randn(ROWS, vocab, generator=generator)
    logits *= torch.tensor([chance.choice((0.0, 0.01, 1.0, 4.0, 40.0)) for _ in range(ROWS)]).unsqueeze(1)
    logits[::3] = (logits[::3] * 4).round() / 4  # many equals
    logits[1::4, 1::2] = float("-inf")

    def column(*values: float) -> torch.Tensor:
        return torch.tensor([chance.choice(values) for _ in range(ROWS)])

    noise = [torch.tensor([chance.randrange(1 << 62) for _ in range(ROWS)]) for _ in range(3)]
    return logits, SamplingBatch(
        False, column(0.0, 0.1, 0.7, 1.0, 3.0), column(0, 0, 1, 2, 40, 64, vocab - 1, vocab, 10 * vocab).long(),
        column(1.0, 1.0, 0.999, 0.9, 0.5, 0.01), column(0.0, 0.0, 0.02, 0.7, 1.0), *noise,
    )  # fmt: skip


@pytest.mark.parametrize("vocab", [1, 2, 15, 63, 64, 65, 257, 5000])
def test_the_tokens_of_the_definition(device: CpuDevice, vocab: int) -> None:
    """Token for token; where rounding decides whether a filter ends before or behind a token, the two must be neighbours in score."""
    chance, differ = random.Random(vocab), 0
    for _ in range(6):
        logits, batch = draw(chance, vocab)
        found = NativeSampler(device).sample(logits.clone(), batch)
        wanted = GumbelSampler(ReferenceDevice(0)).sample(logits.clone(), batch)
        rows = torch.arange(ROWS)
        assert not bool(logits[rows, found].isinf().any()), "a forbidden token was chosen"
        differ += int((logits[rows, found] != logits[rows, wanted]).sum())
    assert differ <= 3, f"{differ} of {6 * ROWS} rows differ"


def test_noise_is_the_core_s(device: CpuDevice) -> None:
    """On flat logits the choice is the noise alone, so the greatest of the core's own must win, at seeds of any size."""
    chance = random.Random(4)
    seeds, indices, positions = (
        torch.tensor([chance.randrange(-(1 << 63), 1 << 63) for _ in range(ROWS)]) for _ in range(3)
    )
    keys = stream_keys(seeds.tolist(), indices.tolist(), positions.tolist())
    noise = gumbel(keys.unsqueeze(1), torch.arange(3000))
    batch = SamplingBatch(False, torch.ones(ROWS), None, None, None, seeds, indices, positions)
    found = NativeSampler(device).sample(torch.zeros(ROWS, 3000), batch)
    assert torch.equal(found, noise.argmax(1))


def test_frequencies_are_the_softmax(device: CpuDevice) -> None:
    """Over many positions each token comes as often as its probability says."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    count = 20_000
    zeros = torch.zeros(count, dtype=torch.int64)
    batch = SamplingBatch(False, torch.ones(count), None, None, None, zeros + 7, zeros, torch.arange(count))
    found = NativeSampler(device).sample(logits.repeat(count, 1), batch).bincount(minlength=5) / count
    assert bool(((found - logits.softmax(0)).abs() < 0.012).all()), found


def test_what_does_not_fit(device: CpuDevice) -> None:
    """Shapes are checked before anything native sees them."""
    ints = torch.zeros(2, dtype=torch.int64)
    good = SamplingBatch(False, torch.ones(2), None, None, None, ints, ints, ints)
    with pytest.raises(ValueError, match="float32"):
        NativeSampler(device).sample(torch.zeros(2, 4, dtype=torch.bfloat16), good)
    with pytest.raises(ValueError, match=r"temperature is \(2,\) for 3 rows"):
        NativeSampler(device).sample(torch.zeros(3, 4), good)
    with pytest.raises(ValueError, match=r"\[S, V\]"):
        NativeSampler(device).sample(torch.zeros(2, 0), good)
