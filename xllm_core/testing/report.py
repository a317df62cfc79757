"""What a run of the conformance kit proved: plain data, as a file and as text for people. Imports neither torch nor pytest."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STATIC = "static"
"""The component that stands for the plugin as a whole: its imports, its metadata, its targets."""


@dataclass(slots=True)
class ComponentReport:
    """One part of a plugin ("attention core/paged"), or `STATIC`.

    ran: cases that passed or failed and ran the part, rather than read what it declares. proven: sentence -> number of cases that
    showed it. failures: test -> why. skips: reason -> number of cases.
    """

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    ran: int = 0
    proven: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    skips: dict[str, int] = field(default_factory=dict)

    def record(self, outcome: str, test: str, what: str, reason: str, *, is_run: bool = True) -> None:
        """Count one case. outcome: "passed", "failed" or "skipped"; what: the sentence that it shows."""
        setattr(self, outcome, getattr(self, outcome) + 1)
        self.ran += is_run and outcome != "skipped"
        if outcome == "passed":
            self.proven[what] = self.proven.get(what, 0) + 1
        elif outcome == "failed":
            self.failures[test] = reason
        else:
            self.skips[reason] = self.skips.get(reason, 0) + 1


@dataclass(slots=True)
class ConformanceReport:
    """A whole run. `ok`: something of what the plugin offers ran, and nothing failed.

    device: kind -> name of the devices that parts ran on. problem: why there is no result at all, or why an empty one is not green.
    """

    plugin: str
    distribution: str = ""
    version: str = ""
    core_version: str = ""
    api_version: str = ""
    device: dict[str, str] = field(default_factory=dict)
    components: list[ComponentReport] = field(default_factory=list)
    problem: str = ""

    @property
    def passed(self) -> int:
        """Cases that passed."""
        return sum(component.passed for component in self.components)

    @property
    def failed(self) -> int:
        """Cases that failed."""
        return sum(component.failed for component in self.components)

    @property
    def skipped(self) -> int:
        """Cases that could not run here."""
        return sum(component.skipped for component in self.components)

    @property
    def ok(self) -> bool:
        """Whether this is green."""
        return not self.problem and self.failed == 0 and self.passed > 0

    @property
    def text(self) -> str:
        """The table, the reasons of skips, and every failure."""
        lines = [f"{self.plugin}  {self.distribution} {self.version}  (xllm-core {self.core_version})".rstrip()]
        lines += [f"  on {kind}: {name}" for kind, name in self.device.items()]
        width = max((len(component.name) for component in self.components), default=0)
        for component in self.components:
            counts = f"{component.passed:>4} proven {component.failed:>3} failed {component.skipped:>3} skipped"
            lines.append(f"  {component.name:<{width}}  {counts}")
            lines += [f"      skipped {count}: {reason}" for reason, count in component.skips.items()]
        for component in self.components:
            for test, reason in component.failures.items():
                lines += [f"FAILED {component.name}: {test}", textwrap.indent(reason, "    ")]
        return "\n".join([*lines, self.verdict])

    @property
    def verdict(self) -> str:
        """One line."""
        counts = f"{self.passed} proven, {self.failed} failed, {self.skipped} skipped"
        return f"{'green' if self.ok else 'NOT GREEN'}: {self.problem or counts}"

    def component(self, name: str) -> ComponentReport:
        """The component of a name; made when it is first asked for."""
        found = next((component for component in self.components if component.name == name), None)
        if found is None:
            found = ComponentReport(name)
            self.components.append(found)
        return found

    def judge(self) -> None:
        """Set `problem` where nothing failed and yet nothing of what the plugin offers was proven."""
        parts = [component for component in self.components if component.name != STATIC]
        ran = sum(component.ran for component in parts)
        skipped = sum(component.skipped for component in parts)
        if self.passed + self.failed == 0:
            self.problem = "no test ran, so nothing is proven"
        elif ran == 0 and skipped:
            reasons = Counter(reason for component in parts for reason in component.skips)
            self.problem = f"nothing that the plugin offers ran here: {reasons.most_common(1)[0][0]}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "ok": self.ok, "passed": self.passed, "failed": self.failed, "skipped": self.skipped}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> ConformanceReport:
        """What `to_json` wrote."""
        own = {key: value for key, value in plain.items() if key not in ("ok", "passed", "failed", "skipped")}
        return cls(**{**own, "components": [ComponentReport(**entry) for entry in own["components"]]})

    def write(self, path: Path) -> None:
        """As a JSON file."""
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> ConformanceReport:
        """A file that `write` made."""
        return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
