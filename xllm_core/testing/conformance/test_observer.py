"""Observers take records in batches and end when they are told to."""

from __future__ import annotations

import pytest

from xllm_core.plugins.contracts.observer import StepRecord
from xllm_core.testing.plugin import Kit, kit_of
from xllm_core.testing.subject import Part


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every observer."""
    parts = kit_of(metafunc.config).subject.parts("observers")
    metafunc.parametrize("part", parts, ids=[part.offer.name for part in parts])


def test_it_takes_records(part: Part, xllm_kit: Kit) -> None:
    """It takes batches of any size, the empty one too, leaves them as they are, and closes."""
    observer = xllm_kit.importable(part).build()
    records = [
        StepRecord(i, i * 0.1, 0.001, 0.001, 0.05, 0.002, 0.001, i * 0.1 + 0.05, 4, 40, 4, 2, 0, 10, 100)
        for i in range(50)
    ]
    for batch in (records[:1], records[1:40], [], records[40:]):
        before = list(batch)
        assert observer.observe(batch) is None
        assert batch == before, "it changed the batch, which other observers read too"
    assert observer.close() is None
