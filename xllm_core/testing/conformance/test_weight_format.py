"""Weight formats: what is not theirs they leave to others, without torch and without an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xllm_core.errors import ModelError, ModelNotFoundError
from xllm_core.testing.plugin import Kit, kit_of
from xllm_core.testing.subject import Part


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every format."""
    parts = kit_of(metafunc.config).subject.parts("weight_format")
    metafunc.parametrize("part", parts, ids=[part.offer.name for part in parts])


@pytest.fixture
def reader(part: Part, xllm_kit: Kit) -> Any:
    """The format, built."""
    return xllm_kit.importable(part).build()


def test_it_leaves_what_is_not_its_own(part: Part, reader: Any, tmp_path: Path) -> None:
    """A reference or a path of no format is answered with None; of a path that is absent it may also say that there is nothing."""
    (tmp_path / "notes.txt").write_text("nothing")
    for reference in (str(tmp_path / "absent" / "deep" / "er"), "no-such-scheme-of-anybody:thing"):
        try:
            answer = reader.resolve(reference)
        except ModelNotFoundError:
            continue
        assert answer is None, f"it resolves {reference!r}, which is nobody's, to {answer!r}"
    assert reader.open(tmp_path / "notes.txt") is None, "it opens notes.txt, which is nobody's"


def test_it_refuses_what_is_damaged(part: Part, reader: Any, tmp_path: Path) -> None:
    """Files that only look like a model are refused with a ModelError, or left to others; they never crash it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["X"]')
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 16)
    (tmp_path / "empty").mkdir()
    for path in (folder, tmp_path / "model.gguf", tmp_path / "empty"):
        try:
            opened = reader.open(path)
        except ModelError:
            continue
        assert opened is None, f"it opens {path.name}, which is damaged"
