"""From settings and plugins to an `AssemblyPlan`: every choice of one engine, once, before anything is built.

device -> weights -> model family -> dtype -> block size, layout and attention -> ops -> the rest; then hooks are locked.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from xllm_core.config import Settings
from xllm_core.config_sources import guess
from xllm_core.errors import ConfigError, ModelError, ModelNotFoundError, PluginError, ResolutionError, XllmError
from xllm_core.plugins.caches import geometry_of, kv_groups_of
from xllm_core.plugins.contracts.attention import AttentionGeometry
from xllm_core.plugins.contracts.device import DeviceFacts
from xllm_core.plugins.contracts.kv import KVGroupSpec
from xllm_core.plugins.contracts.model import ModelFamily, ModelShape, ops_of
from xllm_core.plugins.contracts.ops import CORE_OPS, KV_WRITE_OPS, QUANTIZED_KV_OPS
from xllm_core.plugins.contracts.queries import AttentionQuery, KVStoreQuery, ModelQuery, OpQuery, SamplerQuery
from xllm_core.plugins.contracts.weights import Checkpoint, WeightFormat
from xllm_core.plugins.manager import Offer, PluginManager
from xllm_core.plugins.plan import AssemblyPlan, Choice, describe, load_target
from xllm_core.plugins.probes import Probes
from xllm_core.plugins.select import (
    HOOK_OF_KIND,
    check_names,
    choose,
    choose_all,
    chosen,
    describe_geometry,
    find_named,
    fits_anything,
    is_fallback,
    kv_offers,
    packed_kinds,
    ranking,
    refusal,
    start_probes,
    unfit_attention,
    unfit_device,
    unfit_fusion,
    unfit_model,
    unfit_op,
    unfit_sampler,
    unfit_store,
)

_DEFAULT_BLOCK_SIZE = 16
_FUSED = "linear_silu_mul"  # what a quantisation may do without
_MAX_REDIRECTS = 8

_log = logging.getLogger("xllm_core.plugins")


@dataclass(frozen=True, slots=True)
class Assembly:
    """A plan, and what had to be opened to make it.

    checkpoint: opened, no tensor read. facts: of the chosen device. family, shape, kv_groups: of the model at the plan's dtype.
    """

    plan: AssemblyPlan
    checkpoint: Checkpoint
    facts: DeviceFacts
    family: ModelFamily
    shape: ModelShape
    kv_groups: Sequence[KVGroupSpec]


@dataclass(frozen=True, slots=True)
class _Layout:
    """The joint choice that all KV groups share."""

    block_size: int
    kv_layout: str
    geometry: Mapping[str, AttentionGeometry]
    attention: Mapping[str, Choice]
    kv_store: Choice | None


def assemble(settings: Settings, manager: PluginManager, *, probes: Probes | None = None) -> Assembly:
    """Choose every part for `settings.model.path`, then lock the manager.

    probes: the caller's, for one who assembles several times and need not ask devices each time; it ends them. None: our own.
    Raises ConfigError, PluginError (ResolutionError with every rejection), ModelError. Imports only what must answer: the device for its
    facts, weight formats, and the model family.
    """
    resolver = Resolver(settings, manager, probes)
    device, facts = resolver.device()
    opened, checkpoint = resolver.weights()
    config = checkpoint.config
    model, family = resolver.model(config, facts)
    shape = family.shape(config)
    dtype, dtype_reason = resolver.dtype(config, facts, model)
    layout = resolver.layout(family.attention(config), facts, dtype)
    kv_layout = layout.kv_layout
    quantization, quantized, ops = resolver.quantization(facts, dtype)
    kinds = packed_kinds(quantization, resolver.offers("quantization"), opened, checkpoint)
    asked = dict.fromkeys(ops_of(family, config), model.name)
    asked.setdefault(resolver.kv_write, f"[kv] cache_dtype = {settings.kv.cache_dtype!r}")
    ops |= {name: resolver.op(name, facts, dtype, asked_by=by, kv_layout=kv_layout) for name, by in asked.items()}
    fusions, unused_fusions = resolver.fusions(ops, facts, dtype, kv_layout=kv_layout)
    ops |= fusions
    plan = AssemblyPlan(
        model_path=str(checkpoint.path),
        architecture=shape.architecture,
        dtype=dtype,
        dtype_reason=dtype_reason,
        device=device,
        device_index=settings.device.index,
        device_kind=facts.kind,
        weight_format=opened,
        model=model,
        ops={name: choice for name, choice in ops.items() if kinds or name in CORE_OPS or name not in quantized},
        attention=layout.attention,
        geometry=layout.geometry,
        sampler=resolver.sampler(facts),
        logits_processors=resolver.all_of("logits_processors", is_default_all=True)[0],
        scheduler=resolver.scheduler(),
        kv_store=layout.kv_store,
        quantization=quantization,
        quantized_ops={role: name for role, name in quantized.items() if name in ops},
        quantized_kinds=kinds,
        observers=resolver.all_of("observers", is_default_all=False)[0],
        block_size=layout.block_size,
        kv_layout=kv_layout,
        kv_dtype=resolver.kv_dtype,
        max_model_len=resolver.max_model_len(shape),
        unused_fusions=unused_fusions,
        plugin_settings=manager.tables,
    )
    manager.lock()
    return Assembly(plan, checkpoint, facts, family, shape, kv_groups_of(family, config, plan))


def _op_query(name: str, facts: DeviceFacts, dtype: str, kv_layout: str | None) -> OpQuery:
    layout = kv_layout or (facts.kv_layouts[0] if facts.kv_layouts else "BSGD")
    return OpQuery(op=name, device_kind=facts.kind, dtype=dtype, kv_layout=layout)


def load_family(choice: Choice) -> ModelFamily:
    """The family behind a choice: its target, or an instance where that is a class."""
    target = choice.load()
    family: ModelFamily = target(**choice.options) if isinstance(target, type) else target
    return family


class Resolver:
    """The single choices, in the order in which each needs the one before. One per assembly."""

    def __init__(self, settings: Settings, manager: PluginManager, probes: Probes | None = None) -> None:
        """Loads plugins; raises if one that the user asked for is not there, or a name in `[use]` or `[prefer]` is unknown."""
        logging.getLogger("xllm_core").setLevel(settings.log.level.upper())
        manager.load()
        manager.check_wanted()
        settings = _with_pins(settings)
        check_names(settings, manager)
        self.settings = settings
        self.manager = manager
        self.kv_write = KV_WRITE_OPS[settings.kv.cache_dtype]
        self.kv_dtype = None if settings.kv.cache_dtype == "auto" else settings.kv.cache_dtype
        self._probes = probes

    def offers(self, kind: str) -> tuple[Offer, ...]:
        """What is offered for a kind of `[use]`."""
        return self.manager.offers(HOOK_OF_KIND[kind])

    def device(self) -> tuple[Choice, DeviceFacts]:
        """Accelerators whose probe answers, by rank; else the CPU. Why an accelerator is passed over is logged."""
        offers = self.offers("device")
        own = start_probes(offers, self.settings) if self._probes is None else nullcontext(self._probes)
        with own as probes:
            unfit = partial(unfit_device, probes=probes)
            choice = choose("device", offers, self.settings, unfit, need="this machine", is_lazy=True)
        told = self._probes.told if self._probes is not None else set[str]()
        for name, reason in choice.rejected:
            if not reason.startswith("not asked") and name not in told:
                told.add(name)
                first, _, more = reason.partition("; ")
                _log.warning("device %s is not used: %s%s", name, first, "; the rest: xllm doctor" if more else "")
        index = self.settings.device.index
        backend = _ask(choice.name, f"build device {index}", partial(choice.build, index))
        facts = _ask(choice.name, "tell its facts", backend.facts)
        if not isinstance(facts, DeviceFacts) or not facts.dtypes:
            raise PluginError(
                f"{choice.name}: facts() gave {facts!r}; it must be a DeviceFacts with at least one dtype"
            )
        return choice, facts

    def weights(self) -> tuple[Choice, Checkpoint]:
        """Find and open `[model] path`: formats resolve the reference, in rank order, until one of them opens what it became."""
        reference = self.settings.model.path
        if not reference:
            raise ConfigError("no model is named: give a path, a hub id or pkg:PACKAGE, or set [model] path")
        formats, unusable = self._formats()
        trail = [reference]
        while len(trail) <= _MAX_REDIRECTS:
            if (path := Path(trail[-1])).exists():
                for offer, reader in formats:
                    checkpoint = _ask(offer.name, f"open {path}", partial(reader.open, path))
                    if checkpoint is not None:
                        return self._weight_choice(offer, trail), checkpoint
            answers = (
                _ask(offer.name, f"resolve {trail[-1]!r}", partial(reader.resolve, trail[-1]))
                for offer, reader in formats
            )
            answer = next((answer for answer in answers if answer is not None), None)
            if answer is None or answer in trail:
                break
            trail.append(answer)
        asked = ", ".join(
            f"{offer.name} ({offer.spec.summary})" if offer.spec.summary else offer.name for offer, _ in formats
        )
        became = f", which became {trail[-1]!r}," if len(trail) > 1 else ""
        lines = [f"no weight format takes {reference!r}{became}: check the path or the id. Asked: {asked}"]
        raise ModelNotFoundError("\n".join([*lines, *(f"  not asked {name}: {reason}" for name, reason in unusable)]))

    def model(self, config: Mapping[str, Any], facts: DeviceFacts) -> tuple[Choice, ModelFamily]:
        """The family for the first of config.json's `architectures`."""
        named = config.get("architectures") or ()
        if not isinstance(named, Sequence) or isinstance(named, str) or not named:
            raise ModelError(
                f"the model's configuration names no architecture (`architectures` is {named!r}), so no family can be chosen"
            )
        architecture, offers = str(named[0]), self.offers("model")
        query = ModelQuery(architecture=architecture, device_kind=facts.kind, config=config)
        try:
            choice = choose(
                f"model.{architecture}", offers, self.settings, partial(unfit_model, query=query),
                need=f"{architecture} on {facts.kind}", query=query,
            )  # fmt: skip
        except ResolutionError as error:
            known = sorted({name for offer in offers for name in offer.spec.architectures})
            if architecture in known or {"model", f"model.{architecture}"} & self.settings.use.keys():
                raise
            fallbacks = {offer.name for offer in offers if is_fallback(offer)}
            reasons = "".join(
                f"\n  {name} cannot serve it: {reason}" for name, reason in error.rejections if name in fallbacks
            )
            raise ModelError(
                f"architecture {architecture!r} is not known{guess(architecture, known)}; known are {', '.join(known)}."
                f" A plugin may bring it: see `xllm plugins list`{reasons}"
            ) from error
        return choice, load_family(choice)

    def dtype(self, config: Mapping[str, Any], facts: DeviceFacts, model: Choice) -> tuple[str, str]:
        """(dtype, why). "auto" takes the checkpoint's where device and family can, else the device's best, and says so."""
        spec = next(offer.spec for offer in self.offers("model") if offer.name == model.name)
        able = [dtype for dtype in facts.dtypes if dtype in spec.dtypes]
        asked = self.settings.model.dtype
        if asked != "auto" and asked not in able:
            raise ResolutionError(
                f"[model] dtype = {asked!r}: {facts.name} and {model.name} together serve {', '.join(able) or 'no common dtype'}"
            )
        if not able:
            raise ResolutionError(
                f"{facts.name} computes in {', '.join(facts.dtypes)}, {model.name} in {', '.join(sorted(spec.dtypes))}"
            )
        if asked != "auto":
            return asked, "[model] dtype"
        found = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
        if found in able:
            return found, "the checkpoint's own"
        if not found:
            return able[0], f"the checkpoint names none; the best of {facts.name}"
        reason = f"the checkpoint is {found}, which {facts.name} does not compute in; the best it has is {able[0]}"
        _log.warning("serving in %s: %s", able[0], reason)
        return able[0], reason

    def layout(self, groups: Mapping[str, Mapping[str, Any]], facts: DeviceFacts, dtype: str) -> _Layout:
        """Block size, KV layout, one kernel per group and the store that `[use]` names, chosen together, as they share one cache.

        Only layouts that an op of the device which stores into such a cache knows are looked at.
        Of the combinations that serve all of them the one with the best-ranked kernels is taken, then the device's first.
        """
        wanted = self.settings.kv.block_size
        if wanted is not None and facts.block_sizes and wanted not in facts.block_sizes:
            raise ConfigError(
                f"[kv] block_size = {wanted}: {facts.name} takes {', '.join(map(str, facts.block_sizes))}"
            )
        sizes = (wanted,) if wanted is not None else facts.block_sizes or (_DEFAULT_BLOCK_SIZE,)
        writers = self._writers(facts)
        found: list[_Layout] = []
        errors: list[ResolutionError] = []
        for kv_layout, block_size in itertools.product(facts.kv_layouts, sizes):
            geometry = geometry_of(
                groups, block_size=block_size, dtype=dtype, kv_layout=kv_layout, kv_dtype=self.kv_dtype
            )
            try:
                if writers:  # with none at all, the choice of ops says so
                    self.op(self.kv_write, facts, dtype, kv_layout=kv_layout)
                attention = {name: self.attention(name, entry, facts) for name, entry in geometry.items()}
                store = self.kv_store(KVStoreQuery(device_kind=facts.kind, kv_layout=kv_layout, block_size=block_size))
                found.append(_Layout(block_size, kv_layout, geometry, attention, store))
            except ResolutionError as error:
                errors.append(error)
        if not found:
            raise self._no_layout(facts, sizes, groups, errors)
        return min(found, key=self._rank)

    def _rank(self, layout: _Layout) -> int:
        """How far down the lists the kernels of a combination stand."""
        total = 0
        for group, choice in layout.attention.items():
            ranked, _, _ = ranking(f"attention.{group}", self.offers("attention"), self.settings)
            total += [offer.name for offer in ranked].index(choice.name)
        return total

    def _no_layout(
        self, facts: DeviceFacts, sizes: Sequence[int], groups: Mapping[str, Any], errors: Sequence[ResolutionError]
    ) -> ResolutionError:
        """The reasons of the first combination, and what everybody offers if there were several, or a store stood in the way."""
        if not errors:
            return ResolutionError(f"{facts.name} names no KV layout")
        store = self.settings.use.get("kv_store")
        if len(errors) == 1 and store is None:
            return errors[0]
        lines = [
            f"device {facts.name}: layouts {', '.join(facts.kv_layouts)}; block sizes {', '.join(map(str, sizes))}"
        ]
        lines += [kv_offers(f"kernel {offer.name}", offer.spec) for offer in self.offers("attention")]
        lines += [kv_offers(f"op {offer.name}", offer.spec) for offer in self._writers(facts)]
        if isinstance(store, str):
            named = find_named(store, self.offers("kv_store"), "[use] kv_store")
            lines.append(kv_offers(f"store {named.name}", named.spec))
        text = f"no KV layout and block size serves everyone ({', '.join(groups)}). What is offered:"
        return ResolutionError("\n  ".join([text, *lines, f"the first that was tried: {errors[0]}"]))

    def attention(self, group: str, geometry: AttentionGeometry, facts: DeviceFacts) -> Choice:
        """The kernel for one KV group."""
        query = AttentionQuery(device_kind=facts.kind, geometry=geometry)
        return choose(
            f"attention.{group}", self.offers("attention"), self.settings, partial(unfit_attention, query=query),
            need=describe_geometry(geometry, facts.kind), query=query,
        )  # fmt: skip

    def _writers(self, facts: DeviceFacts) -> list[Offer]:
        """Ops that store into the cache that was asked for, for this device."""
        return [o for o in self.offers("op") if o.spec.op == self.kv_write and facts.kind in o.spec.devices]

    def op(
        self, name: str, facts: DeviceFacts, dtype: str, *, asked_by: str = "", kv_layout: str | None = None
    ) -> Choice:
        """The implementation of one op. asked_by: the family that needs it, where not every model does. kv_layout: None for the device's best."""
        offers = [offer for offer in self.offers("op") if offer.spec.op == name]
        query = _op_query(name, facts, dtype, kv_layout)
        need = f"{name} on {facts.kind} in {dtype}"
        if asked_by and name not in CORE_OPS:
            kinds = sorted({kind for offer in offers for kind in offer.spec.devices}) or ["no device"]
            need += f", which {asked_by} asks for and is offered on {', '.join(kinds)}; choose such a device ([device] name)"
        return choose(f"op.{name}", offers, self.settings, partial(unfit_op, query=query), need=need, query=query)

    def quantization(
        self, facts: DeviceFacts, dtype: str
    ) -> tuple[Choice | None, Mapping[str, str], dict[str, Choice]]:
        """The format that the user names, or none; op by the plain op in whose place it is; and those that it cannot do without, chosen."""
        ops: dict[str, Choice] = {}
        if "quantization" not in self.settings.use:
            return None, {}, ops

        def unfit(offer: Offer) -> str:
            needed = (name for role, name in offer.spec.ops.items() if role != _FUSED)
            try:
                ops.update({name: self.op(name, facts, dtype) for name in needed})
            except ResolutionError as error:
                return str(error).replace("\n ", ";")
            return ""

        offers = self.offers("quantization")
        choice = choose("quantization", offers, self.settings, unfit, need=f"linear maps on {facts.kind} in {dtype}")
        return choice, next(offer.spec.ops for offer in offers if offer.name == choice.name), ops

    def fusions(
        self, ops: Mapping[str, Choice], facts: DeviceFacts, dtype: str, *, kv_layout: str | None = None
    ) -> tuple[dict[str, Choice], tuple[tuple[str, str], ...]]:
        """Fusions to take instead of the ops chosen, by name; and (name, reason) of those that are offered and not taken. kv_layout: as for `op`."""
        formats = {name for offer in self.offers("quantization") for name in offer.spec.ops.values()} | {
            *QUANTIZED_KV_OPS
        }
        offers = [offer for offer in self.offers("op") if offer.spec.replaces]
        # Those over a format that is not in use are none of this engine's business.
        offers = [o for o in offers if o.spec.op not in formats or ops.keys() >= set(o.spec.replaces)]
        taken: dict[str, Choice] = {}
        unused: list[tuple[str, str]] = []
        for name in sorted({offer.spec.op for offer in offers}):
            query = _op_query(name, facts, dtype, kv_layout)
            unfit = partial(unfit_fusion, query=query, ops=ops, offers=self.offers("op"), settings=self.settings)
            named = [offer for offer in offers if offer.spec.op == name]
            need = f"{name} on {facts.kind} in {dtype}"
            try:
                taken[name] = choose(f"op.{name}", named, self.settings, unfit, need=need, query=query)
                unused += taken[name].rejected
            except ResolutionError as error:
                if f"op.{name}" in self.settings.use:
                    raise
                unused += error.rejections
        return taken, tuple(unused)

    def sampler(self, facts: DeviceFacts) -> Choice:
        """The sampler for this device."""
        query = SamplerQuery(device_kind=facts.kind)
        unfit = partial(unfit_sampler, query=query)
        return choose("sampler", self.offers("sampler"), self.settings, unfit, need=f"device {facts.kind}", query=query)

    def scheduler(self) -> Choice:
        """The policy."""
        return choose("scheduler", self.offers("scheduler"), self.settings, fits_anything, need="this engine")

    def kv_store(self, query: KVStoreQuery | None = None) -> Choice | None:
        """The store that `[use]` names, or none. query: the blocks that it must hold; None: whatever it can."""
        if "kv_store" not in self.settings.use:
            return None
        unfit = fits_anything if query is None else partial(unfit_store, query=query)
        need = "this engine" if query is None else f"blocks of {query.block_size} tokens in layout {query.kv_layout}"
        return choose("kv_store", self.offers("kv_store"), self.settings, unfit, need=need, query=query)

    def all_of(self, kind: str, *, is_default_all: bool) -> tuple[tuple[Choice, ...], tuple[tuple[str, str], ...]]:
        """Kinds of which several are active, and who was left out."""
        return choose_all(kind, self.offers(kind), self.settings, is_default_all=is_default_all)

    def max_model_len(self, shape: ModelShape) -> int:
        """The context served; more than the model was made for is refused, not cut."""
        asked = self.settings.model.max_model_len
        if asked is not None and asked > shape.max_model_len:
            raise ConfigError(
                f"[model] max_model_len = {asked}: {shape.architecture} here is made for at most {shape.max_model_len} tokens"
            )
        return asked if asked is not None else shape.max_model_len

    def _formats(self) -> tuple[list[tuple[Offer, WeightFormat]], list[tuple[str, str]]]:
        """Weight formats that can be asked, and (name, reason) of those that cannot."""
        usable, unusable = [], []
        pin = self.settings.use.get("weight_format")
        for offer in self.offers("weight_format"):
            reason = refusal(offer, fits_anything)
            if not reason:
                try:
                    usable.append((offer, load_target(offer.spec.target, owner=offer.name)(**offer.spec.options)))
                    continue
                except KeyboardInterrupt:
                    raise  # that was the user
                except BaseException as error:  # noqa: BLE001  another format may still open the model; the reason is logged and shown
                    reason = describe(error)
            _log.warning("weight format %s is not asked: %s", offer.name, reason)
            unusable.append((offer.name, reason))
        if isinstance(pin, str):
            name = find_named(pin, self.offers("weight_format"), "[use] weight_format").name
            usable = [(offer, reader if offer.name == name else _ResolveOnly(reader)) for offer, reader in usable]
        return usable, unusable

    def _weight_choice(self, offer: Offer, trail: Sequence[str]) -> Choice:
        pin = "pinned by [use] weight_format and " if "weight_format" in self.settings.use else ""
        others = [
            (other.name, "not asked, or of another format")
            for other in self.offers("weight_format")
            if other.name != offer.name
        ]
        return chosen(offer, f"{pin}it opens {' -> '.join(trail)}", (), others)


