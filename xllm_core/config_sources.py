"""Where settings are written: layers of tables, the place of each value, and the environment as one such layer."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xllm_core.errors import ConfigError

PREFIX = "XLLM_"

OTHER_VARIABLES = ("XLLM_API_KEY", "XLLM_CACHE_DIR")
"""Variables that are no settings: the key that our clients send, and where converted tokenizers are kept, which is read before any setting."""

PLUGINS_VARIABLE = "XLLM_PLUGINS"
"""`[plugins] only`, by a name that is quickly typed; set and empty it leaves the core alone."""

PLURAL_KINDS = ("logits_processors", "observers")
"""Kinds of `[use]` that take a list."""

KeyPath = tuple[str, ...]
"""(table, key, ...); an element of a list has its index as key."""


@dataclass(slots=True)
class Layer:
    """What one source says: nested tables, and for each key path where it was written ("xllm.toml:12:3", "XLLM_KV__NUM_BLOCKS")."""

    tables: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)


def place_of(layers: Sequence[Layer], keys: KeyPath) -> str | None:
    """Where the value at `keys` was written, by the first layer that says something about it; None if none does.

    A layer that sets a whole list, or a text, above `keys` decides what is in it: its place is the answer.
    """
    for layer in layers:
        inner: Any = layer.tables
        place = None
        for end, key in enumerate(keys, start=1):
            if not isinstance(inner, Mapping):
                return layer.places.get(keys, place)
            if key not in inner:
                place = None
                break
            inner, place = inner[key], layer.places.get(keys[:end], place)
        if place is not None:
            return place
    return None


def read_environment(
    environ: Mapping[str, str], known: Mapping[str, Iterable[str]], lists: Collection[KeyPath]
) -> Layer:
    """Tables from `XLLM_TABLE__KEY=value`. Lists and tables are JSON; a list may also be written a,b,c.

    known: keys of each core table; a variable that names none of them raises ConfigError, unless Kubernetes injected it.
    lists: those of them, as (table, key), that take several values.
    """
    layer = Layer({})
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name in OTHER_VARIABLES or is_from_kubernetes(name, environ):
            continue
        path = _variable_path(name, known)
        for other, rival in layer.places.items():
            if other[: len(path)] == path[: len(other)]:  # equal, or one holds the other
                raise ConfigError(f"{rival} and {name} set the same thing; unset one of them")
        put(layer.tables, path, _variable_value(name, path, environ[name], path in lists))
        layer.places[path] = name
    return layer


def put(tables: dict[str, Any], path: KeyPath, value: Any) -> None:
    """Set tables[path[0]][path[1]]... = value, making the tables between."""
    for key in path[:-1]:
        tables = tables.setdefault(key, {})
    tables[path[-1]] = value


def walk(tables: Mapping[str, Any], above: KeyPath = ()) -> Iterable[KeyPath]:
    """Every key path of nested tables, tables first."""
    for key, value in tables.items():
        yield (*above, key)
        if isinstance(value, Mapping):
            yield from walk(value, (*above, key))


def guess(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?", or nothing if no known word is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


_KUBERNETES = re.compile(
    r"(XLLM(?:_+[A-Z0-9]+)*?)"  # the name of a service, as a variable
    r"_(?:(SERVICE_HOST|SERVICE_PORT(?:_\w+)?)|(PORT(?:_\d+_(?:TCP|UDP|SCTP))?)|PORT_\d+_(?:TCP|UDP|SCTP)_(PROTO|PORT|ADDR))"
)


def is_from_kubernetes(name: str, environ: Mapping[str, str]) -> bool:
    """True for what Kubernetes injects into every pod for a service called xllm, or xllm-something.

    That is XLLM_SERVICE_HOST, XLLM_SERVICE_PORT[_NAME], XLLM_PORT=tcp://10.0.0.1:8000 and XLLM_PORT_8000_TCP[_PROTO|_PORT|_ADDR].
    The whole family must be there, and XLLM_PORT must hold such an address: XLLM_PORT=8000 was written by a person.
    """
    match = _KUBERNETES.fullmatch(name)
    if match is None or not {f"{match[1]}_SERVICE_HOST", f"{match[1]}_SERVICE_PORT"} <= environ.keys():
        return False
    is_address = re.match(r"(tcp|udp|sctp)://", environ[name]) is not None
    return match[3] is None or is_address


def _variable_path(name: str, known: Mapping[str, Iterable[str]]) -> KeyPath:
    """XLLM_KV__BLOCK_SIZE -> ("kv", "block_size"); raises for a variable that sets nothing."""
    if name == PLUGINS_VARIABLE:
        return "plugins", "only"
    parts = name[len(PREFIX) :].split("__")
    path = tuple(part.lower() for part in parts)
    names = {f"{PREFIX}{table}__{key}".upper(): key for table, keys in known.items() for key in keys}
    min_parts = {"use": 2, "prefer": 2, "plugin": 3}.get(path[0], 0)
    is_free = bool(min_parts) and len(path) >= min_parts and all(path)
    if not is_free and name not in names:
        raise ConfigError(
            f"{name}: no such setting{_explanation(name, names)}; variables are {PREFIX}TABLE__KEY, "
            f"{PREFIX}USE__KIND, {PREFIX}PREFER__KIND and {PREFIX}PLUGIN__ID__KEY"
        )
    if path[0] in ("use", "prefer"):
        # An architecture narrows `model` down and has capitals of its own: XLLM_USE__MODEL__LlamaForCausalLM.
        return path[0], ".".join([path[1], *(part.lower() if part.isupper() else part for part in parts[2:])])
    return path


def _explanation(name: str, names: Mapping[str, str]) -> str:
    """What may have been meant by a variable that is no setting."""
    if name == "XLLM_PORT":
        return (
            ", because Kubernetes gives this name to the address (tcp://...) of a service called xllm"
            "; the port to listen on is XLLM_SERVER__PORT, or --port"
        )
    if match := _KUBERNETES.fullmatch(name):
        return (
            f"; Kubernetes injects this name for a service, but then {match[1]}_SERVICE_HOST and {match[1]}_SERVICE_PORT"
            " are there too, and what ends in _PORT or _TCP is an address like tcp://10.0.0.1:8000"
        )
    tail = name[len(PREFIX) :].lower()
    homes = [variable for variable, key in names.items() if key == tail]
    return f"; did you mean {homes[0]!r}?" if homes else guess(name, names)


def _variable_value(name: str, path: KeyPath, text: str, is_list: bool) -> Any:
    if text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{name}: not valid JSON: {error}"
            ) from None  # the error holds the text, which may be a secret
    if is_list or path[0] == "prefer" or (path[0] == "use" and path[1] in PLURAL_KINDS):
        return [part.strip() for part in text.split(",") if part.strip()]
    return text
