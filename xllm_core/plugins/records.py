"""What becomes of a plugin between its discovery and the plan: its state, the reason, and what it offers."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from xllm_core.plugins.specs import Spec

CORE = "core"

PluginState = Literal[
    "found", "disabled", "not-allowed", "missing", "conflict", "incompatible", "failed", "loaded"
]  # fmt: skip
"""found: installed and not yet imported. disabled: the user said no. not-allowed: the policy did not say yes. missing: named and not installed.
conflict: two claim one id. incompatible: by its metadata or its `xllm_api`. failed: its code, its hooks or its settings. loaded: takes part."""


@dataclass(slots=True)
class PluginRecord:
    """What became of one plugin. Read it; only the manager and the policy write.

    reason: why it is not loaded, or empty. is_wanted: the user named it (required, enabled, pinned or configured), or all are by `strict`, so
    that its failure stops start-up. specs: hook name -> what it offered.
    """

    id: str
    distribution: str
    version: str
    state: PluginState = "found"
    reason: str = ""
    is_wanted: bool = False
    specs: dict[str, tuple[Spec, ...]] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """Distribution and version, for people."""
        return f"{self.distribution} {self.version}" if self.distribution else "not installed"

    def to_json(self) -> dict[str, Any]:
        """Plain data for `xllm plugins list --json`; parts: hook -> what was offered, by name."""
        parts = {hook: {spec.name: _described(spec) for spec in specs} for hook, specs in self.specs.items() if specs}
        return {
            "id": self.id,
            "distribution": self.distribution,
            "version": self.version,
            "state": self.state,
            "reason": self.reason,
            "is_wanted": self.is_wanted,
            "parts": parts,
        }


def _described(spec: Spec) -> dict[str, Any]:
    """What a spec declares, but for its name and what was left empty; sets in order."""
    found = {}
    for entry in fields(spec):
        value = getattr(spec, entry.name)
        if entry.name != "name" and value not in (None, "", (), frozenset(), {}):
            found[entry.name] = sorted(value) if isinstance(value, frozenset) else value
    return found
