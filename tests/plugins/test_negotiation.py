"""What parts that share one cache agree on, what a spec may ask itself, and what its target is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from xllm_core.config import Settings
from xllm_core.errors import PluginError, ResolutionError
from xllm_core.plugins import (
    AttentionQuery,
    AttentionSpec,
    DeviceFacts,
    DeviceSpec,
    KVStoreQuery,
    KVStoreSpec,
    OpSpec,
    PluginInfo,
    SchedulerSpec,
    hookimpl,
)
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.resolve import Resolver
from xllm_core.reference.device import ReferenceDevice

GROUPS = {"full": {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "scale": 0.125}}
HERE = "tests.plugins.test_negotiation"


class Board:
    """A device with two layouts and two block sizes."""

    def __init__(self, index: int) -> None:
        self.index = index

    def facts(self) -> DeviceFacts:
        """Its facts."""
        return replace(
            ReferenceDevice(0).facts(), kind="board", name="board", dtypes=("float32",), kv_layouts=("BSGD", "BGSD"), block_sizes=(16, 64)
        )  # fmt: skip


def kernel(name: str, **declared: Any) -> AttentionSpec:
    return AttentionSpec(name=name, target="a:b", devices={"board"}, dtypes={"float32"}, **declared)


def writer(name: str, op: str = "kv_write", **declared: Any) -> OpSpec:
    return OpSpec(name=name, op=op, target="a:b", devices={"board"}, dtypes={"float32"}, **declared)


def resolver(
    kernels: Iterable[AttentionSpec], stores: Iterable[KVStoreSpec] = (), ops: Iterable[OpSpec] = (), **tables: Any
) -> Resolver:
    """Over a plugin `p` with a board, these kernels, these stores and these ops."""
    kernels, stores, ops = list(kernels), list(stores), list(ops)
    module = SimpleNamespace(
        __name__="m", xllm_plugin=PluginInfo(id="p"),
        xllm_devices=hookimpl(lambda: [DeviceSpec(name="board", target=f"{HERE}:Board", is_accelerator=True)]),
        xllm_attention=hookimpl(lambda: kernels), xllm_kv_stores=hookimpl(lambda: stores),
        xllm_ops=hookimpl(lambda: ops),
    )  # fmt: skip
    settings = Settings(**tables)
    return Resolver(settings, PluginManager.discover(settings, extra=[module]))


def layout(found: Resolver) -> Any:
    return found.layout(GROUPS, found.device()[1], "float32")


def test_the_best_kernel_decides_layout_and_block_size() -> None:
    """Not the order in which the device lists them. Dies if the first combination that works is taken."""
    plain = kernel("plain", layouts=("BSGD", "BGSD"))
    fast = kernel("fast", rank=9, layouts=("BGSD",), block_sizes={64})
    chosen = layout(resolver([plain, fast]))
    assert (chosen.kv_layout, chosen.block_size, chosen.attention["full"].name) == ("BGSD", 64, "p/fast")
    chosen = layout(resolver([plain]))
    assert (chosen.kv_layout, chosen.block_size) == ("BSGD", 16)
    chosen = layout(resolver([plain, fast], kv={"block_size": 16}))
    assert chosen.attention["full"].name == "p/plain" and chosen.block_size == 16


def test_the_store_has_a_say() -> None:
    """The cache that kernels read is the one that the store copies. Dies if the store is chosen afterwards."""
    kernels = [kernel("plain", layouts=("BSGD", "BGSD")), kernel("fast", rank=9, block_sizes={16})]
    store = KVStoreSpec(name="big", target="a:b", block_sizes={64})
    chosen = layout(resolver(kernels, [store], use={"kv_store": "p/big"}))
    assert chosen.block_size == 64 and chosen.attention["full"].name == "p/plain" and chosen.kv_store.name == "p/big"


def test_what_stores_into_the_cache_has_a_say() -> None:
    """A layout that no `kv_write` knows is not taken, though the best kernel reads it; nor is an op or fusion that knows another than the one
    taken. Dies if keys are stored where nobody reads them.
    """
    kernels = [kernel("plain"), kernel("fast", rank=9, layouts=("BGSD",))]
    fusion = writer("rope_kv_write", "rope_kv_write", layouts={"BGSD"}, replaces=("rope", "kv_write"))
    ops = [writer("kv_write", layouts={"BSGD"}), writer("rope", "rope"), fusion]
    found = resolver(kernels, ops=ops)
    chosen = layout(found)
    assert (chosen.kv_layout, chosen.attention["full"].name) == ("BSGD", "p/plain")
    facts = found.device()[1]
    writes = {name: found.op(name, facts, "float32", kv_layout="BSGD") for name in ("rope", "kv_write")}
    taken, unused = found.fusions(writes, facts, "float32", kv_layout="BSGD")
    assert not taken and dict(unused)["p/rope_kv_write"] == "layout BSGD not in BGSD"
    with pytest.raises(ResolutionError, match="layout BGSD not in BSGD"):
        found.op("kv_write", facts, "float32", kv_layout="BGSD")
    both = resolver(kernels, ops=[*ops, writer("other", layouts={"BGSD"})])
    assert layout(both).attention["full"].name == "p/fast", "with one for each layout the kernel decides"
    with pytest.raises(ResolutionError, match="op p/kv_write: layouts BSGD; block sizes any"):
        layout(resolver(kernels[1:], ops=ops))


def test_where_nothing_meets_everybody_is_listed() -> None:
    """Device, kernels and store, each with what it offers, so that the user sees who has to go."""
    store = KVStoreSpec(name="odd", target="a:b", layouts={"GSBD"}, block_sizes={48})
    with pytest.raises(ResolutionError) as raised:
        layout(resolver([kernel("fast", block_sizes={16})], [store], use={"kv_store": "p/odd"}))
    for line in (
        "device board: layouts BSGD, BGSD; block sizes 16, 64",
        "kernel p/fast: layouts BSGD; block sizes 16",
        "store p/odd: layouts GSBD; block sizes 48",
        "a pin never falls back",
    ):
        assert line in str(raised.value)


# ---- check ---------------------------------------------------------------------------------------------------------------------

ASKED: list[Any] = []


def only_small(query: AttentionQuery) -> str | None:
    """A kernel's own condition."""
    ASKED.append(query)
    return None if query.geometry.head_size <= 32 else f"head_size {query.geometry.head_size} is above 32"


