"""Attention kernels against the reference, over a grid made of what the spec declares. What is not declared must be refused.

A declared feature that the core never asks for ("segments", "lse", ...) is skipped by name: nothing proves it yet.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from xllm_core.errors import ConfigError
from xllm_core.plugins.contracts.attention import AttentionGeometry
from xllm_core.plugins.contracts.device import DeviceBackend
from xllm_core.plugins.contracts.queries import AttentionQuery
from xllm_core.plugins.select import unfit_attention
from xllm_core.testing.plugin import Kit, kit_of
from xllm_core.testing.subject import Part

ANY_HEAD_SIZES = (16, 40, 64, 128)
ANY_BLOCK_SIZES = (1, 5, 16)
HEADS = ((4, 4), (6, 2), (4, 1))
TOLERANCES = {"float32": 3e-5, "float16": 4e-3, "bfloat16": 2.5e-2}
INT8_TOLERANCE = (
    5e-4  # a kernel may take queries and weights as 16-bit integers; the cache itself is ten times as coarse
)
NEIGHBOURS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 128, 255, 256)
KNOWN_FEATURES = frozenset({"sliding_window", "soft_cap", "int8_kv"})


@dataclass(frozen=True, slots=True)
class Case:
    """One point of the grid. features: fields of the geometry that need to be declared."""

    part: Part
    dtype: str
    head_size: int
    block_size: int
    layout: str
    features: tuple[tuple[str, float], ...] = ()

    @property
    def component(self) -> str:
        """Its line in the report."""
        return self.part.component

    def geometry(self, heads: tuple[int, int]) -> AttentionGeometry:
        """With so many query and KV heads."""
        window, soft_cap = dict(self.features).get("sliding_window"), dict(self.features).get("soft_cap")
        return AttentionGeometry(
            num_heads=heads[0], num_kv_heads=heads[1], head_size=self.head_size, scale=1 / math.sqrt(self.head_size),
            block_size=self.block_size, dtype=self.dtype, layout=self.layout, soft_cap=soft_cap,
            sliding_window=None if window is None else int(window), kv_dtype="int8" if "int8_kv" in dict(self.features) else None,
        )  # fmt: skip

    @property
    def tolerance(self) -> float:
        """How far from the reference is rounding."""
        return max(TOLERANCES[self.dtype], INT8_TOLERANCE if "int8_kv" in dict(self.features) else 0.0)

    def __str__(self) -> str:
        features = [f"{name.removeprefix('sliding_')}={value:g}" for name, value in self.features]
        return "-".join(
            [self.part.offer.name, self.dtype, f"D{self.head_size}", f"S{self.block_size}", self.layout, *features]
        )


def grid(part: Part, block_sizes: tuple[int, ...]) -> Iterator[Case]:
    """Every declared combination. block_sizes: of the device, where the spec takes any."""
    spec = part.spec
    sizes = sorted(spec.block_sizes) or block_sizes or ANY_BLOCK_SIZES
    for dtype, head_size, size, layout in itertools.product(
        sorted(spec.dtypes), sorted(spec.head_sizes) or ANY_HEAD_SIZES, sizes, spec.layouts
    ):
        plain = Case(part, dtype, head_size, size, layout)
        yield plain
        windows = [("sliding_window", window) for window in sorted({1, size, size + 1, 2 * size + 3})]
        if "sliding_window" in spec.features:
            yield from (replace(plain, features=(window,)) for window in windows)
        if "soft_cap" in spec.features:
            yield replace(plain, features=(("soft_cap", 2.0),))
        if {"sliding_window", "soft_cap"} <= spec.features:
            yield replace(plain, features=(windows[-1], ("soft_cap", 2.0)))
        if "int8_kv" in spec.features:
            yield replace(plain, features=(("int8_kv", 1),))
        if KNOWN_FEATURES <= spec.features:
            yield replace(plain, features=(windows[-1], ("soft_cap", 2.0), ("int8_kv", 1)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cases from the specs."""
    subject = kit_of(metafunc.config).subject
    parts = subject.parts("attention")
    if "case" in metafunc.fixturenames:
        cases = []
        for part in parts:
            found = subject.find_device(part.spec.devices)
            facts = None if isinstance(found, str) else found.facts()
            points = list(grid(part, facts.block_sizes if facts is not None else ()))
            is_promised = facts is None or facts.is_row_invariant
            cases += points[: None if is_promised or "neighbours" not in metafunc.function.__name__ else 1]
        metafunc.parametrize("case", cases, ids=str)
    elif "feature" in metafunc.fixturenames:
        extra = [(part, name) for part in parts for name in sorted(part.spec.features - KNOWN_FEATURES)]
        metafunc.parametrize(("part", "feature"), extra, ids=[f"{part.offer.name}-{name}" for part, name in extra])
    elif "part" in metafunc.fixturenames:
        metafunc.parametrize("part", parts, ids=[part.offer.name for part in parts])


