"""The tables of xllm.toml: every setting of the core with its default, bounds and description. Flags and help are made from them."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretBytes, SecretStr, ValidationInfo, field_validator
from pydantic.fields import FieldInfo


def _seconds(default: float, description: str, *, is_zero_allowed: bool = False) -> Any:
    """A time in seconds: finite, and positive unless 0 means something."""
    least: dict[str, Any] = {"ge": 0.0} if is_zero_allowed else {"gt": 0.0}
    return Field(default, allow_inf_nan=False, description=description, **least)


class Table(BaseModel):
    """One table of xllm.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read `block_size = true` as 1."""
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("input should not be a boolean")
        return value


class ModelTable(Table):
    """What is served."""

    path: str | None = Field(
        None,
        description="Model: a directory, a .gguf file, OWNER/NAME on the hub, or pkg:PYTHON_PACKAGE.",
        json_schema_extra={"flag": "model"},
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Compute in this dtype; auto takes the checkpoint's where the device can."
    )
    quantization: str | None = Field(
        None,
        min_length=1,
        description="Format of the weights, as PLUGIN/NAME or NAME: int8 turns them into it at load, gguf serves a GGUF file's 4- and 8-bit blocks "
        "as they are; default is none: weights in dtype.",
    )
    max_model_len: int | None = Field(None, ge=1, description="Longest context in tokens; default is the model's own.")
    weight_cache_bytes: int = Field(
        4 << 30,
        ge=0,
        description="Bytes on disk, of all models, for weights as the device lays them out: they make the next start faster. In weights/ of "
        "$XLLM_CACHE_DIR (~/.cache/xllm); those unused for longest go first; 0 keeps and reads none.",
    )


class DeviceTable(Table):
    """Where it runs."""

    name: str = Field(
        "auto",
        min_length=1,
        description="Device backend, as PLUGIN/NAME or NAME; auto takes the best that answers.",
        json_schema_extra={"flag": "device"},
    )
    index: int = Field(0, ge=0, description="Which device of that backend.", json_schema_extra={"flag": "device_index"})
    num_threads: int | None = Field(
        None, ge=1, le=1024, description="Host threads for the device's own work, at most 1024; default is its own."
    )


class EngineTable(Table):
    """The loop, and how many of it there are."""

    num_engines: int = Field(1, ge=1, description="Engine processes that share the requests.")
    overlap: bool = Field(
        True, description="Plan each step while the one before it runs, with the worker on a thread of its own."
    )
    graphs: bool = Field(
        True,
        description="Replay decode steps from recorded graphs where the device, its kernels and the model allow it.",
    )
    fusions: bool = Field(True, description="Take ops that stand for several where a plugin offers them.")


class SchedulerTable(Table):
    """How steps are filled."""

    max_num_seqs: int = Field(64, ge=1, description="Most sequences that run at once.")
    max_num_batched_tokens: int = Field(2048, ge=1, description="Most tokens that one step computes.")
    max_chunk_tokens: int = Field(
        0, ge=0, description="Most prompt tokens of one sequence in one step; 0 sets no limit."
    )
    max_waiting: int = Field(10_000, ge=1, description="Most requests that wait; further ones are refused.")


class KVTable(Table):
    """The cache of keys and values."""

    block_size: int | None = Field(None, ge=1, description="Tokens per KV block; default is the device's best.")
    memory_bytes: int | None = Field(
        None, ge=1, description="Memory for KV blocks; default is a share of what is free."
    )
    num_blocks: int | None = Field(None, ge=1, description="Number of KV blocks, instead of a memory size.")
    cache_dtype: Literal["auto", "int8"] = Field(
        "auto",
        description="Keys and values as the model computes them, or in 8 bits with a step per token and head: about half the memory of bfloat16.",
        json_schema_extra={"flag": "kv_cache_dtype"},
    )
    enable_prefix_cache: bool = Field(True, description="Keep computed blocks and reuse them for equal prefixes.")


class ServerTable(Table):
    """What `xllm serve` listens on, whom it lets in, and how much it bears."""

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 is every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 lets the system choose.")
    uds: str | None = Field(
        None, min_length=1, description="Path of a unix socket to listen on, instead of host and port."
    )
    served_model_name: tuple[str, ...] = Field(
        (),
        description="Names that clients may use, the first is shown; default is the last part of the model reference.",
    )
    api_keys: tuple[SecretStr, ...] = Field(
        (),
        description='Keys that clients must send one of; none lets everybody in. { env = "NAME" } takes one from a variable.',
    )
    api_key_file: str | None = Field(None, min_length=1, description="File with further keys, one per line.")
    allowed_hosts: tuple[str, ...] = Field(
        (), description="Further Host headers that are accepted where no key is set."
    )
    open_metrics: bool = Field(False, description="Where keys are set: answer /metrics without one.")
    max_body_bytes: int = Field(32 << 20, ge=1, description="Largest body of a request.")
    max_bodies_bytes: int = Field(
        256 << 20, ge=1, description="Most bytes of all bodies that are being read at once; more are answered 503."
    )
    max_header_bytes: int = Field(64 << 10, ge=256, description="Most bytes of a request's line and headers.")
    header_timeout_s: float = _seconds(10.0, "Time for the line and headers of a request to arrive.")
    body_timeout_s: float = _seconds(60.0, "Time for the whole body of a request to arrive.")
    body_idle_timeout_s: float = _seconds(15.0, "Longest pause between two pieces of a body.")
    keep_alive_timeout_s: float = _seconds(75.0, "Time after which an idle connection is closed.")
    write_timeout_s: float = _seconds(30.0, "A reader of a stream that takes nothing for this long is dropped.")
    comment_interval_s: float = _seconds(
        15.0, "Silence of a stream after which a comment keeps it alive; 0 sends none.", is_zero_allowed=True
    )
    max_connections: int = Field(1024, ge=1, description="Most connections at once.")
    max_queue: int = Field(512, ge=1, description="Most requests that wait for the engine; more are answered 429.")
    max_prompts_per_request: int = Field(512, ge=1, description="Most prompts in one request.")
    shutdown_timeout_s: float = _seconds(
        30.0, "Time that running requests get to finish once the server is told to stop.", is_zero_allowed=True
    )
    drain_delay_s: float = _seconds(
        0.0, "Time between saying not ready and refusing requests, for balancers to notice.", is_zero_allowed=True
    )
    engine_timeout_s: float = _seconds(120.0, "Silence of a busy engine after which /health says so.")
    log_requests: bool = Field(False, description="One line per request in the log; never its text.")
    chat_template: str | None = Field(
        None, min_length=1, description="File with the chat template, instead of the model's own."
    )
    generation_config: Literal["auto", "none"] = Field(
        "auto", description="Defaults of sampling: auto takes the model's own, none takes those of the API."
    )

    @field_validator("max_bodies_bytes")
    @classmethod
    def _check_one_fits(cls, value: int, info: ValidationInfo) -> int:
        if value < (most := info.data.get("max_body_bytes", 0)):
            raise ValueError(f"it must be at least max_body_bytes = {most}, else the largest body never fits")
        return value

    @field_validator("api_keys", mode="before")
    @classmethod
    def _from_variables(cls, value: Any) -> Any:
        """Replace each `{ env = "NAME" }` by what that variable holds."""
        if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
            return value  # refused by the type, with its own words
        return tuple(_secret_of(item) if isinstance(item, Mapping) else item for item in value)

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for number, key in enumerate(value, start=1):
            text = key.get_secret_value()
            if not text or not all("!" <= letter <= "~" for letter in text):
                raise ValueError(
                    f"key {number} is empty or holds a character that a header cannot carry; use ASCII without spaces"
                )
        return value


class LogTable(Table):
    """What is written to stderr."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="Least severity that is printed.", json_schema_extra={"flag": "log_level"}
    )


