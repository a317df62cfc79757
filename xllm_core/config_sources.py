"""Where settings are written: the environment and xllm.toml, read into plain tables with the place of each value."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from xllm_core.errors import ConfigError

PREFIX = "XLLM_"

OTHER_VARIABLES = ("XLLM_CACHE_DIR",)
"""Variables that are no settings, as they are read before any is: where converted tokenizers are kept."""

PLURAL_KINDS = ("logits_processors", "observers")
"""Kinds of `[use]` that take a list."""

Places = dict[tuple[str, ...], str]
"""(table, key, ...) -> "xllm.toml:12" or the name of a variable."""


def read_environment(
    environ: Mapping[str, str],
    known: Mapping[str, Iterable[str]],
    lists: Collection[tuple[str, ...]],
    places: Places,
) -> dict[str, Any]:
    """Tables from `XLLM_TABLE__KEY=value`. Lists and tables are JSON; a list may also be written a,b,c.

    known: keys of each core table; a variable that names none of them raises ConfigError, unless Kubernetes injected it.
    lists: those of them, as (table, key), that take several values.
    """
    tables: dict[str, Any] = {}
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in OTHER_VARIABLES and not _is_kubernetes(name, environ):
            path = _variable_path(name, known)
            put(tables, path, _variable_value(path, environ[name], path in lists))
            places[path] = name
    return tables


def read_toml(path: Path, places: Places) -> dict[str, Any]:
    """Tables of one file; raises ConfigError if it cannot be read or is not TOML."""
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read settings from {path}: {error}; check the path given as --config") from error
    lines = _key_lines(text)
    for keys in walk(tables):
        places[keys] = f"{path}:{lines[keys]}" if keys in lines else str(path)
    return tables


def put(tables: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set tables[path[0]][path[1]]... = value, making the tables between."""
    for key in path[:-1]:
        tables = tables.setdefault(key, {})
    tables[path[-1]] = value


def walk(tables: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterable[tuple[str, ...]]:
    """Every key path of nested tables, tables first."""
    for key, value in tables.items():
        yield (*above, key)
        if isinstance(value, Mapping):
            yield from walk(value, (*above, key))


def guess(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?", or nothing if no known word is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def _is_kubernetes(name: str, environ: Mapping[str, str]) -> bool:
    """True for what Kubernetes injects for a service called xllm or xllm-something: XLLM_SERVICE_HOST, XLLM_PORT_8000_TCP_ADDR, ..."""
    tail = r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)"
    match = re.fullmatch(rf"(XLLM(?:_[A-Z0-9]+)*?){tail}", name)
    return match is not None and f"{match[1]}_SERVICE_HOST" in environ and f"{match[1]}_SERVICE_PORT" in environ


def _variable_path(name: str, known: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """XLLM_KV__BLOCK_SIZE -> ("kv", "block_size"); raises for a variable that sets nothing."""
    path = tuple(part.lower() for part in name[len(PREFIX) :].split("__"))
    names = [f"{PREFIX}{table}__{key}".upper() for table, keys in known.items() for key in keys]
    min_parts = {"use": 2, "prefer": 2, "plugin": 3}.get(path[0], 0)
    is_free = bool(min_parts) and len(path) >= min_parts and all(path)
    if not is_free and name not in names:
        raise ConfigError(
            f"{name}: no such setting{guess(name, names)}; variables are {PREFIX}TABLE__KEY, "
            f"{PREFIX}USE__KIND, {PREFIX}PREFER__KIND and {PREFIX}PLUGIN__ID__KEY"
        )
    return path


def _variable_value(path: tuple[str, ...], text: str, is_list: bool) -> Any:
    if text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{PREFIX}{'__'.join(path).upper()}: not valid JSON: {error}") from error
    if is_list or path[0] == "prefer" or (path[0] == "use" and path[1] in PLURAL_KINDS):
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


_WORD = r"""(?:[\w-]+|"[^"]*"|'[^']*')"""


def _key_lines(text: str) -> dict[tuple[str, ...], int]:
    """The line on which each key stands. Good enough for messages: text inside a multi-line string may pass for a key."""
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if header := re.match(r"\[+([^\]]+)\]", stripped):
            table = _split_key(header[1])
            for end in range(1, len(table) + 1):
                lines.setdefault(table[:end], number)
        elif entry := re.match(rf"({_WORD}(?:\s*\.\s*{_WORD})*)\s*=", stripped):
            key = (*table, *_split_key(entry[1]))
            for end in range(len(table) + 1, len(key) + 1):
                lines.setdefault(key[:end], number)
    return lines


def _split_key(text: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in re.findall(_WORD, text))
