"""Never built."""

from __future__ import annotations


def probe() -> str | None:
    """The reason."""
    return "no /dev/absent0 on this machine"


class Absent:
    """A device."""


class Embedding:
    """An op."""
