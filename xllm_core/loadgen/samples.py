"""What was measured of one request, and the arithmetic on it. Times are seconds; nothing here reads a clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Outcome = Literal["unfinished", "ok", "failed"]
ErrorKind = Literal["", "connect", "disconnect", "timeout", "http", "stream", "protocol"]


@dataclass(slots=True)
class Sample:
    """One request as its client saw it.

    sent_s: when the request had been written, after the start of the run; None if it never was. due_s: when it should have been.
    chunk_s: arrival of each chunk with text or tokens, after sent_s; what came in one read has one time.
    end_s: the end of the answer, after sent_s. status: of HTTP, 0 if there was none.
    prompt_tokens, cached_tokens, output_tokens: by the server's usage; None if it sent none.
    """

    index: int
    asked_input_tokens: int
    asked_output_tokens: int
    due_s: float | None = None
    sent_s: float | None = None
    chunk_s: list[float] = field(default_factory=list)
    end_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    outcome: Outcome = "unfinished"
    error: ErrorKind = ""
    status: int = 0
    message: str = ""

    @property
    def num_tokens(self) -> int:
        """New tokens; without usage every chunk counts as one."""
        return len(self.chunk_s) if self.output_tokens is None else self.output_tokens

    @property
    def ttft_s(self) -> float | None:
        """Request written → first chunk with text or token."""
        return self.chunk_s[0] if self.chunk_s else None

    @property
    def tpot_s(self) -> float | None:
        """(last chunk - first chunk) / (tokens - 1); None for answers of one token."""
        if not self.chunk_s or self.num_tokens < 2:
            return None
        return (self.chunk_s[-1] - self.chunk_s[0]) / (self.num_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Times between chunks. A server that sends several tokens in a chunk has fewer and longer ones."""
        return [later - earlier for earlier, later in zip(self.chunk_s, self.chunk_s[1:], strict=False)]

    @property
    def lag_s(self) -> float | None:
        """How late the client itself was."""
        return None if self.due_s is None or self.sent_s is None else self.sent_s - self.due_s

    def to_json(self) -> dict[str, Any]:
        """Plain data; times to the microsecond."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        for name in ("due_s", "sent_s", "end_s"):
            plain[name] = None if plain[name] is None else round(plain[name], 6)
        return plain | {"chunk_s": [round(moment, 6) for moment in self.chunk_s]}
