"""Discovery, isolation, conflicts, and the lock."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from xllm_core.config import Settings
from xllm_core.errors import ConfigError, PluginConflictError, PluginError
from xllm_core.plugins import ModelSpec, PluginInfo, SchedulerSpec, hookimpl
from xllm_core.plugins.hookspecs import HOOKS
from xllm_core.plugins.manager import PluginManager, PluginRecord

Install = Callable[..., list[str]]
BROKEN = ("broken_import", "unknown_hook", "wrong_spec", "too_new")


def records(manager: PluginManager) -> dict[str, PluginRecord]:
    """By id; tests with two of one id look at the tuple."""
    return {record.id: record for record in manager.records}


def in_process(plugin_id: str, **hooks: Any) -> Any:
    """A plugin without a distribution."""
    return SimpleNamespace(
        __name__=f"{plugin_id}_module",
        xllm_plugin=PluginInfo(id=plugin_id),
        **{k: hookimpl(v) for k, v in hooks.items()},
    )


def test_core_loads_through_the_same_door() -> None:
    """The core's parts come from its own entry point. Dies if builtin.py stops implementing a hook."""
    manager = PluginManager.discover().load()
    core = records(manager)["core"]
    assert core.state == "loaded"
    assert {hook for hook, specs in core.specs.items() if specs} == set(HOOKS)
    assert manager.offers("xllm_devices")[0].name == "core/reference"


def test_a_good_plugin_brings_something_for_every_hook(install: Install) -> None:
    """Every hook is called, and its answer is kept. Dies if `load` leaves a hook out."""
    install("good")
    good = records(PluginManager.discover().load())["good"]
    assert (good.state, good.distribution, good.version) == ("loaded", "xllm-good", "1.4")
    assert {hook for hook, specs in good.specs.items() if specs} == set(HOOKS)


def test_broken_plugins_are_named_and_stop_nobody(install: Install) -> None:
    """Four ways of being broken, one reason each, and the good one works. Dies if isolation or a check is removed."""
    install("good", *BROKEN)
    found = records(PluginManager.discover().load())
    assert found["good"].state == "loaded"
    assert found["broken"].state == "failed"
    assert (
        "ModuleNotFoundError: No module named 'xllm_vendor_library_that_is_not_installed' (plugin.py:5)"
        in found["broken"].reason
    )
    assert found["typo"].state == "failed"
    assert "unknown hook 'xllm_atention'" in found["typo"].reason
    assert found["wrongspec"].state == "failed"
    assert found["wrongspec"].reason == "TypeError: xllm_attention offered a OpSpec; it takes AttentionSpec"
    assert found["toonew"].state == "incompatible"
    assert "requires xllm-core>=9" in found["toonew"].reason
    assert "xllm_too_new.plugin" not in sys.modules, "code of an incompatible plugin ran"


