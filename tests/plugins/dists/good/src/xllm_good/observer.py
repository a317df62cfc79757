"""An observer."""

from __future__ import annotations

from collections.abc import Sequence

from xllm_core.plugins import StepRecord


class CountingObserver:
    """Adds up tokens over all engines of the process."""

    num_tokens = 0

    def observe(self, records: Sequence[StepRecord]) -> None:
        """Count."""
        CountingObserver.num_tokens += sum(record.num_tokens for record in records)

    def close(self) -> None:
        """Nothing to end."""