@dataclass(frozen=True, slots=True)
class _ResolveOnly:
    """A format that may still find a model while another one is pinned to open it."""

    inner: WeightFormat

    def resolve(self, reference: str) -> str | None:
        return self.inner.resolve(reference)

    def open(self, path: Path) -> Checkpoint | None:
        return None


def _with_pins(settings: Settings) -> Settings:
    """`[device] name` is `[use] device`, `[model] quantization` is `[use] quantization`; two different answers are refused."""
    named = {"device": ("[device] name", settings.device.name if settings.device.name != "auto" else None)}
    named["quantization"] = ("[model] quantization", settings.model.quantization)
    pins = {kind: name for kind, (_, name) in named.items() if name is not None}
    for kind, name in pins.items():
        if (pin := settings.use.get(kind, name)) != name:
            raise ConfigError(f"{named[kind][0]} = {name!r} and [use] {kind} = {pin!r} disagree; keep one of them")
    return settings.model_copy(update={"use": {**settings.use, **pins}}) if pins else settings


def _ask(name: str, what: str, call: Callable[[], Any]) -> Any:
    """Call a plugin's part during assembly; its own errors pass, anything else gets the name of who raised it."""
    try:
        return call()
    except (XllmError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise PluginError(f"{name} could not {what}: {describe(error)}") from error
