"""The surface that plugins import, and the only one: hooks, specs, and the contracts that their targets build.

A plugin is a distribution with one entry point in group `xllm_core.plugins`, whose module holds `xllm_plugin = PluginInfo(...)` and
functions marked `@hookimpl` that return specs. Importing this package loads no torch.
"""

from __future__ import annotations

from xllm_core.plugins.contracts.attention import AttentionGeometry, AttentionKernel, BatchLayout, KVSegments
from xllm_core.plugins.contracts.device import DeviceBackend, DeviceFacts, MemoryInfo
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
    Attention,
    ForwardContext,
    Layer,
    Linear,
    Model,
    ModelFamily,
    ModelShape,
    Parts,
)
from xllm_core.plugins.contracts.observer import Observer, StepRecord
from xllm_core.plugins.contracts.ops import CORE_OPS, LinearOp
from xllm_core.plugins.contracts.sampling import LogitsProcessor, ProcessorContext, Sampler, SamplingBatch
from xllm_core.plugins.contracts.scheduler import SchedulerPolicy, SequenceView
from xllm_core.plugins.contracts.weights import (
    Axis,
    Checkpoint,
    TensorInfo,
    TokenizerFiles,
    WeightEntry,
    WeightFormat,
    WeightMap,
)
from xllm_core.plugins.hookspecs import hookimpl
from xllm_core.plugins.specs import (
    API_VERSION,
    AttentionSpec,
    CommandSpec,
    DeviceSpec,
    KVStoreSpec,
    LogitsProcessorSpec,
    ModelSpec,
    ObserverSpec,
    OpSpec,
    PluginContext,
    PluginInfo,
    SamplerSpec,
    SchedulerSpec,
    Spec,
    WeightFormatSpec,
)

__all__ = [
    "API_VERSION",
    "CORE_OPS",
    "Attention",
    "AttentionGeometry",
    "AttentionKernel",
    "AttentionSpec",
    "Axis",
    "BatchLayout",
    "Checkpoint",
    "CommandSpec",
    "DeviceBackend",
    "DeviceFacts",
    "DeviceSpec",
    "ForwardContext",
    "Hit",
    "KVGeometry",
    "KVGroupSpec",
    "KVIndex",
    "KVMover",
    "KVSegments",
    "KVStore",
    "KVStoreSpec",
    "KVTensorSpec",
    "KVView",
    "Later",
    "Layer",
    "Linear",
    "LinearOp",
    "LogitsProcessor",
    "LogitsProcessorSpec",
    "MemoryInfo",
    "Miss",
    "Model",
    "ModelFamily",
    "ModelShape",
    "ModelSpec",
    "Observer",
    "ObserverSpec",
    "OpSpec",
    "Parts",
    "PluginContext",
    "PluginInfo",
    "ProcessorContext",
    "Sampler",
    "SamplerSpec",
    "SamplingBatch",
    "SchedulerPolicy",
    "SchedulerSpec",
    "SequenceView",
    "Spec",
    "StepRecord",
    "TensorInfo",
    "TokenizerFiles",
    "WeightEntry",
    "WeightFormat",
    "WeightFormatSpec",
    "WeightMap",
    "hookimpl",
]
