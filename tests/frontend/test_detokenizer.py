"""Text from tokens as they come: whole characters, and nothing lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_core.frontend.detokenizer import Detokenizer


def bytes_decode(ids: Sequence[int]) -> str:
    """A tokenizer of single bytes: the hardest case for characters."""
    return bytes(ids).decode("utf-8", errors="replace")


def play(ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(bytes_decode)
    return [*(detokenizer.feed((i,)) for i in ids), detokenizer.finish()]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=30))
def test_pieces_of_valid_text_hold_whole_characters(text: str) -> None:
    """They add up to the text, and none shows half a character. Red if nothing is held back."""
    pieces = play(text.encode())
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=30))
def test_pieces_of_any_bytes_lose_nothing(raw: bytes) -> None:
    """Invalid bytes show as U+FFFD, valid characters around them survive in order. Red if `finish` drops what was held."""
    text = "".join(play(raw))
    kept = [c for c in text if c != "\ufffd"]
    assert kept == [c for c in raw.decode("utf-8", errors="ignore") if c != "\ufffd"]


def test_a_flood_of_broken_bytes_is_not_held_for_ever() -> None:
    """At most three bytes can be the beginning of a character; what came before them goes out."""
    detokenizer = Detokenizer(bytes_decode)
    sent = sum(len(detokenizer.feed((0xFF,))) for _ in range(50))
    assert sent >= 47


def test_several_tokens_at_once_equal_one_by_one() -> None:
    """A step may bring several tokens."""
    raw = "naïve 漢字 🙂 text".encode()
    detokenizer = Detokenizer(bytes_decode)
    assert detokenizer.feed(raw[:9]) + detokenizer.feed(raw[9:]) + detokenizer.finish() == raw.decode()


def skipping_decode(ids: Sequence[int]) -> str:
    """Bytes, and special tokens from 256 on that are not shown."""
    return bytes_decode([i for i in ids if i < 256])


@pytest.mark.parametrize(
    "flood",
    [[0xFF], [256], [0xE4, 256], [0x80, 0xFF, 257], [0x82, 0xF0, 0x9F, 0x99]],
    ids=lambda ids: bytes(i % 256 for i in ids).hex(),
)
def test_work_per_token_is_bounded(flood: list[int]) -> None:
    """Counts decoded ids: linear in the tokens, whatever they are, and the text afterwards is whole. Red if the window only grows."""
    num_decoded = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal num_decoded
        num_decoded += len(ids)
        return skipping_decode(ids)

    detokenizer = Detokenizer(decode)
    tokens = [*"好".encode(), *(flood * 400), *"é🙂 end".encode()]
    text = "".join([*(detokenizer.feed((token,)) for token in tokens), detokenizer.finish()])
    assert num_decoded < 60 * len(tokens)
    assert text.startswith("好")
    assert text.endswith("é🙂 end")
    shown_whole = [c for c in skipping_decode(tokens) if c != "\ufffd"]
    assert [c for c in text if c != "\ufffd"] == shown_whole
