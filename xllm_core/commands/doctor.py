"""`xllm doctor`: what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import click

State = Literal["ok", "warn", "fail"]
_MIN_FREE_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. remedy: what to do, empty where nothing needs doing."""

    state: State
    subject: str
    detail: str
    remedy: str = ""


@click.command("doctor")
@click.option("--json", "is_json", is_flag=True, help="One JSON list instead of text.")
def command(is_json: bool) -> None:
    """Check Python, torch, plugins, devices, memory and caches. Exit code 1 if something here cannot work."""
    findings = [finding for check in CHECKS for finding in check()]
    if is_json:
        click.echo(json.dumps([asdict(finding) for finding in findings]))
    else:
        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        width = max(len(finding.subject) for finding in findings)
        for finding in findings:
            click.echo(
                f"{click.style(f'{finding.state:<4}', fg=colours[finding.state])}  {finding.subject:<{width}}  {finding.detail}"
            )
            if finding.remedy:
                click.echo(f"      {'':<{width}}  -> {finding.remedy}")
    if any(finding.state == "fail" for finding in findings):
        sys.exit(1)


def _python() -> Iterator[Finding]:
    is_new = sys.version_info >= (3, 11)
    yield Finding(
        "ok" if is_new else "fail",
        "python",
        platform.python_version(),
        "" if is_new else "install Python 3.11 or newer",
    )


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # noqa: BLE001  it loads the extensions of others, which fail as they like
        cause = f": {error.__cause__}" if error.__cause__ else ""
        yield Finding(
            "fail",
            "torch",
            f"cannot be imported: {error}{cause}",
            "what is missing stands at your device below; without it: pip install torch, or TORCH_DEVICE_BACKEND_AUTOLOAD=0",
        )
        return
    yield Finding("ok", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads")


def _plugins() -> Iterator[Finding]:
    from xllm_core.plugins.manager import PluginManager

    for record in PluginManager.discover().load().records:
        about = f"{record.distribution} {record.version}"
        if record.state == "loaded":
            yield Finding("ok", f"plugin {record.id}", about)
        else:
            state: State = "ok" if record.state == "disabled" else "warn"
            yield Finding(state, f"plugin {record.id}", f"{about}: {record.state}, {record.reason}")


def _devices() -> Iterator[Finding]:
    from xllm_core.config import Settings
    from xllm_core.plugins.manager import PluginManager
    from xllm_core.plugins.plan import describe
    from xllm_core.plugins.select import chosen, device_refusals

    offers = PluginManager.discover().load().offers("xllm_devices")
    reasons = device_refusals(offers, Settings.from_tables({}))
    for offer in offers:
        if reason := reasons[offer.name]:
            yield Finding("warn", f"device {offer.name}", f"not usable here: {reason}")
            continue
        try:
            device = chosen(offer, "asked for a report").build(0)
        except Exception as error:  # noqa: BLE001  whatever it is, it is the reason
            yield Finding("fail", f"device {offer.name}", f"cannot be built: {describe(error)}")
            continue
        facts, memory = device.facts(), device.memory()
        detail = f"{facts.name}, {', '.join(facts.dtypes)}, {memory.free_bytes / 2**30:.1f} of {memory.total_bytes / 2**30:.1f} GiB free"
        is_enough = memory.free_bytes >= _MIN_FREE_BYTES
        yield Finding(
            "ok" if is_enough else "warn",
            f"device {offer.name}",
            detail,
            "" if is_enough else "free some memory, or use a smaller model",
        )


def _caches() -> Iterator[Finding]:
    from xllm_core.runtime.formats.gguf_tokenizer import cache_directory

    path = cache_directory()
    parent = next(p for p in (path, *path.parents) if p.exists())
    is_writable = os.access(parent, os.W_OK)
    yield Finding(
        "ok" if is_writable else "warn", "cache", f"{path} ({'writable' if is_writable else 'cannot be written'})",
        "" if is_writable else "set XLLM_CACHE_DIR to a folder you can write to",
    )  # fmt: skip


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_python, _torch, _plugins, _devices, _caches)
