"""Each op against a formula written out by hand, in float64 where that is the truth."""

from __future__ import annotations

import math

import pytest
import torch

from xllm_core.reference.device import ReferenceDevice
from xllm_core.reference.ops import AddRmsNorm, BlockCopy, Embedding, KvWrite, Linear, RmsNorm, Rope, SiluMul

DEVICE = ReferenceDevice(0)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 4, 5, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widens", [False, True])
def test_linear(dtype: torch.dtype, num_rows: int, has_bias: bool, widens: bool) -> None:
    """Both paths, on every machine. 4,097 outputs end in a tile of one row. Killed by: a tile off by one, a lost bias, rounding twice."""
    op = Linear(DEVICE)
    op._widens = widens
    for out_features in (7, 4097):
        x, weight = random(num_rows, 16, dtype=dtype), random(out_features, 16, seed=1, dtype=dtype)
        bias = random(out_features, seed=2, dtype=dtype) if has_bias else None
        exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        result = op(x, op.prepare(weight, bias))
        assert result.dtype == dtype
        roundings = (
            0.51 if widens and num_rows > 4 else 1.01
        )  # in units of the last place; torch's own path may round the bias too
        assert torch.allclose(result.double(), exact, rtol=roundings * torch.finfo(dtype).eps, atol=1e-5)


def test_embedding() -> None:
    """Killed by: any other row."""
    table = random(9, 4)
    assert torch.equal(Embedding(DEVICE)(torch.tensor([8, 0, 8]), table), torch.stack([table[8], table[0], table[8]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_and_its_fusion(dtype: torch.dtype) -> None:
    """Normalises in float32 and rounds before the weight. Killed by: eps outside the root, mean of x, the weight applied in float32."""
    x, residual, weight = (
        random(3, 2, 8, dtype=dtype),
        random(3, 2, 8, seed=1, dtype=dtype),
        random(8, seed=2, dtype=dtype),
    )
    eps = 0.1
    rows = [
        [[value / math.sqrt(sum(v * v for v in row) / 8 + eps) for value in row] for row in plane]
        for plane in x.double().tolist()
    ]
    expected = torch.tensor(rows).to(dtype) * weight
    assert torch.allclose(RmsNorm(DEVICE)(x, weight, eps), expected, rtol=1e-6 if dtype == torch.float32 else 8e-3)
    normed, total = AddRmsNorm(DEVICE)(x, residual, weight, eps)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, RmsNorm(DEVICE)(x + residual, weight, eps))


def test_rope_turns_pairs_and_leaves_the_rest() -> None:
    """Element i and i + R/2 are a point that turns by its angle. Killed by: neighbours as pairs, the other direction, touching the rest."""
    angles = torch.tensor([[0.3, 1.1], [2.0, -0.7]])
    cos, sin = (torch.cat((wave, wave), -1) for wave in (angles.cos(), angles.sin()))
    q, k = random(2, 3, 6), random(2, 1, 6, seed=1)
    for before, after in zip((q, k), Rope(DEVICE)(q, k, cos, sin), strict=True):
        assert torch.equal(after[..., 4:], before[..., 4:])
        points = torch.complex(before[..., :2], before[..., 2:4]) * torch.polar(torch.ones(2, 2), angles).unsqueeze(1)
        assert torch.allclose(after[..., :2], points.real, atol=1e-6)
        assert torch.allclose(after[..., 2:4], points.imag, atol=1e-6)


def test_silu_mul() -> None:
    """Killed by: halves exchanged, sigmoid without x."""
    gate, up = random(3, 5), random(3, 5, seed=1)
    expected = gate / (1 + (-gate).exp()) * up
    assert torch.allclose(SiluMul(DEVICE)(torch.cat((gate, up), -1)), expected, atol=1e-6)


def test_kv_write_stores_in_place_and_skips_padding() -> None:
    """Killed by: writing -1 to the last slot, skipping slot 0, writing keys as values, a copy of the cache."""
    keys, values = torch.zeros(3, 2, 1, 2), torch.zeros(3, 2, 1, 2)
    new_keys, new_values = random(4, 1, 2), random(4, 1, 2, seed=1)
    KvWrite(DEVICE)((new_keys, new_values), (keys, values), torch.tensor([4, -1, 1, 0]))
    for new, cache in ((new_keys, keys), (new_values, values)):
        expected = torch.zeros(3, 2, 1, 2)
        expected[2, 0], expected[0, 1], expected[0, 0] = new[0], new[2], new[3]
        assert torch.equal(cache, expected)


def test_block_copy_reads_before_it_writes() -> None:
    """A chain 0 -> 1, 1 -> 2 moves the old block 1. Killed by: copying one after the other."""
    cache = torch.arange(12.0).view(3, 2, 2)
    before = cache.clone()
    BlockCopy(DEVICE)((cache,), torch.tensor([0, 1]), torch.tensor([1, 2]))
    assert torch.equal(cache, before[[0, 0, 1]])
