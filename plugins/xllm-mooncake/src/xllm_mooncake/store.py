"""`MooncakeStore`, a `KVStore` of scope remote: both sides, and what they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from xllm_core.plugins import ConfigError, KVGeometry, KVView
from xllm_mooncake.index import Knowledge, MooncakeIndex
from xllm_mooncake.mover import MooncakeMover
from xllm_mooncake.remote import LOOKUP, DownError, Remote, name_of
from xllm_mooncake.settings import MooncakeTable
from xllm_mooncake.staging import Staging

_COUNTERS = (
    "stored_blocks", "loaded_blocks", "evicted_blocks", "hits", "misses", "laters", "dropped_blocks", "failed_saves", "failed_loads",
    "bad_values", "lookup_timeouts",
)  # fmt: skip


class MooncakeStore:
    """Blocks in the memory of all engines of one master. config: `[plugin.mooncake]`."""

    def __init__(self, config: Mapping[str, Any], geometry: KVGeometry) -> None:
        """Connect. Raises ConfigError without consent to what Mooncake listens on, and if no master answers and one must."""
        settings = MooncakeTable.model_validate(dict(config)).model_dump()
        if not settings["allow_wildcard_listeners"]:
            raise ConfigError(
                "Mooncake's client listens on two TCP ports of all addresses of this machine, and whoever reaches them can read and write "
                "the blocks, without a password; it has no setting that changes this. Close those ports to others, and agree with "
                "[plugin.mooncake] allow_wildcard_listeners = true"
            )
        secret = settings.pop("secret")
        self._settings = settings
        self._geometry = geometry
        self._knowledge = Knowledge(settings["lookup_timeout_s"])
        self._staging = Staging(geometry, settings["staging_bytes"], secret.get_secret_value() if secret else None)
        try:
            self._remote = Remote(settings, self._staging, self._knowledge.forget)
        except ConfigError:
            self._staging.close()
            raise
        self._mover: MooncakeMover | None = None

    def index(self) -> MooncakeIndex:
        """The scheduler's side."""
        return MooncakeIndex(self._knowledge, lambda: self._remote.is_up, self._ask)

    def mover(self, view: KVView) -> MooncakeMover:
        """The worker's side; one per store."""
        if self._mover is not None:
            raise ConfigError("a Mooncake store serves one worker; build one store for each")
        self._mover = MooncakeMover(
            self._settings, self._geometry, view, knowledge=self._knowledge, remote=self._remote, staging=self._staging
        )
        return self._mover

    def stats(self) -> dict[str, int]:
        """The contract's counters, and ours. used_bytes: of staging; what the store holds, and evicts, its master knows."""
        with self._knowledge.lock:
            counts = {name: self._knowledge.counts[name] for name in _COUNTERS}
        return {
            **counts, "used_bytes": self._staging.used_bytes, "breaker_openings": self._remote.num_openings,
            "breaker_is_open": int(not self._remote.is_up),
        }  # fmt: skip

    def close(self) -> None:
        """For a store whose mover was never asked for; otherwise the mover's `close` does this."""
        if self._mover is not None:
            self._mover.close()
            return
        self._remote.close()
        self._staging.close()

    @property
    def client_pid(self) -> int | None:
        """The process whose sockets they are."""
        return self._remote.client_pid

    def _ask(self, keys: Sequence[bytes]) -> None:
        if not self._remote.put(LOOKUP, partial(self._find_out, keys)):
            self._knowledge.unasked(keys)

    def _find_out(self, keys: Sequence[bytes]) -> None:
        """On the calling thread."""
        try:
            codes = self._remote.call(
                "exist", timeout_s=self._settings["lookup_timeout_s"], keys=list(map(name_of, keys))
            )
        except DownError:
            self._knowledge.unasked(keys)
            return
        self._knowledge.learn(keys, [code == 1 for code in codes])
