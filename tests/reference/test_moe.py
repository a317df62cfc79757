"""`moe_experts` and `linear_float32` against sums written out token by token."""

from __future__ import annotations

import pytest
import torch

from xllm_core.config import Settings
from xllm_core.errors import ConfigError, ResolutionError
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.resolve import Resolver
from xllm_core.reference.device import ReferenceDevice
from xllm_core.reference.ops import LinearFloat32, MoeExperts, lacks_grouped_mm

DEVICE = ReferenceDevice(0)
NUM_EXPERTS, HIDDEN, INNER = 6, 20, 12


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def naive(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """In float64, one token and one expert at a time."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, chosen in enumerate(ids.tolist()):
        for k, expert in enumerate(chosen):
            if expert >= 0:
                gate, up = (gate_up[expert].double() @ x[t].double()).chunk(2)
                out[t] += weights[t, k].double() * (down[expert].double() @ (gate * gate.sigmoid() * up))
    return out


def choices(num_tokens: int) -> dict[str, torch.Tensor]:
    """By what is special about them."""
    generator = torch.Generator().manual_seed(num_tokens)
    order = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator) for _ in range(num_tokens)])
    some = order[:, :3].clone()
    some[::2, 1] = -1
    return {
        **{f"K = {k}": order[:, :k] for k in range(1, NUM_EXPERTS + 1)},
        "all to one": torch.full((num_tokens, 1), 4),
        "two experts get nothing": order[:, :2] % 4,
        "some are elsewhere": some,
        "all are elsewhere": torch.full((num_tokens, 2), -1),
    }


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(num_tokens: int, dtype: torch.dtype) -> None:
    """Every kind of choice; counters go on from what they held. Killed by: a sort that is not undone, weights of another token or expert, rows
    after the last group let through, gate and up exchanged, counts of what is elsewhere.
    """
    gate_up, down = (
        random(NUM_EXPERTS, 2 * INNER, HIDDEN, dtype=dtype),
        random(NUM_EXPERTS, HIDDEN, INNER, seed=1, dtype=dtype),
    )
    op = MoeExperts(DEVICE)
    prepared = op.prepare(gate_up, down)
    x = random(num_tokens, HIDDEN, seed=2, dtype=dtype)
    for name, ids in choices(num_tokens).items() if num_tokens else [("none", torch.zeros(0, 2, dtype=torch.int64))]:
        weights = random(*ids.shape, seed=3).abs()
        counts = torch.arange(NUM_EXPERTS)
        result = op(x, ids, weights, counts, prepared)
        expected = naive(x, ids, weights, gate_up, down)
        assert result.shape == x.shape and result.dtype == dtype
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        assert torch.allclose(result.double(), expected, rtol=tolerance, atol=tolerance * scale), name
        added = [int((ids == expert).sum()) for expert in range(NUM_EXPERTS)]
        assert counts.tolist() == [start + more for start, more in enumerate(added)], name


@pytest.mark.parametrize(
    ("hidden", "inner", "dtype"), [(7, 3, torch.float32), (8, 8, torch.float32), (13, 1, torch.bfloat16)]
)
def test_any_width(hidden: int, inner: int, dtype: torch.dtype) -> None:
    """torch's grouped product takes rows of whole 16 bytes; ours takes any, and copies no weight that already fits."""
    gate_up, down = random(3, 2 * inner, hidden, dtype=dtype), random(3, hidden, inner, seed=1, dtype=dtype)
    op = MoeExperts(DEVICE)
    prepared = op.prepare(gate_up, down)
    assert (prepared[0] is gate_up) == (hidden * dtype.itemsize % 16 == 0)
    x, ids, weights = random(5, hidden, dtype=dtype), torch.tensor([[0], [2], [2], [1], [0]]), torch.ones(5, 1)
    result = op(x, ids, weights, torch.zeros(3, dtype=torch.int64), prepared)
    expected = naive(x, ids, weights, gate_up, down)
    assert torch.allclose(result.double(), expected, rtol=0.02, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_a_torch_without_grouped_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name and version, at assembly and when the op is built. Killed by: an AttributeError in the first forward."""
    assert lacks_grouped_mm() is None
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    settings = Settings()
    resolver = Resolver(settings, PluginManager.discover(settings))
    with pytest.raises(ResolutionError, match=r"rejected core/moe_experts: needs .*install a newer torch"):
        resolver.op("moe_experts", DEVICE.facts(), "float32")
    with pytest.raises(
        ConfigError, match=rf"moe_experts needs .*grouped_mm, which torch {torch.__version__.split('+')[0]}"
    ):
        MoeExperts(DEVICE)


def test_scores_are_not_rounded() -> None:
    """bfloat16 in, float32 weights and result. Killed by: a product in x's dtype."""
    x, weight = random(4, 33, dtype=torch.bfloat16), random(5, 33, seed=1)
    op = LinearFloat32(DEVICE)
    result = op(x, op.prepare(weight, None))
    assert result.dtype == torch.float32
    assert torch.allclose(result.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)
