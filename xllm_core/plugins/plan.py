"""The outcome of assembly: which part does what, from which distribution, and why. Plain data; a worker loads exactly what it names."""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from xllm_core import __version__
from xllm_core.errors import ConfigError, PluginError
from xllm_core.plugins.contracts.ops import KV_WRITE_OPS

if TYPE_CHECKING:
    from xllm_core.plugins.contracts.attention import AttentionGeometry


MASKED = "***"
"""What stands in a plan for a secret."""


def load_target(target: str, *, owner: str) -> Any:
    """Import "package.module:attribute"; raises PluginError that names `owner` ("plugin/name"), the target and the cause."""
    module_name, _, path = target.partition(":")
    try:
        with redirect_stdout(sys.stderr):  # stdout is the command's, and may hold JSON
            value: Any = import_module(module_name)
            for attribute in path.split("."):
                value = getattr(value, attribute)
    except KeyboardInterrupt:
        raise  # that was the user
    except BaseException as error:  # SystemExit, too: a part must not end, in silence, the process that looks at it
        raise PluginError(
            f"{owner}: its target {target!r} cannot be imported: {describe(error)}; reinstall the plugin, or choose another part"
        ) from error
    return value


def describe(error: BaseException) -> str:
    """An exception in one line, with the file and line that raised it where that is not an import machinery's own."""
    if isinstance(error, PluginError | ConfigError):
        return str(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    frames = [frame for frame in frames if "/xllm_core/plugins/" not in frame.filename.replace("\\", "/")]
    place = f" ({frames[-1].filename.replace(chr(92), '/').rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
    try:
        text = str(error).encode(errors="backslashreplace").decode()  # so that it can be printed
    except Exception as inner:  # noqa: BLE001  it is written by a plugin, and what it is worth is told all the same
        text = f"(its text cannot be read: {type(inner).__name__})"
    return f"{type(error).__name__}: {text}{place}"


def _masked(value: object) -> str:
    """Of what JSON does not know only secrets come here."""
    if not hasattr(value, "get_secret_value"):
        raise TypeError(f"a plan holds plain data, not {type(value).__name__}")
    return MASKED


@dataclass(frozen=True, slots=True)
class Choice:
    """One part that was chosen.

    name: "plugin/name". reason: why this one. eligible: others that would have served, best first. rejected: (name, reason).
    options: what the spec adds to the arguments of its target.
    """

    name: str
    target: str
    plugin: str
    distribution: str
    version: str
    reason: str
    eligible: tuple[str, ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, *arguments: Any) -> Any:
        """Import the target and call it with these arguments and the options; raises PluginError, and what it raises."""
        return self.load()(*arguments, **self.options)

    def load(self) -> Any:
        """Import the target; raises PluginError. Called when parts are built, never later."""
        return load_target(self.target, owner=self.name)


@dataclass(frozen=True, slots=True)
class AssemblyPlan:
    """Every decision of one engine. Frozen.

    attention, geometry: per KV group that attends. ops: per name of `contracts.ops.CORE_OPS`, per op that the family asks for beyond them, and
    per fusion that was taken; unused_fusions: (name, reason) of the others. quantized_ops: what ops "linear", "lm_head" and "linear_silu_mul" are
    done by instead; quantized_kinds: packings that the format serves as the file has them, empty for one that weights are turned into.
    kv_dtype: what keys and values are quantised to, None for the dtype.
    logits_processors: in the order of application. plugin_settings: the validated table of each plugin that has one. dtype_reason: where the
    dtype comes from.
    """

    model_path: str
    architecture: str
    dtype: str
    dtype_reason: str
    device: Choice
    device_index: int
    device_kind: str
    weight_format: Choice
    model: Choice
    ops: Mapping[str, Choice]
    attention: Mapping[str, Choice]
    geometry: Mapping[str, AttentionGeometry]
    sampler: Choice
    logits_processors: tuple[Choice, ...]
    scheduler: Choice
    kv_store: Choice | None
    quantization: Choice | None
    quantized_ops: Mapping[str, str]
    quantized_kinds: tuple[str, ...]
    observers: tuple[Choice, ...]
    block_size: int
    kv_layout: str
    kv_dtype: str | None
    max_model_len: int
    unused_fusions: tuple[tuple[str, str], ...]
    plugin_settings: Mapping[str, Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Plain data that `json.dumps` takes. Secrets that stand in the settings themselves are masked; references stay."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), default=_masked))
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> AssemblyPlan:
        """The plan that `to_json` wrote. Raises PluginError for what is none."""
        from xllm_core.plugins.contracts.attention import AttentionGeometry

        def choice(data: Mapping[str, Any]) -> Choice:
            rejected = tuple((name, reason) for name, reason in data["rejected"])
            return Choice(**{**data, "eligible": tuple(data["eligible"]), "rejected": rejected})

        try:
            KV_WRITE_OPS[plain["kv_dtype"] or "auto"]  # KeyError for one that is not known here
            return cls(
                **{
                    **plain,
                    **{
                        name: choice(plain[name])
                        for name in ("device", "weight_format", "model", "sampler", "scheduler")
                    },
                    **{name: {key: choice(c) for key, c in plain[name].items()} for name in ("ops", "attention")},
                    **{name: tuple(map(choice, plain[name])) for name in ("logits_processors", "observers")},
                    "quantized_kinds": tuple(plain["quantized_kinds"]),
                    "unused_fusions": tuple((name, reason) for name, reason in plain["unused_fusions"]),
                    **{
                        name: choice(plain[name]) if plain[name] is not None else None
                        for name in ("kv_store", "quantization")
                    },
                    "geometry": {key: AttentionGeometry(**entry) for key, entry in plain["geometry"].items()},
                }
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PluginError(f"this is no plan of xllm-core {__version__}: {type(error).__name__}: {error}") from error

    @property
    def kv_write(self) -> str:
        """The op that stores into the cache."""
        return KV_WRITE_OPS[self.kv_dtype or "auto"]

    @property
    def hash(self) -> str:
        """SHA-256 over the plan, hex: equal on every worker, or they were not assembled alike."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def choices(self) -> dict[str, Choice]:
        """Every choice by its kind: "device", "attention.full", "op.linear", "observers.0", ..."""
        single = {"device": self.device, "weight_format": self.weight_format, "model": self.model}
        single |= {f"attention.{group}": choice for group, choice in self.attention.items()}
        single |= {f"op.{name}": choice for name, choice in self.ops.items()}
        single |= {"sampler": self.sampler, "scheduler": self.scheduler}
        single |= {f"logits_processors.{i}": choice for i, choice in enumerate(self.logits_processors)}
        single |= {f"observers.{i}": choice for i, choice in enumerate(self.observers)}
        single |= {"quantization": self.quantization} if self.quantization else {}
        return single | ({"kv_store": self.kv_store} if self.kv_store else {})
