"""What this plugin offers. Imported at every start of xllm, so it imports nothing but `xllm_core.plugins`."""

from __future__ import annotations

from collections.abc import Iterable

from xllm_core.plugins import ModelSpec, PluginInfo, hookimpl

xllm_plugin = PluginInfo(id="example-olmo2", xllm_api=">=0.1")


@hookimpl
def xllm_models() -> Iterable[ModelSpec]:
    """Found by the name in config.json. That a family names it is enough to come before the core's fallback."""
    yield ModelSpec(
        name="olmo2", target="xllm_example_olmo2.olmo2:Olmo2", architectures=frozenset({"Olmo2ForCausalLM"}),
        summary="OLMo-2, dense",
    )  # fmt: skip
