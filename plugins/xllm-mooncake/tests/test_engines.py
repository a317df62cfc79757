"""Engines in processes of their own that share a real master."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .conftest import EngineProcess, Master, wait_for

PREFIX = [(7 * i) % 120 + 3 for i in range(160)]
"""Ten blocks of 16."""

PROMPTS = [[*PREFIX, *([11 + i] * (3 + 5 * i))] for i in range(3)]


def stored(one: EngineProcess, at_least: int) -> dict[str, Any]:
    """Counters, once so many blocks have arrived in the store."""
    one.ask(do="settle")
    return wait_for(lambda: (found := one.stats())["stored_blocks"] >= at_least and found, f"{at_least} blocks in the store")


def test_a_second_engine_serves_a_prefix_that_it_never_computed(master: Master, engine: Callable[..., EngineProcess]) -> None:
    """Blocks of the first engine, offloaded when its requests ended, are found by the second, and its tokens are those of no store at all."""
    plain, first, second = engine(), engine(master), engine(master)
    expected = plain.generate(*PROMPTS)["tokens"]
    assert first.generate(*PROMPTS)["tokens"] == expected
    stored(first, 10)
    found = second.generate(*PROMPTS)
    stats = second.stats()
    assert found["tokens"] == expected
    assert found["waited"] == 3, "every request asks the store, which answers later"
    assert stats["store_tokens"] >= 160 and stats["loaded_blocks"] >= 10 and stats["hits"] >= 1, stats
    assert stats["stored_blocks"] == 0 or stats["stored_blocks"] < 10, "what is there is not stored again"
    assert (stats["bad_values"], stats["failed_loads"], stats["breaker_openings"]) == (0, 0, 0)
