"""`xllm plugins doctor`."""

from __future__ import annotations

import sys
from typing import Any

import click
import importlib_metadata

from xllm_core.config import click_options
from xllm_core.plugins.installed import metadata_of
from xllm_core.plugins.isolated import load_isolated

_CURES = {
    "missing": "install it, or remove what names it",
    "incompatible": "install versions that fit: pip install --upgrade xllm-core {distribution}",
    "failed": "reinstall it or tell its authors; until then: xllm plugins disable {id}",
}


@click.command("doctor")
@click.option("--timeout-s", default=20.0, show_default=True, help="How long one plugin may take to load.")
@click_options()
def command(timeout_s: float, **flags: Any) -> None:
    """Load every plugin in a process of its own, compare what each requires with what is installed, and say what to mend.

    Exit status 1 if a plugin that may take part does not, or misses a requirement.
    """
    num_problems = 0
    for record in load_isolated(flags["config_path"], flags["use"], timeout_s=timeout_s):
        unmet = _unmet(record["distribution"])
        is_ill = record["state"] not in ("loaded", "disabled", "not-allowed")
        num_problems += is_ill + len(unmet)
        click.echo(f"{'!!' if is_ill or unmet else 'ok'}  {record['id']:<16} {record['state']:<13} {_origin(record)}")
        if record["reason"]:
            click.echo(f"    {record['reason']}")
        if cure := _CURES.get(record["state"]):
            click.echo(f"    {cure.format(**record)}")
        for line in unmet:
            click.echo(f"    {line}")
    click.echo(f"{num_problems} problems" if num_problems else "no problems")
    sys.exit(1 if num_problems else 0)


def _origin(record: dict[str, Any]) -> str:
    return f"{record['distribution']} {record['version']}" if record["distribution"] else ""


def _unmet(distribution: str) -> list[str]:
    """Requirements of a distribution that the environment does not satisfy."""
    from packaging.requirements import InvalidRequirement, Requirement

    metadata = metadata_of(distribution) if distribution else None
    found = []
    for text in metadata.get_all("Requires-Dist") or () if metadata is not None else ():
        try:
            need = Requirement(text)
        except InvalidRequirement as error:
            found.append(f"its requirement {text!r} cannot be read: {error}")
            continue
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib_metadata.version(need.name)
        except importlib_metadata.PackageNotFoundError:
            found.append(f"it requires {text}, which is not installed")
            continue
        if not need.specifier.contains(version, True):
            found.append(f"it requires {text}, installed is {version}")
    return found
