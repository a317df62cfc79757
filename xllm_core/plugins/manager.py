"""Finds plugins, takes them in one by one, and collects what they describe. Assembly only: after `lock()` no hook can be called.

found -> policy -> duplicates -> METADATA against the installed core -> import -> `PluginInfo` -> hook names -> own settings -> hooks called, specs
checked -> loaded. Each plugin is registered with a pluggy manager of its own, so that one broken plugin takes nothing down with it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol

import importlib_metadata
import pluggy

from xllm_core import __version__
from xllm_core.errors import ConfigError, PluginConflictError, PluginError
from xllm_core.plugins import hookspecs
from xllm_core.plugins.plan import describe
from xllm_core.plugins.plan import load_target as load_target
from xllm_core.plugins.specs import API_VERSION, PluginContext, PluginInfo, Spec

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from xllm_core.config import Settings

GROUP = "xllm_core.plugins"
CORE = "core"

PluginState = Literal["found", "loaded", "disabled", "failed", "incompatible", "conflict"]
_ID = re.compile(r"[a-z][a-z0-9_-]*")
_log = logging.getLogger("xllm_core.plugins")


class PluginModule(Protocol):
    """What an entry point names: a module, or in tests anything with this attribute and hook implementations."""

    xllm_plugin: PluginInfo


@dataclass(slots=True)
class PluginRecord:
    """What became of one plugin. Read it; only the manager writes.

    reason: why it is not loaded, or empty. is_wanted: the user named it (required, enabled, pinned or configured), so that its failure
    stops start-up. specs: hook name -> what it offered.
    """

    id: str
    distribution: str
    version: str
    state: PluginState = "found"
    reason: str = ""
    is_wanted: bool = False
    specs: dict[str, tuple[Spec, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `xllm plugins list --json`."""
        parts = {hook: [spec.name for spec in specs] for hook, specs in self.specs.items() if specs}
        return {
            "id": self.id,
            "distribution": self.distribution,
            "version": self.version,
            "state": self.state,
            "reason": self.reason,
            "parts": parts,
        }


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
    """A plugin between discovery and loading. `load` imports its module."""

    record: PluginRecord
    load: Callable[[], PluginModule]
    requires: Sequence[str] = ()
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
        self._apply_policy()

    @classmethod
    def discover(cls, settings: Settings | None = None, *, extra: Sequence[PluginModule] = ()) -> PluginManager:
        """Scan entry points once; imports no plugin. extra: plugins given in process, as tests do."""
        candidates = [_from_entry_point(entry) for entry in importlib_metadata.entry_points(group=GROUP)]
        candidates += [_from_module(module) for module in extra]
        if not any(candidate.record.id == CORE for candidate in candidates):
            # A checkout on sys.path without metadata still has its own parts.
            builtin = lambda: import_module("xllm_core.plugins.builtin")  # noqa: E731
            candidates.append(_Candidate(PluginRecord(CORE, "xllm-core", __version__), builtin))
        return cls(candidates, settings)

    @property
    def records(self) -> tuple[PluginRecord, ...]:
        """One per distribution and id, core first, then by id."""
        records = [candidate.record for candidate in self._candidates]
        return tuple(sorted(records, key=lambda record: (record.id != CORE, record.id, record.distribution)))

    @property
    def tables(self) -> Mapping[str, Mapping[str, Any]]:
        """The validated settings of each loaded plugin that has any, defaults filled in, as plain data."""
        return self._tables

    def load(self) -> PluginManager:
        """Import every enabled plugin and call its hooks; failures land in `records`. Returns itself; a second call does nothing."""
        self._check_unlocked()
        if self._is_loaded:
            return self
        self._is_loaded = True
        core = next((c for c in self._candidates if c.record.id == CORE), None)
        for candidate in sorted(self._candidates, key=lambda c: (c is not core, c.record.id)):
            if candidate.record.state == "found":
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
        matches = [candidate for candidate in self._candidates if candidate.record.id == plugin_id]
        for candidate in matches:
            record = candidate.record
            if record.state == "found":
                self._import(candidate)
            if record.state in ("found", "loaded") and candidate.hooks is not None:
                return _offers(record, self._call(candidate, "xllm_cli", PluginContext()))
        found = ", ".join(f"{c.record.distribution}: {c.record.state}, {c.record.reason}" for c in matches)
        raise PluginError(f"plugin {plugin_id!r} is not usable ({found or 'not installed'}); see `xllm plugins list`")

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
        for record in self.records:
            if record.is_wanted and record.state == "conflict":
                raise PluginConflictError(record.reason)
            is_decided = any(r.id == record.id and r.state == "loaded" for r in self.records)
            if record.is_wanted and record.state != "loaded" and not is_decided:
                raise PluginError(
                    f"plugin {record.id!r} ({record.distribution} {record.version}) was asked for and is {record.state}: {record.reason}"
                )
        known = {record.id for record in self.records}
        for plugin_id, place in _wanted(self._settings).items():
            if plugin_id not in known:
                raise ConfigError(
                    f"{place} names plugin {plugin_id!r}, which is not installed; installed: {', '.join(sorted(known))}"
                )
        if self._settings is not None:
            for text in self._settings.plugins.require:
                self._check_version(text)

    def lock(self) -> None:
        """Assembly is over: any further hook call raises, also through a pluggy manager that somebody kept."""
        self._is_locked = True

    def _check_version(self, text: str) -> None:
        need = _requirement(text)
        for record in self.records:
            if (
                record.id == need.name
                and record.state == "loaded"
                and not need.specifier.contains(record.version, True)
            ):
                raise PluginError(
                    f"[plugins] require = [{text!r}]: {record.distribution} {record.version} is installed"
                )

    def _check_unlocked(self) -> None:
        if self._is_locked:
            raise PluginError("plugins are locked: the assembly plan is made, and hooks are called at no other time")

    def _apply_policy(self) -> None:
        """Disable, find two distributions under one id, and mark what the user asked for. No plugin code runs."""
        plugins = self._settings.plugins if self._settings is not None else None
        decided = dict(_split_enable(text) for text in plugins.enable) if plugins else {}
        disabled = set(plugins.disable) if plugins else set()
        wanted = _wanted(self._settings)
        known = {candidate.record.id for candidate in self._candidates}
        if CORE in disabled:
            raise ConfigError(
                "[plugins] disable = ['core']: the core's own parts cannot be disabled; pin others in [use]"
            )
        if unknown := sorted(disabled - known):
            raise ConfigError(
                f"[plugins] disable names {unknown}, not installed; installed: {', '.join(sorted(known))}"
            )
        for candidate in self._candidates:
            record = candidate.record
            record.is_wanted = record.id in wanted
            rivals = sorted({c.record.distribution for c in self._candidates if c.record.id == record.id})
            is_doubled = sum(c.record.id == record.id for c in self._candidates) > 1
            choice = decided.get(record.id)
            if not _ID.fullmatch(record.id):
                record.state, record.reason = "failed", "its id must be lower-case letters, digits, '_' and '-'"
            elif record.id in disabled:
                record.state, record.reason = "disabled", "listed in [plugins] disable"
            elif choice and choice not in rivals:
                record.state = "failed"
                record.reason = f"[plugins] enable asks for {record.id}@{choice}; installed from {', '.join(rivals)}"
            elif choice and choice != record.distribution:
                record.state, record.reason = "disabled", f"[plugins] enable gives {record.id!r} to {choice}"
            elif is_doubled and len(rivals) == 1:
                record.state, record.reason = "conflict", f"{rivals[0]} declares the id {record.id!r} more than once"
            elif is_doubled and not choice:
                record.state = "conflict"
                record.reason = (
                    f"plugin id {record.id!r} is provided by {' and '.join(rivals)}; "
                    f'keep one: [plugins] enable = ["{record.id}@{rivals[0]}"]'
                )

    def _take_in(self, candidate: _Candidate) -> None:
        """Import one plugin, validate its table, call its hooks. Whatever goes wrong becomes the record's state and reason."""
        record = candidate.record
        self._import(candidate)
        if record.state != "found" or candidate.info is None:
            return
        try:
            table = self._validated(candidate.info)
            core = self._settings.core_tables() if self._settings is not None else {}
            context = PluginContext(settings=table, core=core)
            specs = {
                hook: self._call(candidate, hook, PluginContext() if hook == "xllm_cli" else context)
                for hook in hookspecs.HOOKS
            }
        except Exception as error:  # noqa: BLE001  a plugin may raise anything; it is recorded, and fatal if asked for
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
            if reason := _incompatible(candidate.requires):
                record.state, record.reason = "incompatible", reason
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
        except (Exception, SystemExit) as error:  # noqa: BLE001  a plugin may raise anything; it is recorded, and fatal if asked for
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

    def _validated(self, info: PluginInfo) -> Mapping[str, Any]:
        """The plugin's table after its own model checked it, defaults filled in; empty for a plugin that takes no settings."""
        raw = self._settings.plugin.get(info.id, {}) if self._settings is not None else {}
        if info.config is None:
            if raw:
                raise ConfigError(
                    f"[plugin.{info.id}] is set, and plugin {info.id!r} takes no settings; remove the table"
                )
            return {}
        from xllm_core.config import validate_plugin_table  # pydantic, which listing commands does not need

        return validate_plugin_table(info.id, load_target(info.config, owner=f"plugin {info.id}"), raw, self._settings)

    def _refuse_hidden_commands(self) -> None:
        """A plugin whose id is the name of a core command could never be reached as `xllm ID`."""
        taken = {offer.spec.name for offer in self.offers("xllm_cli") if offer.plugin == CORE}
        for record in self.records:
            if record.id in taken and record.state == "loaded" and record.specs.get("xllm_cli"):
                record.state, record.specs = "failed", {}
                record.reason = f"its commands would hide behind `xllm {record.id}` of the core; it needs another id"


