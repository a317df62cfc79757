"""What models with experts ask for: the router's choice and its scores, to the bit among any neighbours, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from xllm_cpu.device import CpuDevice
from xllm_cpu.experts import LinearFloat32, MoeExperts, MoeRoute
from xllm_cpu.ops import RmsNorm

from xllm_core.reference import ops as reference
from xllm_core.reference.device import ReferenceDevice

ROWS = 256
T = torch.randn
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize(
    ("num_experts", "groups", "top_groups", "top_k"),
    [(1, 1, 1, 1), (4, 1, 1, 2), (7, 1, 1, 7), (8, 1, 1, 2), (12, 3, 2, 4), (16, 1, 1, 4), (24, 4, 2, 6),
     (60, 1, 1, 4), (72, 8, 3, 8), (160, 8, 3, 8)],
)  # fmt: skip
def test_routes_of_any_number_of_rows(
    device: CpuDevice, num_experts: int, groups: int, top_groups: int, top_k: int, num_threads: int
) -> None:
    """M = 1 .. 256 at a random place. Dies if a score's sigmoid depends on where in a tensor or a row it stands."""
    device.set_num_threads(num_threads)
    torch.manual_seed(num_experts)
    op, scores, correction = MoeRoute(device), T(ROWS, num_experts) * 3, T(num_experts) / 8
    options = (top_k, groups, top_groups, num_experts % 8 != 0, 1.7)
    ids, weights = op(scores, correction, *options)
    draw = random.Random(num_experts)
    for rows in range(1, ROWS + 1):
        first = draw.randint(0, ROWS - rows)
        found = op(scores[first : first + rows], correction, *options)
        assert torch.equal(found[0], ids[first : first + rows]) and torch.equal(found[1], weights[first : first + rows])
    apart = torch.full((ROWS, num_experts + 3), NAN)
    apart[:, 2:-1] = scores
    found = op(apart[:, 2:-1], correction, *options)
    assert torch.equal(found[0], ids) and torch.equal(found[1], weights), "rows that lie apart are others"


@pytest.mark.parametrize("num_experts", [1, 7, 13, 40])
def test_equal_scores_weigh_the_same(device: CpuDevice, num_experts: int) -> None:
    """And come in the order of their numbers. Dies with a sigmoid that takes another way behind the last whole vector."""
    for score in (-7.3, -0.4, 1.1, 19.0):
        scores = torch.full((3, num_experts), score)
        ids, weights = MoeRoute(device)(scores, torch.zeros(num_experts), num_experts, 1, 1, False, 1.0)
        assert torch.equal(ids, torch.arange(num_experts).repeat(3, 1)) and bool((weights == weights[0, 0]).all())
        assert torch.allclose(weights, scores.double().sigmoid().float(), rtol=3e-7, atol=0)


def test_scores_that_are_no_numbers(device: CpuDevice) -> None:
    """Experts are there, each once, and those of the reference: an index from nowhere would be read and written by others."""
    torch.manual_seed(0)
    for num_experts, groups, top_groups, top_k in ((9, 3, 2, 6), (7, 1, 1, 7), (32, 8, 3, 5), (2, 1, 1, 1)):
        scores, correction = T(200, num_experts), torch.arange(num_experts) * 0.01
        for value in (NAN, INFINITY, -INFINITY):
            scores[torch.rand(scores.shape) < 0.3] = value
        scores[0], scores[1], scores[2] = NAN, INFINITY, -INFINITY
        for bad in (
            correction,
            torch.where(correction > 0.03, -INFINITY, correction),
            torch.full_like(correction, NAN),
        ):
            arguments = (scores, bad, top_k, groups, top_groups, True, 1.0)
            ids, weights = MoeRoute(device)(*arguments)
            wanted, of_wanted = reference.MoeRoute(ReferenceDevice(0))(*arguments)
            assert torch.equal(ids, wanted)
            assert torch.allclose(weights, of_wanted, rtol=1e-6, equal_nan=True)
            assert all(len(set(row)) == top_k and 0 <= min(row) <= max(row) < num_experts for row in ids.tolist())


