"""A cache in 8 bits: in the plan when asked for, refused where a kernel or an op is missing, half the memory, and close to the exact one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.bare_device import PARTS
from tests.fixtures.tiny_models import make_tiny
from xllm_core import LLM, SamplingParams
from xllm_core.config import Settings
from xllm_core.engine.build import plan_geometry
from xllm_core.errors import ConfigError, PluginError, ResolutionError
from xllm_core.plugins import CORE_OPS
from xllm_core.plugins.contracts.kv import KVGeometry, KVGroupSpec, KVTensorSpec
from xllm_core.plugins.explain import why
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.plan import AssemblyPlan
from xllm_core.plugins.resolve import Assembly, assemble
from xllm_core.plugins.worker import assembly_of
from xllm_core.reference.device import ReferenceDevice
from xllm_core.runtime.kv_cache import KVCache, block_bytes

BARE = """
from xllm_core.plugins import CORE_OPS, REFERENCE_ATTENTION, REFERENCE_OPS, AttentionSpec, DeviceSpec, OpSpec
KIND, TYPES = frozenset({"bare"}), frozenset({"float32"})
@hookimpl
def xllm_devices():
    yield DeviceSpec(name="bare", target="xllm_bare.parts:Bare", rank=-5)
@hookimpl
def xllm_ops():
    for op in (*CORE_OPS, *HAS):
        yield OpSpec(name=op, op=op, target=REFERENCE_OPS[op], devices=KIND, dtypes=TYPES)
@hookimpl
def xllm_attention():
    yield AttentionSpec(name="paged", target=REFERENCE_ATTENTION, devices=KIND, dtypes=TYPES, features=frozenset(FEATURES))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny("llama", tmp_path_factory.mktemp("tiny")))


def settings(model: str, **flat: Any) -> Settings:
    return Settings.from_flags(path=model, **{"device": "core/reference", "num_blocks": 64, "overlap": False, **flat})


def assembled(model: str, **flat: Any) -> Assembly:
    made = settings(model, **flat)
    return assemble(made, PluginManager.discover(made))


def test_it_is_in_the_plan_only_when_asked_for(model: str) -> None:
    """With its op and what the kernel must know; a worker finds the same cache. Killed by: two groups of one plan that differ."""
    plain, small = assembled(model), assembled(model, kv_cache_dtype="int8")
    assert plain.plan.kv_dtype is None and "kv_write_int8" not in plain.plan.ops and plain.plan.kv_write == "kv_write"
    assert not [name for name, _ in plain.plan.unused_fusions if "int8" in name]
    assert small.plan.kv_dtype == "int8" and small.plan.ops["kv_write_int8"].name == "core/kv_write_int8"
    assert set(small.plan.ops) >= set(CORE_OPS) and small.plan.kv_write == "kv_write_int8"
    assert not [name for name in small.plan.ops if name == "rope_kv_write"], "nobody would call it"
    assert {geometry.kv_dtype for geometry in small.plan.geometry.values()} == {"int8"}
    crossed = AssemblyPlan.from_json(small.plan.to_json())
    assert crossed == small.plan and crossed.hash != plain.plan.hash
    assert tuple(assembly_of(crossed).kv_groups) == tuple(small.kv_groups)


def test_what_a_group_holds(model: str) -> None:
    """Codes of the shape that it had, then a step for each head; the store's name for it is another. Killed by: steps per block, one key for both."""
    exact, small = assembled(model, dtype="bfloat16"), assembled(model, dtype="bfloat16", kv_cache_dtype="int8")
    (before,), (after,) = exact.kv_groups, small.kv_groups
    heads, size = before.tensors[0].shape
    codes = tuple(KVTensorSpec(name, (heads, size), "int8") for name in ("k", "v"))
    assert after.tensors == (*codes, *(KVTensorSpec(f"{name}_steps", (heads,), "float32") for name in ("k", "v")))
    assert (after.name, after.layers, after.window) == (before.name, before.layers, before.window)
    device = exact.plan.device.build(0)
    plain, packed = (plan_geometry(a, settings(model), device) for a in (exact, small))
    assert packed.block_bytes[0] / plain.block_bytes[0] == (size + 4) / (2 * size)
    assert packed.fingerprint != plain.fingerprint


def test_a_device_without_the_op_refuses(model: str, make_dist: Callable[..., Path]) -> None:
    """By the op's name and who offers it. Killed by: a cache in the model's dtype, in silence."""
    make_dist("bare", "HAS, FEATURES = (), ('int8_kv',)\n" + BARE, {"parts.py": PARTS})
    with pytest.raises(ResolutionError) as caught:
        assembled(model, device="bare/bare", kv_cache_dtype="int8")
    words = str(caught.value)
    assert (
        "no op fits kv_write_int8 on bare in float32, which [kv] cache_dtype = 'int8' asks for and is offered on"
        in words
    )
    assert "device bare not in reference" in words
    assert assembled(model, device="bare/bare").plan.kv_dtype is None


