"""`xllm good hello`."""

from __future__ import annotations

from collections.abc import Iterator

import click

from xllm_core.plugins import Finding


@click.command()
def hello() -> None:
    """Say hello."""
    click.echo("hello from a plugin")


def check() -> Iterator[Finding]:
    """Something that is missing, and how to get it."""
    yield Finding("warn", "toy", "the toy is out of its box", "put it back")
