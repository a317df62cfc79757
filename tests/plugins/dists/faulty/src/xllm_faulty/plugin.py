"""Offers one part per fault, under the fault's name."""

from __future__ import annotations

from collections.abc import Iterable

from xllm_core.plugins import (
    AttentionSpec,
    DeviceSpec,
    KVStoreSpec,
    LogitsProcessorSpec,
    ModelSpec,
    OpSpec,
    PluginInfo,
    SamplerSpec,
    SchedulerSpec,
    hookimpl,
)

xllm_plugin = PluginInfo(id="faulty", xllm_api=">=0.1")

_BOASTER = frozenset({"boaster"})
_DTYPES = frozenset({"float32"})


@hookimpl
def xllm_devices() -> Iterable[DeviceSpec]:
    """Promises rows that are equal to the bit. Memory is not zeroed."""
    yield DeviceSpec(name="boaster", target="xllm_faulty.device:Boaster", rank=-10)


@hookimpl
def xllm_ops() -> Iterable[OpSpec]:
    """An op that rounds on the way, one whose rows feel the others, one that ignores -1, and one that nobody knows."""
    for name, op in (
        ("rounds", "linear"), ("feels_rows", "linear"), ("writes_minus_one", "kv_write"), ("unheard_of", "unheard_of"), ("changes_input", "silu_mul"),
    ):  # fmt: skip
        attribute = "".join(word.capitalize() for word in name.split("_"))
        target = f"xllm_faulty.ops:{attribute}" if name != "unheard_of" else "xllm_faulty.ops:Rounds"
        yield OpSpec(name=name, op=op, target=target, devices=_BOASTER, dtypes=_DTYPES, rank=-1)


@hookimpl
def xllm_attention() -> Iterable[AttentionSpec]:
    """One that ignores its window, one off by one at block edges, one whose rows feel their neighbours."""
    for name in ("ignores_window", "off_by_one", "feels_rows"):
        attribute = "".join(word.capitalize() for word in name.split("_"))
        yield AttentionSpec(
            name=name, target=f"xllm_faulty.kernels:{attribute}", devices=_BOASTER, dtypes=_DTYPES, head_sizes=frozenset({16}),
            block_sizes=frozenset({8}), features=frozenset({"sliding_window"}), rank=-1,
        )  # fmt: skip


@hookimpl
def xllm_models() -> Iterable[ModelSpec]:
    """A Llama with another norm epsilon than its configuration says, and one that cuts a weight the wrong way."""
    for name in ("wrong_eps", "wrong_axis"):
        attribute = "".join(word.capitalize() for word in name.split("_"))
        yield ModelSpec(
            name=name, target=f"xllm_faulty.models:{attribute}", architectures=frozenset({"LlamaForCausalLM"}), rank=-1
        )


@hookimpl
def xllm_schedulers() -> Iterable[SchedulerSpec]:
    """One that starves the old, one that drops an index, one with a memory, one that asks for too much, one that says static and is not."""
    for name in ("starves", "drops", "remembers", "greedy", "not_static"):
        attribute = "".join(word.capitalize() for word in name.split("_"))
        yield SchedulerSpec(name=name, target=f"xllm_faulty.policies:{attribute}", rank=-1)


@hookimpl
def xllm_samplers() -> Iterable[SamplerSpec]:
    """One whose choice depends on its batch, one that counts temperature twice."""
    yield SamplerSpec(name="mates", target="xllm_faulty.choosing:Mates", rank=-1)
    yield SamplerSpec(name="too_cold", target="xllm_faulty.choosing:TooCold", rank=-1)


@hookimpl
def xllm_logits_processors() -> Iterable[LogitsProcessorSpec]:
    """One that touches rows of others, one whose forks share, one that remembers who was in a slot before."""
    for name in ("foreign_rows", "shared_forks", "stale_slots"):
        attribute = "".join(word.capitalize() for word in name.split("_"))
        yield LogitsProcessorSpec(name=name, target=f"xllm_faulty.choosing:{attribute}")


@hookimpl
def xllm_kv_stores() -> Iterable[KVStoreSpec]:
    """One that loses a bit, one whose lookup waits, one that copies on the caller's thread, one that hits anything."""
    for name in ("flips_a_bit", "lookup_waits", "start_waits", "always_hits"):
        attribute = "".join(word.capitalize() for word in name.split("_"))
        yield KVStoreSpec(name=name, target=f"xllm_faulty.stores:{attribute}", rank=-1)
