"""What this plugin offers. Imported at every start of xllm, so it imports nothing but `xllm_core.plugins`."""

from __future__ import annotations

from collections.abc import Iterable

from xllm_core.plugins import ModelSpec, PluginInfo, hookimpl

xllm_plugin = PluginInfo(id="glm", xllm_api=">=0.1")

_FAMILIES = {
    "glm": ("Glm", "GlmForCausalLM", "GLM-4-9B (2024), dense"),
    "glm4": ("Glm4", "Glm4ForCausalLM", "GLM-4-0414 and Z1, dense"),
    "glm4-moe": ("Glm4Moe", "Glm4MoeForCausalLM", "GLM-4.5, 4.6, 4.7: mixture of experts"),
}


@hookimpl
def xllm_models() -> Iterable[ModelSpec]:
    """One family per architecture; each comes before the core's fallback."""
    for name, (family, architecture, summary) in _FAMILIES.items():
        target = f"xllm_models_glm.families:{family}"
        yield ModelSpec(name=name, target=target, architectures=frozenset({architecture}), summary=summary)
