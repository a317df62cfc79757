"""Token ids to text, as they come: no character is ever split, and the pieces add up to the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"
_MAX_HELD = 3  # an unfinished UTF-8 character has at most three bytes
_MAX_PENDING = 16  # tokens that brought no whole character; more are looked at no longer
_NUM_KEPT = _MAX_HELD + 1  # the last tokens, which may still be part of a character

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Text of one sequence. Decodes a short window again for each token, since a token's text depends on the tokens before it.

    decode: ids -> text, the tokenizer's own.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_context = 0  # leading ids of the window whose text is out already
        self._num_sent = 0  # characters of the window's text that are out

    def feed(self, token_ids: Sequence[int]) -> str:
        """Add tokens; returns the text that is certain now. What may still become part of a character is held back."""
        self._window.extend(token_ids)
        text = self._decode(self._window)
        held = min(_MAX_HELD, len(text) - len(text.rstrip(_BROKEN)))
        new = text[self._num_sent : len(text) - held]
        self._num_sent = max(self._num_sent, len(text) - held)
        if new and not held:
            # Everything is out: what came last becomes the context of what comes next.
            self._window = self._window[self._num_context :]
            self._num_context = len(self._window)
            self._num_sent = len(self._decode(self._window))
        elif len(self._window) - self._num_context > _MAX_PENDING:
            new += self._trim(text, held)
        return new

    def _trim(self, text: str, held: int) -> str:
        """Forget tokens of which nothing can come any more: special tokens that are not shown, or bytes that form no character.

        Without it every further token would decode all of them again. Returns what was held back and is now out of reach.
        """
        unsent = text[self._num_sent :]
        last = self._window[-_NUM_KEPT:] if held else []
        self._window = self._window[: self._num_context] + last
        kept = self._decode(self._window)
        if kept.endswith(unsent):
            self._num_sent = len(kept) - len(unsent)
            return ""
        self._num_sent = len(kept)
        return unsent

    def finish(self) -> str:
        """What was held back, at the end: bytes that never became a character show as U+FFFD."""
        new = self._decode(self._window)[self._num_sent :]
        self._num_sent += len(new)
        return new
