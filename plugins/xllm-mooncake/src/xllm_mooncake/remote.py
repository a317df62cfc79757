"""Calls to the store: on one thread, behind the breaker. Nothing else in this plugin talks with Mooncake."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from xllm_core.plugins import ConfigError
from xllm_mooncake.breaker import Breaker
from xllm_mooncake.client import Client, ClientError, LateError, answers
from xllm_mooncake.lane import Job, Lane
from xllm_mooncake.staging import Staging

_log = logging.getLogger("xllm_mooncake")

LOOKUP, LOAD, SAVE = range(3)
"""Urgencies: a request waits for the first two."""

RPC_FAILED = -900
_SETUP_TIMEOUT_S = 15.0
_PROBE_TIMEOUT_S = 1.0
_LATE_POLL_S = 0.1
_PROBE_KEY = "xllm1-probe"


class DownError(Exception):
    """The store cannot be asked now, or has not answered. is_late: the call still goes on, and touches its memory."""

    def __init__(self, reason: str, *, is_late: bool = False) -> None:
        super().__init__(reason)
        self.is_late = is_late


def name_of(key: bytes) -> str:
    """The store's name of a storage key."""
    return f"xllm1-{key.hex()}"


class Remote:
    """The lane, the breaker and the client's process. on_down: called on the lane when the breaker opens."""

    def __init__(self, settings: Mapping[str, Any], staging: Staging, on_down: Callable[[], None]) -> None:
        """Connect. Raises ConfigError if no master answers and one must."""
        self._settings = settings
        self._master: str = settings["master"]
        self._on_down = on_down
        self._client = Client(settings["host"], staging.fd, staging.num_bytes)
        self._breaker = Breaker()
        try:
            self._connect()
        except ClientError as error:
            self._client.kill()
            if settings["must_start"]:
                raise ConfigError(
                    f"[plugin.mooncake] master = {self._master!r}: {error}. Start one for development with `xllm mooncake up`, "
                    "or set must_start = false to begin without it"
                ) from error
            _log.warning("starting without the Mooncake store: %s", error)
            self._breaker.open(str(error))
        self._lane = Lane("xllm-mooncake-calls", 3, self._idle)

    @property
    def is_up(self) -> bool:
        """Is the breaker closed? Any thread may ask."""
        return self._breaker.is_closed

    @property
    def num_openings(self) -> int:
        """How often the breaker has opened."""
        return self._breaker.num_openings

    @property
    def client_pid(self) -> int | None:
        """Of the client's process."""
        return self._client.pid

    def put(self, urgency: int, job: Job) -> bool:
        """Do it on the lane; False after `close`."""
        return self._lane.put(urgency, job)

    def call(
        self, name: str, *, timeout_s: float, on_late: Callable[[], None] = lambda: None, **arguments: Any
    ) -> list[int]:
        """On the lane only. Codes; raises DownError, after which the breaker is open. on_late: when a call that took too long has ended."""
        if not self._breaker.is_closed:
            raise DownError(self._breaker.reason)
        try:
            codes = self._client.call(name, timeout_s=timeout_s, on_late=on_late, **arguments)
        except ClientError as error:
            self._open(str(error))
            raise DownError(str(error), is_late=isinstance(error, LateError)) from error
        if RPC_FAILED in codes:
            self._open(f"{name}: no answer from the master on {self._master}")
            raise DownError(self._breaker.reason)
        return codes

    def close(self) -> None:
        """End the thread and the process; at once if a call is under way."""
        is_idle = self._lane.close(0.3)
        if is_idle:
            self._client.close(is_graceful=self._breaker.is_closed)
        else:
            self._client.interrupt()
            self._lane.close(0.3)
            self._client.kill()

    def _open(self, reason: str) -> None:
        if self._breaker.is_closed:
            _log.warning("the Mooncake store is left alone until it answers again: %s", reason)
        self._breaker.open(reason)
        self._on_down()

    def _idle(self) -> float | None:
        """Between jobs: probe when it is due."""
        if self._breaker.is_closed:
            return None
        if self._breaker.wait_s:
            return self._breaker.wait_s
        if self._client.is_running and not self._client.is_free():
            return _LATE_POLL_S
        try:
            self._connect()
        except ClientError as error:
            self._breaker.open(str(error))
            return self._breaker.wait_s
        self._breaker.close()
        _log.warning("the Mooncake store answers again")
        return None

    def _connect(self) -> None:
        """Set up where that is to be done, and ask something. Raises ClientError."""
        if not answers(self._master):
            raise ClientError("no master answers there")
        if not self._client.is_running:
            self._set_up()
        if self._client.call("exist", timeout_s=_PROBE_TIMEOUT_S, keys=[_PROBE_KEY])[0] < 0:
            raise ClientError("the master does not answer the client")

    def _set_up(self) -> None:
        """A new process whose store is connected, or none: one that is half set up would be asked for ever, in vain."""
        self._client.start()
        try:
            codes = self._client.call(
                "setup", timeout_s=_SETUP_TIMEOUT_S, host=self._settings["host"], master=self._master,
                segment_bytes=self._settings["segment_bytes"], replicas=self._settings["replicas"],
            )  # fmt: skip
        except ClientError as error:
            self._client.kill()
            doubt = ", though something listens there: is it a mooncake_master, and is it well?"
            raise ClientError(f"{error}{doubt if isinstance(error, LateError) else ''}") from error
        if any(codes):
            self._client.kill()
            raise ClientError(f"Mooncake's set-up failed with {codes}{self._client.last_words}")
        _log.info("Mooncake's client is process %d of engine process %d", self._client.pid, os.getpid())
