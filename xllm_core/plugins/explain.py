"""The text of `xllm plugins why KIND`: what is chosen, what else would serve, and why the others would not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from xllm_core.config import KINDS, Settings
from xllm_core.config_sources import guess
from xllm_core.errors import ConfigError
from xllm_core.plugins.contracts.ops import CORE_OPS, MODEL_OPS, QUANTIZED_KV_OPS, QUANTIZED_OPS
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.plan import Choice
from xllm_core.plugins.resolve import Resolver, assemble
from xllm_core.plugins.select import HOOK_OF_KIND, describe_geometry, narrowed

FEATURES: Mapping[str, Any] = {"sliding_window": 4096, "soft_cap": 50.0}
"""What attention can be asked for beyond its heads, and the value that stands in the question where only the feature matters."""


_NARROWED = ("attention", "model", "op")
_MAY_BE_ABSENT = ("kv_store", "logits_processors", "observers", "quantization")


@dataclass(frozen=True, slots=True)
class Shape:
    """Attention to ask about where no model is given; the default is that of a common model of 8 billion parameters."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    features: tuple[str, ...] = ()

    def geometry(self) -> dict[str, Any]:
        """As a model family tells it. Raises ConfigError for a feature that attention does not know."""
        for feature in self.features:
            if feature not in FEATURES:
                raise ConfigError(
                    f"unknown feature {feature!r}{guess(feature, FEATURES)}; attention can be asked for {', '.join(FEATURES)}"
                )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_kv_heads} KV heads do not divide {self.num_heads} query heads")
        features = {name: FEATURES[name] for name in self.features}
        heads = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "head_size": self.head_size}
        return {**heads, "scale": self.head_size**-0.5, **features}


def why(kind: str, settings: Settings, manager: PluginManager, shape: Shape | None = None) -> str:
    """Explain a kind of `[use]`, e.g. "attention" or "op.linear", for `[model] path` or, without a model, for a shape.

    Raises ConfigError for an unknown kind or feature, and what assembly raises: a ResolutionError holds every rejection.
    """
    base = kind.partition(".")[0]
    if base not in KINDS:
        raise ConfigError(f"unknown kind {kind!r}{guess(kind, KINDS)}; kinds are {', '.join(KINDS)}")
    if "." in kind and base not in _NARROWED:
        raise ConfigError(f"{base!r} is one choice, which {kind!r} cannot narrow down; ask for {base!r}")
    if settings.model.path and shape is not None:
        raise ConfigError("a shape is asked about where no model is given: leave out the model, or the shape")
    if settings.model.path:
        found = _with_model(kind, settings, manager)
    else:
        found = _without_model(kind, settings, manager, shape)
    if not found:
        raise ConfigError(f"nothing is called {kind!r} here; ask for {base!r} to see all of them")
    return "\n".join(found)


def _with_model(kind: str, settings: Settings, manager: PluginManager) -> list[str]:
    plan = assemble(settings, manager).plan
    lines: list[str] = []
    for name, choice in plan.choices().items():
        if kind in (name, name.partition(".")[0]):
            group = name.partition(".")[2]
            need = (
                f" for {describe_geometry(plan.geometry[group], plan.device_kind)}"
                if name.startswith("attention.")
                else ""
            )
            lines += (
                _quantized(choice, plan.quantized_ops) if name == "quantization" else [f"{name}{need}", *block(choice)]
            )
    lines += _unused(kind, plan.unused_fusions)
    if not lines and kind == f"model.{plan.architecture}":
        return ["model", *block(plan.model)]
    return lines or (_none_chosen(kind, manager) if kind in _MAY_BE_ABSENT else [])


