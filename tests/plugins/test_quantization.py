"""A format of weights: chosen by name, refused where its ops are missing, and seen by what must tell it apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.constants import GGMLQuantizationType as Kind

from tests.fixtures.bare_device import PARTS
from tests.fixtures.tiny_models import make_tiny
from xllm_core.config import Settings
from xllm_core.engine.build import build_engine, load_model, plan_geometry
from xllm_core.errors import ConfigError, ResolutionError
from xllm_core.plugins import CORE_OPS, QuantizationSpec
from xllm_core.plugins.explain import why
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.plan import AssemblyPlan
from xllm_core.plugins.resolve import Assembly, assemble
from xllm_core.reference.ops import LmHeadBlocks
from xllm_core.testing.driving import drive
from xllm_core.testing.tiny_gguf import write_tiny_gguf
from xllm_core.types import EngineRequest, SamplingParams

BARE = """
from xllm_core.plugins import CORE_OPS, QUANTIZED_OPS, REFERENCE_ATTENTION, REFERENCE_OPS, AttentionSpec, DeviceSpec, OpSpec
KIND, TYPES = frozenset({"bare"}), frozenset({"float32"})
@hookimpl
def xllm_devices():
    yield DeviceSpec(name="bare", target="xllm_bare.parts:Bare", rank=-5)
@hookimpl
def xllm_ops():
    for op in (*CORE_OPS, *HAS):
        target = REFERENCE_OPS.get(op, "xllm_core.reference.ops:LinearSiluMulInt8")
        yield OpSpec(name=op, op=op, target=target, devices=KIND, dtypes=TYPES, replaces=QUANTIZED_OPS.get(op, ()))
@hookimpl
def xllm_attention():
    yield AttentionSpec(name="paged", target=REFERENCE_ATTENTION, devices=KIND, dtypes=TYPES)
"""
DEVICE = "core/reference"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny("llama", tmp_path_factory.mktemp("tiny")))


def settings(model: str, **flat: Any) -> Settings:
    return Settings.from_flags(path=model, **{"device": DEVICE, "num_blocks": 64, "overlap": False, **flat})


def assembled(model: str, **flat: Any) -> Assembly:
    made = settings(model, **flat)
    return assemble(made, PluginManager.discover(made))


def said(model: str, **flat: Any) -> dict[str, list[int]]:
    made = settings(model, **flat)
    built = build_engine(assembled(model, **flat), made)
    try:
        params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        return drive(built.engine, [EngineRequest("a", (5, 3, 8, 1), params, seed=0)])
    finally:
        built.engine.close()


def test_it_is_in_the_plan_only_when_named(model: str) -> None:
    """With its ops and what they are instead of; the plan crosses to a worker. Killed by: a plan for all formats, or for none."""
    plain, plan = assembled(model).plan, assembled(model, quantization="int8").plan
    assert plain.quantization is None and not plain.quantized_ops and not [op for op in plain.ops if "int8" in op]
    assert not [name for name, _ in plain.unused_fusions if "int8" in name]
    assert plan.quantization is not None and plan.quantization.name == "core/int8"
    assert plan.quantized_ops == {"linear": "linear_int8", "lm_head": "lm_head_int8"}
    assert "lm_head" not in plan.ops and "linear_silu_mul" not in plan.ops, "nobody would call them"
    assert plan.ops["linear_int8"].name == "core/linear_int8" and set(plan.ops) >= set(CORE_OPS)
    assert AssemblyPlan.from_json(plan.to_json()) == plan and plan.hash != plain.hash
    assert plan.choices()["quantization"] is plan.quantization


def test_a_device_without_its_ops_refuses(model: str, make_dist: Callable[..., Path]) -> None:
    """By the op's name, with who offers it. Killed by: serving unquantised weights in silence."""
    make_dist("bare", "HAS = ('linear_int8',)\n" + BARE, {"parts.py": PARTS})
    with pytest.raises(ResolutionError) as caught:
        assembled(model, device="bare/bare", quantization="int8")
    words = str(caught.value)
    assert "[use] quantization = 'int8' cannot serve linear maps on bare in float32" in words
    assert "no op fits lm_head_int8 on bare in float32" in words and "device bare not in reference" in words
    assert assembled(model, device="bare/bare").plan.quantization is None


def test_a_fusion_over_the_format(model: str, make_dist: Callable[..., Path]) -> None:
    """Taken with the format, gives what the ops give, and is nobody's business without. Killed by: asking the plain fusion."""
    make_dist("bare", "HAS = ('linear_int8', 'lm_head_int8', 'linear_silu_mul_int8')\n" + BARE, {"parts.py": PARTS})
    plan = assembled(model, device="bare/bare", quantization="int8").plan
    assert plan.quantized_ops["linear_silu_mul"] == "linear_silu_mul_int8"
    expected = said(model, quantization="int8", dtype="float32")
    assert said(model, device="bare/bare", quantization="int8") == expected
    without = assembled(model, device="bare/bare").plan
    assert "linear_silu_mul_int8" not in without.ops and not [
        name for name, _ in without.unused_fusions if "int8" in name
    ]


def test_weights_are_in_the_format(model: str) -> None:
    """Every linear map and the head; other weights stay. Killed by: a role that asks for the plain op."""
    assembly = assembled(model, quantization="int8")
    loaded = load_model(assembly, settings(model, quantization="int8"))
    prepared = [linear.prepared for linear in loaded.parts._linears]
    assert prepared and {len(weights) for weights in prepared} == {3}
    assert {str(weights[0].dtype) for weights in prepared} == {"torch.int8"}
    plain = load_model(assembled(model), settings(model))
    assert {len(linear.prepared) for linear in plain.parts._linears} == {2}