def ready(kit: Kit, case: Case) -> DeviceBackend:
    """The device that a case runs on; skips where there is none, or it has not the case's dtype, layout or block size."""
    kit.importable(case.part)
    device = kit.device(case.part.spec.devices)
    facts = device.facts()
    if case.dtype not in facts.dtypes:
        pytest.skip(f"{facts.name} computes in {', '.join(facts.dtypes)}, not in {case.dtype}")
    if case.layout not in facts.kv_layouts:
        pytest.skip(f"{facts.name} lays KV out as {', '.join(facts.kv_layouts)}, not as {case.layout}")
    if facts.block_sizes and case.block_size not in facts.block_sizes:
        pytest.skip(f"{facts.name} has blocks of {', '.join(map(str, facts.block_sizes))}, not of {case.block_size}")
    return device


def test_rows_equal_the_reference(case: Case, xllm_kit: Kit) -> None:
    """Ragged batches equal the reference: decode, prompts and chunks at block edges, grouped heads, holes."""
    from xllm_core.testing.paged import attend, edge_rows, expected, make_batch

    device = ready(xllm_kit, case)
    for heads in HEADS:
        geometry = case.geometry(heads)
        batch = make_batch(geometry, edge_rows(case.block_size), seed=sum(heads))
        try:
            answer = attend(case.part.build(device, geometry), device, batch, num_layers=2)
        except ConfigError as error:
            pytest.skip(str(error))
        difference = (answer - expected(batch)).abs().amax(dim=(1, 2))
        worst = int(difference.nan_to_num(float("inf")).argmax())
        starts = batch.layout().query_starts.tolist()
        row = next(i for i in range(len(batch.rows)) if worst < starts[i + 1])
        assert difference[worst] <= case.tolerance, (
            f"{heads[0]} heads over {heads[1]}: differs by {float(difference[worst]):.3g} at query {worst - starts[row]} of the row with"
            f" {batch.rows[row][0]} new of {batch.rows[row][1]} tokens (blocks of {case.block_size}); at most {case.tolerance} is rounding"
        )


def test_a_row_does_not_feel_its_neighbours(case: Case, xllm_kit: Kit) -> None:
    """Row i is equal to the bit for every number of neighbours, where the device promises it."""
    import torch

    from xllm_core.testing.paged import attend, make_batch

    device = ready(xllm_kit, case)
    if not device.facts().is_row_invariant:
        pytest.skip(f"{device.facts().name} does not promise rows that are equal to the bit")
    geometry = case.geometry(HEADS[1])
    kernel = case.part.build(device, geometry)
    lengths = [1 + (7 * i) % (4 * case.block_size + 3) for i in range(NEIGHBOURS[-1])]
    batch = make_batch(geometry, [(1, length) for length in lengths])
    together = attend(kernel, device, batch)
    for count in NEIGHBOURS[:-1]:
        fewer = attend(kernel, device, batch.pick(range(count)))
        same = (fewer == together[:count]).flatten(1).all(1)
        assert bool(same.all()), f"row {int(same.int().argmin())} of {count} differs from itself among {NEIGHBOURS[-1]}"
    mixed = make_batch(geometry, [(1, 9), (5, 7), (1, 3), (4, 4), (1, 9)])
    alone = [attend(kernel, device, mixed.pick([row])) for row in range(len(mixed.rows))]
    assert torch.equal(torch.cat(alone), attend(kernel, device, mixed)), "decode and prompt rows change one another"


