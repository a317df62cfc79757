"""Which plugins may take part, what stops a start, and what the lock holds to."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, SecretStr

from xllm_core.config import Settings
from xllm_core.config_secrets import reveal
from xllm_core.errors import ConfigError, PluginError
from xllm_core.plugins import PluginInfo, SchedulerSpec, hookimpl
from xllm_core.plugins.isolated import load_isolated
from xllm_core.plugins.lockfile import check_lock, locked_now, write_lock
from xllm_core.plugins.manager import PluginManager

Install = Callable[..., list[str]]


def states(**tables: Any) -> dict[str, tuple[str, str]]:
    """Id -> (state, reason) after loading; ids that two claim show the last."""
    manager = PluginManager.discover(Settings(**tables)).load()
    return {record.id: (record.state, record.reason) for record in manager.records}


def start(**tables: Any) -> None:
    """What a start checks."""
    PluginManager.discover(Settings(**tables)).load().check_wanted()


# ---- policy ------------------------------------------------------------------------------------------------------------------


def test_a_listed_policy_lets_in_whom_it_names(install: Install) -> None:
    """The others are not imported, and the reason is the line that would let them in. Dies if `listed` is read as `installed`."""
    install("good", "twin_a")
    found = states(plugins={"policy": "listed", "enable": ["good@xllm-good"]})
    assert found["good"][0] == "loaded"
    assert found["twin"][0] == "not-allowed" and 'enable = ["twin@xllm-twin-a"]' in found["twin"][1]
    assert "xllm_twin_a.plugin" not in sys.modules


def test_an_id_is_pinned_to_its_distribution(install: Install) -> None:
    """Any package can claim an id: under `id@distribution` another one does not get in. Dies if only ids are compared."""
    install("twin_b")
    found = states(plugins={"policy": "listed", "enable": ["twin@xllm-twin-a"]})
    assert found["twin"][0] == "failed" and "asks for twin@xllm-twin-a; installed from xllm-twin-b" in found["twin"][1]
    assert "xllm_twin_b.plugin" not in sys.modules


@pytest.mark.parametrize(("value", "loaded"), [("", set()), ("good", {"good"}), ("good,twin", {"good", "twin"})])
def test_xllm_plugins(install: Install, monkeypatch: pytest.MonkeyPatch, value: str, loaded: set[str]) -> None:
    """Unset: the policy; empty: the core alone; ids: these. Dies if the empty value counts as unset."""
    install("good", "twin_a", "broken_import")
    monkeypatch.setenv("XLLM_PLUGINS", value)
    found = states()
    assert {name for name, (state, _) in found.items() if state == "loaded"} == loaded | {"core"}
    assert found["broken"] == ("not-allowed", "[plugins] only (or XLLM_PLUGINS) names others")
    start()


def test_xllm_plugins_names_only_what_is_there(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown id, or a broken plugin, that the variable names stops the start."""
    install("good", "broken_import")
    monkeypatch.setenv("XLLM_PLUGINS", "good,gud")
    with pytest.raises(ConfigError, match=r"names plugin 'gud', which is not installed; installed: broken, core, good"):
        start()
    monkeypatch.setenv("XLLM_PLUGINS", "broken")
    with pytest.raises(PluginError, match=r"'broken' .* was asked for and is failed"):
        start()


def test_missing_plugins_are_in_the_list(install: Install) -> None:
    """A name in the settings that nobody provides is a record, with the place that names it."""
    install("good")
    found = states(use={"kv_store": "bucket/store"}, plugin={"cache": {"x": 1}})
    assert found["bucket"][0] == found["cache"][0] == "missing"
    assert "[use] kv_store = 'bucket/store' names plugin 'bucket'" in found["bucket"][1]


def test_an_optional_table_asks_for_nothing(install: Install) -> None:
    """Absent or broken, its plugin is passed over; present, it gets the table without our word in it."""
    install("good", "broken_import")
    start(
        plugin={"good": {"optional": True, "greeting": "hi"}, "broken": {"optional": True}, "gone": {"optional": True}}
    )
    manager = PluginManager.discover(Settings(plugin={"good": {"optional": True, "greeting": "hi"}})).load()
    assert manager.tables["good"]["greeting"] == "hi" and "optional" not in manager.tables["good"]
    with pytest.raises(ConfigError, match=r"\[plugin.good\] optional = 'yes': it must be true or false"):
        start(plugin={"good": {"optional": "yes"}})


def test_strict_wants_everything(install: Install) -> None:
    """One broken plugin that nobody asked for stops a strict start, and no other."""
    install("good", "broken_import")
    start()
    with pytest.raises(PluginError, match=r"'broken' .* is failed"):
        start(plugins={"strict": True})
    start(plugins={"strict": True, "disable": ["broken"]})