def test_stored_kv_is_told_apart(model: str) -> None:
    """Quantised weights make other keys and values of the same tokens. Killed by: a fingerprint without the format."""
    keys = set()
    for flat in ({}, {"quantization": "int8"}):
        assembly = assembled(model, **flat)
        device = assembly.plan.device.build(0)
        keys.add(plan_geometry(assembly, settings(model, **flat), device).fingerprint)
    assert len(keys) == 2


def test_names(model: str) -> None:
    """Unknown ones are guessed at, and two different ones refused; `[use]` and `[model]` mean the same."""
    with pytest.raises(ResolutionError, match=r"'int9': nothing is offered under that name.*int8"):
        assembled(model, quantization="int9")
    with pytest.raises(ConfigError, match=r"\[model\] quantization = 'int8' and \[use\] quantization = 'x' disagree"):
        assembled(model, quantization="int8", use={"quantization": "x"})
    pinned = assembled(model, use={"quantization": "core/int8"}).plan.quantization
    assert pinned is not None and pinned.name == "core/int8"
    with pytest.raises(ValueError, match="'linear' is needed"):
        QuantizationSpec(name="x", target="a:b", ops={"embedding": "y"})


def test_why_tells() -> None:
    """What stands for what; that none is named; and a single op."""
    for name, words in {
        "int8": (
            "chosen   core/int8  pinned by [use] quantization",
            "linear by linear_int8",
            "lm_head by lm_head_int8",
        ),
        None: ("quantization: none is used", "offered  core/int8"),
    }.items():
        made = Settings.from_flags(device=DEVICE, quantization=name)
        text = why("quantization", made, PluginManager.discover(made))
        assert all(word in text for word in words) and "silu" not in text, text
    made = Settings.from_flags(device=DEVICE)
    assert "chosen   core/linear_int8" in why("op.linear_int8", made, PluginManager.discover(made))


MIXED = {
    "v_proj": Kind.Q8_0,
    "o_proj": Kind.F16,
    "gate_proj": Kind.F32,
    "down_proj": Kind.Q4_0,
    "embed_tokens": Kind.Q8_0,
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tied Llama in one file: a stack of two kinds, one with a plain part, and a plain matrix; the rest Q4_1."""
    source = make_tiny("llama", tmp_path_factory.mktemp("source"), tie_word_embeddings=True)
    return str(
        write_tiny_gguf(source, source / "m.gguf", kind_of=lambda name: MIXED.get(name.split(".")[-2], Kind.Q4_1))
    )


def test_a_file_is_served_as_it_is(file: str, caplog: pytest.LogCaptureFixture) -> None:
    """Blocks where all of a parameter has them, else plain weights, which is said once. Killed by: unpacking all, or a stack in halves."""
    plan = assembled(file, quantization="gguf").plan
    assert plan.quantized_kinds == ("Q4_0", "Q4_1", "Q8_0") and AssemblyPlan.from_json(plan.to_json()) == plan
    assert plan.quantized_ops == {"linear": "linear_blocks", "lm_head": "lm_head_blocks"}
    assert {"linear_blocks", "lm_head_blocks", "linear", "lm_head"} <= set(plan.ops), (
        "what is plain in the file needs its ops too"
    )
    with caplog.at_level("INFO", "xllm.engine"):
        loaded = load_model(assembled(file, quantization="gguf"), settings(file, quantization="gguf"))
    said_so = [record.getMessage() for record in caplog.records if "as the file packs them" in record.getMessage()]
    assert said_so == ["core/gguf: 9 of 15 matrices are served as the file packs them, 6 in float32"]
    held = {linear.weight.name: linear.prepared for linear in loaded.parts._linears}
    is_packed = {name: prepared[0].dtype == torch.int8 for name, prepared in held.items()}
    for layer in range(2):
        names = {"qkv": True, "o": False, "gate_up": False, "down": True}
        assert {part: is_packed[f"layers.{layer}.{part}.weight"] for part in names} == names
    assert is_packed["embed.weight"]


def test_answers_are_those_of_the_unpacked_file(file: str) -> None:
    """The weights are the same numbers, so what activations lose is all that differs. Killed by: rows in the file's order, a stack out of order."""
    reference, blocks = (
        load_model(assembled(file, quantization=q), settings(file, quantization=q)) for q in (None, "gguf")
    )
    torch.manual_seed(0)
    for plain, packed in zip(reference.parts._linears, blocks.parts._linears, strict=True):
        assert plain.weight.name == packed.weight.name
        x = torch.randn(5, plain.weight.shape[1])
        wide, narrow = plain(x), packed(x)
        error = (wide - narrow).square().mean().sqrt() / wide.square().mean().sqrt()
        assert error < 0.01, (plain.weight.name, error)
    assert [len(ids) for ids in said(file, quantization="gguf").values()] == [12] and isinstance(
        blocks.ops["lm_head_blocks"], LmHeadBlocks
    )


def test_files_without_blocks_are_refused(model: str, file: str, tmp_path: Path) -> None:
    """With the format that opened it, what it holds, and what to do. Killed by: serving it unpacked without a word."""
    with pytest.raises(ResolutionError) as caught:
        assembled(model, quantization="gguf")
    words = str(caught.value)
    assert (
        "core/safetensors, gives no weight packed" in words
        and "Q4_0, Q4_1, Q8_0" in words
        and "leave the setting out" in words
    )
    plain = write_tiny_gguf(Path(model), tmp_path / "plain.gguf", kind_of=lambda name: Kind.F16)
    with pytest.raises(ResolutionError, match=r"plain.gguf holds none that is packed"):
        assembled(str(plain), quantization="gguf")
    assert assembled(str(plain), quantization="int8").plan.quantized_kinds == ()
