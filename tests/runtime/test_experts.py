"""Experts and routers as `Parts` hand them out, and the entries of a weight map that fill stacked, reordered and expert tensors."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.runtime.test_loader import InMemory, make_parts
from xllm_core.errors import ConfigError, IntegrityError, WeightMismatchError
from xllm_core.plugins.contracts.weights import WeightEntry, WeightMap
from xllm_core.reference.device import ReferenceDevice
from xllm_core.runtime.loader import load_weights
from xllm_core.runtime.parts import CoreParts
from xllm_core.testing.model_harness import Ring, built_ops

NUM_EXPERTS, HIDDEN, INNER = 4, 6, 5
IDS = torch.tensor([[0, 3], [1, 2], [3, 1], [3, 0], [2, 3]])


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    return {
        f"{e}.{name}": torch.randn(shape, generator=generator)
        for e in range(NUM_EXPERTS)
        for name, shape in shapes.items()
    }


def entries(num_experts: int = NUM_EXPERTS) -> list[WeightEntry]:
    found = []
    for e in range(num_experts):
        for first, name in ((0, "gate"), (INNER, "up")):
            found.append(WeightEntry(f"{e}.{name}", "x.gate_up", (INNER, HIDDEN), "expert", (first, INNER), expert=e))
        found.append(WeightEntry(f"{e}.down", "x.down", (HIDDEN, INNER), "expert", expert=e))
    return found


def expected(x: torch.Tensor, weights: torch.Tensor, held: dict[str, torch.Tensor]) -> torch.Tensor:
    out = torch.zeros_like(x)
    for t, chosen in enumerate(IDS.tolist()):
        for k, e in enumerate(chosen):
            gate, up = held[f"{e}.gate"] @ x[t], held[f"{e}.up"] @ x[t]
            out[t] += weights[t, k] * (held[f"{e}.down"] @ (gate * gate.sigmoid() * up))
    return out


def given() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(len(IDS), HIDDEN, generator=generator), torch.rand(IDS.shape, generator=generator)


def test_experts_from_a_checkpoint() -> None:
    """Each tensor goes to its expert's rows; counts tell who got what. Killed by: experts in file order, gate in the place of up."""
    parts, (x, weights) = make_parts(), given()
    experts = parts.experts("x", NUM_EXPERTS, HIDDEN, INNER)
    report = load_weights(InMemory(**tensors()), WeightMap(entries()[::-1]), parts)
    assert report.num_tensors == 3 * NUM_EXPERTS
    assert torch.allclose(experts(x, IDS, weights), expected(x, weights, tensors()), atol=1e-5)
    experts(x, IDS, weights)
    assert parts.expert_counts()["x"].tolist() == [4, 4, 4, 8]


def test_a_moved_expert_answers_from_its_new_place() -> None:
    """The table says where each expert lies, to the loader and to every call. Killed by: either of them passing it by."""
    parts, (x, weights) = make_parts(), given()
    experts = parts.experts("x", NUM_EXPERTS, HIDDEN, INNER)
    experts.physical_of.copy_(torch.tensor([2, 0, 3, 1]))
    load_weights(InMemory(**tensors()), WeightMap(entries()), parts)
    assert torch.allclose(experts(x, IDS, weights), expected(x, weights, tensors()), atol=1e-5)
    assert experts.counts.tolist() == [2, 4, 2, 2]  # by place: experts 1, 3, 0, 2


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_experts(world_size: int) -> None:
    """Each holds, reads and counts its own; their sum is the whole. Killed by: a rank that answers for experts it does not hold, a sum left out."""
    x, weights = given()
    ring = Ring(world_size)

    class Counting(InMemory):
        reads = 0

        def read(self, name: str) -> torch.Tensor:
            self.reads += 1
            return super().read(name)

    def run(rank: int) -> tuple[torch.Tensor, list[int], int]:
        parts = ranked(rank, world_size, lambda tensor: sum(ring.exchange(rank, tensor)))
        experts, checkpoint = parts.experts("x", NUM_EXPERTS, HIDDEN, INNER), Counting(**tensors())
        load_weights(checkpoint, WeightMap(entries()), parts)
        return experts(x, IDS, weights), experts.counts.tolist(), checkpoint.reads

    with ThreadPoolExecutor(world_size) as pool:
        results = list(pool.map(run, range(world_size)))
    for result, _, reads in results:
        assert torch.allclose(result, expected(x, weights, tensors()), atol=1e-5)
        assert reads == 3 * NUM_EXPERTS // world_size
    assert [count for _, counts, _ in results for count in counts] == [2, 2, 2, 4]