def _without_model(kind: str, settings: Settings, manager: PluginManager, shape: Shape | None) -> list[str]:
    resolver = Resolver(settings, manager)
    base, _, narrow = kind.partition(".")
    if base in ("model", "weight_format"):
        lines = [f"{base}: depends on the model; add --model"]
        for offer in narrowed(kind, resolver.offers(base)):
            serves = ", ".join(sorted(offer.spec.architectures)) if base == "model" else ""
            serves = serves or offer.spec.summary
            lines.append(f"  offered  {offer.name}  {serves}")
        return lines
    if base in ("logits_processors", "observers"):
        active, rejected = resolver.all_of(base, is_default_all=base == "logits_processors")
        lines = [f"{base}, in order of application"]
        lines += [f"  active   {choice.name}  {choice.reason}" for choice in active]
        return lines + [f"  rejected {name}  {reason}" for name, reason in rejected]
    if base in ("scheduler", "kv_store"):
        picked = resolver.scheduler() if base == "scheduler" else resolver.kv_store()
        return [base, *block(picked)] if picked else _none_chosen(kind, manager)
    device, facts = resolver.device()
    if base == "device":
        return [f"device: {facts.name}", *block(device)]
    dtype = facts.dtypes[0] if settings.model.dtype == "auto" else settings.model.dtype
    if base == "quantization":
        format_, replaced, _ = resolver.quantization(facts, dtype)
        here = {offer.spec.op for offer in resolver.offers("op") if facts.kind in offer.spec.devices}
        by = {plain: name for plain, name in replaced.items() if name in here}
        return _quantized(format_, by) if format_ else _none_chosen(kind, manager)
    if base == "sampler":
        return [f"sampler for {facts.kind}", *block(resolver.sampler(facts))]
    if base == "op":
        asked = (
            (narrow,) if narrow in (*MODEL_OPS, *QUANTIZED_OPS, *QUANTIZED_KV_OPS) else {*CORE_OPS, resolver.kv_write}
        )
        ops = {name: resolver.op(name, facts, dtype) for name in sorted(asked)}
        fusions, unused = resolver.fusions(ops, facts, dtype)
        found = {name: choice for name, choice in (ops | fusions).items() if narrow in ("", name)}
        lines = _joined((f"op.{name} on {facts.kind} in {dtype}", choice) for name, choice in found.items())
        return [*lines, *_unused(kind, unused)]
    layout = resolver.layout({narrow or "full": (shape or Shape()).geometry()}, facts, dtype)
    note = "" if shape else " (no model given: a common shape)"
    return _joined(
        (f"attention for {describe_geometry(geometry, facts.kind)}{note}", layout.attention[group])
        for group, geometry in layout.geometry.items()
    )


def _unused(kind: str, fusions: Iterable[tuple[str, str]]) -> list[str]:
    """Fusions that are offered and not taken, where ops are asked about."""
    if kind.partition(".")[0] != "op":
        return []
    return [
        f"fusion not taken: {name}  {reason}"
        for name, reason in fusions
        if kind in ("op", f"op.{name.partition('/')[2]}")
    ]


def _quantized(choice: Choice, ops: Mapping[str, str]) -> list[str]:
    """A format, and what each op is done by."""
    return ["quantization", *block(choice), *(f"  {plain} by {name}" for plain, name in ops.items())]


def _none_chosen(kind: str, manager: PluginManager) -> list[str]:
    """What could be named."""
    offers = manager.offers(HOOK_OF_KIND[kind])
    return [
        f"{kind}: none is used; name one in [use] {kind}",
        *(f"  offered  {o.name}  {o.spec.summary}" for o in offers),
    ]


def _joined(pairs: Iterable[tuple[str, Choice]]) -> list[str]:
    return [line for title, choice in pairs for line in (title, *block(choice))]


def block(choice: Choice) -> list[str]:
    """A choice for people: chosen, eligible, rejected."""
    lines = [f"  chosen   {choice.name}  {choice.reason}  ({choice.distribution} {choice.version})"]
    lines += [f"  eligible {name}" for name in choice.eligible]
    return lines + [f"  rejected {name}  {reason}" for name, reason in choice.rejected]
