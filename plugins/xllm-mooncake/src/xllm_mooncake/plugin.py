"""What this plugin offers. Imported at every start of xllm, so it imports nothing but `xllm_core.plugins`."""

from __future__ import annotations

from collections.abc import Iterable

from xllm_core.plugins import CommandSpec, DoctorSpec, KVStoreSpec, PluginInfo, hookimpl

xllm_plugin = PluginInfo(id="mooncake", xllm_api=">=0.1", config="xllm_mooncake.settings:MooncakeTable")


@hookimpl
def xllm_kv_stores() -> Iterable[KVStoreSpec]:
    """Blocks of any layout and size: to Mooncake they are bytes."""
    yield KVStoreSpec(
        name="store", target="xllm_mooncake.store:MooncakeStore", check="xllm_mooncake.here:check",
        scopes=frozenset({"remote"}), summary="memory of all engines together, through mooncake_master",
    )  # fmt: skip


@hookimpl
def xllm_cli() -> Iterable[CommandSpec]:
    """For development."""
    yield CommandSpec(
        name="up",
        target="xllm_mooncake.commands:up",
        summary="Run a master on this machine until Ctrl-C, for development.",
    )


@hookimpl
def xllm_doctor() -> Iterable[DoctorSpec]:
    """Wheel and library."""
    yield DoctorSpec(
        name="mooncake", target="xllm_mooncake.here:findings", summary="Are Mooncake's wheel and what it loads here?"
    )
