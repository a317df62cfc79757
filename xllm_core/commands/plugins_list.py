"""`xllm plugins list`."""

from __future__ import annotations

import json
from typing import Any

import click

from xllm_core.config import click_options, settings_from_flags
from xllm_core.plugins.manager import PluginManager


@click.command("list")
@click.option(
    "--why",
    "is_loaded",
    is_flag=True,
    help="Load each plugin, in a process of its own; show what it offers, and of its devices what is missing here.",
)
@click.option("--json", "is_json", is_flag=True, help="One JSON array on stdout.")
@click_options()
def command(is_loaded: bool, is_json: bool, **flags: Any) -> None:
    """List every plugin found, its state and the reason. Reads metadata only, so no plugin can break it.

    States: found (installed, may load), disabled, not-allowed, missing, conflict, incompatible; with --why also loaded and failed.
    """
    if is_loaded:
        from xllm_core.plugins.isolated import load_isolated

        records = load_isolated(flags["config_path"], flags["use"], probes_devices=True)
    else:
        manager = PluginManager.discover(settings_from_flags(flags)).check_metadata()
        records = [record.to_json() for record in manager.records]
    if is_json:
        click.echo(json.dumps(records, indent=2))
        return
    for record in records:
        click.echo("\n".join(lines(record)))
    if not is_loaded:
        click.echo("`xllm plugins list --why` loads them and shows what each offers.", err=True)


def lines(record: dict[str, Any]) -> list[str]:
    """A record for people."""
    origin = f"{record['distribution']} {record['version']}" if record["distribution"] else "not installed"
    found = [f"{record['id']}  {record['state']}  {origin}"]
    if record["reason"]:
        found.append(f"  {record['reason']}")
    found += [f"  {hook.removeprefix('xllm_'):<18} {', '.join(parts)}" for hook, parts in record["parts"].items()]
    return found + [
        f"  device {name} cannot be used here: {reason}" for name, reason in record.get("unusable", {}).items()
    ]