def test_left_out_plugins_are_logged(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody has to run `plugins list` to learn it. Dies if the warning goes."""
    install("broken_import")
    PluginManager.discover().load()
    assert "plugin broken (xllm-broken-import 0.3) is left out: ModuleNotFoundError" in caplog.text


@pytest.mark.parametrize(
    "tables",
    [
        {"plugins": {"require": ["broken"]}},
        {"plugins": {"enable": ["broken"]}},
        {"plugin": {"broken": {"x": 1}}},
        {"use": {"attention": "broken/fast"}},
        {"device": {"name": "broken/chip"}},
    ],
)
def test_a_plugin_that_was_asked_for_must_load(install: Install, tables: dict[str, Any]) -> None:
    """Required, enabled, configured or pinned: its failure stops start-up. Dies if `_wanted` forgets one of the ways."""
    install("broken_import")
    manager = PluginManager.discover(Settings(**tables)).load()
    with pytest.raises(PluginError, match=r"plugin 'broken' .* was asked for and is failed: ModuleNotFoundError"):
        manager.check_wanted()


def test_a_plugin_that_was_asked_for_must_be_installed() -> None:
    """And the message says what is."""
    manager = PluginManager.discover(Settings(plugins={"require": ["nowhere>=1"]})).load()
    with pytest.raises(ConfigError, match=r"names plugin 'nowhere', which is not installed; installed: core"):
        manager.check_wanted()


def test_a_required_version_is_held(install: Install) -> None:
    """Dies if `require` only looks at the id."""
    install("good")
    PluginManager.discover(Settings(plugins={"require": ["good>=1.2"]})).load().check_wanted()
    manager = PluginManager.discover(Settings(plugins={"require": ["good>=2"]})).load()
    with pytest.raises(PluginError, match=r"good>=2.*xllm-good 1\.4 is installed"):
        manager.check_wanted()


def test_two_distributions_with_one_id_conflict(install: Install) -> None:
    """Neither is loaded, both are named, and the line that decides is printed. Dies if one of them silently wins."""
    install("twin_a", "twin_b")
    manager = PluginManager.discover(Settings(plugins={"require": ["twin"]})).load()
    twins = [record for record in manager.records if record.id == "twin"]
    assert [record.state for record in twins] == ["conflict", "conflict"]
    line = '[plugins] enable = ["twin@xllm-twin-a"]'
    with pytest.raises(PluginConflictError, match="xllm-twin-a and xllm-twin-b") as raised:
        manager.check_wanted()
    assert line in str(raised.value)


def test_the_line_that_decides_decides(install: Install) -> None:
    """Each of the two can be chosen. Dies if the choice goes by order."""
    install("twin_a", "twin_b")
    for letter in "ab":
        manager = PluginManager.discover(Settings(plugins={"enable": [f"twin@xllm-twin-{letter}"]})).load()
        manager.check_wanted()
        names = [offer.name for offer in manager.offers("xllm_schedulers") if offer.plugin == "twin"]
        assert names == [f"twin/from_{letter}"]


def test_disabled_plugins_are_not_imported(install: Install) -> None:
    """Dies if disabling happens after the import."""
    install("good")
    manager = PluginManager.discover(Settings(plugins={"disable": ["good"]})).load()
    assert records(manager)["good"].state == "disabled"
    assert "xllm_good.plugin" not in sys.modules
    with pytest.raises(ConfigError, match="cannot be disabled"):
        PluginManager.discover(Settings(plugins={"disable": ["core"]}))
    with pytest.raises(ConfigError, match="not installed"):
        PluginManager.discover(Settings(plugins={"disable": ["goood"]}))


def test_discovery_imports_no_plugin(install: Install) -> None:
    """Dies if `discover` loads an entry point."""
    install("good")
    PluginManager.discover()
    assert "xllm_good.plugin" not in sys.modules


def test_after_the_lock_no_hook_can_be_called(install: Install) -> None:
    """Also not through the pluggy manager that somebody kept. Dies if `lock` only sets a flag that one method reads."""
    install("good")
    manager = PluginManager.discover().load()
    kept = next(candidate.hooks for candidate in manager._candidates if candidate.record.id == "good")
    assert kept is not None
    assert kept.hook.xllm_schedulers(ctx=None)
    manager.lock()
    with pytest.raises(PluginError, match="locked"):
        kept.hook.xllm_schedulers(ctx=None)
    with pytest.raises(PluginError, match="locked"):
        manager.commands("good")


def test_order_of_offers_follows_rank_then_others_then_name() -> None:
    """Never the order of installation. Dies if the sort key loses a part."""

    def zebra() -> Iterable[SchedulerSpec]:
        yield SchedulerSpec(name="b", target="a:b", rank=0)
        yield SchedulerSpec(name="a", target="a:b", rank=0)
        yield SchedulerSpec(name="top", target="a:b", rank=9)

    manager = PluginManager.discover(extra=[in_process("zebra", xllm_schedulers=zebra)]).load()
    names = [offer.name for offer in manager.offers("xllm_schedulers")]
    assert names == ["zebra/top", "zebra/a", "zebra/b", "core/fcfs", "core/priority"]


def _wrapper() -> Iterable[Any]:
    yield from ()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (
            SimpleNamespace(__name__="m", xllm_plugin=PluginInfo(id="p"), xllm_models=_wrapper),
            "not marked with @hookimpl",
        ),
        (
            in_process("p", xllm_models=lambda: [ModelSpec(name="a/b", target="a:b", architectures=frozenset())]),
            "no '/'",
        ),
        (
            in_process("p", xllm_models=lambda: [ModelSpec(name="a", target="a.b", architectures=frozenset())]),
            "package.module:attribute",
        ),
        (
            in_process("p", xllm_schedulers=lambda: [SchedulerSpec(name="a", target="a:b")] * 2),
            "offers the name 'a' twice",
        ),
        (
            in_process("p", xllm_schedulers=lambda: SchedulerSpec(name="a", target="a:b")),
            "return an iterable of SchedulerSpec",
        ),
        (in_process("p", xllm_schedulers=lambda typo: []), "typo"),
        (SimpleNamespace(__name__="m", xllm_plugin=PluginInfo(id="p", xllm_api=">=7")), "needs plugin API >=7"),
        (in_process("chat", xllm_cli=lambda: [SimpleNamespace()]), "xllm_cli offered a SimpleNamespace"),
        (in_process("Bad Id"), "lower-case"),
    ],
)
def test_each_rule_of_a_plugin_has_its_reason(module: Any, reason: str) -> None:
    """Dies with the check that it names."""
    record = next(r for r in PluginManager.discover(extra=[module]).load().records if r.id != "core")
    assert record.state in ("failed", "incompatible")
    assert reason in record.reason


@pytest.mark.parametrize("option", ["tryfirst", "trylast", "wrapper", "hookwrapper"])
def test_wrappers_and_call_order_are_refused(option: str) -> None:
    """With them the order of installation would decide again. Dies if `_check_hooks` forgets an option."""
    import pluggy

    def xllm_schedulers() -> Any:
        result = yield
        return result

    marked = pluggy.HookimplMarker("xllm_core")(**{option: True})(xllm_schedulers)
    module = SimpleNamespace(__name__="m", xllm_plugin=PluginInfo(id="p"), xllm_schedulers=marked)
    record = records(PluginManager.discover(extra=[module]).load())["p"]
    assert record.state == "failed"
    assert f"uses {option}" in record.reason


def test_a_plugin_cannot_hide_behind_a_command_of_the_core() -> None:
    """`xllm chat` is the core's; a plugin called chat could never be reached. Dies if the check goes."""
    from xllm_core.plugins import CommandSpec

    module = in_process("chat", xllm_cli=lambda: [CommandSpec(name="x", target="a:b")])
    record = records(PluginManager.discover(extra=[module]).load())["chat"]
    assert record.state == "failed"
    assert "hide behind `xllm chat`" in record.reason


def test_a_plugins_table_is_checked_by_the_plugin(install: Install) -> None:
    """Values reach the hooks' context and the plan with defaults filled in; a wrong key stops with a guess."""
    install("good")
    manager = PluginManager.discover(Settings(plugin={"good": {"host_store_bytes": "4096"}})).load()
    assert manager.tables["good"] == {"host_store_bytes": 4096, "greeting": "hello"}
    manager = PluginManager.discover(Settings(plugin={"good": {"host_store_byte": 1}})).load()
    with pytest.raises(
        PluginError, match=r"\[plugin.good\] host_store_byte: unknown key; did you mean 'host_store_bytes'"
    ):
        manager.check_wanted()


def test_settings_for_a_plugin_that_takes_none() -> None:
    """Dies if a table is dropped in silence."""
    manager = PluginManager.discover(Settings(plugin={"p": {"x": 1}}), extra=[in_process("p")]).load()
    with pytest.raises(PluginError, match="takes no settings"):
        manager.check_wanted()


def test_hooks_see_the_core_settings() -> None:
    """Dies if the context is built empty."""
    seen: list[Any] = []

    def xllm_schedulers(ctx: Any) -> Iterable[SchedulerSpec]:
        seen.append(ctx.core["scheduler"]["max_num_seqs"])
        return []

    PluginManager.discover(
        Settings(scheduler={"max_num_seqs": 5}), extra=[in_process("p", xllm_schedulers=xllm_schedulers)]
    ).load()
    assert seen == [5]
