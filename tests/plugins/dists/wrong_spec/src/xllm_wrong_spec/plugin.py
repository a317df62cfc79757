"""It offers an op where attention is asked."""

from __future__ import annotations

from collections.abc import Iterable

from xllm_core.plugins import AttentionSpec, OpSpec, PluginInfo, hookimpl

xllm_plugin = PluginInfo(id="wrongspec")


@hookimpl
def xllm_attention() -> Iterable[AttentionSpec]:
    """A spec of another kind."""
    yield OpSpec(name="x", op="linear", target="xllm_wrong_spec.x:X", devices=frozenset(), dtypes=frozenset())  # type: ignore[misc]