def test_another_python_is_incompatible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metadata say so, and its code does not run."""
    info = tmp_path / "xllm_future-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: xllm-future\nVersion: 1\nRequires-Python: >=4\n")
    (info / "entry_points.txt").write_text("[xllm_core.plugins]\nfuture = xllm_future_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    record = next(r for r in PluginManager.discover().check_metadata().records if r.id == "future")
    assert record.state == "incompatible" and record.reason.startswith("it requires Python >=4, this is 3.")


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), BaseException("odd")])
def test_nothing_that_a_hook_raises_gets_out(error: BaseException) -> None:
    """Not only Exception. An interrupt is the user's and does get out."""

    def xllm_schedulers() -> Iterable[SchedulerSpec]:
        raise error

    module = SimpleNamespace(__name__="m", xllm_plugin=PluginInfo(id="p"), xllm_schedulers=hookimpl(xllm_schedulers))
    record = next(r for r in PluginManager.discover(extra=[module]).load().records if r.id == "p")
    assert record.state == "failed" and type(error).__name__ in record.reason


# ---- loading apart ------------------------------------------------------------------------------------------------------------


def test_a_plugin_that_ends_or_blocks_its_process_is_a_record(install: Install) -> None:
    """Its neighbours are loaded all the same. Dies if reports load plugins in their own process."""
    install("good", "exits", "hangs", "broken_import")
    found = {record["id"]: record for record in load_isolated(timeout_s=4)}
    assert found["exits"]["state"] == "failed"
    assert found["exits"]["reason"] == "its import ended the process with status 7"
    assert found["hangs"]["reason"] == "its import did not return within 4 s"
    assert found["good"]["state"] == "loaded" and "toy" in found["good"]["parts"]["xllm_attention"]
    assert "ModuleNotFoundError" in found["broken"]["reason"]


@pytest.mark.parametrize(
    "arguments", [("--help",), ("plugins", "list"), ("plugins", "disable", "exits"), ("plugins", "lock")]
)
def test_what_reads_names_only_runs_no_plugin(
    install: Install,
    xllm: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
) -> None:
    """With a plugin installed that kills whoever imports it."""
    install("exits", "hangs")
    monkeypatch.chdir(tmp_path)
    done = xllm(*arguments)
    assert done.returncode == 0, done.stderr
    assert "exits" in done.stdout


# ---- commands -----------------------------------------------------------------------------------------------------------------


