"""`xllm plugins why`."""

from __future__ import annotations

import click

from xllm_core.config import KINDS, click_options, settings_from_flags
from xllm_core.plugins.explain import FEATURES, Shape, why
from xllm_core.plugins.manager import PluginManager


@click.command("why")
@click.argument("kind", metavar="KIND")
@click.option("--model", "model_path", default=None, help="Decide for this model; without it, for a common shape.")
@click.option("--heads", type=click.IntRange(min=1), help="Query heads to ask about; default 32. Without a model.")
@click.option("--kv-heads", type=click.IntRange(min=1), help="KV heads to ask about; default 8.")
@click.option("--head-size", type=click.IntRange(min=1), help="Elements of a head to ask about; default 128.")
@click.option(
    "--feature", "features", multiple=True, type=click.Choice(list(FEATURES)), help="Needed of attention. Repeatable."
)
@click_options("model", "device", "kv")
def command(
    kind: str,
    model_path: str | None,
    heads: int | None,
    kv_heads: int | None,
    head_size: int | None,
    features: tuple[str, ...],
    **flags: object,
) -> None:
    """Explain which part is chosen for KIND, what else would serve, and why the rest would not."""
    given = {"model": model_path} if model_path is not None else {}
    settings = settings_from_flags(flags, **given)
    shape = None
    if heads or kv_heads or head_size or features:
        common = Shape()
        num_heads = heads or max(common.num_heads, kv_heads or 0)
        num_kv_heads = kv_heads or min(common.num_kv_heads, num_heads)
        shape = Shape(num_heads, num_kv_heads, head_size or common.head_size, features)
    click.echo(why(kind, settings, PluginManager.discover(settings).load(), shape))


command.help = (
    f"{command.help}\n\nKinds: {', '.join(KINDS)}; attention.GROUP, op.NAME and model.ARCHITECTURE narrow them down."
)
