"""Sliding windows: groups that hold a block only near some boundaries find theirs in the store too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import EngineProcess, make_prompts
from .real_master import Master, wait_for


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Qwen2 whose second layer sees 64 tokens back, and whose first sees all."""
    from xllm_core.testing.tiny import tiny_config, write_tiny

    path: Path = tmp_path_factory.mktemp("models") / "windowed"
    config = tiny_config(
        "Qwen2ForCausalLM", max_position_embeddings=1024, initializer_range=0.5, use_sliding_window=True, sliding_window=64,
        max_window_layers=1, layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    return str(write_tiny(config, path))


def test_a_second_engine_loads_windows_too(windowed: str, master: Master, engine: Callable[..., EngineProcess]) -> None:
    """It has asked about no block of the window before, so the store must find out for it. Dies if unknown counts as absent."""
    plain, first = EngineProcess(windowed, None), EngineProcess(windowed, master)
    second = EngineProcess(windowed, master)
    try:
        prompt = make_prompts()[:1]
        expected = plain.generate(*prompt)["tokens"]
        assert first.generate(*prompt)["tokens"] == expected
        first.ask(do="settle")
        wait_for(lambda: first.stats()["stored_blocks"] >= 10, "blocks in the store")
        assert second.generate(*prompt)["tokens"] == expected
        stats = second.stats()
        assert stats["store_tokens"] >= 128 and stats["loaded_blocks"] > 10, stats
    finally:
        for one in (plain, first, second):
            one.end()
        for one in (plain, first, second):
            one.close()
