"""`{ env = "NAME" }` in a plugin's table: the plugin gets the variable's value, everybody else the reference.

A plan, a lock file and `xllm config show` hold references, so that a secret is in none of them; a worker reads the variable itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import SecretBytes, SecretStr

from xllm_core.config_sources import KeyPath, put
from xllm_core.errors import ConfigError


def is_reference(value: object) -> bool:
    """Whether a setting is `{ env = "NAME" }`."""
    return isinstance(value, Mapping) and value.keys() == {"env"} and isinstance(value["env"], str)


def find_references(table: Mapping[str, Any], above: KeyPath = ()) -> dict[KeyPath, Mapping[str, Any]]:
    """Every reference of a nested table, by its path."""
    found: dict[KeyPath, Mapping[str, Any]] = {}
    for key, value in table.items():
        if is_reference(value):
            found[(*above, key)] = value
        elif isinstance(value, Mapping):
            found |= find_references(value, (*above, key))
    return found


def with_references(table: dict[str, Any], references: Mapping[KeyPath, Mapping[str, Any]]) -> dict[str, Any]:
    """A validated table with the references back in their places."""
    for path, reference in references.items():
        put(table, path, dict(reference))
    return table


def reveal(table: Mapping[str, Any], place: Callable[..., str] = lambda *keys: "") -> dict[str, Any]:
    """A table with the values of its secrets, for the plugin that owns it. place: of a key path, for the message.

    Raises ConfigError for a variable that is not set, or empty.
    """
    return {key: _revealed(value, place, (key,)) for key, value in table.items()}


def _revealed(value: Any, place: Callable[..., str], path: KeyPath) -> Any:
    if is_reference(value):
        if not os.environ.get(value["env"]):
            raise ConfigError(
                f'{place(*path)}{".".join(path)} = {{ env = "{value["env"]}" }}: the variable is not set, or empty; '
                "set it where xllm is started"
            )
        return os.environ[value["env"]]
    if isinstance(value, Mapping):
        return {key: _revealed(inner, place, (*path, key)) for key, inner in value.items()}
    return value.get_secret_value() if isinstance(value, SecretStr | SecretBytes) else value
