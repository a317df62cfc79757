"""Offers the store."""

from __future__ import annotations

from collections.abc import Iterable

from xllm_core.plugins import KVStoreSpec, PluginInfo, hookimpl

xllm_plugin = PluginInfo(id="far", xllm_api=">=0.1", config="xllm_far.settings:FarTable")


@hookimpl
def xllm_kv_stores() -> Iterable[KVStoreSpec]:
    """Blocks of any layout and size, on this machine."""
    yield KVStoreSpec(
        name="store", target="xllm_far.store:FarStore", scopes=frozenset({"shared"}), summary="a peer behind a socket"
    )
