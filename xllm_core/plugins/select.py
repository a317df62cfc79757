"""Choosing one offer among many: names, pins, preferences, capability matching and probes. Nothing chosen by order of installation.

A pin (`[use]`) is used or start-up stops. Otherwise, of those that fit: `[prefer]`, then rank, then others before the core, then name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec

from xllm_core.config import Settings
from xllm_core.config_sources import guess
from xllm_core.errors import PluginConflictError, ResolutionError
from xllm_core.plugins.contracts.attention import AttentionGeometry
from xllm_core.plugins.contracts.ops import KV_WRITE_OPS
from xllm_core.plugins.contracts.queries import AttentionQuery, KVStoreQuery, ModelQuery, OpQuery, SamplerQuery
from xllm_core.plugins.contracts.weights import Checkpoint, HoldsPacked
from xllm_core.plugins.manager import CORE, Offer, PluginManager
from xllm_core.plugins.plan import Choice, describe, load_target
from xllm_core.plugins.probes import Probes

HOOK_OF_KIND = {
    "attention": "xllm_attention",
    "device": "xllm_devices",
    "kv_store": "xllm_kv_stores",
    "logits_processors": "xllm_logits_processors",
    "model": "xllm_models",
    "observers": "xllm_observers",
    "op": "xllm_ops",
    "quantization": "xllm_quantizations",
    "sampler": "xllm_samplers",
    "scheduler": "xllm_schedulers",
    "weight_format": "xllm_weight_formats",
}
"""Which hook offers what `[use]` and `[prefer]` call a kind."""

_log = logging.getLogger("xllm_core.plugins")


def check_names(settings: Settings, manager: PluginManager) -> None:
    """Every name in `[use]` and `[prefer]` must be offered; raises before anything is chosen."""
    for table, entries in (("use", settings.use), ("prefer", settings.prefer)):
        for kind, value in entries.items():
            offers = manager.offers(HOOK_OF_KIND[kind.partition(".")[0]])
            for name in [value] if isinstance(value, str) else value:
                find_named(name, narrowed(kind, offers), f"[{table}] {kind}")


def narrowed(kind: str, offers: Iterable[Offer]) -> list[Offer]:
    """Offers for what stands behind the dot: `op.linear` wants the op linear. Groups of attention narrow nothing here."""
    base, _, narrow = kind.partition(".")
    if base == "op" and narrow:
        return [offer for offer in offers if offer.spec.op == narrow]
    if base == "model" and narrow:
        return [offer for offer in offers if narrow in offer.spec.architectures or offer.spec.is_fallback]
    return list(offers)


def find_named(name: str, offers: Sequence[Offer], place: str) -> Offer:
    """The offer called "plugin/name", or "name" where only one has it; raises with the names there are, or the line that decides."""
    exact = [offer for offer in offers if name in (offer.name, offer.spec.name)]
    if len(exact) == 1:
        return exact[0]
    if exact:
        names = [offer.name for offer in exact]
        raise PluginConflictError(
            f"{place}: {name!r} is offered by {' and '.join(names)}; write {place} = {names[0]!r}"
        )
    known = [offer.name for offer in offers]
    raise ResolutionError(
        f"{place} = {name!r}: nothing is offered under that name{guess(name, known)}; there is {_list(known)}"
    )


def choose(
    kind: str,
    offers: Sequence[Offer],
    settings: Settings,
    unfit: Callable[[Offer], str],
    *,
    need: str,
    query: object = None,
    is_lazy: bool = False,
) -> Choice:
    """Choose one offer. Called at assembly only.

    kind: "attention.full"; `[use]` and `[prefer]` are looked up under it, then under "attention". unfit: why an offer cannot serve, or "".
    need: what is looked for, for people. query: what a spec's own `check` is asked. is_lazy: stop asking once one fits (probes cost time).
    Raises ResolutionError with every rejection, or for a pin that does not fit.
    """
    base = kind.partition(".")[0]
    pin_kind = kind if kind in settings.use else base
    pin = settings.use.get(pin_kind)
    if isinstance(pin, str):
        offer = find_named(pin, offers, f"[use] {pin_kind}")
        if reason := refusal(offer, unfit, query):
            raise ResolutionError(
                f"[use] {pin_kind} = {pin!r} cannot serve {need}, and a pin never falls back", ((offer.name, reason),)
            )
        return chosen(offer, f"pinned by [use] {pin_kind}{_mark(offer)}")
    ranked, order, prefer_kind = ranking(kind, offers, settings)
    fitting: list[Offer] = []
    rejected: list[tuple[str, str]] = []
    for offer in ranked:
        if fitting and (is_lazy or is_fallback(offer)):
            rejected.append((offer.name, f"not asked: {fitting[0].name} comes first and answers"))
        elif reason := refusal(offer, unfit, query):
            rejected.append((offer.name, reason))
        else:
            fitting.append(offer)
    if not fitting:
        raise ResolutionError(f"no {base} fits {need}; {len(offers)} offered", tuple(rejected))
    best, others = fitting[0], fitting[1:]
    if base == "model":
        _refuse_equals(kind, best, others, order)
    is_first = is_lazy and any(reason.startswith("not asked") for _, reason in rejected) and best.name not in order
    reason = "the first that answers" if is_first else f"{_reason(best, others, order, prefer_kind)}{_mark(best)}"
    return chosen(best, reason, [offer.name for offer in others], rejected)


def _refuse_equals(kind: str, best: Offer, others: Sequence[Offer], order: Sequence[str]) -> None:
    """Two families for one architecture may answer differently, so a name must not decide: a rank, `[prefer]` or a pin does.

    The core's own family gives way to a plugin's; neither is then an equal.
    """
    equals = [o for o in others if o.spec.rank == best.spec.rank and (o.plugin == CORE) == (best.plugin == CORE)]
    if equals and best.name not in order:
        names = " and ".join(offer.name for offer in (best, *equals))
        architecture = kind.partition(".")[2]
        raise PluginConflictError(
            f'{architecture} is offered by {names}, with rank {best.spec.rank} each; say which: [use] "{kind}" = "{best.name}"'
        )


def ranking(kind: str, offers: Sequence[Offer], settings: Settings) -> tuple[list[Offer], list[str], str]:
    """(offers, the best first; names that `[prefer]` puts first; the key of `[prefer]` that applies)."""
    prefer_kind = kind if kind in settings.prefer else kind.partition(".")[0]
    names = {name for offer in offers for name in (offer.name, offer.spec.name)}
    order = [
        find_named(name, offers, f"[prefer] {prefer_kind}").name
        for name in settings.prefer.get(prefer_kind, ())
        if name in names  # a list for all ops holds names of other ops
    ]
    return sorted(offers, key=lambda offer: _order(offer, order)), order, prefer_kind


def choose_all(
    kind: str, offers: Sequence[Offer], settings: Settings, *, is_default_all: bool
) -> tuple[tuple[Choice, ...], tuple[tuple[str, str], ...]]:
    """Choose several: what `[use]` lists, in that order, or else all that fit by rank (or none). Second: (name, reason) of those left out."""
    listed = settings.use.get(kind)
    if listed is not None:
        picked = []
        for name in listed:
            offer = find_named(name, offers, f"[use] {kind}")
            if reason := refusal(offer, fits_anything):
                raise ResolutionError(f"[use] {kind} lists {name!r}, which cannot serve", ((offer.name, reason),))
            picked.append(chosen(offer, f"listed in [use] {kind}"))
        return tuple(picked), ()
    if not is_default_all:
        return (), tuple((offer.name, f"active only when listed in [use] {kind}") for offer in offers)
    active, rejected = [], []
    for offer in offers:
        if reason := refusal(offer, fits_anything):
            rejected.append((offer.name, reason))
            _log.warning("%s %s is left out: %s", kind, offer.name, reason)
        else:
            active.append(chosen(offer, f"all are active; rank {offer.spec.rank}"))
    return tuple(active), tuple(rejected)


def chosen(offer: Offer, reason: str, eligible: Iterable[str] = (), rejected: Iterable[tuple[str, str]] = ()) -> Choice:
    """An offer as a choice."""
    return Choice(
        name=offer.name,
        target=offer.spec.target,
        plugin=offer.plugin,
        distribution=offer.distribution,
        version=offer.version,
        reason=reason,
        eligible=tuple(eligible),
        rejected=tuple(rejected),
        options=offer.spec.options,
    )


def refusal(offer: Offer, unfit: Callable[[Offer], str], query: object = None) -> str:
    """Why an offer cannot serve, or nothing: modules it requires first, as a probe may need them; its own `check` last, as it runs code."""
    try:
        missing = [name for name in offer.spec.requires if not is_findable(name)]
    except Exception as error:  # noqa: BLE001  the package of a submodule that is asked for, which is imported
        return f"a module that it needs fails: {describe(error)}"
    if missing:
        return f"needs module {_list(missing)}, not installed"
    if (reason := unfit(offer)) or offer.spec.check is None:
        return reason
    try:
        answer = load_target(offer.spec.check, owner=offer.name)(query)
    except KeyboardInterrupt:
        raise  # that was the user
    except BaseException as error:  # noqa: BLE001  whatever a plugin's check raises, SystemExit too, is the reason not to use the part
        return f"its check failed: {describe(error)}"
    return "" if answer is None else str(answer)


def fits_anything(offer: Offer) -> str:
    """For kinds without capabilities."""
    return ""


def unfit_device(offer: Offer, probes: Probes) -> str:
    """Why a device cannot be used here: what its probe says. A device without a probe is always there."""
    return probes.answer(offer.spec.probe) if offer.spec.probe else ""


def start_probes(offers: Iterable[Offer], settings: Settings, *, timeout_s: float | None = None) -> Probes:
    """Start, together, the probes that a choice of device will ask: of all that have one and what it requires, or of the pinned one alone."""
    pin = settings.use.get("device")
    asked = [find_named(pin, list(offers), "[use] device")] if isinstance(pin, str) else offers
    targets = [offer.spec.probe for offer in asked if offer.spec.probe and not refusal(offer, fits_anything)]
    return Probes(targets, timeout_s=timeout_s)


def device_refusals(offers: Sequence[Offer], settings: Settings, *, timeout_s: float | None = None) -> dict[str, str]:
    """Name of each device -> why it cannot be used here, or "". timeout_s: for all probes together, which run at once."""
    with start_probes(offers, settings, timeout_s=timeout_s) as probes:
        return {offer.name: refusal(offer, partial(unfit_device, probes=probes)) for offer in offers}


def unfit_op(offer: Offer, query: OpQuery) -> str:
    """Why an op offer cannot serve on this device in this dtype, with the cache laid out so."""
    return _reasons(
        device=(query.device_kind, offer.spec.devices),
        dtype=(query.dtype, offer.spec.dtypes),
        layout=(query.kv_layout, offer.spec.layouts or {query.kv_layout}),
    )


def unfit_fusion(
    offer: Offer, query: OpQuery, ops: Mapping[str, Choice], offers: Sequence[Offer], settings: Settings
) -> str:
    """Why a fusion is not taken instead of the ops that were chosen. A pinned fusion gives way to nothing but another pin."""
    if not settings.engine.fusions:
        return "[engine] fusions = false"
    if reason := unfit_op(offer, query):
        return reason
    stores = KV_WRITE_OPS[settings.kv.cache_dtype]
    if idle := ({*KV_WRITE_OPS.values()} - {stores}) & set(offer.spec.replaces):
        return f"replaces {', '.join(idle)}, and [kv] cache_dtype = {settings.kv.cache_dtype!r} stores by {stores}"
    ranks = {other.name: other.spec.rank for other in offers}
    is_pinned = f"op.{query.op}" in settings.use
    for name in offer.spec.replaces:
        if (choice := ops.get(name)) is None:
            return f"replaces {name!r}, which is no op of the core"
        if f"op.{name}" in settings.use:
            return f"replaces {name}, which [use] op.{name} pins to {choice.name}"
        if ranks[choice.name] > offer.spec.rank and not is_pinned:
            return f"rank {offer.spec.rank}; replaces {name}, for which {choice.name} has {ranks[choice.name]}"
    return ""


def unfit_sampler(offer: Offer, query: SamplerQuery) -> str:
    """Why a sampler cannot serve on this device; no device named means any."""
    return _reasons(device=(query.device_kind, offer.spec.devices)) if offer.spec.devices else ""


def unfit_model(offer: Offer, query: ModelQuery) -> str:
    """Why a family cannot serve this architecture here."""
    if query.architecture not in offer.spec.architectures and not is_fallback(offer):
        return f"serves {_list(offer.spec.architectures)}"
    return _reasons(device=(query.device_kind, offer.spec.devices)) if offer.spec.devices else ""


def unfit_store(offer: Offer, query: KVStoreQuery) -> str:
    """Why a store cannot hold these blocks."""
    spec = offer.spec
    return _reasons(
        layout=(query.kv_layout, spec.layouts or {query.kv_layout}),
        block_size=(query.block_size, spec.block_sizes or {query.block_size}),
    )


def unfit_attention(offer: Offer, query: AttentionQuery) -> str:
    """Why a kernel cannot serve this geometry: what it does not declare is denied."""
    spec, geometry = offer.spec, query.geometry
    reason = _reasons(
        device=(query.device_kind, spec.devices),
        dtype=(geometry.dtype, spec.dtypes),
        head_size=(geometry.head_size, spec.head_sizes or {geometry.head_size}),
        block_size=(geometry.block_size, spec.block_sizes or {geometry.block_size}),
        layout=(geometry.layout, spec.layouts),
    )
    undeclared = [f"feature {name!r} not declared" for name in sorted(geometry.features - spec.features)]
    return "; ".join([*filter(None, [reason]), *undeclared])


def kv_offers(what: str, spec: object) -> str:
    """What a part offers of KV layouts and block sizes, for people. spec: anything with `layouts`, and perhaps `block_sizes`."""
    layouts, sizes = (
        ", ".join(map(str, sorted(getattr(spec, name, ())))) or "any" for name in ("layouts", "block_sizes")
    )
    return f"{what}: layouts {layouts}; block sizes {sizes}"


def is_fallback(offer: Offer) -> bool:
    """Whether an offer is for what nobody else serves (`ModelSpec.is_fallback`)."""
    return getattr(offer.spec, "is_fallback", False)


def _mark(offer: Offer) -> str:
    return f"; {offer.spec.summary or 'fallback'}" if is_fallback(offer) else ""


def _order(offer: Offer, preferred: Sequence[str]) -> tuple[object, ...]:
    place = preferred.index(offer.name) if offer.name in preferred else len(preferred)
    # Devices: a CPU after every accelerator. Families: those that name no architecture after those that do.
    is_last = not getattr(offer.spec, "is_accelerator", True) or is_fallback(offer)
    return (place, is_last, -offer.spec.rank, offer.plugin == CORE, offer.plugin, offer.spec.name)


def _reason(best: Offer, others: Sequence[Offer], order: Sequence[str], kind: str) -> str:
    if best.name in order:
        return f"first that fits in [prefer] {kind}"
    if not others:
        return "no family that names the architecture fits" if is_fallback(best) else "the only one that fits"
    second = others[0]
    if is_fallback(best) != is_fallback(second):
        return f"it names the architecture, {second.name} is a fallback"
    if best.spec.rank != second.spec.rank:
        return f"rank {best.spec.rank}, before {second.name} with {second.spec.rank}"
    is_by_plugin = best.plugin != CORE and second.plugin == CORE
    return (
        f"rank {best.spec.rank} like {second.name}, {'which is of the core' if is_by_plugin else 'and first by name'}"
    )


def _reasons(**pairs: tuple[object, Iterable[object]]) -> str:
    return "; ".join(
        f"{what} {value} not in {_list(allowed)}" for what, (value, allowed) in pairs.items() if value not in allowed
    )


def _list(names: Iterable[object]) -> str:
    return ", ".join(sorted(str(name) for name in names)) or "nothing"


def is_findable(module: str) -> bool:
    """Whether a module could be imported; a submodule's package is imported to know."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it is missing
        return False


