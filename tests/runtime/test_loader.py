"""The loader: what is filled, cast, cut and reported, and what it refuses. Damaged files have their own table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from xllm_core.errors import ConfigError, IntegrityError, WeightMismatchError
from xllm_core.plugins.contracts.weights import PackedTensor, TensorInfo, TokenizerFiles, WeightEntry, WeightMap
from xllm_core.reference.device import ReferenceDevice
from xllm_core.runtime.loader import LoadReport, load_weights, packed_parameters
from xllm_core.runtime.parts import CoreParts, WeightsInFormat
from xllm_core.testing.model_harness import built_ops


class InMemory:
    """A checkpoint that is a dictionary."""

    path = Path("/models/dictionary")
    config: Mapping[str, Any] = {}
    generation_config: Mapping[str, Any] = {}

    def __init__(self, **held: torch.Tensor) -> None:
        self.held = held

    def tensors(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(tuple(tensor.shape), str(tensor.dtype)) for name, tensor in self.held.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.held[name]

    def tokenizer(self) -> TokenizerFiles:
        raise AssertionError("not asked for")

    def fingerprint(self) -> str:
        return ""


def make_parts(dtype: torch.dtype = torch.float32) -> CoreParts:
    device = ReferenceDevice(0)
    return CoreParts(device, dtype, built_ops(device), {})


def entry(name: str, param: str, *shape: int, **rest: Any) -> WeightEntry:
    return WeightEntry(name, param, shape, "replicated", **rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fills_fuses_casts_and_reports(dtype: torch.dtype) -> None:
    """Rows of a fused parameter in their places, values in the model's dtype, the file untouched. Killed by: wrong rows, no cast, aliasing."""
    a, b, norm = torch.randn(2, 3), torch.randn(1, 3, dtype=torch.float64).half(), torch.randn(4)
    checkpoint = InMemory(a=a, b=b, norm=norm, unused=torch.zeros(1))
    entries = [
        entry("b", "w.weight", 1, 3, rows=(2, 1)),
        entry("a", "w.weight", 2, 3, rows=(0, 2)),
        entry("norm", "n", 4),
    ]
    parts = make_parts(dtype)
    linear, n = parts.linear("w", 3, 3, axis="replicated"), parts.parameter("n", (4,))
    seen: list[tuple[str, int, int]] = []
    report = load_weights(checkpoint, WeightMap(entries, ["unus.d"]), parts, progress=lambda *facts: seen.append(facts))
    x = torch.randn(1, 3).to(dtype)
    assert torch.equal(linear(x), x @ torch.cat((a.to(dtype), b.to(dtype))).T)
    assert torch.equal(n, norm.to(dtype))
    n.fill_(9)
    assert not torch.equal(norm, torch.full((4,), 9.0))
    size = dtype.itemsize
    assert seen == [("b", 3 * size, 13 * size), ("a", 9 * size, 13 * size), ("norm", 13 * size, 13 * size)]
    assert report == LoadReport(num_tensors=3, num_ignored=1, loaded_bytes=13 * size, seconds=report.seconds)


def test_what_is_missing_misshapen_or_surplus_is_listed() -> None:
    """All of it in one error, the first ten by name. Killed by: stopping at the first, matching ignorable names by prefix."""
    entries = [entry(f"m{index:02}", f"p{index}", 2) for index in range(12)] + [entry("shape", "s", 2, 3)]
    parts = make_parts()
    for index in range(12):
        parts.parameter(f"p{index}", (2,))
    parts.parameter("s", (2, 3))
    checkpoint = InMemory(shape=torch.zeros(3, 2), more=torch.zeros(1), buffers=torch.zeros(1))
    with pytest.raises(WeightMismatchError) as caught:
        load_weights(checkpoint, WeightMap(entries, ["buffer"]), parts)
    message = str(caught.value)
    assert "12 missing: m00; m01" in message
    assert "and 2 more" in message
    assert "m10" not in message
    assert "shape is [3, 2], the model needs [2, 3]" in message
    assert "2 not expected by this model: more; buffers" in message
    assert "/models/dictionary" in message


