"""The text of `xllm plugins why KIND`: what is chosen, what else would serve, and why the others would not."""

from __future__ import annotations

from collections.abc import Iterable

from xllm_core.config import KINDS, Settings
from xllm_core.config_sources import guess
from xllm_core.errors import ConfigError
from xllm_core.plugins.contracts.ops import CORE_OPS
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.plan import Choice
from xllm_core.plugins.resolve import Resolver, assemble, describe_geometry

_DEFAULT_HEADS = {"num_heads": 32, "num_kv_heads": 8, "head_size": 128, "scale": 128**-0.5}


def why(kind: str, settings: Settings, manager: PluginManager) -> str:
    """Explain a kind of `[use]`, e.g. "attention" or "op.linear", for `[model] path` or, without a model, for a common geometry.

    Raises ConfigError for an unknown kind, and what assembly raises: a ResolutionError holds every rejection.
    """
    base = kind.partition(".")[0]
    if base not in KINDS:
        raise ConfigError(f"unknown kind {kind!r}{guess(kind, KINDS)}; kinds are {', '.join(KINDS)}")
    found = _with_model(kind, settings, manager) if settings.model.path else _without_model(kind, settings, manager)
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
            lines += [f"{name}{need}", *block(choice)]
    return lines or [_none_chosen(kind)]


def _without_model(kind: str, settings: Settings, manager: PluginManager) -> list[str]:
    resolver = Resolver(settings, manager)
    base, _, narrow = kind.partition(".")
    if base in ("model", "weight_format"):
        lines = [f"{base}: depends on the model; add --model"]
        for offer in resolver.offers(base):
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
        return [base, *block(picked)] if picked else [_none_chosen(kind)]
    device, facts = resolver.device()
    if base == "device":
        return [f"device: {facts.name}", *block(device)]
    dtype = facts.dtypes[0] if settings.model.dtype == "auto" else settings.model.dtype
    if base == "sampler":
        return [f"sampler for {facts.kind}", *block(resolver.sampler(facts))]
    if base == "op":
        names = [name for name in CORE_OPS if narrow in ("", name)]
        return _joined((f"op.{name} on {facts.kind} in {dtype}", resolver.op(name, facts, dtype)) for name in names)
    layout = resolver.layout({narrow or "full": _DEFAULT_HEADS}, facts, dtype)
    return _joined(
        (
            f"attention for {describe_geometry(geometry, facts.kind)} (no model given: a common shape)",
            layout.attention[group],
        )
        for group, geometry in layout.geometry.items()
    )


def _none_chosen(kind: str) -> str:
    return f"{kind}: none is used; name one in [use] {kind}"


def _joined(pairs: Iterable[tuple[str, Choice]]) -> list[str]:
    return [line for title, choice in pairs for line in (title, *block(choice))]


def block(choice: Choice) -> list[str]:
    """A choice for people: chosen, eligible, rejected."""
    lines = [f"  chosen   {choice.name}  {choice.reason}  ({choice.distribution} {choice.version})"]
    lines += [f"  eligible {name}" for name in choice.eligible]
    return lines + [f"  rejected {name}  {reason}" for name, reason in choice.rejected]
