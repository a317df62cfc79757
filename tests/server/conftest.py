"""One server of a tiny model for all tests that change nothing in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import add_tokenizer, demo_model, tiny_model
from tests.server.rig import Server, serving

__all__ = ["add_tokenizer", "demo_model", "tiny_model"]

FLAGS = ("--dtype", "float32", "--num-blocks", "512", "--max-num-seqs", "16", "--served-model-name", "tiny")


@pytest.fixture(scope="session")
def server(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """float32, 512 blocks, 16 sequences, context 512."""
    with serving(tiny_model, tmp_path_factory.mktemp("server") / "log.txt", *FLAGS) as running:
        yield running
