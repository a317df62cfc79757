"""What a check of this machine finds out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `xllm doctor`. subject: what was looked at; detail: what was found; remedy: what to do, a command where one helps, else "".

    state: "fail" for what keeps xllm from working at all, "warn" for what only this part lacks.
    """

    state: Literal["ok", "warn", "fail"]
    subject: str
    detail: str
    remedy: str = ""
