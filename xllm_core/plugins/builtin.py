"""Plugin `core`: everything built in, offered through the same hooks as everybody else's parts. Names only; nothing is imported."""

from __future__ import annotations

from collections.abc import Iterable

from xllm_core.plugins.contracts.ops import CORE_FUSIONS, REFERENCE_ATTENTION, REFERENCE_OPS
from xllm_core.plugins.hookspecs import hookimpl
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
    PluginInfo,
    QuantizationSpec,
    SamplerSpec,
    SchedulerSpec,
    WeightFormatSpec,
)

xllm_plugin = PluginInfo(id="core", xllm_api=">=0.1", config="xllm_core.config:CorePluginTable")

_REFERENCE = frozenset({"reference"})
_DTYPES = frozenset({"float32", "bfloat16"})


@hookimpl
def xllm_devices() -> Iterable[DeviceSpec]:
    """The device that is always there."""
    yield DeviceSpec(
        name="reference",
        target="xllm_core.reference.device:ReferenceDevice",
        summary="Plain PyTorch on the CPU: slow, obvious, the oracle of the others.",
    )


@hookimpl
def xllm_ops() -> Iterable[OpSpec]:
    """The definition of every op: `rms_norm` is `xllm_core.reference.ops:RmsNorm`, and so on."""
    checks = {"moe_experts": "xllm_core.reference.ops:lacks_grouped_mm"}
    for op, target in REFERENCE_OPS.items():
        yield OpSpec(
            name=op, op=op, target=target, check=checks.get(op), devices=_REFERENCE, dtypes=_DTYPES, summary="the reference",
        )  # fmt: skip
    yield OpSpec(  # the one fusion that it has a use for: other results, not only faster ones
        name="lm_head", op="lm_head", target="xllm_core.reference.ops:LmHead", devices=_REFERENCE, dtypes=_DTYPES,
        replaces=CORE_FUSIONS["lm_head"], summary="the reference",
    )  # fmt: skip


@hookimpl
def xllm_attention() -> Iterable[AttentionSpec]:
    """Paged attention in plain PyTorch."""
    yield AttentionSpec(
        name="paged",
        target=REFERENCE_ATTENTION,
        devices=_REFERENCE,
        dtypes=_DTYPES,
        features=frozenset({"sliding_window", "soft_cap", "int8_kv"}),
        summary="the reference",
    )


@hookimpl
def xllm_models() -> Iterable[ModelSpec]:
    """Dense decoders, and for what nobody names transformers' own classes."""
    architectures = {
        "llama": ("xllm_core.models.llama:Llama", "LlamaForCausalLM"),
        "mistral": ("xllm_core.models.llama:Mistral", "MistralForCausalLM"),
        "qwen2": ("xllm_core.models.qwen:Qwen2", "Qwen2ForCausalLM"),
        "qwen3": ("xllm_core.models.qwen:Qwen3", "Qwen3ForCausalLM"),
    }
    for name, (target, architecture) in architectures.items():
        yield ModelSpec(name=name, target=target, architectures=frozenset({architecture}))
    yield ModelSpec(
        name="transformers",
        target="xllm_core.models.transformers_fallback:TransformersFallback",
        check="xllm_core.models.transformers_fallback:check",
        requires=("transformers",),
        is_fallback=True,
        summary="fallback: transformers' own code, our paged KV",
    )


@hookimpl
def xllm_weight_formats() -> Iterable[WeightFormatSpec]:
    """Local files first, an installed package by its prefix, the hub for what nobody else knew."""
    package = "xllm_core.runtime.formats"
    yield WeightFormatSpec(
        name="package",
        target=f"{package}.package:Package",
        rank=3,
        summary="pkg:NAME, weights shipped in an installed Python package",
    )
    yield WeightFormatSpec(name="gguf", target=f"{package}.gguf_file:GGUF", rank=2, summary="one .gguf file")
    yield WeightFormatSpec(
        name="safetensors",
        target=f"{package}.safetensors_dir:SafetensorsDirectory",
        rank=1,
        summary="a Hugging Face directory",
    )
    yield WeightFormatSpec(
        name="hub", target=f"{package}.hub:Hub", rank=-100, summary="OWNER/NAME on the Hugging Face hub"
    )


