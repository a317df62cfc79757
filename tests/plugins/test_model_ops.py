"""Ops that only some models ask for: chosen for those, asked of no other device, and missed by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.bare_device import PARTS
from tests.fixtures.tiny_models import make_tiny
from xllm_core.config import Settings
from xllm_core.errors import PluginError, ResolutionError
from xllm_core.plugins import CORE_OPS, MODEL_OPS
from xllm_core.plugins.explain import why
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.resolve import Assembly, assemble
from xllm_core.plugins.worker import assembly_of

PLUGIN = """
from xllm_core.plugins import CORE_OPS, REFERENCE_OPS, AttentionSpec, DeviceSpec, ModelSpec, OpSpec, REFERENCE_ATTENTION
KIND, TYPES = frozenset({"bare"}), frozenset({"float32"})
@hookimpl
def xllm_devices():
    yield DeviceSpec(name="bare", target="xllm_bare.parts:Bare", rank=-5)
@hookimpl
def xllm_ops():
    for op in CORE_OPS:
        yield OpSpec(name=op, op=op, target=REFERENCE_OPS[op], devices=KIND, dtypes=TYPES)
@hookimpl
def xllm_attention():
    yield AttentionSpec(name="paged", target=REFERENCE_ATTENTION, devices=KIND, dtypes=TYPES)
@hookimpl
def xllm_models():
    yield ModelSpec(name="choosy", target="xllm_bare.parts:Choosy", architectures={"LlamaForCausalLM"}, rank=1)
"""
CHOOSY = """
from xllm_core.models.llama import Llama
class Choosy(Llama):
    wanted = ("moe_experts",)
    def ops(self, config):
        return self.wanted
"""


@pytest.fixture
def assembled(make_dist: Callable[..., Path], tmp_path: Path) -> Callable[..., Assembly]:
    make_dist("bare", PLUGIN, {"parts.py": PARTS + CHOOSY})
    model = str(make_tiny("llama", tmp_path))

    def run(**use: str) -> Assembly:
        settings = Settings(model={"path": model}, use=use)
        return assemble(settings, PluginManager.discover(settings))

    return run


def test_what_a_family_asks_for_is_in_the_plan(assembled: Callable[..., Assembly]) -> None:
    """And nothing that no one asks for. Killed by: plans for the core's ops alone, or for all."""
    asked = assembled(device="core/reference").plan
    assert (
        set(asked.ops) == {*CORE_OPS, "lm_head", "moe_experts"} and asked.ops["moe_experts"].name == "core/moe_experts"
    )
    assert set(assembled(device="core/reference", model="core/llama").plan.ops) == {*CORE_OPS, "lm_head"}


def test_a_device_without_it_serves_other_models(assembled: Callable[..., Assembly]) -> None:
    """The refusal names op, device, family and who was turned down. Killed by: asking every device for every op."""
    assert set(assembled(device="bare/bare", model="core/llama").plan.ops) == set(CORE_OPS)
    with pytest.raises(ResolutionError) as caught:
        assembled(device="bare/bare")
    message = str(caught.value)
    assert (
        "no op fits moe_experts on bare in float32, which bare/choosy asks for and is offered on reference; choose such a device ([device] name)"
        in message
    )
    assert "core/moe_experts: device bare not in reference" in message


def test_a_worker_that_needs_more_than_the_plan_has_refuses(
    assembled: Callable[..., Assembly], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of the family, say. Killed by: finding out in the first forward."""
    plan = assembled(device="core/reference").plan
    from xllm_bare.parts import Choosy

    assert assembly_of(plan).plan is plan
    monkeypatch.setattr(Choosy, "wanted", MODEL_OPS)
    with pytest.raises(
        PluginError, match="bare/choosy asks here for the ops linear_float32, moe_route, which the plan does not have"
    ):
        assembly_of(plan)


def test_why_tells_of_them() -> None:
    """By name, without a model. Killed by: looking among the core's ops only."""
    settings = Settings(use={"device": "core/reference"})
    lines = why("op.moe_experts", settings, PluginManager.discover(settings))
    assert any(
        "chosen   core/moe_experts" in line for line in (lines if isinstance(lines, list) else lines.splitlines())
    )
