"""One entry per op: what to call it with. The reference op of the same name is the oracle; a new op or fusion is one more entry.

Values come in the dtype under test, on the host. Everything is drawn from a generator, so that a run repeats.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from xllm_core.plugins.contracts.ops import BLOCK_COLUMNS
from xllm_core.reference import ops as reference
from xllm_core.reference.quantization import Int8, int8_entries


@dataclass(frozen=True, slots=True)
class Draw:
    """Random tensors in one dtype. block_size: of the device's cache, in tokens."""

    dtype: torch.dtype
    generator: torch.Generator
    block_size: int = 16

    def __call__(self, *shape: int, spread: float = 1.0) -> torch.Tensor:
        """Normal numbers."""
        return (torch.randn(shape, generator=self.generator) * spread).to(self.dtype)

    def ids(self, count: int, below: int) -> torch.Tensor:
        """[count] int64."""
        return torch.randint(0, below, (count,), generator=self.generator)

    def order(self, count: int) -> torch.Tensor:
        """A permutation of 0 .. count - 1."""
        return torch.randperm(count, generator=self.generator)


@dataclass(frozen=True, slots=True)
class Call:
    """One call. arguments: nested tuples of tensors and numbers. prepared: for ops with `prepare`, what that is given, before `arguments`.

    changed: index of the argument that the op changes in place, None for ops that only return new tensors.
    by_row: indices of arguments whose first axis is the token's, for row invariance.
    """

    arguments: tuple[Any, ...]
    prepared: tuple[torch.Tensor | tuple[torch.Tensor, ...] | None, ...] | None = None
    changed: int | None = None
    by_row: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class OpInputs:
    """How an op is tried. calls(draw, T): calls with T tokens. roundings: places between inputs and result where the dtype rounds.

    caches: indices of arguments that are cache tensors, laid out as the device lays them out.
    """

    calls: Callable[[Draw, int], Iterable[Call]]
    roundings: int = 1
    caches: tuple[int, ...] = field(default=())

    @property
    def is_exact(self) -> bool:
        """It moves values and computes none."""
        return self.roundings == 0


def _linear(draw: Draw, tokens: int) -> Iterable[Call]:
    for in_features, out_features, has_bias in ((64, 48, False), (33, 7, True), (256, 513, True), (1, 1, False)):
        weight, bias = draw(out_features, in_features), draw(out_features) if has_bias else None
        yield Call((draw(tokens, in_features),), prepared=(weight, bias))


def _lm_head(draw: Draw, tokens: int) -> Iterable[Call]:
    for in_features, out_features in ((64, 48), (33, 7), (16, 4100)):
        yield Call((draw(tokens, in_features),), prepared=(draw(out_features, in_features), None))


def _linear_float32(draw: Draw, tokens: int) -> Iterable[Call]:
    for in_features, out_features in ((64, 16), (33, 7)):
        yield Call((draw(tokens, in_features),), prepared=(draw(out_features, in_features).float(), None))