def test_disable_and_enable_keep_the_file(
    install: Install, xllm: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comments stay; what still names a disabled plugin is told; enabling again leaves what was there."""
    install("good")
    monkeypatch.chdir(tmp_path)
    file = Path("xllm.toml")
    before = '# mine\n[plugins]\nrequire = ["good>=1.2"] # needed\n\n[use]\nscheduler = "good/toy"\n'
    file.write_text(before)
    done = xllm("plugins", "disable", "good")
    assert done.stdout == 'xllm.toml: [plugins] require -= "good>=1.2", disable += "good"\n'
    assert "[use] scheduler still names it" in done.stderr
    assert "# mine" in file.read_text() and "# needed" in file.read_text()
    assert Settings().plugins.disable == ("good",) and Settings().plugins.require == ()
    assert xllm("plugins", "disable", "good").stdout == "plugin 'good' is disabled already\n"
    assert 'disable -= "good"' in xllm("plugins", "enable", "good").stdout
    assert Settings().plugins.disable == ()
    assert "not disabled" in xllm("plugins", "enable", "good").stdout
    wrong = xllm("plugins", "enable", "goood")
    assert wrong.returncode == 1 and "did you mean 'good'?" in wrong.stderr


def test_enable_writes_the_line_that_decides(
    install: Install, xllm: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two claim an id, or only listed plugins may load."""
    install("twin_a", "twin_b", "good")
    monkeypatch.chdir(tmp_path)
    unclear = xllm("plugins", "enable", "twin")
    assert unclear.returncode == 2 and "enable twin@xllm-twin-a" in unclear.stderr
    assert xllm("plugins", "enable", "twin@xllm-twin-b").returncode == 0
    assert Settings().plugins.enable == ("twin@xllm-twin-b",)
    Path("xllm.toml").write_text('[plugins]\npolicy = "listed"\n')
    assert xllm("plugins", "enable", "good").returncode == 0
    assert Settings().plugins.enable == ("good@xllm-good",)


def test_show_and_schema(install: Install, xllm: Callable[..., Any]) -> None:
    """Where it comes from, each part with what it declares, and its settings as TOML that the plugin takes."""
    install("good")
    shown = xllm("plugins", "show", "good").stdout
    assert "distribution  xllm-good 1.4" in shown and "good/toy" in shown and "xllm_attention" in shown
    assert "did you mean 'good'?" in xllm("plugins", "show", "god").stderr
    sample = xllm("plugins", "schema", "good").stdout
    assert "[plugin.good]" in sample and '# greeting = "hello"' in sample
    schema = json.loads(xllm("plugins", "schema", "good", "--json").stdout)
    assert "host_store_bytes" in schema["properties"]


def test_doctor_names_what_to_mend(install: Install, xllm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit status 1 with a broken plugin, 0 without."""
    install("good", "broken_import")
    ill = xllm("plugins", "doctor")
    assert ill.returncode == 1 and "xllm plugins disable broken" in ill.stdout and "1 problems" in ill.stdout
    monkeypatch.setenv("XLLM_PLUGINS", "good")
    well = xllm("plugins", "doctor")
    assert well.returncode == 0 and "no problems" in well.stdout, well.stdout


# ---- lock ----------------------------------------------------------------------------------------------------------------------


def test_the_lock_refuses_what_has_changed(install: Install, tmp_path: Path) -> None:
    """Another plugin, one less, another version, other files: each is a line, and nothing is imported. Dies with the comparison it names."""
    path = tmp_path / "xllm.lock.toml"
    install("good")
    records = PluginManager.discover().records
    entries = locked_now(records)
    write_lock(path, entries)
    check_lock(path, records)
    table = {"locked": True, "lock_file": str(path)}
    start(plugins=table)
    for module in [name for name in sys.modules if name.startswith("xllm_good")]:
        del sys.modules[module]
    text = path.read_text()
    for old, new, line in (
        ('version = "1.4"', 'version = "1.3"', "good: xllm-good 1.3 is in the lock, installed is xllm-good 1.4"),
        (entries[0].sha256, "0" * 64, "good: the files of xllm-good 1.4 have changed"),
        ('id = "good"', 'id = "gone"', "gone: xllm-good 1.4 is in the lock and cannot load here"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(PluginError, match=line):
            start(plugins=table)
        assert "xllm_good.plugin" not in sys.modules
    path.write_text("")
    with pytest.raises(PluginError, match=r"good: xllm-good 1.4 is installed and not in the lock"):
        start(plugins=table)
    path.unlink()
    with pytest.raises(ConfigError, match=r"there is no .*xllm.lock.toml; write it with `xllm plugins lock`"):
        start(plugins=table)


def test_the_lock_lies_beside_the_settings(install: Install, xllm: Callable[..., Any], tmp_path: Path) -> None:
    """And another process that gets its settings as tables finds it too."""
    install("good")
    config = tmp_path / "conf" / "my.toml"
    config.parent.mkdir()
    config.write_text("[plugins]\nlocked = true\n")
    assert xllm("plugins", "lock", "--config", str(config)).returncode == 0
    assert "what is installed" in xllm("plugins", "lock", "--check", "--config", str(config)).stdout
    settings = Settings(config_path=config)
    assert Settings.from_tables(settings.tables()).lock_path == config.parent / "xllm.lock.toml"


# ---- secrets -------------------------------------------------------------------------------------------------------------------


class Keys(BaseModel):
    """Settings of a plugin with a secret."""

    model_config = ConfigDict(extra="forbid")
    token: SecretStr
    url: str = "here"
    size: int = 1


def keyed(seen: list[Any]) -> Any:
    """A plugin that keeps what it is given."""

    def xllm_schedulers(ctx: Any) -> Iterable[SchedulerSpec]:
        seen.append(dict(ctx.settings))
        return []

    info = PluginInfo(id="keyed", config="tests.plugins.test_policy:Keys")
    return SimpleNamespace(__name__="m", xllm_plugin=info, xllm_schedulers=hookimpl(xllm_schedulers))


def test_a_secret_is_the_plugins_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin sees the value, the plan's table the reference. Dies if the value gets into what is printed or sent."""
    monkeypatch.setenv("MY_TOKEN", "s3cr3t")
    seen: list[Any] = []
    settings = Settings(plugin={"keyed": {"token": {"env": "MY_TOKEN"}}})
    manager = PluginManager.discover(settings, extra=[keyed(seen)]).load()
    manager.check_wanted()
    assert seen == [{"token": "s3cr3t", "url": "here", "size": 1}]
    assert manager.tables["keyed"] == {"token": {"env": "MY_TOKEN"}, "url": "here", "size": 1}
    assert reveal(manager.tables["keyed"])["token"] == "s3cr3t"
    assert "s3cr3t" not in json.dumps(settings.tables())


def test_a_secret_that_is_not_there_is_named_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File, line, variable; and a wrong value elsewhere in the table quotes no secret."""
    monkeypatch.delenv("MY_TOKEN", raising=False)
    config = tmp_path / "xllm.toml"
    config.write_text('[plugin.keyed]\ntoken = { env = "MY_TOKEN" }\n')
    manager = PluginManager.discover(Settings(config_path=config), extra=[keyed([])]).load()
    with pytest.raises(
        PluginError, match=r'xllm\.toml:2:1: \[plugin\.keyed\] token = \{ env = "MY_TOKEN" \}: the variable is not set'
    ):
        manager.check_wanted()
    monkeypatch.setenv("MY_TOKEN", "s3cr3t")
    config.write_text('[plugin.keyed]\ntoken = { env = "MY_TOKEN" }\nsize = { env = "MY_TOKEN" }\n')
    manager = PluginManager.discover(Settings(config_path=config), extra=[keyed([])]).load()
    with pytest.raises(PluginError, match=r"size = \*\*\*") as raised:
        manager.check_wanted()
    assert "s3cr3t" not in str(raised.value)
