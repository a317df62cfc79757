"""Ops and fusions against their definitions in `xllm_core.reference.ops`, with the inputs of `xllm_core.testing.op_inputs`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from xllm_core.plugins.contracts.ops import CORE_FUSIONS, CORE_OPS, MODEL_OPS, QUANTIZED_KV_OPS, QUANTIZED_OPS
from xllm_core.plugins.contracts.queries import OpQuery
from xllm_core.plugins.select import unfit_op
from xllm_core.testing.plugin import Kit, kit_of
from xllm_core.testing.subject import Part

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

    from xllm_core.plugins.contracts.device import DeviceBackend
    from xllm_core.testing.op_inputs import Call, OpInputs

TOKENS = (1, 2, 5, 33)
NEIGHBOURS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 128, 255, 256)


@dataclass(frozen=True, slots=True)
class Case:
    """An op in one dtype."""

    part: Part
    dtype: str

    @property
    def component(self) -> str:
        """Its line in the report."""
        return self.part.component


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every op, in every dtype that it declares."""
    parts = kit_of(metafunc.config).subject.parts("op")
    if "case" in metafunc.fixturenames:
        cases = [Case(part, dtype) for part in parts for dtype in sorted(part.spec.dtypes)]
        metafunc.parametrize("case", cases, ids=[f"{case.part.offer.name}-{case.dtype}" for case in cases])
    elif "part" in metafunc.fixturenames:
        metafunc.parametrize("part", parts, ids=[part.offer.name for part in parts])


def ready(kit: Kit, case: Case) -> tuple[DeviceBackend, OpInputs]:
    """The device and the inputs of a case; skips where there is no device, or nothing is known of the op."""
    from xllm_core.testing.op_inputs import OPS, oracle

    name = case.part.spec.op
    if name not in OPS or oracle(name) is None:
        pytest.skip(f"{name!r} has no reference, so nothing says what it must compute")
    kit.importable(case.part)
    device = kit.device(case.part.spec.devices)
    if case.dtype not in device.facts().dtypes:
        pytest.skip(f"{device.facts().name} computes in {', '.join(device.facts().dtypes)}, not in {case.dtype}")
    return device, OPS[name]


class Bound:
    """An op on a device, called with host tensors. layout: of its cache arguments."""

    def __init__(self, op: Any, device: DeviceBackend, inputs: OpInputs, layout: str) -> None:
        self.op, self.device, self.inputs, self.layout = op, device, inputs, layout

    def __call__(self, call: Call) -> list[torch.Tensor]:
        """Results, then what became of the caches, on the host. Arguments that are only read must stay as they were."""
        import torch

        from xllm_core.testing.op_inputs import flat, moved

        def to_device(tensor: torch.Tensor) -> torch.Tensor:
            return self.device.to_device(tensor.clone())

        arguments = tuple(
            moved(argument, self._as_cache if i in self.inputs.caches else to_device)
            for i, argument in enumerate(call.arguments)
        )
        before = [moved(argument, lambda tensor: tensor.clone()) for argument in arguments]
        with torch.inference_mode():
            if call.prepared is not None:
                prepared = self.op.prepare(*moved(call.prepared, to_device))
                answer = self.op(*arguments, prepared)
            else:
                answer = self.op(*arguments)
        self.device.synchronize()
        for i, (old, new) in enumerate(zip(before, arguments, strict=True)):
            is_kept = all(torch.equal(a, b) for a, b in zip(flat(old), flat(new), strict=True))
            assert is_kept or i == call.changed, f"it changed its argument {i}, which it may only read"
        changed = [] if call.changed is None else flat(arguments[call.changed])
        return [*(tensor.cpu() for tensor in flat(answer)), *map(self._from_cache, changed)]

    def _as_cache(self, tensor: torch.Tensor) -> torch.Tensor:
        from xllm_core.testing.paged import laid_out

        return laid_out(tensor, self.layout, self.device)

    def _from_cache(self, tensor: torch.Tensor) -> torch.Tensor:
        return (tensor if self.layout == "BSGD" else tensor.transpose(1, 2)).cpu()


def calls(inputs: OpInputs, dtype: str, tokens: int, device: DeviceBackend) -> list[Call]:
    """What to call an op with, in blocks as the device has them."""
    import torch

    from xllm_core.runtime.dtypes import torch_dtype
    from xllm_core.testing.op_inputs import Draw

    sizes = device.facts().block_sizes
    draw = Draw(torch_dtype(dtype), torch.Generator().manual_seed(tokens), sizes[0] if sizes else 16)
    return list(inputs.calls(draw, tokens))


def layouts(device: DeviceBackend, inputs: OpInputs, declared: Collection[str]) -> tuple[str, ...]:
    """Every KV layout of the device that the op declares, for ops that touch the cache; one that declares none takes all."""
    if not inputs.caches:
        return ("BSGD",)
    known = tuple(layout for layout in device.facts().kv_layouts if not declared or layout in declared)
    assert known, f"it declares {', '.join(sorted(declared))}, the device has {', '.join(device.facts().kv_layouts)}"
    return known


