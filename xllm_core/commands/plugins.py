"""`xllm plugins`: what is installed, in which state, and why a part is chosen."""

from __future__ import annotations

import json
import logging

import click

from xllm_core.config import KINDS, click_options, settings_from_flags
from xllm_core.plugins.explain import why
from xllm_core.plugins.manager import PluginManager, PluginRecord


@click.group("plugins")
def command() -> None:
    """List plugins, and explain why a part is chosen."""


@command.command("list")
@click.option("--json", "is_json", is_flag=True, help="One JSON array on stdout.")
@click_options()
def list_plugins(is_json: bool, **flags: object) -> None:
    """List every plugin found, its state and what it offers. A broken plugin is shown with its reason and stops nothing."""
    settings = settings_from_flags(flags)
    logging.getLogger("xllm_core.plugins").setLevel(logging.ERROR)  # the reasons stand in the list itself
    records = PluginManager.discover(settings).load().records
    if is_json:
        click.echo(json.dumps([record.to_json() for record in records], indent=2))
        return
    for record in records:
        click.echo("\n".join(_lines(record)))


@command.command("why")
@click.argument("kind", metavar="KIND")
@click.option("--model", "model_path", default=None, help="Decide for this model; without it, for a common shape.")
@click_options("model", "device", "kv")
def why_chosen(kind: str, model_path: str | None, **flags: object) -> None:
    """Explain which part is chosen for KIND, what else would serve, and why the rest would not."""
    given = {"model": model_path} if model_path is not None else {}
    settings = settings_from_flags(flags, **given)
    click.echo(why(kind, settings, PluginManager.discover(settings).load()))


why_chosen.help = (
    f"{why_chosen.help}\n\nKinds: {', '.join(KINDS)}; attention.GROUP, op.NAME and model.ARCHITECTURE narrow them down."
)


def _lines(record: PluginRecord) -> list[str]:
    lines = [f"{record.id}  {record.state}  {record.distribution} {record.version}"]
    if record.reason:
        lines.append(f"  {record.reason}")
    for hook, specs in record.specs.items():
        if specs:
            lines.append(f"  {hook.removeprefix('xllm_'):<18} {', '.join(spec.name for spec in specs)}")
    return lines
