"""Implements every hook there is, each with a part that works."""

from __future__ import annotations

from collections.abc import Iterable

from xllm_core.plugins import (
    CORE_FUSIONS,
    CORE_OPS,
    AttentionSpec,
    CommandSpec,
    DeviceSpec,
    DoctorSpec,
    KVStoreSpec,
    LogitsProcessorSpec,
    ModelSpec,
    ObserverSpec,
    OpSpec,
    PluginContext,
    PluginInfo,
    QuantizationSpec,
    SamplerSpec,
    SchedulerSpec,
    WeightFormatSpec,
    hookimpl,
)

xllm_plugin = PluginInfo(id="good", xllm_api=">=0.1", config="xllm_good.settings:GoodTable")

_TOY = frozenset({"toy"})
_DTYPES = frozenset({"float32"})


@hookimpl
def xllm_devices() -> Iterable[DeviceSpec]:
    """A toy accelerator: host memory under another name. `[plugin.good] probe_answer` is what its probe says."""
    yield DeviceSpec(
        name="toy", target="xllm_good.device:ToyDevice", probe="xllm_good.probe:probe", is_accelerator=True
    )


@hookimpl
def xllm_ops() -> Iterable[OpSpec]:
    """Its own linear and fusions; the rest are the reference, offered for the toy."""
    for name, replaces in CORE_FUSIONS.items():
        attribute = "".join(part.capitalize() for part in name.split("_"))
        yield OpSpec(
            name=name, op=name, target=f"xllm_good.ops:Toy{attribute}", devices=_TOY, dtypes=_DTYPES, rank=5, replaces=replaces
        )  # fmt: skip
    yield OpSpec(name="linear", op="linear", target="xllm_good.ops:ToyLinear", devices=_TOY, dtypes=_DTYPES, rank=5)
    for op in {*CORE_OPS, "linear_int8"} - {"linear"}:
        attribute = "".join(part.capitalize() for part in op.split("_"))
        yield OpSpec(name=op, op=op, target=f"xllm_core.reference.ops:{attribute}", devices=_TOY, dtypes=_DTYPES)


@hookimpl
def xllm_attention() -> Iterable[AttentionSpec]:
    """The reference, offered for the toy, for one head size and block size, and without a soft cap."""
    yield AttentionSpec(
        name="toy",
        target="xllm_core.reference.attention:ReferenceAttention",
        devices=_TOY,
        dtypes=_DTYPES,
        head_sizes=frozenset({16}),
        block_sizes=frozenset({8}),
        features=frozenset({"sliding_window"}),
    )


@hookimpl
def xllm_models() -> Iterable[ModelSpec]:
    """A family of its own name."""
    yield ModelSpec(
        name="toy", target="xllm_good.model:Toy", architectures=frozenset({"ToyForCausalLM"}), dtypes=_DTYPES
    )


@hookimpl
def xllm_weight_formats() -> Iterable[WeightFormatSpec]:
    """Models named `toy:SEED`, made up when they are opened."""
    yield WeightFormatSpec(name="toy", target="xllm_good.weights:ToyFormat", summary="toy:SEED, random weights")


@hookimpl
def xllm_quantizations() -> Iterable[QuantizationSpec]:
    """The core's format, for all linear maps but the last."""
    yield QuantizationSpec(name="inner", target="xllm_good.ops:Inner", ops={"linear": "linear_int8"})


@hookimpl
def xllm_schedulers() -> Iterable[SchedulerSpec]:
    """Last come, first served."""
    yield SchedulerSpec(name="lifo", target="xllm_good.policy:Lifo", rank=-1)


@hookimpl
def xllm_samplers() -> Iterable[SamplerSpec]:
    """Greedy only, and only on the toy."""
    yield SamplerSpec(name="greedy", target="xllm_good.sampling:GreedySampler", devices=_TOY, rank=1)


@hookimpl
def xllm_logits_processors() -> Iterable[LogitsProcessorSpec]:
    """Forbids one token."""
    yield LogitsProcessorSpec(name="ban", target="xllm_good.sampling:Ban")


@hookimpl
def xllm_kv_stores() -> Iterable[KVStoreSpec]:
    """The host store, built with this plugin's settings."""
    yield KVStoreSpec(name="host", target="xllm_core.kv.host_store:HostStore")


@hookimpl
def xllm_observers() -> Iterable[ObserverSpec]:
    """Counts steps."""
    yield ObserverSpec(name="count", target="xllm_good.observer:CountingObserver")


@hookimpl
def xllm_cli(ctx: PluginContext) -> Iterable[CommandSpec]:
    """One command."""
    assert not ctx.settings, "xllm_cli is called before settings are read"
    yield CommandSpec(name="hello", target="xllm_good.commands:hello", summary="Say hello.")


@hookimpl
def xllm_doctor() -> Iterable[DoctorSpec]:
    """One check."""
    yield DoctorSpec(name="toy", target="xllm_good.commands:check", summary="Is the toy in its box?")
