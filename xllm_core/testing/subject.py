"""The plugin under test: loaded as a start would load it, its parts, and the devices they can run on. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from xllm_core.config import Settings
from xllm_core.config_secrets import reveal
from xllm_core.config_sources import guess
from xllm_core.errors import PluginError, ResolutionError
from xllm_core.plugins.contracts.ops import CORE_OPS, MODEL_OPS
from xllm_core.plugins.manager import Offer, PluginManager, PluginRecord
from xllm_core.plugins.plan import Choice, describe
from xllm_core.plugins.probes import Probes
from xllm_core.plugins.resolve import Resolver
from xllm_core.plugins.select import HOOK_OF_KIND, chosen, is_findable, refusal, unfit_device

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xllm_core.plugins.contracts.attention import AttentionGeometry
    from xllm_core.plugins.contracts.device import DeviceBackend
    from xllm_core.testing.model_harness import Machine

KINDS = {**HOOK_OF_KIND, "command": "xllm_cli"}
"""Kind -> the hook that offers it."""


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that the plugin offers."""

    kind: str
    offer: Offer

    @property
    def component(self) -> str:
        """Its line in the report."""
        return f"{self.kind} {self.offer.name}"

    @property
    def spec(self) -> Any:
        """What it declares."""
        return self.offer.spec

    def build(self, *arguments: Any) -> Any:
        """Import the target and call it; raises PluginError, and what it raises."""
        return chosen(self.offer, "under test").build(*arguments)

    def missing(self) -> str:
        """Why it cannot be imported here (a module that it requires), or ""."""
        names = [name for name in self.spec.requires if not is_findable(name)]
        return f"needs module {', '.join(names)}, not installed" if names else ""


class Subject:
    """A plugin by its id, under settings. Raises PluginError if nothing of that id is installed."""

    def __init__(self, plugin_id: str, settings: Settings, *, extra: Iterable[Any] = ()) -> None:
        self.settings = settings
        self.manager = PluginManager.discover(settings, extra=tuple(extra)).load()
        found = [record for record in self.manager.records if record.id == plugin_id]
        if not found or found[0].state == "missing":
            known = [record.id for record in self.manager.records if record.state != "missing"]
            raise PluginError(
                f"no plugin {plugin_id!r} is installed{guess(plugin_id, known)}; installed: {', '.join(known)}"
            )
        self.record: PluginRecord = next((record for record in found if record.state == "loaded"), found[0])
        self.plugin_id = plugin_id
        self._devices: dict[str, DeviceBackend | str] = {}

    def parts(self, kind: str) -> list[Part]:
        """What the plugin offers of a kind; nothing if it did not load."""
        offers = self.manager.offers(KINDS[kind])
        return [Part(kind, offer) for offer in offers if offer.plugin == self.plugin_id]

    def table(self) -> Mapping[str, Any]:
        """The plugin's own validated settings, secrets readable."""
        return reveal(self.manager.tables.get(self.plugin_id, {}))

    def device_of(self, offer: Offer) -> DeviceBackend | str:
        """The device that an offer builds, or why it cannot be used here. Probed and built once."""
        if offer.name not in self._devices:
            with Probes([offer.spec.probe] if offer.spec.probe else []) as probes:
                reason = refusal(offer, partial(unfit_device, probes=probes))
            try:
                built = reason or chosen(offer, "under test").build(self.settings.device.index)
            except Exception as error:  # noqa: BLE001  whatever it is, it is the reason why nothing runs there
                built = f"it cannot be built: {describe(error)}"
            self._devices[offer.name] = built
        return self._devices[offer.name]

    def find_device(self, kinds: Iterable[str]) -> DeviceBackend | str:
        """A device of one of these kinds, from this plugin or any other, or why there is none. No kind: the reference."""
        wanted = set(kinds) or {"reference"}
        offers = self.manager.offers("xllm_devices")
        ordered = sorted(offers, key=lambda o: (o.spec.name not in wanted, o.plugin != self.plugin_id))
        reasons = []
        for offer in ordered:
            found = self.device_of(offer)
            if isinstance(found, str):
                reasons.append(f"{offer.name}: {found}")
            elif found.facts().kind in wanted:
                return found
        return f"no device of kind {' or '.join(sorted(wanted))} here" + (f" ({'; '.join(reasons)})" if reasons else "")

    def pins(self) -> dict[str, Any]:
        """`[use]` as the settings give it."""
        return dict(self.settings.use)

    def choose_ops(self, device: DeviceBackend, dtype: str) -> dict[str, Choice]:
        """An implementation of every core op for a device, as assembly would choose them. Raises ResolutionError."""
        resolver = Resolver(self.settings, self.manager)
        return {name: resolver.op(name, device.facts(), dtype) for name in CORE_OPS}

    def choose_model_ops(self, device: DeviceBackend, dtype: str) -> dict[str, Choice]:
        """Of the ops that only some models ask for those that this device has."""
        resolver, found = Resolver(self.settings, self.manager), {}
        for name in MODEL_OPS:
            with suppress(ResolutionError):
                found[name] = resolver.op(name, device.facts(), dtype)
        return found

    def choose_attention(self, device: DeviceBackend, geometry: AttentionGeometry) -> Choice:
        """The kernel that assembly would choose. Raises ResolutionError."""
        return Resolver(self.settings, self.manager).attention("full", geometry, device.facts())

    def choose_sampler(self, device: DeviceBackend) -> Choice:
        """The sampler that assembly would choose. Raises ResolutionError."""
        return Resolver(self.settings, self.manager).sampler(device.facts())

    def common_geometry(self, device: DeviceBackend, dtype: str) -> AttentionGeometry:
        """The joint choice of layout and block size for heads as most models have them. Raises ResolutionError."""
        heads = {"num_heads": 8, "num_kv_heads": 2, "head_size": 128, "scale": 128**-0.5}
        return Resolver(self.settings, self.manager).layout({"full": heads}, device.facts(), dtype).geometry["full"]

    def machine(self, device: DeviceBackend, dtype: str) -> Machine:
        """A device with the ops and kernels that assembly would choose, for models driven by hand."""
        from xllm_core.testing.model_harness import Machine
        from xllm_core.testing.paged import POISON

        chosen_ops = self.choose_ops(device, dtype) | self.choose_model_ops(device, dtype)
        fusions, _ = Resolver(self.settings, self.manager).fusions(chosen_ops, device.facts(), dtype)
        ops = {name: choice.build(device) for name, choice in (chosen_ops | fusions).items()}
        layout = self.common_geometry(device, dtype).layout
        kernel = lambda backend, geometry: self.choose_attention(backend, geometry).build(backend, geometry)  # noqa: E731
        return Machine(device, ops, kernel, layout, POISON)

    def devices_used(self) -> dict[str, str]:
        """Kind -> name of every device that was built."""
        built = [device.facts() for device in self._devices.values() if not isinstance(device, str)]
        return {facts.kind: facts.name for facts in built}
