"""The surface that plugins import, and the only one: hooks, specs, the contracts that their targets build, and the words those speak.

A plugin is a distribution with one entry point in group `xllm_core.plugins`, whose module holds `xllm_plugin = PluginInfo(...)` and
functions marked `@hookimpl` that return specs. Importing this package loads no torch, and a contract only when it is named: plugin
modules run at every start, also of `xllm --help`, and most of them need only specs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from xllm_core.plugins.hookspecs import hookimpl
from xllm_core.plugins.specs import (
    API_VERSION,
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
    Spec,
    WeightFormatSpec,
)

if TYPE_CHECKING:
    from xllm_core.errors import ConfigError, ModelFormatError
    from xllm_core.models.config import Fields, RopeConfig, read_dtype, read_rope
    from xllm_core.models.rope import Rotary
    from xllm_core.plugins.contracts.attention import AttentionGeometry, AttentionKernel, BatchLayout, KVSegments
    from xllm_core.plugins.contracts.device import AsyncDevice, DeviceBackend, DeviceFacts, LazyMemoryDevice, MemoryInfo
    from xllm_core.plugins.contracts.doctor import Finding
    from xllm_core.plugins.contracts.graphs import (
        Graph,
        GraphDevice,
        GraphKernel,
        NotCapturableError,
        RaggedGraphKernel,
    )
    from xllm_core.plugins.contracts.kv import (
        Hit,
        KVGeometry,
        KVGroupSpec,
        KVIndex,
        KVMover,
        KVStore,
        KVTensorSpec,
        KVView,
        Later,
        Miss,
    )
    from xllm_core.plugins.contracts.model import (
        AsksForOps,
        Attention,
        Experts,
        ForwardContext,
        Layer,
        Linear,
        Model,
        ModelFamily,
        ModelShape,
        Parts,
    )
    from xllm_core.plugins.contracts.observer import Observer, StepRecord
    from xllm_core.plugins.contracts.ops import (
        CORE_FUSIONS,
        CORE_OPS,
        MODEL_OPS,
        QUANTIZED_KV_OPS,
        QUANTIZED_OPS,
        REFERENCE_ATTENTION,
        REFERENCE_OPS,
        GivesRows,
        KeepsPrepared,
        LinearOp,
        MoeExpertsOp,
        MoeRouteOp,
        PackedQuantization,
        Quantization,
        QuantizedLinearOp,
    )
    from xllm_core.plugins.contracts.queries import AttentionQuery, KVStoreQuery, ModelQuery, OpQuery, SamplerQuery
    from xllm_core.plugins.contracts.sampling import LogitsProcessor, ProcessorContext, Sampler, SamplingBatch
    from xllm_core.plugins.contracts.scheduler import SchedulerPolicy, SequenceView
    from xllm_core.plugins.contracts.weights import (
        Axis,
        Checkpoint,
        HoldsPacked,
        NamesFiles,
        PackedTensor,
        TensorInfo,
        TokenizerFiles,
        WeightEntry,
        WeightFormat,
        WeightMap,
    )
    from xllm_core.runtime.noise import gumbel, stream_keys
    from xllm_core.types import KVTransfer, SamplingParams, SlotState

_CONTRACTS = {
    "attention": (
        "AttentionGeometry",
        "AttentionKernel",
        "BatchLayout",
        "KVSegments",
    ),
    "device": (
        "AsyncDevice",
        "DeviceBackend",
        "DeviceFacts",
        "LazyMemoryDevice",
        "MemoryInfo",
    ),
    "doctor": ("Finding",),
    "graphs": ("Graph", "GraphDevice", "GraphKernel", "NotCapturableError", "RaggedGraphKernel"),
    "kv": (
        "Hit",
        "KVGeometry",
        "KVGroupSpec",
        "KVIndex",
        "KVMover",
        "KVStore",
        "KVTensorSpec",
        "KVView",
        "Later",
        "Miss",
    ),
    "model": (
        "AsksForOps",
        "Attention",
        "Experts",
        "ForwardContext",
        "Layer",
        "Linear",
        "Model",
        "ModelFamily",
        "ModelShape",
        "Parts",
    ),
    "observer": (
        "Observer",
        "StepRecord",
    ),
    "ops": (
        "CORE_FUSIONS",
        "CORE_OPS",
        "MODEL_OPS",
        "QUANTIZED_KV_OPS",
        "QUANTIZED_OPS",
        "REFERENCE_ATTENTION",
        "REFERENCE_OPS",
        "GivesRows",
        "KeepsPrepared",
        "LinearOp",
        "MoeExpertsOp",
        "MoeRouteOp",
        "PackedQuantization",
        "Quantization",
        "QuantizedLinearOp",
    ),
    "queries": (
        "AttentionQuery",
        "KVStoreQuery",
        "ModelQuery",
        "OpQuery",
        "SamplerQuery",
    ),
    "sampling": (
        "LogitsProcessor",
        "ProcessorContext",
        "Sampler",
        "SamplingBatch",
    ),
    "scheduler": (
        "SchedulerPolicy",
        "SequenceView",
    ),
    "weights": (
        "Axis",
        "Checkpoint",
        "HoldsPacked",
        "NamesFiles",
        "PackedTensor",
        "TensorInfo",
        "TokenizerFiles",
        "WeightEntry",
        "WeightFormat",
        "WeightMap",
    ),
}
_ELSEWHERE = {
    "xllm_core.errors": ("ConfigError", "ModelFormatError"),
    "xllm_core.models.config": ("Fields", "RopeConfig", "read_dtype", "read_rope"),
    "xllm_core.models.rope": ("Rotary",),
    "xllm_core.runtime.noise": ("gumbel", "stream_keys"),
    "xllm_core.types": ("KVTransfer", "SamplingParams", "SlotState"),
}
_HOMES = {name: f"xllm_core.plugins.contracts.{module}" for module, names in _CONTRACTS.items() for name in names}
_HOMES |= {name: module for module, names in _ELSEWHERE.items() for name in names}

__all__ = [
    "API_VERSION",
    "CORE_FUSIONS",
    "CORE_OPS",
    "MODEL_OPS",
    "QUANTIZED_KV_OPS",
    "QUANTIZED_OPS",
    "REFERENCE_ATTENTION",
    "REFERENCE_OPS",
    "AsksForOps",
    "AsyncDevice",
    "Attention",
    "AttentionGeometry",
    "AttentionKernel",
    "AttentionQuery",
    "AttentionSpec",
    "Axis",
    "BatchLayout",
    "Checkpoint",
    "CommandSpec",
    "ConfigError",
    "DeviceBackend",
    "DeviceFacts",
    "DeviceSpec",
    "DoctorSpec",
    "Experts",
    "Fields",
    "Finding",
    "ForwardContext",
    "GivesRows",
    "Graph",
    "GraphDevice",
    "GraphKernel",
    "Hit",
    "HoldsPacked",
    "KVGeometry",
    "KVGroupSpec",
    "KVIndex",
    "KVMover",
    "KVSegments",
    "KVStore",
    "KVStoreQuery",
    "KVStoreSpec",
    "KVTensorSpec",
    "KVTransfer",
    "KVView",
    "KeepsPrepared",
    "Later",
    "Layer",
    "LazyMemoryDevice",
    "Linear",
    "LinearOp",
    "LogitsProcessor",
    "LogitsProcessorSpec",
    "MemoryInfo",
    "Miss",
    "Model",
    "ModelFamily",
    "ModelFormatError",
    "ModelQuery",
    "ModelShape",
    "ModelSpec",
    "MoeExpertsOp",
    "MoeRouteOp",
    "NamesFiles",
    "NotCapturableError",
    "Observer",
    "ObserverSpec",
    "OpQuery",
    "OpSpec",
    "PackedQuantization",
    "PackedTensor",
    "Parts",
    "PluginContext",
    "PluginInfo",
    "ProcessorContext",
    "Quantization",
    "QuantizationSpec",
    "QuantizedLinearOp",
    "RaggedGraphKernel",
    "RopeConfig",
    "Rotary",
    "Sampler",
    "SamplerQuery",
    "SamplerSpec",
    "SamplingBatch",
    "SamplingParams",
    "SchedulerPolicy",
    "SchedulerSpec",
    "SequenceView",
    "SlotState",
    "Spec",
    "StepRecord",
    "TensorInfo",
    "TokenizerFiles",
    "WeightEntry",
    "WeightFormat",
    "WeightFormatSpec",
    "WeightMap",
    "gumbel",
    "hookimpl",
    "read_dtype",
    "read_rope",
    "stream_keys",
]


def __getattr__(name: str) -> object:
    """Import the module that a public name belongs to, once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'xllm_core.plugins' has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, also those not imported yet."""
    return sorted({*globals(), *__all__})
