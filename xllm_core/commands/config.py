"""`xllm config`: what is set, and by what."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import click

from xllm_core.config import TABLES, Settings, click_options, plain, settings_from_flags
from xllm_core.config_sources import KeyPath
from xllm_core.plugins.manager import PluginManager

_Table = tuple[KeyPath, dict[str, Any]]
_MAX_ALIGNED = 60  # a longer line does not push the places of the others to the right


@click.group("config")
def command() -> None:
    """Look at the settings."""


@command.command("show")
@click.argument("model", required=False)
@click.option("--json", "is_json", is_flag=True, help='One JSON object: {table: {key: {"value": ..., "from": ...}}}.')
@click_options("model", "device", "engine", "scheduler", "kv", "server", "log")
def show(model: str | None, is_json: bool, **flags: Any) -> None:
    """Print every setting and where it comes from: default, a line of the file, a variable, or a flag.

    Takes what `xllm serve` takes, and shows what it would run with. Tables of plugins are checked by their plugins and
    shown with their defaults. Secrets are masked. The output is TOML; what is not set stands in a comment.
    """
    settings = settings_from_flags(flags, **({"path": model} if model is not None else {}))
    manager = PluginManager.discover(settings).load()
    manager.check_wanted()
    tables = _tables(settings, manager.tables)
    click.echo(json.dumps(_as_json(settings, tables), indent=2) if is_json else _as_toml(settings, tables))


def _tables(settings: Settings, of_plugins: Mapping[str, Mapping[str, Any]]) -> list[_Table]:
    """(path of the table, its values), secrets masked; every table, in the order of the documentation."""
    tables: list[_Table] = [((name,), plain(getattr(settings, name).model_dump())) for name in TABLES]
    tables += [((name,), plain(getattr(settings, name))) for name in ("use", "prefer")]
    return tables + [(("plugin", name), plain(table)) for name, table in of_plugins.items()]


def _as_json(settings: Settings, tables: list[_Table]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for path, table in tables:
        inner = shown
        for key in path:
            inner = inner.setdefault(key, {})
        for key, value in table.items():
            inner[key] = {"value": value, "from": settings.place(*path, key)}
    return shown


def _as_toml(settings: Settings, tables: list[_Table]) -> str:
    blocks = []
    for path, table in tables:
        entries = [
            (f"# {_key(key)} is not set" if value is None else f"{_key(key)} = {_value(value)}", settings.place(*path, key))
            for key, value in table.items()
        ]  # fmt: skip
        width = max((len(entry) for entry, _ in entries if len(entry) <= _MAX_ALIGNED), default=0)
        lines = [f"{entry:<{width}}  # {place}" for entry, place in entries]
        blocks.append("\n".join([f"[{'.'.join(map(_key, path))}]", *lines]))
    return "\n\n".join(blocks)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: Any) -> str:
    """A value as TOML writes it. None has no way there and is left out of what holds it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        members = (f"{_key(key)} = {_value(inner)}" for key, inner in value.items() if inner is not None)
        return f"{{ {', '.join(members)} }}"
    if isinstance(value, list):
        return f"[{', '.join(_value(inner) for inner in value if inner is not None)}]"
    return str(value)
