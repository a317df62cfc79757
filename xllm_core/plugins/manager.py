"""Finds plugins, takes them in one by one, and collects what they describe. Assembly only: after `lock()` no hook can be called.

found -> policy -> duplicates -> METADATA against the installed core -> import -> `PluginInfo` -> hook names -> own settings -> hooks called, specs
checked -> loaded. Each plugin is registered with a pluggy manager of its own, so that one broken plugin takes nothing down with it.
"""

from __future__ import annotations

import logging
import platform
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

from xllm_core import __version__
from xllm_core.errors import ConfigError, PluginConflictError, PluginError
from xllm_core.plugins import hookspecs
from xllm_core.plugins import policy as plugin_policy
from xllm_core.plugins.installed import Installed, installed_plugins
from xllm_core.plugins.plan import describe
from xllm_core.plugins.plan import load_target as load_target
from xllm_core.plugins.records import CORE as CORE
from xllm_core.plugins.records import PluginRecord as PluginRecord
from xllm_core.plugins.specs import API_VERSION, PluginContext, PluginInfo, Spec

if TYPE_CHECKING:
    from xllm_core.config import Settings

_log = logging.getLogger("xllm_core.plugins")


class PluginModule(Protocol):
    """What an entry point names: a module, or in tests anything with this attribute and hook implementations."""

    xllm_plugin: PluginInfo


@dataclass(frozen=True, slots=True)
class Offer:
    """One spec and who offers it."""

    plugin: str
    distribution: str
    version: str
    spec: Any

    @property
    def name(self) -> str:
        """The qualified name, as users write it in `[use]`."""
        return f"{self.plugin}/{self.spec.name}"


@dataclass(slots=True)
class _Candidate:
    """A plugin between discovery and loading. `load` imports its module; flaw: why its metadata cannot be read, or ""."""

    record: PluginRecord
    load: Callable[[], PluginModule]
    requires: Sequence[str] = ()
    requires_python: str = ""
    flaw: str = ""
    hooks: pluggy.PluginManager | None = None
    info: PluginInfo | None = None