def test_optional_tensors() -> None:
    """Present: read. Absent: the fallback stands in, or the parameter stays zero. Killed by: fallback first, an error for the absent."""
    entries = [
        entry("a", "pa", 2), entry("head", "ph", 2, is_optional=True, fallback="a"), entry("bias", "pb", 2, is_optional=True),
    ]  # fmt: skip
    one, two = torch.ones(2), torch.full((2,), 2.0)
    for held, expected in (({"a": one}, (one, torch.zeros(2))), ({"a": one, "head": two, "bias": two}, (two, two))):
        parts = make_parts()
        tensors = [parts.parameter(name, (2,)) for name in ("pa", "ph", "pb")]
        load_weights(InMemory(**held), WeightMap(entries), parts)
        assert torch.equal(tensors[1], expected[0])
        assert torch.equal(tensors[2], expected[1])
    with pytest.raises(WeightMismatchError, match="1 missing: a"):
        parts = make_parts()
        parts.parameter("ph", (2,))
        load_weights(InMemory(), WeightMap([entries[1]]), parts)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(value: float) -> None:
    """Killed by: not looking; a sum that hides opposite infinities gives NaN, which shows too."""
    tensor = torch.zeros(1000)
    tensor[777] = value
    parts = make_parts()
    parts.parameter("p", (1000,))
    with pytest.raises(WeightMismatchError, match=r"'t'.*not finite"):
        load_weights(InMemory(t=tensor), WeightMap([entry("t", "p", 1000)]), parts)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([entry("t", "p", 2, rows=(0, 2))], "fills 2 of 4 rows"),
        ([entry("t", "p", 4), entry("u", "q", 1)], "did not ask for"),
        ([WeightEntry("t", "p", (4,), "column")], "axis 'column'"),
        ([entry("t", "p", 3)], "shape"),
    ],
)
def test_a_weight_map_that_does_not_cover_the_model_is_a_bug(entries: list[WeightEntry], says: str) -> None:
    """A gap would leave zeros in a model that runs. Killed by: trusting the family."""
    parts = make_parts()
    parts.parameter("p", (4,))
    held = {one.name: torch.zeros(one.shape) for one in entries}
    with pytest.raises(IntegrityError, match=says):
        load_weights(InMemory(**held), WeightMap(entries), parts)


def test_parts_refuse_what_makes_no_sense() -> None:
    """Killed by: a second parameter of one name silently replacing the first, a lookup error without a sentence."""
    parts = make_parts()
    parts.parameter("p", (4,))
    with pytest.raises(IntegrityError, match="twice"):
        parts.parameter("p", (4,))
    with pytest.raises(IntegrityError, match="'conv'"):
        parts.op("conv")
    with pytest.raises(IntegrityError, match="'full'"):
        parts.attention("full", 0, num_heads=1, num_kv_heads=1, head_size=2, scale=1.0)
    with pytest.raises(IntegrityError, match="2 ranks"):
        CoreParts(parts.device, torch.float32, {}, {}, world_size=2)


