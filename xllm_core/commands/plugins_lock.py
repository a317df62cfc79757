"""`xllm plugins lock`."""

from __future__ import annotations

from typing import Any

import click

from xllm_core.config import click_options, settings_from_flags
from xllm_core.plugins.lockfile import check_lock, locked_now, write_lock
from xllm_core.plugins.manager import PluginManager


@click.command("lock")
@click.option(
    "--check", "is_check", is_flag=True, help="Only compare; exit status 1 and the difference if there is one."
)
@click_options()
def command(is_check: bool, **flags: Any) -> None:
    """Write xllm.lock.toml beside the settings file: each plugin that may load, its distribution, its version, and a hash of its files.

    With `[plugins] locked = true`, or --locked, xllm starts with exactly these and refuses with the difference. No plugin is imported.
    """
    settings = settings_from_flags(flags)
    records = PluginManager.discover(settings).check_metadata().records
    path = settings.lock_path
    if is_check:
        check_lock(path, records)
        click.echo(f"{path} is what is installed")
        return
    entries = locked_now(records)
    write_lock(path, entries)
    click.echo(f"{path}: {len(entries)} plugins")
    for entry in entries:
        click.echo(f"  {entry.id:<16} {entry.distribution} {entry.version}  {entry.sha256[:12]}")
