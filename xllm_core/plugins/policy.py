"""Which of the plugins found may take part, by `[plugins]`, pins and tables. Reads names only: no plugin code has run yet."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from xllm_core.errors import ConfigError, PluginConflictError, PluginError
from xllm_core.plugins.records import CORE, PluginRecord, PluginState

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from xllm_core.config import Settings

_ID = re.compile(r"[a-z][a-z0-9_-]*")


def apply_policy(records: Sequence[PluginRecord], settings: Settings | None) -> list[PluginRecord]:
    """Set state, reason and `is_wanted` of what was found; returns further records, `missing`, for ids that are named and not installed.

    Raises ConfigError for lines that could never hold: the core disabled, an id disabled or allowed that does not exist.
    """
    _check_ids(records, settings)
    wanted = wanted_ids(settings)
    is_strict = settings is not None and settings.plugins.strict
    for record in records:
        rivals = [other for other in records if other.id == record.id]
        record.state, record.reason = _verdict(record, rivals, settings)
        record.is_wanted = record.id in wanted or (is_strict and record.state not in ("disabled", "not-allowed"))
    known = {record.id for record in records}
    missing = {**wanted, **_optional_tables(settings)}
    names = ", ".join(sorted(known))
    return [
        PluginRecord(
            plugin_id, "", "", state="missing", is_wanted=plugin_id in wanted,
            reason=f"{place} names plugin {plugin_id!r}, which is not installed; installed: {names}",
        )
        for plugin_id, place in missing.items()
        if plugin_id not in known
    ]  # fmt: skip


def check_wanted(records: Iterable[PluginRecord], settings: Settings | None) -> None:
    """Raise for the first plugin that the user asked for and that is not loaded, or that is not of the version required."""
    records = list(records)
    loaded = {record.id: record for record in records if record.state == "loaded"}
    for record in records:
        if not record.is_wanted or record.id in loaded:
            continue
        if record.state == "conflict":
            raise PluginConflictError(record.reason)
        if record.state == "missing":
            raise ConfigError(record.reason)
        raise PluginError(
            f"plugin {record.id!r} ({record.origin}) was asked for and is {record.state}: {record.reason}"
        )
    for text in settings.plugins.require if settings is not None else ():
        need = requirement(text)
        found = loaded.get(need.name)
        if found is not None and not need.specifier.contains(found.version, True):
            raise PluginError(f"[plugins] require = [{text!r}]: {found.origin} is installed")


def wanted_ids(settings: Settings | None) -> dict[str, str]:
    """Plugin ids that the user named, and where; their failure stops start-up."""
    if settings is None:
        return {}
    table = settings.plugins
    optional = _optional_tables(settings)
    wanted = {plugin_id: f"[plugin.{plugin_id}]" for plugin_id in settings.plugin if plugin_id not in optional}
    wanted |= {plugin_id: f"[plugins] only = [{plugin_id!r}]" for plugin_id in table.only or ()}
    wanted |= {_split(text)[0]: f"[plugins] enable = [{text!r}]" for text in table.enable}
    wanted |= {requirement(text).name: f"[plugins] require = [{text!r}]" for text in table.require}
    pins = [
        (f"[use] {kind}", name)
        for kind, value in settings.use.items()
        for name in ([value] if isinstance(value, str) else value)
    ]
    for place, name in [*pins, ("[device] name", settings.device.name)]:
        if "/" in name:
            wanted[name.partition("/")[0]] = f"{place} = {name!r}"
    return wanted


def requirement(text: str) -> Requirement:
    """A name with version bounds. Raises ConfigError."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        return Requirement(text)
    except InvalidRequirement as error:
        raise ConfigError(f"{text!r} is no requirement: {error}; write a name, or name>=version") from error


def _optional_tables(settings: Settings | None) -> dict[str, str]:
    """Plugins whose table says `optional = true`: absent or broken, they are passed over."""
    if settings is None:
        return {}
    for plugin_id, table in settings.plugin.items():
        if not isinstance(table.get("optional", False), bool):
            place = settings.place("plugin", plugin_id, "optional")
            raise ConfigError(
                f"{place}: [plugin.{plugin_id}] optional = {table['optional']!r}: it must be true or false"
            )
    return {plugin_id: f"[plugin.{plugin_id}]" for plugin_id, table in settings.plugin.items() if table.get("optional")}


def _check_ids(records: Sequence[PluginRecord], settings: Settings | None) -> None:
    if settings is None:
        return
    known = sorted({record.id for record in records})
    if CORE in settings.plugins.disable:
        raise ConfigError("[plugins] disable = ['core']: the core's own parts cannot be disabled; pin others in [use]")
    if unknown := sorted(set(settings.plugins.disable) - set(known)):
        raise ConfigError(
            f"{settings.place('plugins', 'disable')}: [plugins] disable names {', '.join(unknown)}, not installed; "
            f"installed: {', '.join(known)}. To take it out: xllm plugins enable {unknown[0]}"
        )


def _verdict(
    record: PluginRecord, rivals: Sequence[PluginRecord], settings: Settings | None
) -> tuple[PluginState, str]:
    if not _ID.fullmatch(record.id):
        return "failed", "its id must be lower-case letters, digits, '_' and '-'"
    if settings is None or record.id == CORE:
        return _rivalry(record, rivals, None)
    table = settings.plugins
    enabled = dict(_split(text) for text in table.enable)
    if record.id in table.disable:
        return "disabled", f"listed in [plugins] disable; `xllm plugins enable {record.id}` takes it out"
    if table.only is not None and record.id not in table.only:
        return "not-allowed", "[plugins] only (or XLLM_PLUGINS) names others"
    if table.policy == "listed" and record.id not in enabled:
        return "not-allowed", (
            f'[plugins] policy = "listed", and enable does not name it; to allow it: enable = ["{record.id}@{record.distribution}"]'
        )
    return _rivalry(record, rivals, enabled.get(record.id))


def _rivalry(record: PluginRecord, rivals: Sequence[PluginRecord], chosen: str | None) -> tuple[PluginState, str]:
    """Two distributions under one id; chosen: the one that `enable` gives it to."""
    counts = Counter(rival.distribution for rival in rivals)
    names = sorted(counts)
    if chosen and chosen not in counts:
        return "failed", f"[plugins] enable asks for {record.id}@{chosen}; installed from {', '.join(names)}"
    if chosen and chosen != record.distribution:
        return "disabled", f"[plugins] enable gives {record.id!r} to {chosen}"
    if counts[record.distribution] > 1:
        return "conflict", f"{record.distribution} declares the id {record.id!r} more than once"
    if len(names) > 1 and not chosen:
        return "conflict", (
            f"plugin id {record.id!r} is provided by {' and '.join(names)}; "
            f'keep one: [plugins] enable = ["{record.id}@{names[0]}"]'
        )
    return "found", ""


def _split(text: str) -> tuple[str, str | None]:
    plugin_id, _, distribution = text.partition("@")
    return plugin_id, distribution or None
