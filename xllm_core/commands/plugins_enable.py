"""`xllm plugins enable`."""

from __future__ import annotations

from pathlib import Path

import click

from xllm_core.commands.plugins_file import SettingsFile, installed, installed_ids, note_environment


@click.command("enable")
@click.argument("plugin_id", metavar="ID[@DISTRIBUTION]")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="Settings file; default ./xllm.toml.")
def command(plugin_id: str, config: Path | None) -> None:
    """Let a plugin take part: takes it out of `disable`, and where the policy is `listed`, or two distributions claim the id, puts it into `enable`.

    The file keeps its comments. No plugin is imported.
    """
    name, _, wanted = plugin_id.partition("@")
    file = SettingsFile(config)
    changes = file.remove("disable", name)
    if changes and name not in installed_ids():  # uninstalled since: the line that names it stops every start
        file.save(changes, otherwise="")
        click.echo(f"note: plugin {name!r} is not installed", err=True)
        return
    distributions = installed(name, wanted)
    if file.get("policy") == "listed" or len(distributions) > 1 or wanted:
        if len(distributions) > 1 and not wanted:
            raise click.UsageError(
                f"{name!r} is claimed by {' and '.join(distributions)}; say which: xllm plugins enable {name}@{distributions[0]}"
            )
        changes += file.remove("enable", name)
        changes += file.add("enable", f"{name}@{wanted or distributions[0]}")
    file.save(changes, otherwise=f"plugin {name!r} is not disabled, and the policy lets it load")
    note_environment(name)
