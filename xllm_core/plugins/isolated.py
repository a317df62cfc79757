"""Loads plugins in a child process, for reports: one that crashes, exits or hangs while it is imported becomes a record like any other.

python -m xllm_core.plugins.isolated      reads a JSON request on stdin, writes a JSON line per event on stdout
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from xllm_core.config import settings_from_flags
from xllm_core.errors import PluginError
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.select import device_refusals

LOAD_TIMEOUT_S = 20.0
_PROBE_SHARE = 0.8  # of the silence that a child may keep: its devices are asked within it


def load_isolated(
    config_path: str | None = None,
    pins: tuple[str, ...] = (),
    *,
    timeout_s: float = LOAD_TIMEOUT_S,
    probes_devices: bool = False,
) -> list[dict[str, Any]]:
    """Records of all plugins as `PluginRecord.to_json` gives them, each loaded as far as it can be.

    config_path, pins: as `--config` and `--use` give them. timeout_s: for one plugin. probes_devices: each record also gets "unusable", its
    devices that cannot be used here with the reason. Raises PluginError if the child fails by itself.
    """
    skip: dict[str, str] = {}
    while True:
        request = {
            "path": sys.path,
            "config_path": config_path,
            "use": list(pins),
            "skip": skip,
            "probe_s": timeout_s * _PROBE_SHARE if probes_devices else None,
        }
        begun, records, end = _run(request, timeout_s)
        if records is not None:
            return records
        if begun is None or begun in skip:
            raise PluginError(f"plugins could not be loaded in a process of their own: it {end}")
        skip[begun] = f"its import {end}"


def _run(request: dict[str, Any], timeout_s: float) -> tuple[str | None, list[dict[str, Any]] | None, str]:
    """(plugin that was being loaded at the end, records if it came that far, how the child ended)."""
    command = [sys.executable, "-m", "xllm_core.plugins.isolated"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(json.dumps(request).encode())
        child.stdin.close()
        begun, end = None, ""
        try:
            for event in _events(child.stdout.fileno(), timeout_s):
                if "records" in event:
                    return None, event["records"], ""
                if "error" in event:
                    raise PluginError(event["error"])
                begun = event["begin"]
        except TimeoutError:
            end = f"did not return within {timeout_s:g} s"
            child.kill()
    if not end:
        status = child.returncode
        end = (
            f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended the process with status {status}"
        )
    return begun, None, end


def _events(fd: int, timeout_s: float) -> Iterator[dict[str, Any]]:
    """Lines as they come. Raises TimeoutError after so long a silence."""
    buffer = b""
    deadline_s = time.monotonic() + timeout_s
    while True:
        if not select.select([fd], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
            raise TimeoutError
        piece = os.read(fd, 1 << 16)
        if not piece:
            return
        *lines, buffer = (buffer + piece).split(b"\n")
        for line in lines:
            deadline_s = time.monotonic() + timeout_s
            yield json.loads(line)


def main() -> None:
    """The child. What plugins print goes to stderr."""
    out = os.dup(1)
    os.dup2(2, 1)
    request = json.load(sys.stdin)

    def tell(event: dict[str, Any]) -> None:
        os.write(out, json.dumps(event).encode() + b"\n")

    try:
        settings = settings_from_flags({"config_path": request["config_path"], "use": tuple(request["use"])})
        logging.getLogger("xllm_core.plugins").setLevel(logging.ERROR)  # the reasons stand in the records
        manager = PluginManager.discover(settings)
        manager.load(skip=request["skip"], on_begin=lambda plugin_id: tell({"begin": plugin_id}))
        records = [record.to_json() for record in manager.records]
        if request["probe_s"] is not None:
            offers = manager.offers("xllm_devices")
            reasons = device_refusals(offers, settings, timeout_s=request["probe_s"])
            for record in records:
                mine = {offer.spec.name: reasons[offer.name] for offer in offers if offer.plugin == record["id"]}
                record["unusable"] = {name: reason for name, reason in mine.items() if reason}
        tell({"records": records})
    except Exception as error:  # noqa: BLE001  whatever it is, the parent raises it
        tell({"error": str(error)})


if __name__ == "__main__":
    main()
