"""`xllm plan`: everything that a start would decide, and what decided it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import click

from xllm_core.config import TABLES, Settings, click_options, plain, settings_from_flags
from xllm_core.config_sources import guess
from xllm_core.errors import ConfigError
from xllm_core.plugins.explain import block
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.plan import AssemblyPlan, Choice
from xllm_core.plugins.resolve import assemble


class _Row(NamedTuple):
    key: str
    value: Any
    origin: str


@click.command("plan")
@click.argument("model")
@click.option(
    "--why",
    "key",
    default=None,
    metavar="KEY",
    help="Only this key, or those under it: kv, kv.block_size, attention, op.linear.",
)
@click.option(
    "--json", "is_json", is_flag=True, help='{"hash": ..., "plan": ..., "values": {KEY: {"value": ..., "from": ...}}}.'
)
@click_options("model", "device", "engine", "scheduler", "kv", "log")
def command(model: str, key: str | None, is_json: bool, **flags: Any) -> None:
    """Print the plan of MODEL without loading weights: each value and where it comes from.

    Origins: default, a line of the settings file, a variable, a flag, the model, a device, or the reason why a part was chosen.
    """
    settings = settings_from_flags(flags, path=model)
    plan = assemble(settings, PluginManager.discover(settings).load()).plan
    rows = [*_settings(settings, plan), *_decisions(settings, plan)]
    if key is not None:
        found = [row for row in rows if row.key == key or row.key.startswith(f"{key}.")]
        if not found:
            raise ConfigError(f"no value is called {key!r}{guess(key, [row.key for row in rows])}")
        rows = found
    if is_json:
        values = {row.key: {"value": row.value, "from": row.origin} for row in rows}
        click.echo(json.dumps({"hash": plan.hash, "plan": plan.to_json(), "values": values}, indent=2))
        return
    for line in _text(rows, plan, is_narrow=key is not None):
        click.echo(line)


def _settings(settings: Settings, plan: AssemblyPlan) -> Iterable[_Row]:
    for table in TABLES:
        if table != "server":
            for key, value in plain(getattr(settings, table).model_dump()).items():
                yield _Row(f"{table}.{key}", value, settings.place(table, key))
    for plugin_id, values in plain(plan.plugin_settings).items():
        for key, value in values.items():
            place = settings.place("plugin", plugin_id, key)
            yield _Row(
                f"plugin.{plugin_id}.{key}", value, f"default of plugin {plugin_id}" if place == "default" else place
            )


def _decisions(settings: Settings, plan: AssemblyPlan) -> Iterable[_Row]:
    def set_or(table: str, key: str, otherwise: str) -> str:
        return settings.place(table, key) if getattr(getattr(settings, table), key) is not None else otherwise

    yield _Row("model_path", plan.model_path, settings.place("model", "path"))
    yield _Row("architecture", plan.architecture, "the model's configuration")
    asked = settings.model.dtype != "auto"
    yield _Row("dtype", plan.dtype, settings.place("model", "dtype") if asked else plan.dtype_reason)
    yield _Row("max_model_len", plan.max_model_len, set_or("model", "max_model_len", "the model's configuration"))
    yield _Row(
        "block_size", plan.block_size, set_or("kv", "block_size", f"{plan.device.name}, and what every kernel reads")
    )
    yield _Row("kv_layout", plan.kv_layout, f"{plan.device.name}, and what every kernel reads")
    yield _Row(
        "kv_dtype", plan.kv_dtype or plan.dtype, settings.place("kv", "cache_dtype") if plan.kv_dtype else "dtype"
    )
    for kind, choice in plan.choices().items():
        yield _Row(
            kind, choice.name, f"{choice.reason}{_said_at(settings, choice)} ({choice.distribution} {choice.version})"
        )


def _said_at(settings: Settings, choice: Choice) -> str:
    """Where the pin or the preference stands that decided a choice, or nothing. Not in the plan, whose hash is the same wherever it is made."""
    found = re.search(r"\[(use|prefer)\] ([\w.]+)", choice.reason)
    if found is None:
        return ""
    place = settings.place(found[1], found[2])
    if place == "default" and found[2] == "device":
        place = settings.place("device", "name")
    return f", {place}"


def _text(rows: Iterable[_Row], plan: AssemblyPlan, *, is_narrow: bool) -> Iterable[str]:
    rows = list(rows)
    choices = plan.choices()
    width = max(len(row.key) for row in rows)
    for row in rows:
        value = (
            "is not set" if row.value is None else row.value if isinstance(row.value, str) else json.dumps(row.value)
        )
        yield f"{row.key:<{width}}  {value}  # {row.origin}"
        if is_narrow and row.key in choices:
            yield from block(choices[row.key])[1:]
    if not is_narrow:
        yield f"{'plan':<{width}}  {plan.hash}  # equal on every worker"