def _from_entry_point(entry: importlib_metadata.EntryPoint) -> _Candidate:
    dist = entry.dist
    name, version = (dist.metadata["Name"], dist.version) if dist is not None else ("unknown", "0")
    return _Candidate(PluginRecord(entry.name, name, version), entry.load, tuple((dist and dist.requires) or ()))


def _from_module(module: PluginModule) -> _Candidate:
    record = PluginRecord(
        module.xllm_plugin.id, f"in-process:{getattr(module, '__name__', type(module).__name__)}", "0"
    )
    return _Candidate(record, lambda: module)


def _incompatible(requires: Iterable[str]) -> str:
    """The reason why the installed core does not satisfy a distribution's own requirements, or nothing."""
    for text in requires:
        if not re.match(r"xllm[-_.]core\b(?![-_.]?\w)", text, re.IGNORECASE):
            continue  # another package's line, and not ours to judge
        need = _requirement(text)
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


def _split_enable(text: str) -> tuple[str, str | None]:
    plugin_id, _, distribution = text.partition("@")
    return plugin_id, distribution or None


def _requirement(text: str) -> Requirement:
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        return Requirement(text)
    except InvalidRequirement as error:
        raise ConfigError(f"{text!r} is no requirement: {error}; write a name, or name>=version") from error


def _wanted(settings: Settings | None) -> dict[str, str]:
    """Plugin ids that the user named, and where; their failure stops start-up."""
    if settings is None:
        return {}
    wanted = {plugin_id: f"[plugin.{plugin_id}]" for plugin_id in settings.plugin}
    wanted |= {_split_enable(text)[0]: f"[plugins] enable = [{text!r}]" for text in settings.plugins.enable}
    wanted |= {_requirement(text).name: f"[plugins] require = [{text!r}]" for text in settings.plugins.require}
    pins = [
        (f"[use] {kind}", name)
        for kind, value in settings.use.items()
        for name in ([value] if isinstance(value, str) else value)
    ]
    for place, name in [*pins, ("[device] name", settings.device.name)]:
        if "/" in name:
            wanted[name.partition("/")[0]] = f"{place} = {name!r}"
    return wanted


def _offers(record: PluginRecord, specs: Iterable[Spec]) -> tuple[Offer, ...]:
    return tuple(Offer(record.id, record.distribution, record.version, spec) for spec in specs)
