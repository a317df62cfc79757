"""Settings: flags over `XLLM_*` variables over xllm.toml over defaults. What is unknown is an error with its place and a guess.

`[scheduler] max_num_seqs`, `XLLM_SCHEDULER__MAX_NUM_SEQS` and `--max-num-seqs` are one setting. `./xllm.toml` is read if it is there;
a path that was given must exist.
"""

from __future__ import annotations

import datetime
import logging
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from xllm_core.config_sources import PLURAL_KINDS, guess, put, read_environment, read_toml, walk
from xllm_core.config_tables import (
    FLAT_KEYS,
    TABLES,
    CorePluginTable,
    DeviceTable,
    EngineTable,
    KVTable,
    LogTable,
    ModelTable,
    PluginsTable,
    SchedulerTable,
    ServerTable,
    Table,
    flag_name,
    holds_secret,
    is_list,
)
from xllm_core.errors import ConfigError

__all__ = [
    "KINDS", "TABLES", "CorePluginTable", "DeviceTable", "EngineTable", "KVTable", "LogTable", "ModelTable", "PluginsTable",
    "SchedulerTable", "ServerTable", "Settings", "Table", "click_options", "settings_from_flags", "validate_plugin_table",
]  # fmt: skip

DEFAULT_FILE = Path("xllm.toml")

KINDS = (
    "attention", "device", "kv_store", "logits_processors", "model", "observers", "op", "sampler", "scheduler", "weight_format",
)  # fmt: skip
"""What `[use]` and `[prefer]` can name; `attention.GROUP`, `op.NAME` and `model.ARCHITECTURE` narrow it down."""

_NARROWED = ("attention", "model", "op")


@dataclass(slots=True)
class _Reading:
    """One construction of `Settings`: which file was asked for, and where each value came from."""

    config_path: Path | None = None
    is_closed: bool = False  # neither variables nor a file are read
    places: dict[tuple[str, ...], str] = field(default_factory=dict)


_READING: ContextVar[_Reading | None] = ContextVar("_READING", default=None)


def _reading() -> _Reading:
    reading = _READING.get()
    if reading is None:
        raise RuntimeError("settings sources were asked outside Settings()")
    return reading


class _Source(PydanticBaseSettingsSource):
    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False  # pydantic-settings asks per field; ours answer for all at once


class _EnvironmentSource(_Source):
    """`XLLM_TABLE__KEY=value`."""

    def __call__(self) -> dict[str, Any]:
        if _reading().is_closed:
            return {}
        known = {table: tuple(model.model_fields) for table, model in TABLES.items()}
        lists = [(t, key) for t, model in TABLES.items() for key, e in model.model_fields.items() if is_list(e)]
        return read_environment(os.environ, known, lists, _reading().places)


class _TomlSource(_Source):
    """The file."""

    def __call__(self) -> dict[str, Any]:
        reading = _reading()
        if reading.is_closed:
            return {}
        path = reading.config_path or DEFAULT_FILE
        if reading.config_path is None and not path.exists():
            return {}
        tables = read_toml(path, reading.places)
        _check_known(tables, lambda keys: reading.places.get(keys, str(path)))
        return tables