@hookimpl
def xllm_quantizations() -> Iterable[QuantizationSpec]:
    """What the core defines; a device needs ops that read it."""
    yield QuantizationSpec(
        name="int8", target="xllm_core.reference.quantization:Int8", summary="8-bit integers, a step per output channel and per token",
        ops={"linear": "linear_int8", "lm_head": "lm_head_int8", "linear_silu_mul": "linear_silu_mul_int8"},
    )  # fmt: skip
    yield QuantizationSpec(
        name="gguf", target="xllm_core.reference.quantization:Gguf", summary="the blocks of 4 and 8 bits of a GGUF file, as they are",
        ops={"linear": "linear_blocks", "lm_head": "lm_head_blocks", "linear_silu_mul": "linear_silu_mul_blocks"},
        kinds=frozenset({"Q4_0", "Q4_1", "Q8_0"}),
    )  # fmt: skip


@hookimpl
def xllm_schedulers() -> Iterable[SchedulerSpec]:
    """Policies. Of equal ranks the first by name serves when nobody says otherwise: `fcfs`."""
    yield SchedulerSpec(name="fcfs", target="xllm_core.engine.policy:Fcfs", summary="first come, first served")
    yield SchedulerSpec(name="priority", target="xllm_core.engine.policy:Priority", summary="lower `priority` first")


@hookimpl
def xllm_samplers() -> Iterable[SamplerSpec]:
    """One sampler for every device."""
    yield SamplerSpec(
        name="gumbel",
        target="xllm_core.runtime.sampler:GumbelSampler",
        summary="argmax of scores with counter-based noise",
    )


@hookimpl
def xllm_logits_processors() -> Iterable[LogitsProcessorSpec]:
    """Additive changes first; what forbids tokens comes last, so that nothing lifts a ban again."""
    module = "xllm_core.runtime.processors"
    yield LogitsProcessorSpec(name="penalties", target=f"{module}:Penalties", rank=-10)
    yield LogitsProcessorSpec(name="logit_bias", target=f"{module}:LogitBias", rank=-20)
    yield LogitsProcessorSpec(name="min_tokens", target=f"{module}:MinTokens", rank=-90)
    yield LogitsProcessorSpec(name="allowed_tokens", target=f"{module}:AllowedTokens", rank=-100)


@hookimpl
def xllm_kv_stores() -> Iterable[KVStoreSpec]:
    """Host memory, bounded by `[plugin.core] host_store_bytes`."""
    yield KVStoreSpec(
        name="host",
        target="xllm_core.kv.host_store:HostStore",
        scopes=frozenset({"local"}),
        summary="host memory of this process",
    )


@hookimpl
def xllm_observers() -> Iterable[ObserverSpec]:
    """One line a while."""
    yield ObserverSpec(name="log", target="xllm_core.engine.metrics:LogObserver", summary="rates, to the log")


@hookimpl
def xllm_cli() -> Iterable[CommandSpec]:
    """Commands at the top of `xllm`."""
    summaries = {
        "serve": "Serve a model over HTTP, as OpenAI's API.",
        "generate": "Complete prompts and print the answers.",
        "chat": "Talk to a model in the terminal.",
        "run-batch": "Answer a file of requests.",
        "verify": "Prove that switching features on changes no answer.",
        "bench": "Measure throughput or latency of a model.",
        "profile": "Fit a formula for the time of a step, and show its error.",
        "doctor": "Check this machine, the plugins and what they would choose.",
        "models": "Show a model's facts, or the architectures that can be served.",
        "plan": "Show everything that a start would decide, and what decided it.",
        "plugins": "List plugins, explain choices, and say which take part.",
        "config": "Show every setting and where it comes from.",
    }
    for name, summary in summaries.items():
        yield CommandSpec(name=name, target=f"xllm_core.commands.{name.replace('-', '_')}:command", summary=summary)


@hookimpl
def xllm_doctor() -> Iterable[DoctorSpec]:
    """What every machine needs, in the order in which one thing needs another."""
    checks = {
        "python": "Is it new enough?",
        "torch": "Can it be imported?",
        "plugins": "Which load, and why not the others?",
        "devices": "Which can be used, and how much memory is free?",
        "caches": "Can they be written?",
    }
    for i, (name, summary) in enumerate(checks.items()):
        yield DoctorSpec(
            name=name, target=f"xllm_core.commands.doctor:check_{name}", rank=len(checks) - i, summary=summary
        )
