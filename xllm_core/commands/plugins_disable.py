"""`xllm plugins disable`."""

from __future__ import annotations

from pathlib import Path

import click

from xllm_core.commands.plugins_file import SettingsFile, installed


@click.command("disable")
@click.argument("plugin_id", metavar="ID")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="Settings file; default ./xllm.toml.")
def command(plugin_id: str, config: Path | None) -> None:
    """Keep a plugin from being imported: puts it into `[plugins] disable`, and takes it out of `enable` and `require`.

    The file keeps its comments. No plugin is imported, so a broken one can be disabled.
    """
    installed(plugin_id)
    file = SettingsFile(config)
    changes = file.remove("enable", plugin_id) + file.remove("require", plugin_id) + file.add("disable", plugin_id)
    file.save(changes, otherwise=f"plugin {plugin_id!r} is disabled already")
    for place in file.mentions(plugin_id):
        click.echo(f"note: {place} still names it, which stops every start; remove that line too", err=True)