class PluginsTable(Table):
    """Which plugins take part. All that are installed do, unless policy, only or disable say otherwise."""

    policy: Literal["installed", "listed"] = Field(
        "installed", description="installed: every plugin found may load. listed: only those that enable names."
    )
    only: tuple[str, ...] | None = Field(
        None,
        description="Only these ids, and all of them must load; also XLLM_PLUGINS=a,b. Empty is none but the core.",
    )
    enable: tuple[str, ...] = Field(
        (), description="Plugins that must load: ID, or ID@DISTRIBUTION, which no other distribution can claim."
    )
    disable: tuple[str, ...] = Field((), description="Plugin ids that are not imported.")
    require: tuple[str, ...] = Field(
        (), description="Plugins that must load, with a version where it matters: ID>=1.2."
    )
    strict: bool = Field(False, description="Start only if every plugin that may load does.")
    locked: bool = Field(False, description="Start only with the plugins that the lock names (`xllm plugins lock`).")
    lock_file: str | None = Field(
        None, min_length=1, description="Where the lock is; default xllm.lock.toml beside the settings file."
    )


class CorePluginTable(Table):
    """`[plugin.core]`: settings of parts that the core brings."""

    host_store_bytes: int = Field(1 << 30, ge=1, description="Bound of the KV store in host memory.")


TABLES: dict[str, type[Table]] = {
    "model": ModelTable,
    "device": DeviceTable,
    "engine": EngineTable,
    "scheduler": SchedulerTable,
    "kv": KVTable,
    "server": ServerTable,
    "log": LogTable,
    "plugins": PluginsTable,
}
"""The core's own tables: name -> model."""


def flag_name(key: str, entry: FieldInfo) -> str:
    """The flat name of a field: its own, or a longer one where its own says too little alone (`[log] level` is `log_level`)."""
    extra = entry.json_schema_extra
    return str(extra["flag"]) if isinstance(extra, dict) and "flag" in extra else key


def _flat_keys() -> dict[str, tuple[str, str]]:
    keys: dict[str, tuple[str, str]] = {}
    for table, model in TABLES.items():
        for name, entry in model.model_fields.items():
            for flat in {name, flag_name(name, entry)}:
                if flat in keys:
                    raise RuntimeError(
                        f"[{table}] {name} and {keys[flat]} share the flat key {flat!r}; give one a flag name"
                    )
                keys[flat] = (table, name)
    return keys


FLAT_KEYS = _flat_keys()
"""Flat name -> (table, key)."""


def is_list(entry: FieldInfo) -> bool:
    """True for a field that takes several values."""
    kinds = (entry.annotation, *typing.get_args(entry.annotation))
    return any(typing.get_origin(kind) is tuple for kind in kinds)


def holds_secret(annotation: Any) -> bool:
    """True for a type whose values must not be shown: a secret, a container of some, or a model with one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return any(holds_secret(entry.annotation) for entry in annotation.model_fields.values())
    if annotation in (SecretStr, SecretBytes):
        return True
    return any(holds_secret(argument) for argument in typing.get_args(annotation))


def _secret_of(reference: Mapping[str, Any]) -> str:
    """The value of the variable that `{ env = "NAME" }` names."""
    name = reference.get("env")
    if len(reference) != 1 or not isinstance(name, str):
        raise ValueError('a key is a string, or { env = "NAME" } with the variable that holds it')
    if not os.environ.get(name):
        raise ValueError(f"the variable {name} is not set, or empty")
    return os.environ[name]