class PluginManager:
    """All plugins of this process. Make one with `discover`, then `load`, then hand it to `resolve.assemble`, which locks it."""

    def __init__(self, candidates: Sequence[_Candidate], settings: Settings | None) -> None:
        self._candidates = list(candidates)
        self._settings = settings
        self._tables: dict[str, Mapping[str, Any]] = {}
        self._is_loaded = False
        self._is_locked = False
        self._missing = plugin_policy.apply_policy([candidate.record for candidate in self._candidates], settings)

    @classmethod
    def discover(cls, settings: Settings | None = None, *, extra: Sequence[PluginModule] = ()) -> PluginManager:
        """Scan entry points once; imports no plugin. extra: plugins given in process, as tests do."""
        candidates = [_from_installed(entry) for entry in installed_plugins()]
        candidates += [_from_module(module) for module in extra]
        if not any(candidate.record.id == CORE for candidate in candidates):
            # A checkout on sys.path without metadata still has its own parts.
            builtin = lambda: import_module("xllm_core.plugins.builtin")  # noqa: E731
            candidates.append(_Candidate(PluginRecord(CORE, "xllm-core", __version__), builtin))
        return cls(candidates, settings)

    @property
    def records(self) -> tuple[PluginRecord, ...]:
        """One per distribution and id, and one per id that is named and not installed; core first, then by id."""
        records = [*(candidate.record for candidate in self._candidates), *self._missing]
        return tuple(sorted(records, key=lambda record: (record.id != CORE, record.id, record.distribution)))

    @property
    def tables(self) -> Mapping[str, Mapping[str, Any]]:
        """The validated settings of each loaded plugin that has any, defaults filled in, secrets as references where they were given so."""
        return self._tables

    def load(
        self,
        *,
        skip: Mapping[str, str] = MappingProxyType({}),
        on_begin: Callable[[str], None] = lambda plugin_id: None,
    ) -> PluginManager:
        """Import every enabled plugin and call its hooks; failures land in `records`. Returns itself; a second call does nothing.

        Raises PluginError, before anything is imported, if `[plugins] locked` is set and the lock names others.
        skip: plugin id -> why it is known to fail; it is not imported. on_begin: told the id of each before it is imported.
        """
        self._check_unlocked()
        if self._is_loaded:
            return self
        self._is_loaded = True
        if self._settings is not None and self._settings.plugins.locked:
            from xllm_core.plugins.lockfile import check_lock

            check_lock(self._settings.lock_path, self.check_metadata().records)  # before any of their code runs
        core = next((c for c in self._candidates if c.record.id == CORE), None)
        for candidate in sorted(self._candidates, key=lambda c: (c is not core, c.record.id)):
            if candidate.record.state != "found":
                continue
            if reason := skip.get(candidate.record.id):
                candidate.record.state, candidate.record.reason = "failed", reason
                continue
            on_begin(candidate.record.id)
            with redirect_stdout(
                sys.stderr
            ):  # stdout is the command's: what a plugin prints must not stand in its JSON
                self._take_in(candidate)
        self._refuse_hidden_commands()
        for record in self.records:
            if record.state in ("failed", "incompatible", "conflict") and not record.is_wanted:
                _log.warning(
                    "plugin %s (%s %s) is left out: %s", record.id, record.distribution, record.version, record.reason
                )
        return self

    def commands(self, plugin_id: str) -> tuple[Offer, ...]:
        """What one plugin brings to the command line; imports that plugin's module and no other. Raises PluginError if it cannot be loaded."""
        self._check_unlocked()
        candidate = self._usable(plugin_id)
        try:
            with redirect_stdout(sys.stderr):
                return _offers(candidate.record, self._call(candidate, "xllm_cli", PluginContext()))
        except KeyboardInterrupt:
            raise  # that was the user
        except BaseException as error:
            record = candidate.record
            record.state, record.reason = "failed", describe(error)
            raise self._unusable(plugin_id) from error

    def _usable(self, plugin_id: str) -> _Candidate:
        """The one candidate of an id, imported. Raises PluginError."""
        for candidate in self._candidates:
            if candidate.record.id == plugin_id and candidate.record.state == "found":
                with redirect_stdout(sys.stderr):
                    self._import(candidate)
            if (
                candidate.record.id == plugin_id
                and candidate.hooks is not None
                and candidate.record.state in ("found", "loaded")
            ):
                return candidate
        raise self._unusable(plugin_id)

    def _unusable(self, plugin_id: str) -> PluginError:
        found = ", ".join(f"{r.distribution}: {r.state}, {r.reason}" for r in self.records if r.id == plugin_id)
        return PluginError(f"plugin {plugin_id!r} is not usable ({found or 'not installed'}); see `xllm plugins list`")

    def config_model(self, plugin_id: str) -> Any:
        """The pydantic model of one plugin's table, or None if it takes no settings; imports that plugin and no other. Raises PluginError."""
        self._check_unlocked()
        candidate = self._usable(plugin_id)
        config = candidate.info.config if candidate.info is not None else None
        return _table_model(config, plugin_id) if config is not None else None

    def offers(self, hook: str) -> tuple[Offer, ...]:
        """What loaded plugins offer through one hook: by descending rank, core last among equals, then by name."""
        if hook not in hookspecs.HOOKS:
            raise PluginError(f"there is no hook {hook!r}; hooks are {', '.join(sorted(hookspecs.HOOKS))}")
        if not self._is_loaded:
            raise PluginError("offers() before load(): plugins were discovered and not loaded")
        offers = [offer for r in self.records if r.state == "loaded" for offer in _offers(r, r.specs.get(hook, ()))]
        return tuple(sorted(offers, key=lambda o: (-o.spec.rank, o.plugin == CORE, o.plugin, o.spec.name)))

    def check_wanted(self) -> None:
        """Raise for the first plugin that the user asked for and that is not loaded, or that is not of the version required."""
        plugin_policy.check_wanted(self.records, self._settings)

    def lock(self) -> None:
        """Assembly is over: any further hook call raises, also through a pluggy manager that somebody kept."""
        self._is_locked = True

    def _check_unlocked(self) -> None:
        if self._is_locked:
            raise PluginError("plugins are locked: the assembly plan is made, and hooks are called at no other time")

    def _take_in(self, candidate: _Candidate) -> None:
        """Import one plugin, validate its table, call its hooks. Whatever goes wrong becomes the record's state and reason."""
        record = candidate.record
        self._import(candidate)
        if record.state != "found" or candidate.info is None:
            return
        try:
            table = self._validated(candidate.info)
            core = self._settings.core_tables() if self._settings is not None else {}
            context = PluginContext(settings=_revealed(table), core=core)
            specs = {
                hook: self._call(candidate, hook, PluginContext() if hook == "xllm_cli" else context)
                for hook in hookspecs.HOOKS
            }
        except KeyboardInterrupt:
            raise  # that was the user
        except BaseException as error:  # noqa: BLE001  a plugin may raise anything; it is recorded, and fatal if asked for
            record.state, record.reason = "failed", describe(error)
            return
        record.specs, record.state = specs, "loaded"
        if table:
            self._tables[record.id] = table

    def _import(self, candidate: _Candidate) -> None:
        """Check metadata, import the module and check its hooks in a pluggy manager of its own."""
        record = candidate.record
        if candidate.hooks is not None:
            return
        try:
            if not _fits(candidate):
                return
            module = candidate.load()
            info = _checked_info(module, record.id)
            if not _speaks_our_api(info):
                record.state = "incompatible"
                record.reason = f"it needs plugin API {info.xllm_api}, this core provides {API_VERSION}"
                return
            hooks = pluggy.PluginManager(hookspecs.PROJECT)
            hooks.add_hookspecs(hookspecs)
            hooks.add_hookcall_monitoring(lambda *_: self._check_unlocked(), lambda *_: None)
            hooks.register(module, name=record.id)
            hooks.check_pending()
            _check_hooks(hooks, module)
        except KeyboardInterrupt:
            raise  # that was the user
        except BaseException as error:  # noqa: BLE001  a plugin may raise anything; it is recorded, and fatal if asked for
            record.state, record.reason = "failed", describe(error)
            return
        candidate.hooks, candidate.info = hooks, info

    def _call(self, candidate: _Candidate, hook: str, context: PluginContext) -> tuple[Spec, ...]:
        """Call one hook of one plugin and check what it returns."""
        if candidate.hooks is None:
            return ()
        kind = hookspecs.HOOKS[hook]
        specs: list[Spec] = []
        for answer in getattr(candidate.hooks.hook, hook)(ctx=context):
            if isinstance(answer, Spec) or not isinstance(answer, Iterable):
                raise TypeError(
                    f"{hook} returned {type(answer).__name__}; return an iterable of {kind.__name__}, or yield them"
                )
            for spec in answer:
                if type(spec) is not kind:
                    raise TypeError(f"{hook} offered a {type(spec).__name__}; it takes {kind.__name__}")
                if any(spec.name == other.name for other in specs):
                    raise PluginConflictError(f"{hook} offers the name {spec.name!r} twice")
                specs.append(spec)
        return tuple(specs)

    def check_metadata(self) -> PluginManager:
        """Say of each plugin that is found whether its metadata fits this core and this Python; no plugin code runs. Returns itself."""
        for candidate in self._candidates:
            if candidate.record.state == "found":
                _fits(candidate)
        return self

    def _validated(self, info: PluginInfo) -> Mapping[str, Any]:
        """The plugin's table after its own model checked it, defaults filled in; empty for a plugin that takes no settings."""
        given = self._settings.plugin.get(info.id, {}) if self._settings is not None else {}
        raw = {key: value for key, value in given.items() if key != "optional"}  # which is said to us
        if info.config is None:
            if raw:
                raise ConfigError(
                    f"[plugin.{info.id}] is set, and plugin {info.id!r} takes no settings; remove the table"
                )
            return {}
        from xllm_core.config import validate_plugin_table  # pydantic, which listing commands does not need

        return validate_plugin_table(info.id, _table_model(info.config, info.id), raw, self._settings)

    def _refuse_hidden_commands(self) -> None:
        """A plugin whose id is the name of a core command could never be reached as `xllm ID`."""
        taken = {offer.spec.name for offer in self.offers("xllm_cli") if offer.plugin == CORE}
        for record in self.records:
            if record.id in taken and record.state == "loaded" and record.specs.get("xllm_cli"):
                record.state, record.specs = "failed", {}
                record.reason = f"its commands would hide behind `xllm {record.id}` of the core; it needs another id"


