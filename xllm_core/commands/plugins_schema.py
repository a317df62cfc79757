"""`xllm plugins schema`."""

from __future__ import annotations

import json
import textwrap
from enum import Enum
from typing import Any

import click
import tomlkit
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from xllm_core.config import click_options, settings_from_flags
from xllm_core.config_tables import holds_secret
from xllm_core.plugins.manager import CORE, PluginManager

_SIGNS = (
    ("gt", ">"),
    ("ge", ">="),
    ("lt", "<"),
    ("le", "<="),
    ("min_length", "length >="),
    ("max_length", "length <="),
)


@click.command("schema")
@click.argument("plugin_id", metavar="ID")
@click.option("--json", "is_json", is_flag=True, help="The JSON Schema instead.")
@click_options()
def command(plugin_id: str, is_json: bool, **flags: Any) -> None:
    """Print the settings of a plugin as a commented `[plugin.ID]` table: each key with its type, its default and what it does."""
    model = PluginManager.discover(settings_from_flags(flags)).config_model(plugin_id)
    if model is None:
        click.echo(f"plugin {plugin_id!r} takes no settings", err=True)
        return
    click.echo(json.dumps(model.model_json_schema(), indent=2) if is_json else "\n".join(_sample(plugin_id, model)))


def _sample(plugin_id: str, model: type[BaseModel]) -> list[str]:
    lines = textwrap.wrap(model.__doc__ or "", 100, initial_indent="# ", subsequent_indent="# ")
    lines.append(f"[plugin.{plugin_id}]")
    for name, entry in model.model_fields.items():
        note = ". ".join(filter(None, [(entry.description or "").rstrip("."), f"Type: {_type(entry)}"]))
        lines += textwrap.wrap(note, 100, initial_indent="# ", subsequent_indent="# ")
        lines.append(_line(name, entry))
    if plugin_id == CORE:
        return lines
    return [*lines, "# Not the plugin's: true passes over it where it is absent or broken.", "# optional = false"]


def _line(name: str, entry: FieldInfo) -> str:
    key = entry.alias or name
    if holds_secret(entry.annotation):
        return f'{"" if entry.is_required() else "# "}{key} = {{ env = "{name.upper()}" }}'
    default = entry.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return f"{key} = ...  # must be set"
    if default is None:
        return f"# {key} is not set"
    if isinstance(default, BaseModel):
        default = default.model_dump(mode="json", exclude_none=True)
    value = default.value if isinstance(default, Enum) else default
    if isinstance(value, dict):  # a table of its own elsewhere; here a line
        inline = tomlkit.inline_table()
        inline.update(value)
        return f"# {key} = {inline.as_string()}"
    return f"# {key} = {tomlkit.item(list(value) if isinstance(value, tuple | frozenset | set) else value).as_string()}"


def _type(entry: FieldInfo) -> str:
    kind = entry.annotation
    text = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    limits = [
        f"{sign} {getattr(limit, name)}" for limit in entry.metadata for name, sign in _SIGNS if hasattr(limit, name)
    ]
    return f"{text} {', '.join(limits)}" if limits else text