class PackingLinear:
    """A linear op that keeps a packed copy and counts what is alive."""

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return weight.clone()

    def __call__(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        return x @ prepared.T


def test_packed_weights_are_let_go() -> None:
    """After `finish` nobody but the op holds a weight, except a tied table. Killed by: a parameter that keeps its tensor."""
    device = ReferenceDevice(0)
    parts = CoreParts(device, "float32", {**built_ops(device), "linear": PackingLinear()}, {})
    parts.linear("w", 4, 4, axis="column")
    embed = parts.embedding("e", 6, 4)
    head = parts.lm_head("h", 4, 6, tied_to="e")
    weight, table = torch.randn(4, 4), torch.randn(6, 4)
    parts.parameter("n", (4,))
    entries = [
        entry("n", "n", 4),
        WeightEntry("w", "w.weight", (4, 4), "column"),
        WeightEntry("e", "e.weight", (6, 4), "vocab"),
    ]
    load_weights(InMemory(w=weight, e=table, n=table[0]), WeightMap(entries), parts)
    assert all(parameter.tensor is None for parameter in parts.parameters.values())
    assert torch.equal(embed(torch.tensor([5])), table[5:])
    assert torch.allclose(head(table[:1]), table[:1] @ table.T)


class Packed(InMemory):
    """One whose matrices are packed, in a kind of four columns a block; unpacked they are twice as large."""

    def packed(self) -> dict[str, str]:
        return {name: "K4" for name, tensor in self.held.items() if tensor.dim() == 2 and name != "plain"}

    def read_packed(self, name: str) -> PackedTensor:
        rows, columns = self.held[name].shape
        return PackedTensor("K4", self.held[name].to(torch.uint8).view(rows, columns // 4, 4))

    def read(self, name: str) -> torch.Tensor:
        return self.held[name] * 2


class Took:
    """An op that keeps what it was given to prepare."""

    def __init__(self) -> None:
        self.weights: list[Any] = []

    def prepare(self, weight: Any, bias: torch.Tensor | None) -> Any:
        self.weights.append(weight)
        return weight


def stacked(tensors: Sequence[PackedTensor]) -> tuple[torch.Tensor, ...]:
    return (torch.cat([tensor.blocks.flatten(1) for tensor in tensors]),)


def packed_parts(checkpoint: Packed, entries: list[WeightEntry], **rest: Any) -> tuple[CoreParts, Took]:
    device, took = ReferenceDevice(0), Took()
    packed = packed_parameters(checkpoint, WeightMap(entries), {"K4"})
    weights = WeightsInFormat(
        {"linear": "narrow", "lm_head": "narrow"}, stack=rest.pop("stack", stacked), packed=packed
    )
    ops = {**built_ops(device), "narrow": took}
    return CoreParts(device, torch.float32, ops, {}, weights=weights, **rest), took


def numbered(rows: int, columns: int, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + rows * columns).float().view(rows, columns)


def test_packed_rows_reach_the_op_as_they_are() -> None:
    """Stacked in the order of the parameter's rows, not of the file; nothing unpacked, no memory asked for. Killed by: the order of arrival."""
    entries = [
        WeightEntry("b", "m.weight", (2, 8), "column", rows=(4, 2)), WeightEntry("a", "m.weight", (4, 8), "column", rows=(0, 4)),
    ]  # fmt: skip
    checkpoint = Packed(a=numbered(4, 8), b=numbered(2, 8, 100))
    parts, took = packed_parts(checkpoint, entries)
    parts.linear("m", 8, 6, axis="column")
    assert parts.parameters["m.weight"].tensor is None
    load_weights(checkpoint, WeightMap(entries), parts)
    ((weight,),) = took.weights
    assert torch.equal(weight.float(), torch.cat((numbered(4, 8), numbered(2, 8, 100))))
    assert parts.parameters["m.weight"].packed is None, "the file is held no longer than needed"


def test_what_is_not_packed_keeps_its_weights() -> None:
    """A parameter of which one tensor is plain, or of another kind, is unpacked whole. Killed by: half of it in either form."""
    entries = [
        entry("a", "m.weight", 2, 4, rows=(0, 2)),
        entry("plain", "m.weight", 2, 4, rows=(2, 2)),
        entry("b", "n.weight", 2, 4),
    ]
    checkpoint = Packed(a=numbered(2, 4), plain=numbered(2, 4), b=numbered(2, 4))
    assert packed_parameters(checkpoint, WeightMap(entries), {"K4"}) == {"n.weight"}
    assert not packed_parameters(checkpoint, WeightMap(entries), {"K5"})
    assert not packed_parameters(InMemory(**checkpoint.held), WeightMap(entries), {"K4"})
    parts, took = packed_parts(checkpoint, entries)
    wide, narrow = (parts.linear(name, 4, rows, axis="replicated") for name, rows in (("m", 4), ("n", 2)))
    load_weights(checkpoint, WeightMap(entries), parts)
    assert torch.equal(wide(torch.eye(4)).T, 2 * torch.cat((numbered(2, 4), numbered(2, 4))))
    assert len(took.weights) == 1 and narrow is not wide


def test_a_tied_table_has_both() -> None:
    """The embedding reads it unpacked, the head packed; one that no head reads is unpacked only."""
    entries = [WeightEntry("t", "embed.weight", (6, 4), "vocab"), WeightEntry("u", "other.weight", (6, 4), "vocab")]
    checkpoint = Packed(t=numbered(6, 4), u=numbered(6, 4, 50))
    parts, took = packed_parts(checkpoint, entries)
    embed, other = parts.embedding("embed", 6, 4), parts.embedding("other", 6, 4)
    parts.lm_head("head", 4, 6, tied_to="embed")
    load_weights(checkpoint, WeightMap(entries), parts)
    ids = torch.tensor([5, 0])
    assert torch.equal(embed(ids), 2 * numbered(6, 4)[ids]) and torch.equal(other(ids), 2 * numbered(6, 4, 50)[ids])
    assert len(took.weights) == 1 and torch.equal(took.weights[0][0].float(), numbered(6, 4))


def test_packed_rows_are_shared_out() -> None:
    """Rows, stacked maps and blocks of columns; a row's order too. A rank's part that is no whole block is refused."""
    entries = [
        WeightEntry("up", "up.weight", (8, 4), "column", stacked=2), WeightEntry("down", "down.weight", (2, 8), "row"),
        WeightEntry("turn", "turn.weight", (4, 4), "column", row_order=(1, 0)),
    ]  # fmt: skip
    checkpoint = Packed(up=numbered(8, 4), down=numbered(2, 8), turn=numbered(4, 4))
    for rank in (0, 1):
        parts, took = packed_parts(
            checkpoint, entries, world_size=2, rank=rank, all_reduce=lambda t: t, all_gather=lambda t: t
        )
        (
            parts.linear("up", 4, 8, axis="column"),
            parts.linear("down", 8, 2, axis="row"),
            parts.linear("turn", 4, 4, axis="column"),
        )
        load_weights(checkpoint, WeightMap(entries), parts)
        up, down, turn = (weight[0].float() for weight in took.weights)
        assert torch.equal(up, numbered(8, 4).view(2, 2, 2, 4)[:, rank].flatten(0, 1))
        assert torch.equal(down, numbered(2, 8)[:, 4 * rank : 4 * rank + 4])
        assert torch.equal(turn, numbered(4, 4)[[[1, 0], [3, 2]][rank]])
    narrow = [WeightEntry("down", "down.weight", (2, 4), "row")]
    parts, _ = packed_parts(
        one := Packed(down=numbered(2, 4)), narrow, world_size=2, rank=0, all_reduce=lambda t: t, all_gather=lambda t: t
    )
    parts.linear("down", 4, 2, axis="row")
    with pytest.raises(ConfigError, match="does not divide over 2 ranks"):
        load_weights(one, WeightMap(narrow), parts)


def test_packed_scales_that_are_not_finite() -> None:
    """Told with the parameter's name. Killed by: trusting what is not unpacked."""
    entries = [entry("a", "m.weight", 2, 4)]
    checkpoint = Packed(a=numbered(2, 4))
    parts, _ = packed_parts(
        checkpoint, entries, stack=lambda tensors: (*stacked(tensors), torch.tensor([1.0, float("inf")]))
    )
    parts.linear("m", 4, 2, axis="replicated")
    with pytest.raises(WeightMismatchError, match=r"'m\.weight'.*not finite"):
        load_weights(checkpoint, WeightMap(entries), parts)