def _from_installed(entry: Installed) -> _Candidate:
    record = PluginRecord(entry.id, entry.distribution, entry.version)
    return _Candidate(record, entry.load, entry.requires, entry.requires_python, entry.flaw)


def _from_module(module: PluginModule) -> _Candidate:
    record = PluginRecord(
        module.xllm_plugin.id, f"in-process:{getattr(module, '__name__', type(module).__name__)}", "0"
    )
    return _Candidate(record, lambda: module)


def _fits(candidate: _Candidate) -> bool:
    """Whether a plugin's metadata lets it load; otherwise its record says why not."""
    if candidate.flaw:
        candidate.record.state, candidate.record.reason = "failed", candidate.flaw
    elif reason := _unfit(candidate):
        candidate.record.state, candidate.record.reason = "incompatible", reason
    return candidate.record.state == "found"


def _unfit(candidate: _Candidate) -> str:
    """The reason why this core, or this Python, does not satisfy a distribution's own requirements, or nothing."""
    if candidate.requires_python:
        from packaging.specifiers import InvalidSpecifier, SpecifierSet

        python = platform.python_version()
        try:
            if not SpecifierSet(candidate.requires_python).contains(python, True):
                return f"it requires Python {candidate.requires_python}, this is {python}"
        except InvalidSpecifier as error:
            return f"its metadata says Requires-Python: {error}"
    for text in candidate.requires:
        if not re.match(r"xllm[-_.]core\b(?![-_.]?\w)", text, re.IGNORECASE):
            continue  # another package's line, and not ours to judge
        try:
            need = plugin_policy.requirement(text)
        except ConfigError:
            return f"its metadata says Requires-Dist: {text}, which is no requirement"
        is_active = need.marker is None or need.marker.evaluate({"extra": ""})
        if is_active and not need.specifier.contains(__version__, True):
            return f"it requires xllm-core{need.specifier}, installed is {__version__}"
    return ""


