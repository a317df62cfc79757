"""Settings: flags over `XLLM_*` variables over xllm.toml over defaults. What is unknown is an error with its place and a guess.

`[scheduler] max_num_seqs`, `XLLM_SCHEDULER__MAX_NUM_SEQS` and `--max-num-seqs` are one setting. `./xllm.toml` is read if it is there;
a path that was given must exist.
"""

from __future__ import annotations

import datetime
import logging
import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    SecretBytes,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from xllm_core.config_flags import click_options
from xllm_core.config_secrets import find_references, reveal, with_references
from xllm_core.config_sources import PLURAL_KINDS, KeyPath, Layer, guess, place_of, put, read_environment, walk
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
from xllm_core.config_toml import read_toml
from xllm_core.errors import ConfigError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = [
    "KINDS", "TABLES", "CorePluginTable", "DeviceTable", "EngineTable", "KVTable", "LogTable", "ModelTable", "PluginsTable",
    "SchedulerTable", "ServerTable", "Settings", "Table", "click_options", "plain", "settings_from_flags", "validate_plugin_table",
]  # fmt: skip

DEFAULT_FILE = Path("xllm.toml")

KINDS = (
    "attention", "device", "kv_store", "logits_processors", "model", "observers", "op", "quantization", "sampler", "scheduler",
    "weight_format",
)  # fmt: skip
"""What `[use]` and `[prefer]` can name; `attention.GROUP`, `op.NAME` and `model.ARCHITECTURE` narrow it down."""

_NARROWED = ("attention", "model", "op")


@dataclass(slots=True)
class _Reading:
    """One construction of `Settings`: what each source said. Of two settings with equal values neither origin makes them differ."""

    layers: list[Layer] = field(default_factory=list, compare=False)  # highest precedence first
    config_path: Path | None = field(default=None, compare=False)
    is_closed: bool = field(default=False, compare=False)  # neither variables nor a file are read


_READING: ContextVar[_Reading | None] = ContextVar("_READING", default=None)


class _Source(PydanticBaseSettingsSource):
    """A source below what `Settings` was called with."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False  # pydantic-settings asks per field; ours answer for all at once

    @abstractmethod
    def read(self, config_path: Path | None) -> Layer:
        """What this source says."""

    def __call__(self) -> dict[str, Any]:
        reading = _READING.get()
        if reading is None:
            raise RuntimeError("settings sources were asked outside Settings()")
        if reading.is_closed:
            return {}
        layer = _checked(self.read(reading.config_path))
        reading.layers.append(layer)
        return layer.tables


class _EnvironmentSource(_Source):
    """`XLLM_TABLE__KEY=value`."""

    def read(self, config_path: Path | None) -> Layer:
        known = {table: tuple(model.model_fields) for table, model in TABLES.items()}
        lists = [(t, key) for t, model in TABLES.items() for key, e in model.model_fields.items() if is_list(e)]
        return read_environment(os.environ, known, lists)


class _TomlSource(_Source):
    """The file."""

    def read(self, config_path: Path | None) -> Layer:
        is_there = config_path is not None or DEFAULT_FILE.exists()
        return read_toml(config_path or DEFAULT_FILE) if is_there else Layer({})


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

    _reading: _Reading = PrivateAttr(default_factory=_Reading)

    def __init__(self, *, config_path: str | Path | None = None, reads_sources: bool = True, **tables: Any) -> None:
        reading = _Reading([], Path(config_path) if config_path is not None else None, not reads_sources)
        reading.layers.append(_checked(Layer(dict(tables), {keys: _flag_of(keys) for keys in walk(tables)})))
        token = _READING.set(reading)
        try:
            super().__init__(**reading.layers[0].tables)
        except ValidationError as error:
            raise ConfigError(_explain(error, type(self), reading.layers)) from error
        finally:
            _READING.reset(token)
        self._reading = reading

    @field_validator("use", "prefer")
    @classmethod
    def _check_counts(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for kind, names in value.items():
            if info.field_name == "use" and kind not in PLURAL_KINDS and not isinstance(names, str):
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
        tables: dict[str, dict[str, Any]] = plain(self.model_dump(), shows_secrets=True)
        if self.plugins.locked:  # the other process knows no settings file
            tables["plugins"]["lock_file"] = str(self.lock_path.absolute())
        return tables

    @property
    def lock_path(self) -> Path:
        """Where the lock of plugins is: `[plugins] lock_file`, or beside the settings file, or here."""
        if self.plugins.lock_file is not None:
            return Path(self.plugins.lock_file)
        return (self._reading.config_path or DEFAULT_FILE).parent / "xllm.lock.toml"

    def place(self, *keys: str) -> str:
        """Where the value at `keys` (table, key, ...) comes from: "xllm.toml:12:3", "XLLM_KV__NUM_BLOCKS", "--num-blocks", "argument", "default"."""
        return place_of(self._reading.layers, keys) or "default"

    def core_tables(self) -> dict[str, dict[str, Any]]:
        """The core's own tables as plain data, for plugins to read; without secrets."""
        return {
            name: getattr(self, name).model_dump(
                exclude={key for key, entry in model.model_fields.items() if holds_secret(entry.annotation)}
            )
            for name, model in TABLES.items()
        }


