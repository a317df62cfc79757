"""A hook is documented, called, and wanted by two. What a plugin imports is pinned."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import xllm_core
from xllm_core import plugins
from xllm_core.plugins import builtin, hookspecs
from xllm_core.plugins.select import HOOK_OF_KIND

HOOKS = sorted(hookspecs.HOOKS)
GOOD = Path(__file__).parent.parent / "plugins" / "dists" / "good" / "src" / "xllm_good" / "plugin.py"


def test_the_list_of_hooks() -> None:
    """A new hook is a decision: this list changes with it. Each is marked, and none is left out of HOOKS."""
    marked = [name for name, value in vars(hookspecs).items() if callable(value) and name.startswith("xllm_")]
    assert sorted(marked) == HOOKS
    assert HOOKS == [
        "xllm_attention", "xllm_cli", "xllm_devices", "xllm_doctor", "xllm_kv_stores", "xllm_logits_processors", "xllm_models",
        "xllm_observers", "xllm_ops", "xllm_quantizations", "xllm_samplers", "xllm_schedulers", "xllm_weight_formats",
    ]  # fmt: skip


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_documented(name: str) -> None:
    """With arguments, what to return, what goes wrong, and an example that compiles and names the hook."""
    text = inspect.getdoc(getattr(hookspecs, name)) or ""
    for part in ("Args:", "Returns:", "Errors:", "Example::"):
        assert part in text, f"{name}: no {part}"
    example = inspect.cleandoc(text.split("Example::")[1])
    compile(example, name, "exec")
    assert f"def {name}(" in example


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_has_a_caller_and_two_implementations(name: str) -> None:
    """The core's own and one from outside; whatever is collected is chosen from somewhere. Dies with a hook nobody asks."""
    assert hasattr(builtin, name)
    assert f"def {name}(" in GOOD.read_text()
    assert name in ("xllm_cli", "xllm_doctor") or name in HOOK_OF_KIND.values(), "collected, and never chosen from"


def test_every_name_of_the_surface_exists() -> None:
    """Also those that are imported only when they are used. Dies with a name that was moved or misspelt."""
    for module in (plugins, xllm_core):
        for name in module.__all__:
            if name not in ("LLM", "AsyncEngine"):  # these load torch; test_the_door opens them
                assert getattr(module, name) is not None
        assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        xllm_core.LMM  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'DeviceSpecc'"):
        plugins.DeviceSpecc  # noqa: B018


def test_the_public_surface() -> None:
    """What third parties build on. A name that goes or is renamed breaks them: this list changes only on purpose."""
    assert xllm_core.__all__ == ["LLM", "AsyncEngine", "SamplingParams", "__version__"]
    assert sorted(plugins.__all__) == [
        "API_VERSION", "AsksForOps", "AsyncDevice", "Attention", "AttentionGeometry", "AttentionKernel", "AttentionQuery", "AttentionSpec", "Axis",
        "BatchLayout", "CORE_FUSIONS", "CORE_OPS", "Checkpoint", "CommandSpec", "ConfigError", "DeviceBackend", "DeviceFacts", "DeviceSpec",
        "DoctorSpec", "Experts", "Fields", "Finding", "ForwardContext", "GivesRows", "Graph", "GraphDevice", "GraphKernel", "Hit", "HoldsPacked",
        "KVGeometry", "KVGroupSpec", "KVIndex", "KVMover", "KVSegments", "KVStore", "KVStoreQuery", "KVStoreSpec", "KVTensorSpec", "KVTransfer",
        "KVView", "KeepsPrepared", "Later", "Layer", "LazyMemoryDevice",
        "Linear", "LinearOp", "LogitsProcessor", "LogitsProcessorSpec", "MODEL_OPS", "MemoryInfo",
        "Miss", "Model", "ModelFamily", "ModelFormatError", "ModelQuery", "ModelShape", "ModelSpec", "MoeExpertsOp", "MoeRouteOp",
        "NamesFiles", "NotCapturableError",
        "Observer", "ObserverSpec", "OpQuery", "OpSpec", "PackedQuantization", "PackedTensor", "Parts", "PluginContext", "PluginInfo",
        "ProcessorContext", "QUANTIZED_KV_OPS", "QUANTIZED_OPS", "Quantization", "QuantizationSpec", "QuantizedLinearOp", "REFERENCE_ATTENTION",
        "REFERENCE_OPS", "RaggedGraphKernel", "RopeConfig", "Rotary", "Sampler", "SamplerQuery", "SamplerSpec", "SamplingBatch", "SamplingParams",
        "SchedulerPolicy", "SchedulerSpec", "SequenceView", "SlotState", "Spec", "StepRecord", "TensorInfo", "TokenizerFiles",
        "WeightEntry", "WeightFormat", "WeightFormatSpec", "WeightMap", "gumbel", "hookimpl", "read_dtype", "read_rope", "stream_keys",
    ]  # fmt: skip


def test_the_door_opens() -> None:
    """LLM and AsyncEngine come through the lazy door. In a process of its own, as they load torch."""
    code = "from xllm_core import LLM, AsyncEngine, SamplingParams; print(LLM.__name__, AsyncEngine.__name__, SamplingParams(n=2).n)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "LLM AsyncEngine 2", done.stderr
