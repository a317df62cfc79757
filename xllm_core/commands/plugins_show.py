"""`xllm plugins show`."""

from __future__ import annotations

import json
from typing import Any

import click

from xllm_core.config import click_options
from xllm_core.config_sources import guess
from xllm_core.errors import PluginError
from xllm_core.plugins.installed import metadata_of
from xllm_core.plugins.isolated import load_isolated

_LABELS = {
    "Summary": "summary",
    "Home-page": "home page",
    "License-Expression": "license",
    "License": "license",
    "Requires-Python": "python",
}


@click.command("show")
@click.argument("plugin_id", metavar="ID")
@click.option(
    "--json", "is_json", is_flag=True, help="One JSON array on stdout, an entry per distribution that claims the id."
)
@click_options()
def command(plugin_id: str, is_json: bool, **flags: Any) -> None:
    """Show one plugin: its distribution, its state, and each part with what it declares. It is loaded in a process of its own."""
    records = load_isolated(flags["config_path"], flags["use"])
    found = [record for record in records if record["id"] == plugin_id]
    if not found:
        known = [record["id"] for record in records]
        raise PluginError(f"no plugin {plugin_id!r}{guess(plugin_id, known)}; installed: {', '.join(known)}")
    if is_json:
        click.echo(json.dumps(found, indent=2))
        return
    for record in found:
        click.echo("\n".join([*_head(record), *_parts(record)]))


def _head(record: dict[str, Any]) -> list[str]:
    lines = [f"{record['id']}  {record['state']}"]
    if record["reason"]:
        lines.append(f"  {record['reason']}")
    if not record["distribution"]:
        return lines
    lines.append(f"  distribution  {record['distribution']} {record['version']}")
    metadata = metadata_of(record["distribution"])
    if metadata is None:
        return lines
    lines += [f"  {label:<13} {metadata[key]}" for key, label in _LABELS.items() if metadata.get(key)]
    requires = metadata.get_all("Requires-Dist") or []
    return lines + ([f"  requires      {'; '.join(r for r in requires if 'extra ==' not in r)}"] if requires else [])


def _parts(record: dict[str, Any]) -> list[str]:
    lines = []
    for hook, parts in record["parts"].items():
        lines.append(f"  {hook}")
        for name, declared in parts.items():
            lines.append(f"    {record['id']}/{name}  {declared.pop('summary', '')}".rstrip())
            lines += [f"      {key:<14} {_text(value)}" for key, value in declared.items()]
    return lines


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
