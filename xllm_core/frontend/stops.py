"""Stop strings in a stream of text, across the borders of its pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stopped:
    """Where a stop string ended the text: `text` may still be given out, `stop` is the string."""

    text: str
    stop: str


class StopStrings:
    """Holds back text that may be the beginning of a stop string. The stop that is complete first wins; of several at once, the longest.

    That rule, unlike "the one that begins first", gives the same answer however the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str], *, is_included: bool = False) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        self._is_included = is_included
        self._held = ""

    def feed(self, text: str) -> str | Stopped:
        """Add a piece; returns the text that can go out, or where it stopped (feed nothing more then)."""
        if not self._stops:
            return text
        text = self._held + text
        found = min(((at + len(s), -len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0), default=None)
        if found is not None:
            end, _, at, stop = found
            return Stopped(text[:end] if self._is_included else text[:at], stop)
        keep = max((self._overlap(text, s) for s in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when the sequence ended otherwise."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        for size in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:size]):
                return size
        return 0
