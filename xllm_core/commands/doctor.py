"""`xllm doctor`: what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING

import click

from xllm_core.errors import ConfigError
from xllm_core.plugins.contracts.doctor import Finding

if TYPE_CHECKING:
    from xllm_core.config import Settings

_MIN_FREE_BYTES = 2 << 30


@click.command("doctor")
@click.option("--json", "is_json", is_flag=True, help="One JSON list instead of text.")
def command(is_json: bool) -> None:
    """Check Python, torch, plugins, devices, memory, caches, and what each plugin needs. Exit code 1 if something here cannot work."""
    from xllm_core.plugins.findings import findings_of
    from xllm_core.plugins.manager import PluginManager

    settings, problem = settings_here()
    manager = PluginManager.discover(settings).load()
    findings = [Finding("fail", "settings", problem, "xllm config show")] if problem else []
    findings += [finding for offer in manager.offers("xllm_doctor") for finding in findings_of(offer.name, offer.spec)]
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


def check_python() -> Iterator[Finding]:
    """Is it new enough?"""
    is_new = sys.version_info >= (3, 11)
    yield Finding(
        "ok" if is_new else "fail",
        "python",
        platform.python_version(),
        "" if is_new else "install Python 3.11 or newer",
    )


def settings_here() -> tuple[Settings, str]:
    """(the user's settings, "") so that a plugin that is switched off stays so; or, of settings that are wrong, (the defaults, what is wrong)."""
    from xllm_core.config import Settings

    try:
        return Settings(), ""
    except ConfigError as error:
        return Settings.from_tables({}), str(error)


@cache
def torch_problem() -> str:
    """Why torch cannot be imported, or "". Asked once: what it leaves behind half loaded crashes the process if it is tried again and again."""
    try:
        import torch  # noqa: F401
    except Exception as error:  # noqa: BLE001  it loads the extensions of others, which fail as they like
        return f"{error}{f': {error.__cause__}' if error.__cause__ else ''}"
    return ""


def check_torch() -> Iterator[Finding]:
    """Can it be imported?"""
    if problem := torch_problem():
        remedy = "what is missing stands at your device below; without it: pip install torch, or TORCH_DEVICE_BACKEND_AUTOLOAD=0"
        yield Finding("fail", "torch", f"cannot be imported: {problem}", remedy)
        return
    import torch

    yield Finding("ok", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads")


def check_plugins() -> Iterator[Finding]:
    """Which load, and why the others do not."""
    from xllm_core.plugins.manager import PluginManager

    for record in PluginManager.discover(settings_here()[0]).load().records:
        about = f"{record.distribution} {record.version}"
        if record.state == "loaded":
            yield Finding("ok", f"plugin {record.id}", about)
        else:
            yield Finding(
                "ok" if record.state in ("disabled", "not-allowed") else "warn",
                f"plugin {record.id}",
                f"{about}: {record.state}, {record.reason}",
            )


def check_devices() -> Iterator[Finding]:
    """Which can be used here, and how much memory is free."""
    from xllm_core.plugins.manager import PluginManager
    from xllm_core.plugins.plan import describe
    from xllm_core.plugins.select import chosen, device_refusals

    settings = settings_here()[0].model_copy(update={"use": {}})  # of all of them, whichever is pinned
    offers = PluginManager.discover(settings).load().offers("xllm_devices")
    reasons = device_refusals(offers, settings)
    for offer in offers:
        if reason := reasons[offer.name]:
            yield Finding("warn", f"device {offer.name}", f"not usable here: {reason}")
            continue
        if torch_problem():
            yield Finding("fail", f"device {offer.name}", "not tried: torch cannot be imported, see above")
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


def check_caches() -> Iterator[Finding]:
    """Can they be written?"""
    from xllm_core.runtime.formats.gguf_tokenizer import cache_directory

    path = cache_directory()
    parent = next(p for p in (path, *path.parents) if p.exists())
    is_writable = os.access(parent, os.W_OK)
    yield Finding(
        "ok" if is_writable else "warn", "cache", f"{path} ({'writable' if is_writable else 'cannot be written'})",
        "" if is_writable else "set XLLM_CACHE_DIR to a folder you can write to",
    )  # fmt: skip