def plain(value: Any, *, shows_secrets: bool = False) -> Any:
    """A setting, or nested tables of them, as data that JSON can hold. Secrets become "***" unless they are to be shown."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner, shows_secrets=shows_secrets) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner, shows_secrets=shows_secrets) for inner in value]
    if isinstance(value, SecretStr | SecretBytes):
        return str(value.get_secret_value()) if shows_secrets else "***"
    if isinstance(value, datetime.date | datetime.time):  # TOML has them, and models read them from text as well
        return value.isoformat()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _flag_of(keys: KeyPath) -> str:
    if keys[0] == "use" and len(keys) > 1:
        return "--use"
    entry = TABLES[keys[0]].model_fields.get(keys[1]) if keys[0] in TABLES and len(keys) > 1 else None
    if entry is None or holds_secret(entry.annotation) or keys[:2] == ("model", "path"):
        return "argument"
    return f"--{flag_name(keys[1], entry).replace('_', '-')}"


def _checked(layer: Layer) -> Layer:
    """The layer with `[use]` and `[prefer]` flat. Raises ConfigError for the first table, key or kind that does not exist."""
    names = list(Settings.model_fields)
    for table, value in layer.tables.items():
        place = layer.places.get((table,)) or next((p for k, p in layer.places.items() if k[0] == table), "argument")
        if table not in names:
            raise ConfigError(f"{place}: unknown table [{table}]{guess(table, names)}; tables are {', '.join(names)}")
        known = list(TABLES[table].model_fields) if table in TABLES else []
        for key in value if table in TABLES and isinstance(value, Mapping) else ():
            if key not in known:
                raise ConfigError(
                    f"{layer.places.get((table, key), place)}: unknown key [{table}] {key}"
                    f"{_elsewhere(key, table) or guess(key, known)}; keys are {', '.join(known) or 'none'}"
                )
    for table in ("use", "prefer"):
        if isinstance(value := layer.tables.get(table), Mapping):
            layer.tables[table] = _flat_kinds(table, value, layer)
    return layer


def _flat_kinds(table: str, value: Mapping[str, Any], layer: Layer, above: KeyPath = ()) -> dict[str, Any]:
    """`op.linear = "x"` without quotes makes a table in TOML; where a list is due, one name stands for a list of one."""
    flat: dict[str, Any] = {}
    for key, names in value.items():
        path = (*above, key)
        kind = ".".join(path)
        if isinstance(names, Mapping):
            flat |= _flat_kinds(table, names, layer, path)
            continue
        place = layer.places.get((table, *path), "argument")
        layer.places[table, kind] = place
        base, _, narrow = kind.partition(".")
        if base not in KINDS or (narrow and base not in _NARROWED):
            raise ConfigError(
                f"{place}: [{table}] unknown kind {kind!r}{guess(kind, KINDS)}; kinds are {', '.join(KINDS)}"
            )
        is_one_of_several = isinstance(names, str) and (table == "prefer" or kind in PLURAL_KINDS)
        flat[kind] = (names,) if is_one_of_several else names
    return flat


def _elsewhere(key: str, table: str) -> str:
    homes = [name for name, model in TABLES.items() if name != table and key in model.model_fields]
    return f"; it belongs in [{homes[0]}]" if homes else ""


def _explain(error: ValidationError, model: type[BaseModel], layers: Sequence[Layer]) -> str:
    """One line per wrong value: where it was written, which key, what it is, what is allowed."""
    lines = []
    for problem in error.errors(include_url=False):
        keys = tuple(str(part) for part in problem["loc"])
        places = (place_of(layers, keys[:end]) for end in range(len(keys), 0, -1))
        place = next((place for place in places if place is not None), "argument")
        table, rest = keys[0] if keys else "", ".".join(keys[1:2])
        about = f" ({note})" if (note := _description(model, keys)) else ""
        shown = shown_value(model, keys, problem["input"])
        lines.append(f"{place}: [{table}] {rest} = {shown}: {_reason(problem)}{about}".replace("]  =", "] ="))
    return "\n".join(lines)


def _reason(problem: ErrorDetails) -> str:
    reason = problem["msg"].removeprefix("Value error, ")
    return reason[:1].lower() + reason[1:]


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


def validate_plugin_table(
    plugin_id: str, model: type[BaseModel], raw: Mapping[str, Any], settings: Settings | None = None
) -> dict[str, Any]:
    """Check `[plugin.ID]` with the plugin's own model; returns plain data with defaults, and with references to secrets, which `reveal` resolves.

    Raises ConfigError that names key and value.

    settings: where `raw` came from, so that the message says in which line, too.
    """

    def place(*keys: str) -> str:
        found = settings.place("plugin", plugin_id, *keys) if settings is not None else "default"
        return f"{found}: " if found != "default" else ""

    known = list(model.model_fields)
    for key in raw:
        if key not in known:
            raise ConfigError(
                f"{place(key)}[plugin.{plugin_id}] {key}: unknown key{guess(key, known)}; keys are {', '.join(known)}"
            )
    references = find_references(raw)
    revealed = reveal(raw, lambda *keys: f"{place(*keys)}[plugin.{plugin_id}] ")
    try:
        return with_references(model.model_validate(revealed).model_dump(), references)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            keys = tuple(str(part) for part in problem["loc"])
            is_hidden = any(keys[: len(path)] == path for path in references)
            shown = "***" if is_hidden else shown_value(model, keys, problem["input"])
            lines.append(f"{place(*keys)}[plugin.{plugin_id}] {'.'.join(keys)} = {shown}: {_reason(problem)}")
        cause = None if holds_secret(model) or references else error  # a traceback prints it, and it quotes values
        raise ConfigError("\n".join(lines)) from cause


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
