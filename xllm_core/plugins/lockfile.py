"""`xllm.lock.toml`: which plugins were installed when it was written, to the byte. `[plugins] locked` refuses to start with others."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import importlib_metadata

from xllm_core.errors import ConfigError, PluginError
from xllm_core.plugins.records import CORE, PluginRecord

_HEAD = "# Plugins that `xllm ... --locked` starts with. Written by `xllm plugins lock`; sha256 is over the installed files.\n"


@dataclass(frozen=True, slots=True)
class LockedPlugin:
    """One entry. sha256: over its modules as they lie there, and over RECORD, which lists every file as it was installed (not of an editable one)."""

    id: str
    distribution: str
    version: str
    sha256: str


def locked_now(records: Iterable[PluginRecord]) -> list[LockedPlugin]:
    """Entries for what may load now, by id."""
    entries = []
    for record in records:
        if record.id != CORE and record.state in ("found", "loaded"):
            entries.append(LockedPlugin(record.id, record.distribution, record.version, fingerprint(record)))
    return sorted(entries, key=lambda entry: (entry.id, entry.distribution))


def write_lock(path: Path, entries: Iterable[LockedPlugin]) -> None:
    """Write the file."""
    blocks = [
        "[[plugin]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in asdict(entry).items())
        for entry in entries
    ]
    path.write_text("\n".join([_HEAD, *blocks]), encoding="utf-8")


def check_lock(path: Path, records: Iterable[PluginRecord]) -> None:
    """Raise PluginError that lists every difference between the file and what may load, ConfigError for a file that is no lock."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("plugin", [])
        wanted = {(entry := LockedPlugin(**table)).id: entry for table in tables}
    except FileNotFoundError as error:
        raise ConfigError(
            f"[plugins] locked is set and there is no {path}; write it with `xllm plugins lock`"
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, TypeError) as error:
        raise ConfigError(f"{path} is not a lock file: {error}; write it with `xllm plugins lock`") from error
    found = {entry.id: entry for entry in locked_now(records)}
    lines = []
    for plugin_id in sorted(wanted.keys() | found.keys()):
        there, here = wanted.get(plugin_id), found.get(plugin_id)
        if there is None:
            assert here is not None
            lines.append(f"  {plugin_id}: {here.distribution} {here.version} is installed and not in the lock")
        elif here is None:
            lines.append(f"  {plugin_id}: {there.distribution} {there.version} is in the lock and cannot load here")
        elif (here.distribution, here.version) != (there.distribution, there.version):
            lines.append(
                f"  {plugin_id}: {there.distribution} {there.version} is in the lock, installed is {here.distribution} {here.version}"
            )
        elif here.sha256 != there.sha256:
            lines.append(f"  {plugin_id}: the files of {here.distribution} {here.version} have changed")
    if lines:
        raise PluginError(
            "\n".join([f"installed plugins differ from {path}:", *lines, "to accept them: xllm plugins lock"])
        )


def fingerprint(record: PluginRecord) -> str:
    """SHA-256, hex, over what is installed under a plugin's distribution. Imports nothing of it."""
    dist = importlib_metadata.distribution(record.distribution)
    origin = json.loads(dist.read_text("direct_url.json") or "{}")
    recorded = dist.read_text("RECORD")
    digest = hashlib.sha256()
    if recorded is not None and not origin.get("dir_info", {}).get("editable"):
        digest.update(recorded.encode())
    targets = [entry.value for entry in dist.entry_points if entry.group == "xllm_core.plugins"]
    modules = sorted({re.split(r"[.:\s]", target.strip())[0] for target in targets} - {""})
    for path in sorted(file for module in modules for file in _sources(module)):
        content = path.read_bytes()
        digest.update(f"{path.name}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def _sources(module: str) -> list[Path]:
    spec = find_spec(module)  # of a top module: runs nothing
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return [path for place in spec.submodule_search_locations for path in Path(place).rglob("*.py")]
    return [Path(spec.origin)] if spec.origin else []
