"""Edits of the settings file that `xllm plugins enable` and `disable` make. Reads names of plugins, and imports none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import tomlkit
from tomlkit.exceptions import ParseError

from xllm_core.config import DEFAULT_FILE
from xllm_core.config_sources import PLUGINS_VARIABLE, guess
from xllm_core.errors import ConfigError, PluginError
from xllm_core.plugins.installed import installed_plugins
from xllm_core.plugins.records import CORE


def installed(plugin_id: str, distribution: str = "") -> list[str]:
    """Distributions that provide an id. Raises PluginError if none does, or not the one given."""
    entries = installed_plugins()
    found = sorted({entry.distribution for entry in entries if entry.id == plugin_id})
    if plugin_id == CORE:
        raise PluginError("the core's own parts always take part; pin others in [use]")
    if not found:
        known = sorted({entry.id for entry in entries} - {CORE})
        raise PluginError(
            f"no plugin {plugin_id!r} is installed{guess(plugin_id, known)}; installed: {', '.join(known) or 'none'}"
        )
    if distribution and distribution not in found:
        raise PluginError(f"{plugin_id!r} is provided by {', '.join(found)}, not by {distribution!r}")
    return found


def installed_ids() -> set[str]:
    """Ids that some distribution provides."""
    return {entry.id for entry in installed_plugins()}


def note_environment(plugin_id: str) -> None:
    """Say so where a variable overrules the file."""
    import os

    if PLUGINS_VARIABLE in os.environ and plugin_id not in os.environ[PLUGINS_VARIABLE].split(","):
        click.echo(f"note: the variable {PLUGINS_VARIABLE} is set and does not name it", err=True)


class SettingsFile:
    """The `[plugins]` table of a settings file, which need not exist yet."""

    def __init__(self, path: Path | None) -> None:
        self._path = path or DEFAULT_FILE
        try:
            text = self._path.read_text(encoding="utf-8") if path is not None or self._path.exists() else ""
            self._document = tomlkit.parse(text)
        except (OSError, UnicodeDecodeError, ParseError) as error:
            raise ConfigError(f"cannot edit {self._path}: {error}") from error

    def get(self, key: str) -> Any:
        """A value of `[plugins]`, as plain data."""
        table = self._document.unwrap().get("plugins", {})
        return table.get(key) if isinstance(table, dict) else None

    def add(self, key: str, value: str) -> list[str]:
        """Append to a list of `[plugins]`; returns what was changed, for people."""
        if value in self._list(key):
            return []
        table = self._document.setdefault("plugins", tomlkit.table())
        table.setdefault(key, tomlkit.array()).append(value)
        return [f'{key} += "{value}"']

    def remove(self, key: str, plugin_id: str) -> list[str]:
        """Take a plugin out of a list of `[plugins]`, however it is written there ("x", "x@dist", "x>=1")."""
        gone = [text for text in self._list(key) if re.split(r"[^a-z0-9_-]", text)[0] == plugin_id]
        for text in gone:
            self._document["plugins"][key].remove(text)
        return [f'{key} -= "{text}"' for text in gone]

    def mentions(self, plugin_id: str) -> list[str]:
        """Other places of the file that ask for a plugin."""
        document = self._document.unwrap()
        places = [f"[plugin.{plugin_id}]"] if plugin_id in document.get("plugin", {}) else []
        for kind, names in document.get("use", {}).items():
            if any(str(name).startswith(f"{plugin_id}/") for name in ([names] if isinstance(names, str) else names)):
                places.append(f"[use] {kind}")
        return places

    def save(self, changes: list[str], *, otherwise: str) -> None:
        """Write the file if anything changed, and say what."""
        if not changes:
            click.echo(otherwise)
            return
        self._path.write_text(tomlkit.dumps(self._document), encoding="utf-8")
        click.echo(f"{self._path}: [plugins] {', '.join(changes)}")

    def _list(self, key: str) -> list[str]:
        value = self.get(key) or []
        if not isinstance(value, list):
            raise ConfigError(f"{self._path}: [plugins] {key} = {value!r}: it must be a list")
        return [str(item) for item in value]