def broken_check(query: object) -> str | None:
    """One that fails."""
    raise KeyError("x")


def no_store(query: KVStoreQuery) -> str | None:
    """A store's own condition."""
    return f"{query.block_size} tokens do not fit on {query.device_kind}"


def test_a_spec_may_ask_itself() -> None:
    """Last, with the frozen query; its answer, or its exception, is the reason. Dies if a check is ignored, or asked before the data."""
    ASKED.clear()
    kernels = [
        kernel("small", rank=3, check=f"{HERE}:only_small"),
        kernel("broken", rank=2, check=f"{HERE}:broken_check"),
        kernel("gone", rank=2, check=f"{HERE}:nothing_here"),
        kernel("elsewhere", rank=2, block_sizes={1}, check=f"{HERE}:only_small"),
        kernel("plain"),
    ]
    chosen = layout(resolver(kernels, kv={"block_size": 16})).attention["full"]
    rejected = dict(chosen.rejected)
    assert chosen.name == "p/plain"
    assert rejected["p/small"] == "head_size 64 is above 32"
    assert rejected["p/broken"].startswith("its check failed: KeyError: 'x'")
    assert rejected["p/gone"].startswith("its check failed: ") and "nothing_here" in rejected["p/gone"]
    assert rejected["p/elsewhere"] == "block_size 16 not in 1"
    assert [type(query).__name__ for query in ASKED] == ["AttentionQuery"] * len(ASKED) and ASKED[
        0
    ].device_kind == "board"
    with pytest.raises(AttributeError):
        ASKED[0].device_kind = "other"


def test_a_pinned_part_is_checked_too() -> None:
    """A pin never falls back, and its own refusal is the message."""
    store = KVStoreSpec(name="s", target="a:b", check=f"{HERE}:no_store")
    with pytest.raises(ResolutionError, match="16 tokens do not fit on board"):
        layout(resolver([kernel("plain")], [store], use={"kv_store": "p/s"}, kv={"block_size": 16}))


# ---- options -------------------------------------------------------------------------------------------------------------------


class Tuned:
    """What a target with options is built with."""

    def __init__(self, *, weight: float, names: list[str]) -> None:
        self.weight, self.names = weight, names


def test_options_reach_the_target_and_stand_in_the_plan() -> None:
    """So that a part is configured wherever it is built. Dies if they are dropped on the way from spec to choice."""
    spec = SchedulerSpec(name="tuned", target=f"{HERE}:Tuned", options={"weight": 0.5, "names": ["a"]})
    module = SimpleNamespace(__name__="m", xllm_plugin=PluginInfo(id="p"), xllm_schedulers=hookimpl(lambda: [spec]))
    settings = Settings(use={"scheduler": "p/tuned"})
    choice = Resolver(settings, PluginManager.discover(settings, extra=[module])).scheduler()
    built = choice.build()
    assert (choice.options, built.weight, built.names) == ({"weight": 0.5, "names": ["a"]}, 0.5, ["a"])


def test_options_are_plain_data() -> None:
    """A plan crosses processes."""
    with pytest.raises(TypeError, match="tuned: options must be plain data"):
        SchedulerSpec(name="tuned", target="a:b", options={"when": object()})


def test_a_query_on_the_command_line(install: Callable[..., Any], xllm: Callable[..., Any]) -> None:
    """Without a model, the shape can be given: what is chosen for it, and why the others are not."""
    flags = ("--device", "core/reference", "--head-size", "80", "--kv-heads", "2", "--feature", "sliding_window")
    done = xllm("plugins", "why", "attention", *flags)
    assert "2 KV heads of 80" in done.stdout and "chosen   core/paged" in done.stdout, done.stderr
    wrong = xllm("plugins", "why", "attention", "--feature", "sink", "--device", "core/reference")
    assert wrong.returncode == 2 and "sliding_window" in wrong.stderr
    with pytest.raises(PluginError):
        layout(resolver([kernel("plain", head_sizes={80})]))
