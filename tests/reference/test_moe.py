"""`moe_route`, `moe_experts` and `linear_float32` against what they mean, written out token by token."""

from __future__ import annotations

import pytest
import torch

from xllm_core.config import Settings
from xllm_core.errors import ConfigError, ResolutionError
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.resolve import Resolver
from xllm_core.reference.device import ReferenceDevice
from xllm_core.reference.ops import LinearFloat32, MoeExperts, MoeRoute, lacks_grouped_mm

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


def choice(p: list[float], correction: list[float], top_k: int, num_groups: int, top_groups: int) -> list[int]:
    """Of one token, by sorting pairs."""
    size = len(p) // num_groups
    ranked = [a + b for a, b in zip(p, correction, strict=True)]
    of_group = [sum(sorted(ranked[g * size : (g + 1) * size])[-2:]) for g in range(num_groups)]
    groups = sorted(range(num_groups), key=lambda g: (-of_group[g], g))[:top_groups]
    allowed = range(len(p)) if top_groups == num_groups else [e for e in range(len(p)) if e // size in groups]
    return sorted(allowed, key=lambda e: (-ranked[e], e))[:top_k]


ROUTES = [
    (1, 1, 1, 1), (7, 3, 1, 1), (8, 8, 1, 1), (16, 3, 4, 2), (160, 8, 8, 3), (12, 2, 3, 1), (5, 2, 5, 5), (24, 6, 4, 4),
]  # fmt: skip


@pytest.mark.parametrize(("num_experts", "top_k", "num_groups", "top_groups"), ROUTES)
@pytest.mark.parametrize("is_normalised", [True, False])
def test_routes(num_experts: int, top_k: int, num_groups: int, top_groups: int, is_normalised: bool) -> None:
    """Killed by: a correction that counts, or that does not choose, groups by their best alone, the sum of all experts, no scaling."""
    scores, correction = random(40, num_experts), random(num_experts, seed=1) * 0.2
    ids, weights = MoeRoute(DEVICE)(scores, correction, top_k, num_groups, top_groups, is_normalised, 2.5)
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32 and ids.shape == weights.shape == (40, top_k)
    for t in range(40):
        p = scores[t].double().sigmoid().float()
        chosen = choice(p.tolist(), correction.tolist(), top_k, num_groups, top_groups)
        assert ids[t].tolist() == chosen
        counting = p[chosen] / (p[chosen].sum() + 1e-20 if is_normalised else 1.0) * 2.5
        assert torch.allclose(weights[t], counting, rtol=1e-6)


def test_of_equal_experts_the_lower_number_is_chosen() -> None:
    """And of equal groups too. Killed by: topk, sorts that are not stable."""
    levels = torch.linspace(-2.9, 3.3, 17)
    for num_experts, top_k, num_groups, top_groups in ROUTES:
        scores = levels[torch.randint(0, 17, (65, num_experts), generator=torch.Generator().manual_seed(num_experts))]
        correction = torch.full((num_experts,), 0.125)
        ids = MoeRoute(DEVICE)(scores, correction, top_k, num_groups, top_groups, True, 1.0)[0]
        for t in range(65):
            p = scores[t].double().sigmoid().float().tolist()
            assert ids[t].tolist() == choice(p, correction.tolist(), top_k, num_groups, top_groups)


@pytest.mark.parametrize("num_experts", [4, 7, 13, 40])
def test_equal_scores_are_equal_wherever_they_stand(num_experts: int) -> None:
    """In any row and place. Killed by: sigmoid in float32, whose last bit is another behind the last whole vector of a tensor."""
    for score in torch.linspace(-8, 8, 33):
        scores = score.repeat(3, num_experts)
        ids, weights = MoeRoute(DEVICE)(scores, torch.zeros(num_experts), num_experts, 1, 1, False, 1.0)
        assert torch.equal(ids, torch.arange(num_experts).repeat(3, 1)) and bool((weights == weights[0, 0]).all())


def test_what_is_no_number_is_chosen_first() -> None:
    """And its weight says so; the experts are others than each other all the same. Killed by: a row of NaN that names experts twice."""
    scores, nan = torch.zeros(3, 6), float("nan")
    scores[0, 4], scores[1], scores[2, 5] = nan, nan, float("inf")
    ids, weights = MoeRoute(DEVICE)(scores, torch.zeros(6), 3, 3, 2, False, 1.0)
    assert ids.tolist() == [[4, 0, 1], [0, 1, 2], [5, 0, 1]]
    assert weights.isnan().tolist() == [[True, False, False], [True] * 3, [False] * 3]


@pytest.mark.parametrize(
    "options",
    [(0, 1, 1), (9, 1, 1), (5, 4, 2), (1, 3, 1), (1, 4, 5), (1, 4, 0), (1, 0, 0), (1, -1, -1), (1, 8, 2)],
    ids=str,
)
def test_impossible_choices_are_refused(options: tuple[int, int, int]) -> None:
    """(top_k, num_groups, top_groups) of 8 experts. Killed by: too few experts for a token, unequal groups, groups of one."""
    with pytest.raises(ValueError, match=r"of 8 cannot be chosen"):
        MoeRoute(DEVICE)(torch.zeros(2, 8), torch.zeros(8), *options, True, 1.0)


def test_scores_are_not_rounded() -> None:
    """bfloat16 in, float32 weights and result. Killed by: a product in x's dtype."""
    x, weight = random(4, 33, dtype=torch.bfloat16), random(5, 33, seed=1)
    op = LinearFloat32(DEVICE)
    result = op(x, op.prepare(weight, None))
    assert result.dtype == torch.float32
    assert torch.allclose(result.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)
