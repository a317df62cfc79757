"""What `verify` speaks of: how much is run, what a row's engine gave out, and what the comparison made of it. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from xllm_core.engine.engine import Engine
from xllm_core.errors import XllmError
from xllm_core.testing.driving import Tokens, settle
from xllm_core.types import EngineRequest

MIN_COMPARED = 0.9


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is run. lengths: prompt tokens of each request."""

    lengths: tuple[int, ...]
    new_tokens: int


FULL = Scale((1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 65, 100, 150, 257, 400, 600), 64)
QUICK = Scale((1, 16, 33, 100), 16)


@dataclass(slots=True)
class Row:
    """One line of the report. activity counts what the feature did; `what` says what that is. differences: first few, in words.

    not_applicable: why this model or device cannot have the feature; "" where it can.
    """

    feature: str
    is_identical: bool
    num_compared: int
    num_tokens: int
    activity: int
    what: str
    differences: list[str] = field(default_factory=list)
    not_applicable: str = ""

    @property
    def has_passed(self) -> bool:
        """Identical, active, and enough was compared; or not applicable."""
        if self.not_applicable:
            return True
        return self.is_identical and self.activity > 0 and self.num_compared >= MIN_COMPARED * self.num_tokens


@dataclass(slots=True)
class Report:
    """All rows of one model, dtype and device."""

    model: str
    dtype: str
    device: str
    is_row_invariant: bool
    rows: list[Row] = field(default_factory=list)

    @property
    def has_passed(self) -> bool:
        """Whether every row passed, and there is one."""
        return bool(self.rows) and all(row.has_passed for row in self.rows)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a row's engine gave out.

    expected: instead of the plain run, where the row has a comparison of its own; requests: those that it asked, where they differ.
    differences: of what the row compares beside tokens, in words.
    """

    got: Tokens
    activity: int
    what: str
    expected: Tokens | None = None
    requests: Sequence[EngineRequest] | None = None
    differences: Sequence[str] = ()


class NotApplicableError(XllmError):
    """A row asks for something that this model or device cannot have."""


def num_wasted(engine: Engine) -> int:
    """Rows computed in vain, with those of steps that nobody waits for any more."""
    settle(engine)
    return engine.scheduler.stats.num_wasted_rows
