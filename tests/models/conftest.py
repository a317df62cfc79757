"""Fixtures of the models' tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.tiny_models import make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny("llama", **overrides) -> the directory of a random model, written once per session."""
    made: dict[str, Path] = {}

    def make(kind: str, **overrides: Any) -> Path:
        key = repr((kind, sorted(overrides.items())))
        if key not in made:
            made[key] = make_tiny(kind, tmp_path_factory.mktemp(kind), **overrides)
        return made[key]

    return make