def _routed(draw: Draw, tokens: int, groups: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and corrections with which no two experts, and no two groups, are so near each other that rounding could decide between them."""
    num_experts = groups * size

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=draw.generator, dtype=torch.float64)

    correction = ((uniform(num_experts) - 0.5) * 0.4).float()
    rows: list[torch.Tensor] = []
    while len(rows) < tokens:
        ranked = 0.25 + 0.5 * (draw.order(num_experts) + 0.5 * uniform(num_experts)) / num_experts
        best = ranked.view(groups, size).sort(dim=1, descending=True).values[:, :2].sum(1).sort().values
        if groups == 1 or float(best.diff().min()) > 1e-5:
            rows.append((ranked - correction).logit().float())
    return torch.stack(rows), correction


def _moe_route(draw: Draw, tokens: int) -> Iterable[Call]:
    """One expert, sizes that are no whole vectors, all of them chosen; then many that are equal, and scores at both ends of sigmoid."""
    for groups, size, top_groups, top_k, is_normalised in (
        (1, 1, 1, 1, True), (1, 7, 1, 7, False), (1, 8, 1, 2, True), (4, 4, 2, 3, True), (8, 20, 3, 8, True), (3, 3, 1, 3, False),
        (4, 15, 4, 6, False), (1, 160, 1, 8, True), (5, 2, 4, 1, False),
    ):  # fmt: skip
        scores, correction = _routed(draw, tokens, groups, size)
        yield Call((scores, correction, top_k, groups, top_groups, is_normalised, 1.7))
    levels = torch.tensor([0.0, 1.0, 3.0])
    for groups, size, top_groups, top_k in ((1, 24, 1, 9), (6, 4, 2, 5)):
        scores = levels[draw.ids(tokens * groups * size, 3)].view(tokens, -1)
        yield Call((scores, torch.full((groups * size,), 0.125), top_k, groups, top_groups, True, 1.0))
    ends = torch.tensor([-float("inf"), -200.0, -90.0, -20.0, -3.0, 0.0, 3.0, 9.0, 40.0, 200.0, float("inf")])
    yield Call((ends.repeat(tokens, 1), torch.arange(11) / 2, 11, 1, 1, False, 1.0))


def _moe_experts(draw: Draw, tokens: int) -> Iterable[Call]:
    """Random choices with some elsewhere, one expert for all, every expert for all, none here."""
    num_experts, hidden, inner = 5, 24, 20  # rows that are no whole vectors
    every = torch.arange(num_experts).repeat(tokens, 1)
    some = torch.stack([draw.order(num_experts)[:3] for _ in range(tokens)])
    some[1::3, 1] = -1
    for ids in (some, torch.full((tokens, 1), 3), every, torch.full((tokens, 2), -1)):
        prepared = (draw(num_experts, 2 * inner, hidden, spread=0.2), draw(num_experts, hidden, inner, spread=0.2))
        weights = torch.rand(ids.shape, generator=draw.generator)
        counts = draw.ids(num_experts, 9)
        yield Call((draw(tokens, hidden), ids, weights, counts), prepared=prepared, changed=3, by_row=(0, 1, 2))


def _embedding(draw: Draw, tokens: int) -> Iterable[Call]:
    yield Call((draw.ids(tokens, 50), draw(50, 24)))


def _rms_norm(draw: Draw, tokens: int) -> Iterable[Call]:
    yield Call((draw(tokens, 64, spread=3.0), draw(64), 1e-5))
    yield Call((draw(tokens, 3, 40, spread=0.01), draw(40), 1e-6))
    yield Call((draw(tokens, 17) * 0, draw(17), 1e-6))
    yield Call((draw(tokens, 2, 3, 24), draw(24), 1e-6))
    yield Call((draw(tokens, 24, 3).transpose(1, 2), draw(24), 1e-6))


def _add_rms_norm(draw: Draw, tokens: int) -> Iterable[Call]:
    yield Call((draw(tokens, 64), draw(tokens, 64, spread=20.0), draw(64), 1e-5), by_row=(0, 1))
    yield Call((draw(tokens, 33), draw(tokens, 33), draw(33), 1e-6), by_row=(0, 1))


def _rotation(draw: Draw, tokens: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(tokens, size // 2, generator=draw.generator) * 6.28
    both = torch.cat((angles, angles), -1)
    return both.cos().to(draw.dtype), both.sin().to(draw.dtype)


def _rope(draw: Draw, tokens: int) -> Iterable[Call]:
    for heads, kv_heads, size, rotated in ((4, 2, 16, 16), (3, 1, 40, 24), (1, 1, 64, 64)):
        arguments = (draw(tokens, heads, size), draw(tokens, kv_heads, size), *_rotation(draw, tokens, rotated))
        yield Call(arguments, by_row=(0, 1, 2, 3))


def _silu_mul(draw: Draw, tokens: int) -> Iterable[Call]:
    yield Call((draw(tokens, 96, spread=4.0),))
    yield Call((draw(tokens, 10),))


def _caches(draw: Draw, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (num_blocks, draw.block_size, 2, 8)
    return draw(*shape), draw(*shape)


def _slots(draw: Draw, tokens: int) -> tuple[int, torch.Tensor]:
    """(blocks that hold them, a slot of its own for each token, some of them skipped)."""
    num_blocks = -(-(tokens + 5) // draw.block_size) + 1
    slots = draw.order(num_blocks * draw.block_size)[:tokens]
    slots[1::5] = -1
    return num_blocks, slots


def _kv_write(draw: Draw, tokens: int) -> Iterable[Call]:
    num_blocks, slots = _slots(draw, tokens)
    new, caches = (draw(tokens, 2, 8), draw(tokens, 2, 8)), _caches(draw, num_blocks)
    yield Call((new, caches, slots), changed=1, by_row=(0, 2))
    yield Call((new, caches, torch.full_like(slots, -1)), changed=1, by_row=(0, 2))


def _in_int8(tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Codes of each, then steps of each."""
    codes, steps = zip(*map(int8_entries, tensors), strict=True)
    return (*codes, *steps)


def _kv_write_int8(draw: Draw, tokens: int) -> Iterable[Call]:
    """Entries of zeros, of one large value and next to nothing among them; heads that are no whole vectors."""
    num_blocks, slots = _slots(draw, tokens)
    for size in (8, 40):
        k, v = draw(tokens, 2, size), draw(tokens, 2, size)
        k[1::7], v[2::7, 0, 0], k[3::7] = 0, 100, 2.0**-110
        shape = (num_blocks, draw.block_size, 2, size)
        yield Call(((k, v), _in_int8((draw(*shape), draw(*shape))), slots), changed=1, by_row=(0, 2))


def _block_copy(draw: Draw, tokens: int) -> Iterable[Call]:
    order, caches = draw.order(9), _caches(draw, 9)
    yield Call((caches, order[:4], order[4:8]), changed=0, by_row=())
    yield Call(
        (caches, order[:3], order[1:4]), changed=0, by_row=()
    )  # sources are read before any destination is written


def _linear_silu_mul(draw: Draw, tokens: int) -> Iterable[Call]:
    for in_features, inner, has_bias in ((64, 48, False), (33, 7, True), (256, 130, True)):
        bias = draw(2 * inner) if has_bias else None
        yield Call(
            (draw(tokens, in_features, spread=in_features**-0.5),), prepared=(draw(2 * inner, in_features), bias)
        )


def _int8(draw: Draw, tokens: int) -> Iterable[Call]:
    """Widths that are no whole vectors, more of them than float32 adds exactly, rows of zeros and of one large value."""
    for in_features, out_features, has_bias in ((64, 48, False), (33, 7, True), (1100, 130, True), (1, 1, False)):
        weight, bias = draw(out_features, in_features), draw(out_features) if has_bias else None
        x = draw(tokens, in_features)
        weight[::5], x[1::7], x[2::7, 0] = 0, 0, 100
        yield Call((x,), prepared=(Int8().quantize(weight), bias))


def _linear_silu_mul_int8(draw: Draw, tokens: int) -> Iterable[Call]:
    for in_features, inner, has_bias in ((64, 48, False), (33, 7, True), (256, 130, True)):
        bias = draw(2 * inner) if has_bias else None
        x = draw(tokens, in_features, spread=in_features**-0.5)
        yield Call((x,), prepared=(Int8().quantize(draw(2 * inner, in_features)), bias))


def _in_blocks(draw: Draw, out_features: int, in_features: int, kind: str) -> tuple[torch.Tensor, ...]:
    """A random weight of about unit size in each form that ops over blocks take, some of its blocks nothing."""
    generator, shape = draw.generator, (out_features, in_features // BLOCK_COLUMNS)
    if kind.startswith("4"):
        codes = torch.randint(0, 256, (out_features, in_features // 2), generator=generator, dtype=torch.uint8)
        scales = torch.randn(shape, generator=generator) / 8
    else:
        codes = torch.randint(-128, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
        scales = torch.randn(shape, generator=generator) / 75
    scales[::5] = 0
    minimums = (torch.randn(shape, generator=generator).half(),) if kind.endswith("minimums") else ()
    return codes, scales.half(), *minimums


_BLOCK_KINDS = ("4 bits", "4 bits, minimums", "8 bits", "8 bits, minimums")


def _blocks(draw: Draw, tokens: int) -> Iterable[Call]:
    """Every kind; channels that are no whole vectors; blocks of zeros and of one large value."""
    for kind, (in_features, out_features, has_bias) in itertools.product(
        _BLOCK_KINDS, ((64, 48, False), (32, 7, True), (576, 130, True))
    ):
        x, bias = draw(tokens, in_features), draw(out_features) if has_bias else None
        x[1::7, :32], x[2::7, 0] = 0, 100
        yield Call((x,), prepared=(_in_blocks(draw, out_features, in_features, kind), bias))


def _linear_silu_mul_blocks(draw: Draw, tokens: int) -> Iterable[Call]:
    for kind, (in_features, inner, has_bias) in itertools.product(_BLOCK_KINDS, ((64, 48, False), (32, 7, True))):
        x, bias = draw(tokens, in_features, spread=in_features**-0.5), draw(2 * inner) if has_bias else None
        yield Call((x,), prepared=(_in_blocks(draw, 2 * inner, in_features, kind), bias))


def _rope_kv_write(draw: Draw, tokens: int) -> Iterable[Call]:
    num_blocks, slots = _slots(draw, tokens)
    q, k, v = draw(tokens, 4, 8), draw(tokens, 2, 8), draw(tokens, 2, 8)
    arguments = (q, k, v, *_rotation(draw, tokens, 8), _caches(draw, num_blocks), slots)
    yield Call(arguments, changed=5, by_row=(0, 1, 2, 3, 4, 6))


def _rope_kv_write_int8(draw: Draw, tokens: int) -> Iterable[Call]:
    for call in _rope_kv_write(draw, tokens):
        arguments = (*call.arguments[:5], _in_int8(call.arguments[5]), call.arguments[6])
        yield Call(arguments, changed=5, by_row=call.by_row)


OPS: Mapping[str, OpInputs] = {
    "linear": OpInputs(_linear),
    "embedding": OpInputs(_embedding, roundings=0),
    "rms_norm": OpInputs(_rms_norm, roundings=2),
    "add_rms_norm": OpInputs(_add_rms_norm, roundings=3),
    "rope": OpInputs(_rope, roundings=3),
    "silu_mul": OpInputs(_silu_mul, roundings=3),
    "kv_write": OpInputs(_kv_write, roundings=0, caches=(1,)),
    "block_copy": OpInputs(_block_copy, roundings=0, caches=(0,)),
    "linear_float32": OpInputs(_linear_float32),
    "moe_route": OpInputs(_moe_route, roundings=6),
    "moe_experts": OpInputs(_moe_experts, roundings=6),
    "lm_head": OpInputs(_lm_head),
    "linear_silu_mul": OpInputs(_linear_silu_mul, roundings=5),
    "linear_int8": OpInputs(_int8),
    "lm_head_int8": OpInputs(_int8),
    "linear_silu_mul_int8": OpInputs(_linear_silu_mul_int8, roundings=5),
    "linear_blocks": OpInputs(_blocks),
    "lm_head_blocks": OpInputs(_blocks),
    "linear_silu_mul_blocks": OpInputs(_linear_silu_mul_blocks, roundings=5),
    "rope_kv_write": OpInputs(_rope_kv_write, roundings=3, caches=(5,)),
    "kv_write_int8": OpInputs(_kv_write_int8, roundings=0, caches=(1,)),
    "rope_kv_write_int8": OpInputs(_rope_kv_write_int8, roundings=3, caches=(5,)),
}


def oracle(op: str) -> Any:
    """The class that defines an op, or None where the reference has none."""
    return getattr(reference, "".join(part.capitalize() for part in op.split("_")), None)


def moved(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same nesting with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    return type(value)(moved(inner, change) for inner in value) if isinstance(value, tuple | list) else value


def flat(value: Any) -> list[torch.Tensor]:
    """Every tensor of a nesting, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for inner in value for tensor in flat(inner)] if isinstance(value, tuple | list) else []


def limit(expected: torch.Tensor, dtype: torch.dtype, roundings: int) -> torch.Tensor:
    """How far a right answer may lie from the reference's: so many roundings of the dtype, of the value or of what cancelled on the way.

    Codes in 8 bits: what that is of the largest, and one for what lies next to the edge between two. Other whole numbers are exact.
    """
    unit = torch.finfo(dtype).eps
    if not expected.is_floating_point():
        most = 1 + 127 * roundings * unit if expected.dtype == torch.int8 else 0.0
        return torch.full_like(expected, most, dtype=torch.float32)
    row = expected.float().abs().flatten(1).amax(1).view(-1, *[1] * (expected.dim() - 1))
    sums = 64 * torch.finfo(torch.float32).eps * row.clamp(min=1e-3)  # float32 sums in another order
    return roundings * unit * (expected.float().abs() + 0.25 * row) + sums