@pytest.mark.parametrize("shape", [(1, 1, 33), (5, 3, 33), (16, 3, 64)])
def test_blocks_come_back_from_a_store(shape: tuple[int, int, int]) -> None:
    """Steps lie behind codes, at any byte. Killed by: a view of floats that begins between two."""
    size, heads, width = shape
    group = KVGroupSpec(
        "full", "full", (0, 1), tuple(KVTensorSpec(n, (heads, width), "bfloat16") for n in "kv")
    ).in_int8()
    geometry = KVGeometry((group,), size, (3,), (block_bytes(group, size),), "BSGD", "")
    cache = KVCache(ReferenceDevice(0), geometry)
    for tensor in cache.tensors(0):
        tensor.copy_(torch.randint(-127, 127, tensor.shape))
    before = [tensor[1].clone() for tensor in cache.tensors(0)]
    kept = cache.read_block(0, 1)
    assert len(kept) == geometry.block_bytes[0]
    cache.write_block(0, 2, kept)
    assert all(torch.equal(tensor[2], was) for tensor, was in zip(cache.tensors(0), before, strict=True))


def test_a_device_with_neither_names_the_setting(model: str, make_dist: Callable[..., Path]) -> None:
    """As most devices are. Killed by: a refusal that speaks of a feature, and leaves it to the user to find out who asked."""
    make_dist("bare", "HAS, FEATURES = (), ()\n" + BARE, {"parts.py": PARTS})
    with pytest.raises(ResolutionError, match=r"int8_kv \(\[kv\] cache_dtype = 'int8'\)"):
        assembled(model, device="bare/bare", kv_cache_dtype="int8")


def test_a_kernel_that_does_not_say_so_is_refused(model: str, make_dist: Callable[..., Path]) -> None:
    """By the feature's name. Killed by: a kernel that takes codes for numbers."""
    make_dist("bare", "HAS, FEATURES = ('kv_write_int8',), ()\n" + BARE, {"parts.py": PARTS})
    with pytest.raises(ResolutionError, match="int8_kv"):
        assembled(model, device="bare/bare", kv_cache_dtype="int8")


def test_without_a_fusion_the_two_ops_are_called(model: str, make_dist: Callable[..., Path]) -> None:
    """They give what they give on the reference device. Killed by: rotated keys that reach the plain op."""
    make_dist("bare", "HAS, FEATURES = ('kv_write_int8',), ('int8_kv',)\n" + BARE, {"parts.py": PARTS})
    assert set(assembled(model, device="bare/bare", kv_cache_dtype="int8").plan.ops) == {*CORE_OPS, "kv_write_int8"}
    small = scores(model, kv_cache_dtype="int8", dtype="float32")
    assert torch.equal(scores(model, kv_cache_dtype="int8", dtype="float32", device="bare/bare"), small)
    difference = (small - scores(model, dtype="float32")).abs()
    assert 0 < float(difference.mean()) < 0.02, "8 bits cost something, and little"


def scores(model: str, **flat: Any) -> torch.Tensor:
    """Log probabilities of a prompt's own tokens."""
    prompt = {"prompt_token_ids": [(7 * i + i * i) % 100 for i in range(60)]}
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with LLM(model, **{"device": "core/reference", "num_blocks": 64, **flat}) as llm:
        (answer,) = llm.generate([prompt], params, use_tqdm=False)
    pairs = zip(answer.prompt_token_ids[1:], (answer.prompt_logprobs or [])[1:], strict=True)
    return torch.tensor([entry[token].logprob for token, entry in pairs if entry is not None])


def test_a_worker_whose_family_needs_the_op_says_so(model: str) -> None:
    """A plan without it, or with a cache that nobody knows, is no plan. Killed by: finding out in the first forward."""
    plain = assembled(model, kv_cache_dtype="int8").plan.to_json()
    with pytest.raises(PluginError, match=r"this is no plan.*int1"):
        AssemblyPlan.from_json({**plain, "kv_dtype": "int1"})
    del plain["ops"]["kv_write_int8"]
    with pytest.raises(PluginError, match="kv_write_int8"):
        assembly_of(AssemblyPlan.from_json(plain))


def test_names(model: str) -> None:
    """What is known is listed; `xllm plugins why` knows the op."""
    with pytest.raises(ConfigError, match="'auto' or 'int8'"):
        settings(model, kv_cache_dtype="fp8")
    made = Settings(use={"device": "core/reference"}, kv={"cache_dtype": "int8"})
    for kind in ("op", "op.kv_write_int8"):
        text = why(kind, made, PluginManager.discover(made))
        assert "core/kv_write_int8" in (text if isinstance(text, str) else "\n".join(text))