class Settings(BaseSettings):
    """Everything a user can set. Frozen. `Settings(kv={"block_size": 32})` reads variables and file beneath what is given."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    model: ModelTable = ModelTable()
    device: DeviceTable = DeviceTable()
    engine: EngineTable = EngineTable()
    scheduler: SchedulerTable = SchedulerTable()
    kv: KVTable = KVTable()
    server: ServerTable = ServerTable()
    log: LogTable = LogTable()
    plugins: PluginsTable = PluginsTable()
    use: dict[str, str | tuple[str, ...]] = Field(
        default_factory=dict, description="Pins, KIND = NAME. A pinned part is used or start-up stops."
    )
    prefer: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="Order of preference, KIND = [NAME, ...]."
    )
    plugin: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="One table per plugin, checked by itself."
    )

    def __init__(self, *, config_path: str | Path | None = None, reads_sources: bool = True, **tables: Any) -> None:
        reading = _Reading(Path(config_path) if config_path is not None else None, is_closed=not reads_sources)
        _check_known(tables, lambda keys: _flag_of(keys))
        token = _READING.set(reading)
        try:
            super().__init__(**tables)
        except ValidationError as error:
            places = {keys: _flag_of(keys) for keys in walk(tables)}
            raise ConfigError(_explain(error, type(self), {**reading.places, **places})) from error
        finally:
            _READING.reset(token)

    @field_validator("use", "prefer", mode="before")
    @classmethod
    def _flatten(cls, value: Any, info: ValidationInfo) -> Any:
        """`op.linear = "x"` without quotes makes a table in TOML; where a list is due, one name stands for a list of one."""
        if not isinstance(value, Mapping):
            return value
        flat = _dotted(value)
        for kind, names in flat.items():
            if isinstance(names, str) and (info.field_name == "prefer" or kind in PLURAL_KINDS):
                flat[kind] = (names,)
        return flat

    @field_validator("use", "prefer")
    @classmethod
    def _check_kinds(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for kind, names in value.items():
            base, _, narrow = kind.partition(".")
            if base not in KINDS or (narrow and base not in _NARROWED):
                raise ValueError(f"unknown kind {kind!r}{guess(kind, KINDS)}; kinds are {', '.join(KINDS)}")
            if info.field_name == "use" and base not in PLURAL_KINDS and not isinstance(names, str):
                raise ValueError(f"{kind} takes one name, not {list(names)}; give an order of preference in [prefer]")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, environment, file; our own readers, because pydantic-settings passes over what it does not know."""
        return init_settings, _EnvironmentSource(settings_cls), _TomlSource(settings_cls)

    @classmethod
    def from_flags(cls, config_path: str | Path | None = None, **flat_keys: Any) -> Settings:
        """Settings from keys without their table (`max_num_seqs=8`), as flags and keyword arguments give them.

        A table's own name with a mapping gives several keys of it (`kv={"block_size": 32}`, `use={"kv_store": "core/host"}`).
        Raises ConfigError for a key that no table has, with a guess.
        """
        tables: dict[str, Any] = {}
        for key, value in flat_keys.items():
            if key in cls.model_fields and isinstance(value, Mapping):
                tables[key] = {**tables.get(key, {}), **value}
                continue
            if key not in FLAT_KEYS:
                raise ConfigError(f"unknown setting {key!r}{guess(key, [*FLAT_KEYS, *cls.model_fields])}")
            table, name = FLAT_KEYS[key]
            put(tables, (table, name), value)
        return cls(config_path=config_path, **tables)

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any]) -> Settings:
        """Settings as another process had them, from its `tables()`. Reads no variable and no file. Raises ConfigError."""
        return cls(reads_sources=False, **tables)

    def tables(self) -> dict[str, dict[str, Any]]:
        """Every table as plain data that JSON can hold, for `from_tables` in another process. SECRETS ARE READABLE in it."""
        plain: dict[str, dict[str, Any]] = _plain(self.model_dump())
        return plain

    def core_tables(self) -> dict[str, dict[str, Any]]:
        """The core's own tables as plain data, for plugins to read; without secrets."""
        return {
            name: getattr(self, name).model_dump(
                exclude={key for key, entry in model.model_fields.items() if holds_secret(entry.annotation)}
            )
            for name, model in TABLES.items()
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, datetime.date | datetime.time):  # TOML has them; a plugin's model reads them from text as well
        return value.isoformat()
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def _dotted(value: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _dotted(inner, f"{above}{key}.") if isinstance(inner, Mapping) else {f"{above}{key}": inner}
    return flat


def _flag_of(keys: tuple[str, ...]) -> str:
    if keys[1:2] and keys[0] in TABLES and (entry := TABLES[keys[0]].model_fields.get(keys[1])) is not None:
        if holds_secret(entry.annotation):
            return "argument"
        flat = flag_name(keys[1], entry)
        return f"--{flat.replace('_', '-')}"
    return "argument"


def _check_known(tables: Mapping[str, Any], place: Callable[[tuple[str, ...]], str]) -> None:
    """Raise for the first table or key that does not exist."""
    names = list(Settings.model_fields)
    for table, value in tables.items():
        if table not in names:
            raise ConfigError(
                f"{place((table,))}: unknown table [{table}]{guess(table, names)}; tables are {', '.join(names)}"
            )
        if table in TABLES and isinstance(value, Mapping):
            known = list(TABLES[table].model_fields)
            for key in value:
                if key not in known:
                    raise ConfigError(
                        f"{place((table, key))}: unknown key [{table}] {key}{_elsewhere(key, table) or guess(key, known)}"
                        f"; keys are {', '.join(known) or 'none'}"
                    )


def _elsewhere(key: str, table: str) -> str:
    homes = [name for name, model in TABLES.items() if name != table and key in model.model_fields]
    return f"; it belongs in [{homes[0]}]" if homes else ""


def _explain(error: ValidationError, model: type[BaseModel], places: Mapping[tuple[str, ...], str]) -> str:
    """One line per wrong value: where it was written, which key, what it is, what is allowed."""
    lines = []
    for problem in error.errors(include_url=False):
        keys = tuple(str(part) for part in problem["loc"])
        place = next((places[keys[:end]] for end in range(len(keys), 0, -1) if keys[:end] in places), "argument")
        reason = problem["msg"].removeprefix("Value error, ")
        reason = reason[:1].lower() + reason[1:]
        table, rest = keys[0] if keys else "", ".".join(keys[1:2])
        about = f" ({note})" if (note := _description(model, keys)) else ""
        shown = shown_value(model, keys, problem["input"])
        lines.append(f"{place}: [{table}] {rest} = {shown}: {reason}{about}".replace("]  =", "] ="))
    return "\n".join(lines)


def _field_at(model: type[BaseModel], keys: Iterable[str]) -> FieldInfo | None:
    """The deepest field on the way `keys`, or None if not even the first is one."""
    entry = None
    for key in keys:
        below = model.model_fields.get(key)
        if below is None:
            return entry
        entry = below
        if not (isinstance(entry.annotation, type) and issubclass(entry.annotation, BaseModel)):
            return entry
        model = entry.annotation
    return entry


def _description(model: type[BaseModel], keys: Iterable[str]) -> str:
    entry = _field_at(model, keys)
    return (entry.description if entry is not None else None) or ""


def shown_value(model: type[BaseModel], keys: tuple[str, ...], value: Any) -> str:
    """A value as people may see it; "***" for one that is a secret or holds some."""
    entry = _field_at(model, keys)
    is_secret = holds_secret(entry.annotation if entry is not None else model)
    return "***" if is_secret else repr(value)


def validate_plugin_table(plugin_id: str, model: type[BaseModel], raw: Mapping[str, Any]) -> dict[str, Any]:
    """Check `[plugin.ID]` with the plugin's own model; returns plain data with defaults. Raises ConfigError that names key and value."""
    known = list(model.model_fields)
    for key in raw:
        if key not in known:
            raise ConfigError(
                f"[plugin.{plugin_id}] {key}: unknown key{guess(key, known)}; keys are {', '.join(known)}"
            )
    try:
        return model.model_validate(dict(raw)).model_dump()
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            keys = tuple(str(part) for part in problem["loc"])
            shown = shown_value(model, keys, problem["input"])
            lines.append(f"[plugin.{plugin_id}] {'.'.join(keys)} = {shown}: {problem['msg']}")
        raise ConfigError("\n".join(lines)) from error


_Command = TypeVar("_Command", bound=Callable[..., Any])


def click_options(*tables: str, without: Collection[str] = ()) -> Callable[[_Command], _Command]:
    """Give a click command `--config`, `--use KIND=NAME` and one flag per field of these tables; read them with `settings_from_flags`.

    without: fields that mean nothing to this command. Values stay text until `Settings` checks them, so that a flag, a variable and a
    line of the file fail with one message.
    """
    import click

    def decorate(command: _Command) -> _Command:
        for table in reversed(tables):
            for name, entry in reversed(list(TABLES[table].model_fields.items())):
                flat = flag_name(name, entry)
                if name in without:
                    continue
                if holds_secret(entry.annotation):
                    command = _refused_flag(flat, f"XLLM_{table}__{name}".upper())(command)
                elif (table, name) != ("model", "path"):  # the model is each command's argument
                    command = click.option(*_flag(flat, entry), **_flag_type(name, entry))(command)
        pins = click.option(
            "--use", multiple=True, metavar="KIND=NAME", help="Pin a part, e.g. attention=core/paged. Repeatable."
        )
        config = click.option(
            "--config", "config_path", type=click.Path(), metavar="FILE", help="Settings file; default ./xllm.toml."
        )
        return config(pins(command))

    return decorate


def settings_from_flags(flags: dict[str, Any], **more: Any) -> Settings:
    """Settings from what a command with `click_options` was called with. Takes its flags out of `flags`, and leaves the command's own.

    more: flat keys that the command sets itself (`model="..."`).
    """
    config_path = flags.pop("config_path", None)
    pins: dict[str, Any] = {}
    for pin in flags.pop("use", ()):
        kind, is_pin, name = pin.partition("=")
        if not is_pin or not kind or not name:
            raise ConfigError(f"--use {pin}: write KIND=NAME, e.g. --use attention=core/paged")
        base = kind.partition(".")[0]
        pins[kind] = [*pins.get(kind, ()), *name.split(",")] if base in PLURAL_KINDS else name
    given = {key: value for key in FLAT_KEYS if key in flags and (value := flags.pop(key)) not in (None, ())}
    given |= {"use": pins} if pins else {}
    settings = Settings.from_flags(config_path, **given, **more)
    logging.basicConfig(level=settings.log.level.upper(), format="%(levelname)s %(name)s: %(message)s")  # to stderr
    return settings


def _flag(flat: str, entry: FieldInfo) -> tuple[str, ...]:
    flag = flat.replace("_", "-")
    if entry.annotation is bool:
        off = flag.replace("enable-", "disable-") if flag.startswith("enable-") else f"no-{flag}"
        return (f"--{flag}/--{off}", flat)
    return (f"--{flag}", flat)


def _refused_flag(flat: str, variable: str) -> Callable[[_Command], _Command]:
    """A flag that only explains why there is none: command lines show in `ps` and in shell histories."""
    import click

    flag = flat.removesuffix("s").replace("_", "-")

    def refuse(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            raise click.UsageError(
                f"--{flag} is not offered: a secret on a command line shows in ps; use --{flag}-file FILE or the variable {variable}"
            )

    return click.option(
        f"--{flag}", f"--{flag}s", expose_value=False, hidden=True, is_eager=True, flag_value="", is_flag=False, callback=refuse
    )  # fmt: skip


def _flag_type(name: str, entry: FieldInfo) -> dict[str, Any]:
    default = "" if entry.default is None or entry.default == () else f"  [default: {entry.default}]"
    options: dict[str, Any] = {"default": None, "help": f"{entry.description}{default}"}
    if entry.annotation is bool:
        return options
    if is_list(entry):
        return options | {"multiple": True, "metavar": "TEXT", "help": f"{entry.description}  [repeatable]"}
    arguments = typing.get_args(entry.annotation)
    if typing.get_origin(entry.annotation) is Literal:
        options["metavar"] = "|".join(str(argument) for argument in arguments)
        return options
    plain = [a for a in arguments if a is not types.NoneType] if arguments else [entry.annotation]
    number = "SECONDS" if name.endswith("_s") else "BYTES" if name.endswith("_bytes") else "N"
    options["metavar"] = number if plain in ([int], [float]) else "TEXT"
    return options