@pytest.mark.spec_only
def test_undeclared_is_refused(part: Part) -> None:
    """What the spec does not declare is refused before anything is imported."""
    spec = part.spec
    size, head_size = (min(sizes, default=16) for sizes in (spec.block_sizes, spec.head_sizes))
    fits = AttentionGeometry(
        num_heads=4, num_kv_heads=2, head_size=head_size, scale=1.0, block_size=size, dtype=min(spec.dtypes), layout=spec.layouts[0],
    )  # fmt: skip
    kind = min(spec.devices)
    assert not unfit_attention(part.offer, AttentionQuery(device_kind=kind, geometry=fits))
    wrong = [replace(fits, dtype="float8_unheard_of"), replace(fits, layout="DGSB")]
    wrong += [replace(fits, head_size=max(spec.head_sizes) + 1)] if spec.head_sizes else []
    wrong += [replace(fits, block_size=max(spec.block_sizes) + 1)] if spec.block_sizes else []
    wrong += [] if "sliding_window" in spec.features else [replace(fits, sliding_window=7)]
    wrong += [] if "soft_cap" in spec.features else [replace(fits, soft_cap=30.0)]
    wrong += [] if "int8_kv" in spec.features else [replace(fits, kv_dtype="int8")]
    wrong += [replace(fits, kv_dtype="int1")]
    for geometry in wrong:
        query = AttentionQuery(device_kind=kind, geometry=geometry)
        assert unfit_attention(part.offer, query), (
            f"{part.offer.name} is taken for {geometry}, which it does not declare"
        )
    assert unfit_attention(part.offer, AttentionQuery(device_kind="unheard-of", geometry=fits))


def test_capture_equals_eager(case: Case, xllm_kit: Kit) -> None:
    """A plan that stays in place and is laid out anew for each step gives what a new plan gives, whatever it held before."""
    import torch

    from xllm_core.plugins.contracts.graphs import GraphKernel
    from xllm_core.testing.paged import attend, make_batch

    device = ready(xllm_kit, case)
    geometry = case.geometry(HEADS[1])
    kernel = case.part.build(device, geometry)
    if not isinstance(kernel, GraphKernel):
        pytest.skip(f"{case.part.offer.name} has no plans that stay in place")
    lengths = [1 + (5 * i) % (3 * case.block_size + 2) for i in range(7)]
    plan = kernel.graph_plan(len(lengths), 8)
    for count in (7, 2, 5, 1, 7):
        batch = make_batch(geometry, [(1, length) for length in lengths[:count]], seed=count)
        kernel.refill(plan, batch.layout())
        assert torch.equal(
            attend(kernel, device, batch, plan=plan, room=len(lengths)), attend(kernel, device, batch)
        ), f"{count} rows in a plan of {len(lengths)}"


def test_ragged_capture_equals_eager(case: Case, xllm_kit: Kit) -> None:
    """The same where rows of a plan that stays in place have several new tokens, or some one and some many."""
    import torch

    from xllm_core.plugins.contracts.graphs import RaggedGraphKernel
    from xllm_core.testing.paged import attend, make_batch

    device = ready(xllm_kit, case)
    geometry = case.geometry(HEADS[1])
    kernel = case.part.build(device, geometry)
    if not isinstance(kernel, RaggedGraphKernel):
        pytest.skip(f"{case.part.offer.name} has no plans for rows of any length that stay in place")
    room, size = 24, case.block_size
    plan = kernel.graph_plan(room, 64)
    for seed, rows in enumerate(
        ([(24, 24)], [(1, 7), (16, 16 + 3 * size), (1, 1)], [(1, 5), (1, size + 1)], [(5, 2 * size + 5), (19, 19)])
    ):
        batch = make_batch(geometry, rows, seed=seed)
        kernel.refill_ragged(plan, batch.layout())
        assert torch.equal(attend(kernel, device, batch, plan=plan, room=room), attend(kernel, device, batch)), (
            f"rows of {rows} tokens (new, all) in a plan of {room}"
        )


def test_features_without_proof(part: Part, feature: str) -> None:
    """A declared feature that the core asks for is proven."""
    pytest.skip(f"the core asks no kernel for {feature!r} yet, so declaring it proves nothing")
