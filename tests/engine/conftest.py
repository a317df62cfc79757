"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from xllm_core.testing.engine_rig import Rig, build_rig


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    """`build_rig`; what it built is closed after the test."""
    rigs: list[Rig] = []

    def make(num_blocks: int = 64, **options: Any) -> Rig:
        rigs.append(build_rig(num_blocks, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.engine.close()
