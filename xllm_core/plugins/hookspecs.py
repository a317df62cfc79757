"""Every hook there is. A plugin implements those it needs, and only describes: nothing here runs once a model is served.

Common to all: a hook is called once per plugin while plugins load, in the process that assembles, never in a worker and never
between two tokens. It takes `ctx` (an implementation may leave it out) and returns an iterable of frozen specs, or nothing.
Spec names are unique within one plugin and hook. Order of installation never decides: what is chosen follows from pins, preferences,
ranks and declared capabilities (`xllm plugins why KIND` tells). An exception, a value of another type or a name offered twice leaves
the plugin `failed` with the reason; start-up stops only if that plugin was required, pinned or configured.
Wrappers and call order (`tryfirst`, `trylast`) are refused.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from xllm_core.plugins.specs import (
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
    QuantizationSpec,
    SamplerSpec,
    SchedulerSpec,
    Spec,
    WeightFormatSpec,
)

PROJECT = "xllm_core"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def xllm_devices(ctx: PluginContext) -> Iterable[DeviceSpec]:  # type: ignore[empty-body]
    """Offer device backends: where tensors live, how much memory there is, what the device promises.

    Args:
        ctx: the plugin's validated settings and the core's, as plain data.

    Returns: one spec per backend. `probe` is run in a child process with a time limit before anything of the backend is imported.
    Errors: a probe that gives a reason leaves the next device in charge, and the reason is printed; it stops start-up only if the
        device was pinned by `[device] name` or `[use] device`.

    Example::

        @hookimpl
        def xllm_devices():
            yield DeviceSpec(name="npu", target="xllm_ascend.device:NpuDevice", probe="xllm_ascend.probe:probe", is_accelerator=True)
    """


@hookspec
def xllm_ops(ctx: PluginContext) -> Iterable[OpSpec]:  # type: ignore[empty-body]
    """Offer named ops for some devices and dtypes; `xllm_core.reference.ops` is what each of them must compute.

    Args:
        ctx: the plugin's validated settings and the core's, as plain data.

    Returns: one spec per op and implementation. Devices and dtypes that are not declared are never asked for.
    Errors: an op that no installed plugin offers for the chosen device stops assembly with every rejection listed.

    Example::

        @hookimpl
        def xllm_ops():
            yield OpSpec(name="rms_norm", op="rms_norm", target="xllm_cpu.norm:RmsNorm", rank=50,
                         devices={"cpu"}, dtypes={"float32", "bfloat16"})
    """


@hookspec
def xllm_attention(ctx: PluginContext) -> Iterable[AttentionSpec]:  # type: ignore[empty-body]
    """Offer attention kernels over paged KV. One is chosen per KV group of the model.

    Args:
        ctx: the plugin's validated settings and the core's, as plain data.

    Returns: one spec per kernel. A feature that the spec does not declare is denied, so a kernel written before the feature
        existed is passed over and never computes the wrong thing.
    Errors: a group that no kernel can serve stops assembly with every rejection listed.

    Example::

        @hookimpl
        def xllm_attention():
            yield AttentionSpec(name="flash", target="xllm_cuda.flash:FlashAttention", rank=50, devices={"cuda"},
                                dtypes={"bfloat16"}, head_sizes={64, 128}, features={"sliding_window"})
    """


@hookspec
def xllm_models(ctx: PluginContext) -> Iterable[ModelSpec]:  # type: ignore[empty-body]
    """Offer model families, found by the name in config.json's `architectures`.

    Args:
        ctx: the plugin's validated settings and the core's, as plain data.

    Returns: one spec per family, or a fallback (`is_fallback`) for architectures that no family names.
    Errors: an architecture that nobody offers is refused by name, with the known ones and each fallback's reason beside it.

    Example::

        @hookimpl
        def xllm_models():
            yield ModelSpec(name="glm4", target="xllm_models_glm.glm4:Glm4", architectures={"Glm4ForCausalLM"})
    """


@hookspec
def xllm_weight_formats(ctx: PluginContext) -> Iterable[WeightFormatSpec]:  # type: ignore[empty-body]
    """Offer ways to find a model by its reference, and to open its files.

    Args:
        ctx: the plugin's validated settings and the core's, as plain data.

    Returns: one spec per format or source. Formats are asked in descending rank; the first that answers wins.
    Errors: a reference that nobody takes is refused with the list of who was asked.

    Example::

        @hookimpl
        def xllm_weight_formats():
            yield WeightFormatSpec(name="bucket", target="xllm_bucket.source:Bucket", rank=10)
    """


@hookspec
def xllm_quantizations(ctx: PluginContext) -> Iterable[QuantizationSpec]:  # type: ignore[empty-body]
    """Offer formats that weights of linear maps are turned into at load, or that files hold them in, and name the ops that read them.

    Args:
        ctx: the plugin's validated settings and the core's, as plain data.

    Returns: one spec per format. None is used unless `[model] quantization = "NAME"` names it.
    Errors: a format that was named, and for whose ops the chosen device has nothing, stops assembly with every rejection listed; so does one
        with `kinds` where the model's files hold none of them.

    Example::

        @hookimpl
        def xllm_quantizations():
            yield QuantizationSpec(name="fp8", target="xllm_cuda.fp8:Fp8", ops={"linear": "linear_fp8", "lm_head": "lm_head_fp8"})
    """


@hookspec
def xllm_schedulers(ctx: PluginContext) -> Iterable[SchedulerSpec]:  # type: ignore[empty-body]
    """Offer scheduling policies: who is admitted first, how chunks are cut, who gives way.

    Args:
        ctx: the plugin's validated settings and the core's, as plain data.

    Returns: one spec per policy; users choose by `[use] scheduler = "id/name"`.
    Errors: a policy that was chosen and cannot be imported stops start-up.

    Example::

        @hookimpl
        def xllm_schedulers():
            yield SchedulerSpec(name="deadline", target="xllm_deadline.policy:EarliestDeadline")
    """


@hookspec
def xllm_samplers(ctx: PluginContext) -> Iterable[SamplerSpec]:  # type: ignore[empty-body]
    """Offer ways to choose a token from logits. The choice is a pure function of logits, parameters and (seed, index, position).

    Args:
        ctx: the plugin's validated settings and the core's, as plain data.

    Returns: one spec per sampler; empty `devices` means any.
    Errors: no sampler for the chosen device stops assembly with every rejection listed.

    Example::

        @hookimpl
        def xllm_samplers():
            yield SamplerSpec(name="fused", target="xllm_cuda.sampler:FusedSampler", rank=50, devices={"cuda"})
    """


@hookspec
def xllm_logits_processors(ctx: PluginContext) -> Iterable[LogitsProcessorSpec]:  # type: ignore[empty-body]
    """Offer what changes logits before a token is chosen. All of them are active, in descending rank, unless `[use]` lists others.

    Args:
        ctx: the plugin's validated settings and the core's, as plain data.

    Returns: one spec per processor; each is asked per sequence whether it applies.
    Errors: a processor that cannot be imported stops start-up: leaving it out would change answers in silence.

    Example::

        @hookimpl
        def xllm_logits_processors():
            yield LogitsProcessorSpec(name="watermark", target="xllm_watermark.processor:Watermark", rank=10)
    """


@hookspec
def xllm_kv_stores(ctx: PluginContext) -> Iterable[KVStoreSpec]:  # type: ignore[empty-body]
    """Offer stores that hold KV blocks outside device memory (host, disk, remote).

    Args:
        ctx: the plugin's validated settings and the core's, as plain data.

    Returns: one spec per store. None is used unless `[use] kv_store = "id/name"` names it.
    Errors: a store that was named and cannot be built stops start-up.

    Example::

        @hookimpl
        def xllm_kv_stores():
            yield KVStoreSpec(name="store", target="xllm_mooncake.store:MooncakeStore", scopes={"remote"})
    """


@hookspec
def xllm_observers(ctx: PluginContext) -> Iterable[ObserverSpec]:  # type: ignore[empty-body]
    """Offer receivers of step records, fed in batches on a thread of their own.

    Args:
        ctx: the plugin's validated settings and the core's, as plain data.

    Returns: one spec per observer. Only those in `[use] observers = ["id/name"]` are active.
    Errors: an observer that was named and cannot be built stops start-up.

    Example::

        @hookimpl
        def xllm_observers():
            yield ObserverSpec(name="csv", target="xllm_csv.observer:CsvObserver")
    """


@hookspec
def xllm_cli(ctx: PluginContext) -> Iterable[CommandSpec]:  # type: ignore[empty-body]
    """Offer commands. They appear as `xllm ID NAME`, ID being the plugin's; the core's own stand at the top.

    Called when `xllm` needs a list of commands, before any setting is read: `ctx` is empty for this hook.

    Args:
        ctx: empty here; the command reads its settings when it runs.

    Returns: one spec per command. `summary` is the one line that help shows; the target is imported when the command runs.
    Errors: an unknown command names the nearest one.

    Example::

        @hookimpl
        def xllm_cli():
            yield CommandSpec(name="status", target="xllm_mooncake.commands:status", summary="Show what the store holds.")
    """


@hookspec
def xllm_doctor(ctx: PluginContext) -> Iterable[DoctorSpec]:  # type: ignore[empty-body]
    """Offer checks of this machine: is what the plugin needs here (driver, library, wheel), and if not, how does one get it.

    Args:
        ctx: the plugin's validated settings and the core's, as plain data.

    Returns: one spec per check. Its target runs when `xllm doctor` or `xllm plugins list --why` is asked, and never at a start.
    Errors: whatever a check raises becomes a finding under its name; the others run.

    Example::

        @hookimpl
        def xllm_doctor():
            yield DoctorSpec(name="driver", target="xllm_ascend.doctor:driver", summary="Is the driver installed?")
    """


HOOKS: dict[str, type[Spec]] = {
    "xllm_attention": AttentionSpec,
    "xllm_cli": CommandSpec,
    "xllm_devices": DeviceSpec,
    "xllm_doctor": DoctorSpec,
    "xllm_kv_stores": KVStoreSpec,
    "xllm_logits_processors": LogitsProcessorSpec,
    "xllm_models": ModelSpec,
    "xllm_observers": ObserverSpec,
    "xllm_ops": OpSpec,
    "xllm_quantizations": QuantizationSpec,
    "xllm_samplers": SamplerSpec,
    "xllm_schedulers": SchedulerSpec,
    "xllm_weight_formats": WeightFormatSpec,
}
"""What each hook must return, by its name."""