def test_it_equals_the_reference(case: Case, xllm_kit: Kit) -> None:
    """Results equal the reference's, up to the roundings that the definition allows."""
    from xllm_core.reference.device import ReferenceDevice
    from xllm_core.runtime.dtypes import torch_dtype
    from xllm_core.testing.op_inputs import limit, oracle

    device, inputs = ready(xllm_kit, case)
    name = case.part.spec.op
    definition = Bound(oracle(name)(ReferenceDevice(0)), ReferenceDevice(0), inputs, "BSGD")
    for layout in layouts(device, inputs, case.part.spec.layouts):
        op = Bound(case.part.build(device), device, inputs, layout)
        for tokens in TOKENS:
            for number, call in enumerate(calls(inputs, case.dtype, tokens, device)):
                place = f"{name}, call {number} with {tokens} tokens" + (f", layout {layout}" if inputs.caches else "")
                answers, wanted = op(call), definition(call)
                assert len(answers) == len(wanted), f"{place}: {len(answers)} results, {len(wanted)} are defined"
                for answer, want in zip(answers, wanted, strict=True):
                    assert (answer.shape, answer.dtype) == (want.shape, want.dtype), (
                        f"{place}: gives {answer.dtype} {tuple(answer.shape)}, defined is {want.dtype} {tuple(want.shape)}"
                    )
                    difference = (answer.float() - want.float()).abs().nan_to_num(float("inf"))
                    is_wide = want.is_floating_point() and not inputs.caches
                    rounded_to = want.dtype if is_wide else torch_dtype(case.dtype)
                    allowed = difference * 0 if inputs.is_exact else limit(want, rounded_to, inputs.roundings)
                    assert bool((difference <= allowed).all()), (
                        f"{place}: differs by {float(difference.max()):.3g} where {float(allowed.max()):.3g} is rounding"
                    )


def test_a_row_does_not_feel_its_neighbours(case: Case, xllm_kit: Kit) -> None:
    """Row i is equal to the bit for every number of tokens, where the device promises it."""
    from xllm_core.testing.op_inputs import flat, moved

    device, inputs = ready(xllm_kit, case)
    if not device.facts().is_row_invariant:
        pytest.skip(f"{device.facts().name} does not promise rows that are equal to the bit")
    if inputs.caches:
        pytest.skip("it moves values and computes none")
    op = Bound(case.part.build(device), device, inputs, "BSGD")
    for call in calls(inputs, case.dtype, NEIGHBOURS[-1], device):
        num_changed = 0 if call.changed is None else len(flat(call.arguments[call.changed]))
        rows = slice(None, -num_changed or None)  # what is changed in place, a counter, has no row per token
        together = op(call)[rows]
        for count in NEIGHBOURS[:-1]:
            fewer = tuple(
                moved(argument, partial(_first, count=count)) if i in call.by_row else argument
                for i, argument in enumerate(call.arguments)
            )
            for alone, all_rows in zip(op(replace(call, arguments=fewer))[rows], together, strict=True):
                same = (alone == all_rows[:count]).flatten(1).all(1)
                assert bool(same.all()), (
                    f"{case.part.spec.op}: row {int(same.int().argmin())} of {count} differs from itself among {NEIGHBOURS[-1]}"
                )


def _first(tensor: torch.Tensor, count: int) -> torch.Tensor:
    return tensor[:count]


@pytest.mark.spec_only
def test_its_name_means_something(part: Part) -> None:
    """The op is one that the core defines, or a fusion of such."""
    spec = part.spec
    quantized = {**QUANTIZED_OPS, **QUANTIZED_KV_OPS}
    ops = (*CORE_OPS, *MODEL_OPS, *(name for name, replaces in quantized.items() if not replaces))
    if spec.op in ops:
        assert not spec.replaces, f"{spec.op!r} is an op of the core and no fusion; it replaces nothing"
        return
    fusions = {**CORE_FUSIONS, **{name: replaces for name, replaces in quantized.items() if replaces}}
    assert spec.op in fusions or spec.replaces, (
        f"{spec.op!r} is no op of the core and replaces none, so no model ever asks for it; ops are {', '.join(ops)}"
    )
    if spec.op in fusions:
        assert spec.replaces == fusions[spec.op], (
            f"{spec.op!r} stands for {', '.join(fusions[spec.op])}, the spec says {', '.join(spec.replaces) or 'nothing'}"
        )
    unknown = sorted(set(spec.replaces) - {*ops, *fusions})
    assert not unknown, f"{spec.op!r} replaces {', '.join(unknown)}, which nobody defines"


@pytest.mark.spec_only
def test_undeclared_is_refused(part: Part) -> None:
    """Another device, dtype or KV layout than declared is refused before anything is imported."""
    spec = part.spec
    fitting = OpQuery(
        op=spec.op, device_kind=min(spec.devices), dtype=min(spec.dtypes), kv_layout=min(spec.layouts, default="BSGD")
    )
    assert not unfit_op(part.offer, fitting)
    assert unfit_op(part.offer, replace(fitting, device_kind="unheard-of"))
    assert unfit_op(part.offer, replace(fitting, dtype="float8_unheard_of"))
    assert not spec.layouts or unfit_op(part.offer, replace(fitting, kv_layout="unheard-of"))
