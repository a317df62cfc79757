"""What hooks return: frozen descriptions, free of imports. A `target` is imported only once it is chosen.

Capabilities are data. What a spec does not declare is denied when something asks for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """Common to all: `name` is unique within a plugin (users write `plugin/name`, or `name` where that is unambiguous).

    target: "module:attribute", a callable or class that builds the contract. rank: higher is preferred; the core's own parts have 0.
    requires: modules that must be findable, else the spec is rejected with that reason. check: "module:attribute", a function of the query
    (`AttentionQuery`, `OpQuery`, ...; None for kinds that have none) that is asked last and returns why the part cannot serve, or None; an
    exception is a reason too. options: keyword arguments of the target, such as the plugin's settings; they stand in the plan, so they are
    plain data and no secrets.
    """

    name: str
    target: str
    rank: int = 0
    requires: tuple[str, ...] = ()
    check: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""

    def __post_init__(self) -> None:
        """Check the shape, and freeze sets and lists given for convenience; raises ValueError or TypeError that names the field."""
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name {self.name!r}: use letters, digits, '_', '-' and '.', and no '/'")
        for name, value in (("target", self.target), ("check", self.check)):
            if value is not None and not _TARGET.fullmatch(value):
                raise ValueError(f"{self.name}: {name} {value!r} is not of the form 'package.module:attribute'")
        try:
            json.dumps(self.options)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{self.name}: options must be plain data: {error}") from error
        for entry in fields(self):
            kind, value = str(entry.type).partition("[")[0], getattr(self, entry.name)
            if kind not in ("frozenset", "tuple"):
                continue
            if isinstance(value, str) or not isinstance(value, Iterable):
                raise TypeError(f"{self.name}: {entry.name} is {value!r}; give a collection, not one value")
            object.__setattr__(self, entry.name, frozenset(value) if kind == "frozenset" else tuple(value))


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceSpec(Spec):
    """A device backend. `target(index: int)` builds a `DeviceBackend`.

    probe: "module:attribute", a function without arguments that returns None if the device is usable here, else the reason; it
        runs in a child process. is_accelerator: chosen before a CPU when its probe succeeds.
    """

    probe: str | None = None
    is_accelerator: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class OpSpec(Spec):
    """A named op for some devices. `target(device: DeviceBackend)` builds the callable that `contracts.ops` defines for `op`.

    replaces: for a fusion, the ops it stands for, in order (`contracts.ops.CORE_FUSIONS`). It is taken where each of them would have been
        chosen with no higher rank, and none of them is pinned; `[engine] fusions = false` leaves all of them out.
    layouts: KV layouts that an op which stores into the cache knows (`kv_write`, `rope_kv_write`, the same in 8 bits); empty means any, as for
        ops that never see it.
    """

    op: str
    devices: frozenset[str]
    dtypes: frozenset[str]
    replaces: tuple[str, ...] = ()
    layouts: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec(Spec):
    """An attention kernel. `target(device: DeviceBackend, geometry: AttentionGeometry)` builds an `AttentionKernel`.

    head_sizes, block_sizes: empty means any. layouts: KV layouts it reads ("BSGD": block, slot, KV head, element).
    features: what it can do beyond causal attention over own blocks ("sliding_window", "soft_cap", "int8_kv", "segments", "lse", "tree_mask", ...).
    """

    devices: frozenset[str]
    dtypes: frozenset[str]
    head_sizes: frozenset[int] = frozenset()
    block_sizes: frozenset[int] = frozenset()
    layouts: tuple[str, ...] = ("BSGD",)
    features: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec(Spec):
    """A model family. `target` is a `ModelFamily`. architectures: names as in config.json's `architectures`.

    is_fallback: serves architectures that nobody names, so `architectures` is empty and `check` says which it cannot. It comes after every
    family that names the architecture, whatever the ranks, and is not asked where one of them fits; `why` marks what it serves.
    """

    architectures: frozenset[str] = frozenset()
    dtypes: frozenset[str] = frozenset({"float32", "bfloat16"})
    devices: frozenset[str] = frozenset()
    is_fallback: bool = False

    def __post_init__(self) -> None:
        """Check that either architectures are named, or it is a fallback that can say no."""
        Spec.__post_init__(self)
        if self.is_fallback and self.architectures:
            raise ValueError(
                f"{self.name}: a fallback names no architectures, it serves what nobody names; here are {sorted(self.architectures)}"
            )
        if self.is_fallback and self.check is None:
            raise ValueError(f"{self.name}: a fallback needs `check`, which says what it cannot serve")
        if not self.is_fallback and not self.architectures:
            raise ValueError(f"{self.name}: architectures is empty; name some, or set is_fallback")


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFormatSpec(Spec):
    """Where weights, configuration and tokenizers come from. `target()` builds a `WeightFormat`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationSpec(Spec):
    """A format that weights of linear maps are turned into at load. `target()` builds a `Quantization`, or with `kinds` a `PackedQuantization`.

    kinds: packings of stored tensors that are served as they are (`PackedTensor.kind`); whatever else a file holds keeps its weights. Empty for a
        format that any weight is turned into.
    ops: what each of "linear", "lm_head" and "linear_silu_mul" is done by, names of ops that read the format. Without "lm_head" the output
        projection keeps its weights; the third is a fusion of the first with `silu_mul`, taken where a device has it. Embeddings, routers and
        experts keep theirs.
    """

    ops: Mapping[str, str]
    kinds: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Check that linear maps have an op, and that nothing else is named."""
        Spec.__post_init__(self)
        known = {"linear", "lm_head", "linear_silu_mul"}
        if "linear" not in self.ops or not known.issuperset(self.ops):
            raise ValueError(f"{self.name}: ops names {sorted(self.ops)}; 'linear' is needed, of {sorted(known)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerSpec(Spec):
    """A scheduling policy. `target()` builds a `SchedulerPolicy`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerSpec(Spec):
    """Token choice. `target(device: DeviceBackend)` builds a `Sampler`."""

    devices: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitsProcessorSpec(Spec):
    """Something that changes logits before a token is chosen. `target(context: ProcessorContext)` builds a `LogitsProcessor`.

    All that are found are active, in descending rank, then by name; each is asked per sequence whether it applies.
    works_with: features it stays correct under ("speculation", ...).
    """

    works_with: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class KVStoreSpec(Spec):
    """A place for KV blocks outside device memory. `target(config: Mapping, geometry: KVGeometry)` builds a `KVStore`.

    scopes: "local" (this process), "shared" (this machine), "remote". layouts, block_sizes: of the blocks that it can hold; empty means any.
    """

    scopes: frozenset[str] = frozenset({"local"})
    layouts: frozenset[str] = frozenset()
    block_sizes: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class ObserverSpec(Spec):
    """Gets batched step records, off the step path. `target()` builds an `Observer`. Active only when named in `[use] observers`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandSpec(Spec):
    """A command of `xllm`. `target` is a `click.Command`, imported when the command runs or its own help is shown."""

    group: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorSpec(Spec):
    """A check of this machine. `target()` returns or yields `Finding`s, within seconds; `xllm doctor` and `xllm plugins list --why` call it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginInfo:
    """What a plugin module says of itself, as `xllm_plugin = PluginInfo(...)`.

    id equals the entry point's name and the plugin's TOML table `[plugin.<id>]`. xllm_api: a version specifier on `API_VERSION`.
    config: "module:attribute" of the pydantic model that validates the table, None if the plugin takes no settings.
    """

    id: str
    xllm_api: str = ">=0.1"
    config: str | None = None


@dataclass(frozen=True, slots=True)
class PluginContext:
    """What a hook may read: the plugin's own validated table and the user's core settings, both as plain data."""

    settings: Mapping[str, object] = field(default_factory=dict)
    core: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


API_VERSION = "0.1"