def packed_kinds(
    quantization: Choice | None, offers: Iterable[Offer], opened: Choice, checkpoint: Checkpoint
) -> tuple[str, ...]:
    """The packings that the chosen format serves as they are; none for one that weights are turned into. Refused where the file has none.

    opened: the weight format that opened the checkpoint.
    """
    spec = next((offer.spec for offer in offers if quantization is not None and offer.name == quantization.name), None)
    if spec is None or not spec.kinds:
        return ()
    kinds = tuple(sorted(spec.kinds))
    refused = f"[model] quantization = {spec.name!r} serves weights as a file packs them ({', '.join(kinds)}), and {checkpoint.path}"
    advice = "take a file that holds them so, such as a .gguf file of that kind, or leave the setting out"
    if not isinstance(checkpoint, HoldsPacked):
        raise ResolutionError(f"{refused}, opened by {opened.name}, gives no weight packed: {advice}")
    if not (held := set(checkpoint.packed().values())) & spec.kinds:
        raise ResolutionError(f"{refused} holds {', '.join(sorted(held)) or 'none that is packed'}: {advice}")
    return kinds


def describe_geometry(geometry: AttentionGeometry, device_kind: str) -> str:
    """What a kernel is asked for, for people."""
    features = "".join(f", {name}" for name in sorted(geometry.features))
    if geometry.kv_dtype is not None:
        features += f" ([kv] cache_dtype = {geometry.kv_dtype!r})"
    return (
        f"{device_kind}, {geometry.dtype}, {geometry.num_heads} query and {geometry.num_kv_heads} KV heads of {geometry.head_size},"
        f" blocks of {geometry.block_size}, layout {geometry.layout}{features}"
    )
