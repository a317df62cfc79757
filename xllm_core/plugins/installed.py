"""What is installed under our group of entry points, by metadata alone. A distribution whose metadata cannot be read is one entry, not the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import importlib_metadata

from xllm_core.plugins.plan import describe

GROUP = "xllm_core.plugins"


@dataclass(frozen=True, slots=True)
class Installed:
    """One entry point. `load` imports its module; flaw: why its metadata cannot be read, or ""."""

    id: str
    distribution: str
    version: str
    load: Callable[[], Any]
    requires: tuple[str, ...] = ()
    requires_python: str = ""
    flaw: str = ""


def installed_plugins() -> list[Installed]:
    """Every entry point of the group, in the order of `sys.path`; imports nothing of them."""
    return [_described(entry, entry.dist) for entry in importlib_metadata.entry_points(group=GROUP)]


def metadata_of(distribution: str) -> importlib_metadata.PackageMetadata | None:
    """METADATA of a distribution, or None where it is not installed or cannot be read."""
    try:
        return importlib_metadata.metadata(distribution)
    except Exception:  # noqa: BLE001  what is wrong with it stands in the plugin's record
        return None


def _described(entry: importlib_metadata.EntryPoint, dist: importlib_metadata.Distribution | None) -> Installed:
    if dist is None:
        return Installed(entry.name, "unknown", "0", entry.load)
    try:
        metadata = dist.metadata
        about = metadata["Name"], metadata["Version"], tuple(dist.requires or ()), metadata.get("Requires-Python") or ""
    except Exception as error:  # noqa: BLE001  without it nobody knows what the plugin needs, so its code does not run
        flaw = f"its metadata cannot be read: {describe(error)}; reinstall it"
        return Installed(entry.name, _name(dist), "0", entry.load, flaw=flaw)
    name, version, requires, python = about
    return Installed(entry.name, name, version, entry.load, requires, python)


def _name(dist: importlib_metadata.Distribution) -> str:
    """The distribution's name; where its metadata does not tell, the name of the folder that holds it."""
    try:
        return str(dist.metadata["Name"])
    except Exception:  # noqa: BLE001  said where it matters
        return str(getattr(getattr(dist, "_path", None), "stem", "unknown")).partition("-")[0].replace("_", "-")