def _checked_info(module: PluginModule, plugin_id: str) -> PluginInfo:
    info = getattr(module, "xllm_plugin", None)
    if not isinstance(info, PluginInfo):
        raise PluginError("its module has no `xllm_plugin = PluginInfo(...)`")
    if info.id != plugin_id:
        raise PluginError(
            f"its entry point is named {plugin_id!r} and its PluginInfo says {info.id!r}; make them equal"
        )
    return info


def _speaks_our_api(info: PluginInfo) -> bool:
    if info.xllm_api == f">={API_VERSION}":
        return True  # by far the most, and `packaging` takes longer to import than all the rest of `xllm --help`
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        return SpecifierSet(info.xllm_api).contains(API_VERSION, True)
    except InvalidSpecifier as error:
        raise PluginError(f"PluginInfo.xllm_api: {error}") from error


def _check_hooks(hooks: pluggy.PluginManager, module: PluginModule) -> None:
    """Refuse what would make the order of installation matter, and implementations that would never be called."""
    for name in hookspecs.HOOKS:
        implementations = getattr(hooks.hook, name).get_hookimpls()
        for implementation in implementations:
            options = ("hookwrapper", "wrapper", "tryfirst", "trylast")
            if used := [option for option in options if getattr(implementation, option)]:
                raise PluginError(f"{name} uses {used[0]}; hooks only describe, so wrappers and call order are refused")
        if not implementations and callable(getattr(module, name, None)):
            raise PluginError(f"{name} is defined and not marked with @hookimpl, so it would never be called")


def _table_model(target: str, plugin_id: str) -> Any:
    from pydantic import BaseModel

    model = load_target(target, owner=f"plugin {plugin_id}")
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise PluginError(f"plugin {plugin_id}: PluginInfo.config = {target!r} is {model!r}, and no pydantic model")
    return model


def _revealed(table: Mapping[str, Any]) -> Mapping[str, Any]:
    if not table:
        return {}
    from xllm_core.config_secrets import reveal

    return reveal(table)


def _offers(record: PluginRecord, specs: Iterable[Spec]) -> tuple[Offer, ...]:
    return tuple(Offer(record.id, record.distribution, record.version, spec) for spec in specs)
