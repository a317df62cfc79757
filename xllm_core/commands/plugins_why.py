"""`xllm plugins why`."""

from __future__ import annotations

import click

from xllm_core.config import KINDS, click_options, settings_from_flags
from xllm_core.plugins.explain import why
from xllm_core.plugins.manager import PluginManager


@click.command("why")
@click.argument("kind", metavar="KIND")
@click.option("--model", "model_path", default=None, help="Decide for this model; without it, for a common shape.")
@click_options("model", "device", "kv")
def command(kind: str, model_path: str | None, **flags: object) -> None:
    """Explain which part is chosen for KIND, what else would serve, and why the rest would not."""
    given = {"model": model_path} if model_path is not None else {}
    settings = settings_from_flags(flags, **given)
    click.echo(why(kind, settings, PluginManager.discover(settings).load()))


command.help = (
    f"{command.help}\n\nKinds: {', '.join(KINDS)}; attention.GROUP, op.NAME and model.ARCHITECTURE narrow them down."
)