def ranked(rank: int, world_size: int, all_reduce: Callable[[Any], Any]) -> CoreParts:
    device = ReferenceDevice(0)
    return CoreParts(
        device, torch.float32, built_ops(device), {}, world_size=world_size, rank=rank, all_reduce=all_reduce, all_gather=all_reduce
    )  # fmt: skip


def test_experts_that_do_not_divide_are_refused() -> None:
    """Killed by: rounding down."""
    with pytest.raises(ConfigError, match="a dimension of 4 does not divide over 3 ranks"):
        ranked(0, 3, lambda tensor: tensor).experts("x", NUM_EXPERTS, HIDDEN, INNER)


def test_a_missing_expert_is_named_and_an_unfilled_one_is_a_bug() -> None:
    """A checkpoint that lacks one; a map that forgets one; one tensor given to the wrong kind. Killed by: coverage counted per tensor."""
    held = tensors()
    del held["2.up"]
    parts = make_parts()
    parts.experts("x", NUM_EXPERTS, HIDDEN, INNER)
    with pytest.raises(WeightMismatchError, match=r"1 missing: 2\.up"):
        load_weights(InMemory(**held), WeightMap(entries()), parts)
    with pytest.raises(IntegrityError, match=r"the weight map fills 0 of 10 rows of 'x\.gate_up', expert 3"):
        load_weights(InMemory(**tensors()), WeightMap(entries(3), [r"3\..*"]), parts)
    twice = [replace(e, expert=2) if e.expert == 3 else e for e in entries()]
    with pytest.raises(IntegrityError, match=r"the weight map fills 20 of 10 rows of 'x\.gate_up', expert 2"):
        load_weights(InMemory(**tensors()), WeightMap(twice), parts)
    with pytest.raises(IntegrityError, match=r"fills 6 rows of 'x\.down', which has shape"):
        load_weights(
            InMemory(down=torch.zeros(6, 5)),
            WeightMap([WeightEntry("down", "x.down", (6, 5), "column", expert=0)]),
            parts,
        )


def test_all_experts_in_one_tensor() -> None:
    """An entry without `expert` fills all. Killed by: coverage that knows single experts only."""
    held, parts, (x, weights) = tensors(), make_parts(), given()
    experts = parts.experts("x", NUM_EXPERTS, HIDDEN, INNER)
    gate_up = torch.stack([torch.cat((held[f"{e}.gate"], held[f"{e}.up"])) for e in range(NUM_EXPERTS)])
    down = torch.stack([held[f"{e}.down"] for e in range(NUM_EXPERTS)])
    stacked = [
        WeightEntry("gate_up", "x.gate_up", tuple(gate_up.shape), "expert"), WeightEntry("down", "x.down", tuple(down.shape), "expert"),
    ]  # fmt: skip
    load_weights(InMemory(gate_up=gate_up, down=down), WeightMap(stacked), parts)
    assert torch.allclose(experts(x, IDS, weights), expected(x, weights, held), atol=1e-5)


def test_a_router_and_its_correction_stay_float32() -> None:
    """In a bfloat16 model. Killed by: parameters in the model's dtype."""
    weight, correction = torch.randn(3, HIDDEN), torch.randn(3)
    parts = make_parts(torch.bfloat16)
    router, held = parts.router("r", HIDDEN, 3), parts.parameter("c", (3,), is_float32=True)
    load_weights(
        InMemory(w=weight, c=correction),
        WeightMap([WeightEntry("w", "r.weight", (3, HIDDEN), "replicated"), WeightEntry("c", "c", (3,), "replicated")]), parts,
    )  # fmt: skip
    x = torch.randn(2, HIDDEN).bfloat16()
    assert torch.equal(router(x), x.float() @ weight.T) and torch.equal(held, correction)


@pytest.mark.parametrize("rank", [0, 1])
def test_stacked_and_reordered_rows(rank: int) -> None:
    """Gate and up in one tensor are cut each by itself; rows of a head are put in another order. Killed by: cutting the tensor whole, the
    inverse order, an order over the whole tensor.
    """
    stacked, heads = torch.randn(8, 3), torch.arange(8.0).view(8, 1)
    parts = ranked(rank, 2, lambda tensor: tensor)
    gate_up, q = parts.parameter("g", (8, 3), "column"), parts.parameter("q", (8, 1), "column")
    load_weights(
        InMemory(g=stacked, q=heads),
        WeightMap([
            WeightEntry("g", "g", (8, 3), "column", stacked=2), WeightEntry("q", "q", (8, 1), "column", row_order=(2, 0, 1, 3)),
        ]), parts,
    )  # fmt: skip
    assert torch.equal(gate_up, torch.cat((stacked[2 * rank : 2 * rank + 2], stacked[4 + 2 * rank : 6 + 2 * rank])))
    assert q.flatten().tolist() == [4 * rank + row for row in (2, 0, 1, 3)]
