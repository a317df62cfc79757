"""Stop strings: the same cut however the text arrives."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_core.frontend.stops import Stopped, StopStrings


def play(pieces: list[str], stops: list[str], *, is_included: bool = False) -> tuple[str, str | None]:
    """(text given out, stop that ended it)."""
    checker, out = StopStrings(stops, is_included=is_included), ""
    for piece in pieces:
        fed = checker.feed(piece)
        if isinstance(fed, Stopped):
            return out + fed.text, fed.stop
        out += fed
    return out + checker.finish(), None


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("hello world", [], ("hello world", None)),
        ("hello world", ["wor"], ("hello ", "wor")),
        ("abcabd", ["abd"], ("abc", "abd")),
        ("aaab", ["aab"], ("a", "aab")),
        ("no stop here", ["xyz"], ("no stop here", None)),
        ("ends with wo", ["world"], ("ends with wo", None)),
        ("one\n\ntwo", ["\n\n", "two"], ("one", "\n\n")),
        ("xabX", ["abX", "b"], ("xa", "b")),
        ("问题:答案", [":"], ("问题", ":")),
    ],
)
def test_where_text_stops(text: str, stops: list[str], expected: tuple[str, str | None]) -> None:
    """Whole, and character by character. Red if nothing is held back, or if a held beginning is lost at the end."""
    assert play([text], stops) == expected
    assert play(list(text), stops) == expected


def test_included_stop_stays_in_the_text() -> None:
    """`include_stop_str_in_output` keeps the stop and nothing behind it."""
    assert play(["one, two, three"], [", t"], is_included=True) == ("one, t", ", t")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    text=st.text(alphabet="ab", max_size=20), stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=6),
)  # fmt: skip
def test_pieces_do_not_matter(text: str, stops: list[str], cuts: list[int]) -> None:
    """Any cutting of the text stops at the same place. Red under "the stop that begins first wins"."""
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert play(pieces, stops) == play([text], stops)
