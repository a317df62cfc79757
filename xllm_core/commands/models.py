"""`xllm models`: which model families are installed, and what would serve a given model."""

from __future__ import annotations

import json
from typing import Any

import click

from xllm_core.config import click_options, settings_from_flags


@click.command("models")
@click.argument("model", required=False)
@click.option("--json", "is_json", is_flag=True, help="JSON instead of text.")
@click_options("model", "device")
def command(model: str | None, is_json: bool, **flags: Any) -> None:
    """List the architectures that can be served; with MODEL, open it and show what would serve it. No weights are read."""
    from xllm_core.plugins.manager import PluginManager

    settings = settings_from_flags(flags, path=model) if model else settings_from_flags(flags)
    manager = PluginManager.discover(settings).load()
    if model is None:
        families = [
            {
                "name": o.name,
                "architectures": sorted(o.spec.architectures),
                "is_fallback": o.spec.is_fallback,
                "summary": o.spec.summary,
                "dtypes": sorted(o.spec.dtypes),
                "distribution": f"{o.distribution} {o.version}",
            }
            for o in manager.offers("xllm_models")
        ]
        if is_json:
            click.echo(json.dumps(families))
            return
        for family in families:
            serves = ", ".join(family["architectures"]) or f"any other that its check accepts ({family['summary']})"
            click.echo(f"{family['name']:<17} {serves}  ({family['distribution']}; {', '.join(family['dtypes'])})")
        return
    facts = _facts(settings, manager)
    if is_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        click.echo(f"{name:<16} {value}")


def _facts(settings: Any, manager: Any) -> dict[str, Any]:
    from xllm_core.plugins.resolve import assemble

    assembly = assemble(settings, manager)
    plan, shape = assembly.plan, assembly.shape
    infos = assembly.checkpoint.tensors().values()
    num_parameters = 0
    for info in infos:
        size = 1
        for extent in info.shape:
            size *= extent
        num_parameters += size
    return {
        "path": str(plan.model_path), "format": plan.weight_format.name, "architecture": plan.architecture, "family": plan.model.name,
        "why": plan.model.reason,
        "layers": shape.num_layers, "hidden": shape.hidden_size, "vocabulary": shape.vocab_size, "parameters": num_parameters,
        "context": plan.max_model_len, "dtype": plan.dtype, "device": plan.device.name,
        "attention": {group: choice.name for group, choice in plan.attention.items()},
    }  # fmt: skip