def test_scores_are_float32(device: CpuDevice, dtype: torch.dtype) -> None:
    """Of a widened x, to the bit, for any width and rows that lie apart. Dies with a product in x's dtype."""
    op = LinearFloat32(device)
    for width, num_experts in ((33, 7), (64, 16), (1, 1), (17, 160)):
        x, prepared = T(37, width + 3).to(dtype), op.prepare(T(num_experts, width), None)
        found = op(x[:, 2:-1], prepared)
        assert found.dtype == torch.float32 and torch.equal(found, op(x[:, 2:-1].float().contiguous(), prepared))
        assert op(x[:0, 2:-1], prepared).shape == (0, num_experts)


def test_norms_of_heads_that_are_cut_out(device: CpuDevice, dtype: torch.dtype) -> None:
    """Queries and keys out of one product: tokens lie apart, heads side by side. Dies if rows are taken for neighbours."""
    norm = RmsNorm(device)
    heads, weight = T(9, 7, 24).to(dtype), T(24).to(dtype)
    for part in torch.split(heads, [4, 2, 1], dim=1):
        assert torch.equal(norm(part, weight, 1e-6), norm(part.contiguous(), weight, 1e-6))
        assert torch.equal(norm(part, weight, 1e-6)[3:4], norm(part[3:4], weight, 1e-6))
    assert norm(heads[:0, :4], weight, 1e-6).shape == (0, 4, 24) and norm(heads[:, :0], weight, 1e-6).shape == (
        9,
        0,
        24,
    )


def route(scores: torch.Tensor, correction: torch.Tensor, *options: int) -> Callable[[CpuDevice], Any]:
    return lambda device: MoeRoute(device)(scores, correction, *options, True, 1.0)


REFUSED: dict[str, tuple[Callable[[CpuDevice], Any], type[Exception], str]] = {
    "no experts": (route(T(2, 0), T(0), 1, 1, 1), ValueError, r"scores must be \[T, E\] and correction \[E\]"),
    "more than all": (route(T(2, 8), T(8), 9, 1, 1), ValueError, "9 experts in the best 1 of 1 equal groups of 8"),
    "more than are allowed": (route(T(2, 8), T(8), 5, 4, 2), ValueError, "cannot be chosen"),
    "none": (route(T(2, 8), T(8), 0, 1, 1), ValueError, "cannot be chosen"),
    "unequal groups": (route(T(2, 8), T(8), 1, 3, 1), ValueError, "3 equal groups of 8"),
    "no groups": (route(T(2, 8), T(8), 1, 0, 0), ValueError, "cannot be chosen"),
    "fewer than no groups": (route(T(2, 8), T(8), 1, -2, -2), ValueError, "cannot be chosen"),
    "too many groups": (route(T(2, 8), T(8), 1, 4, 5), ValueError, "cannot be chosen"),
    "no best group": (route(T(2, 8), T(8), 1, 4, 0), ValueError, "cannot be chosen"),
    "groups of one": (route(T(2, 8), T(8), 1, 8, 2), ValueError, "cannot be chosen"),
    "correction, size": (route(T(2, 8), T(7), 1, 1, 1), ValueError, r"correction \[E\], both float32"),
    "correction, dtype": (route(T(2, 8), T(8).double(), 1, 1, 1), ValueError, "both float32"),
    "scores, dtype": (route(T(2, 8).bfloat16(), T(8), 1, 1, 1), ValueError, "both float32"),
    "scores, one row": (route(T(8), T(8), 1, 1, 1), ValueError, r"scores must be \[T, E\]"),
    "experts, two dtypes": (lambda d: MoeExperts(d).prepare(T(3, 8, 6), T(3, 6, 4).bfloat16()), ValueError, "of one dtype"),
    "experts, shape": (lambda d: MoeExperts(d).prepare(T(3, 7, 6), T(3, 6, 4)), ValueError, r"gate_up must be \[E, 2I, H\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(device: CpuDevice, name: str) -> None:
    """Each with its reason: native code checks neither counts nor types."""
    call, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        call(device)


def test_no_tokens(device: CpuDevice) -> None:
    """No rows at all are no reason to fail."""
    ids, weights = MoeRoute(device)(T(0, 8), T(8), 2, 1, 1, True, 1.0)
    assert ids.shape == weights.shape == (0, 2) and ids.dtype == torch.int64 and weights.dtype == torch.float32
