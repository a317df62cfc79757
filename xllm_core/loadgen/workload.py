"""What is asked of a server and when: lengths, arrivals and prompts. Everything follows from the seed and from the trace."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from xllm_core.errors import ConfigError

TRACE_BLOCK_TOKENS = 512
"""Prompt tokens behind one id of `hash_ids` in Mooncake's traces."""

WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you "
    "were all her she there would their we him been has when who will no more if out so up said what its about than into them "
    "can only other time new some could these two may first then do any like my now over such our man me even most made after "
    "also well many must before through years where much your way down should because long each just state those people too "
    "how little good world make very year still see work own such get here between both under never day same another know "
    "while last might us great old off come since go against came right used take three himself few house use place during "
    "high without again home around small found thought went say part once general school upon left every got number course"
).split()
"""Common words: about one token each with the usual tokenizers."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request before it has a prompt.

    due_s: when it is to be sent, seconds after the start; None if a client sends it as soon as it is free.
    prefix: (id, tokens) of blocks that the prompt begins with; equal ids stand for equal tokens.
    """

    index: int
    input_tokens: int
    output_tokens: int
    due_s: float | None = None
    prefix: tuple[tuple[int, int], ...] = ()


def fixed_lengths(num_requests: int, input_tokens: int, output_tokens: int) -> list[Ask]:
    """Requests that are all alike, but for their prompts."""
    return [Ask(index, input_tokens, output_tokens) for index in range(num_requests)]


def poisson(asks: Sequence[Ask], rate: float, seed: int) -> list[Ask]:
    """The same requests, arriving on their own: `rate` per second in the mean, with exponential gaps, the first at 0."""
    gaps = np.random.default_rng([seed, 1]).exponential(1.0 / rate, len(asks))
    dues = np.cumsum(gaps) - (gaps[0] if len(asks) else 0.0)
    return [replace(ask, due_s=float(due)) for ask, due in zip(asks, dues, strict=True)]


def read_trace(
    path: Path, *, num_requests: int | None = None, length_factor: float = 1.0, time_factor: float = 1.0
) -> list[Ask]:
    """The first `num_requests` rows of a trace, their lengths and arrival times multiplied by the factors; a length is at least 1.

    Formats: .csv with TIMESTAMP, ContextTokens, GeneratedTokens (Azure's), or .jsonl with timestamp in milliseconds,
    input_length, output_length and hash_ids (Mooncake's), where equal ids mean equal prefixes. Raises ConfigError.
    """
    readers: dict[str, Callable[[str], Ask]] = {".csv": _azure_row, ".jsonl": _mooncake_row}
    reader = readers.get(path.suffix)
    if reader is None:
        raise ConfigError(f"--trace {path}: the name must end in .csv (Azure's format) or .jsonl (Mooncake's)")
    asks: list[Ask] = []
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            for number, line in enumerate(lines, start=1):
                if num_requests is not None and len(asks) >= num_requests:
                    break
                if not line.strip() or (path.suffix == ".csv" and number == 1):
                    continue
                asks.append(_read_row(reader, line, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from error
    if not asks:
        raise ConfigError(f"--trace {path}: there is no request in it")
    start_s = asks[0].due_s or 0.0
    return [_scaled(ask, index, start_s, length_factor, time_factor) for index, ask in enumerate(asks)]


def check_context(asks: Sequence[Ask], max_model_len: int, length_factor: float | None = None) -> None:
    """Raise ConfigError if a request cannot fit the model's context; length_factor: that of a trace, so that a fitting one can be named."""
    longest = max(ask.input_tokens + ask.output_tokens for ask in asks)
    if longest <= max_model_len:
        return
    num_long = sum(ask.input_tokens + ask.output_tokens > max_model_len for ask in asks)
    fix = "lower --input-len or --output-len"
    if length_factor is not None:
        fix = f"try --length-factor {length_factor * (max_model_len - 2) / longest:.3g}"
    raise ConfigError(
        f"{num_long} of {len(asks)} requests are longer than the model's context of {max_model_len} tokens, the longest"
        f" has {longest} with its answer; {fix}"
    )


@dataclass(frozen=True, slots=True)
class Prompts:
    """Makes prompts. The same seed and request give the same prompt in every process; equal prefix ids give equal beginnings.

    Ids lie in [low, high): special tokens of most models are the first few, or the last.
    """

    seed: int
    low: int
    high: int

    @classmethod
    def of_vocabulary(cls, seed: int, vocab_size: int) -> Prompts:
        """Leave out the first ten ids where there are enough."""
        return cls(seed, min(10, vocab_size // 2), vocab_size)

    def ids(self, ask: Ask) -> list[int]:
        """Random token ids, as many as the request asks for."""
        parts = [self._draw(2, block, tokens) for block, tokens in ask.prefix]
        num_own = ask.input_tokens - sum(tokens for _, tokens in ask.prefix)
        ids: list[int] = np.concatenate([*parts, self._draw(3, ask.index, num_own)]).tolist()
        return ids

    def text(self, ask: Ask) -> str:
        """Random common words, as many as the request has tokens; how many tokens they are, the server says."""
        return " ".join(WORDS[token % len(WORDS)] for token in self.ids(ask))

    def _draw(self, stream: int, number: int, tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.random.default_rng([self.seed, stream, number]).integers(self.low, self.high, tokens)


def _read_row(reader: Callable[[str], Ask], line: str, place: str) -> Ask:
    try:
        ask = reader(line)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{place}: not a row of such a trace: {type(error).__name__}: {error}") from error
    is_whole = all(block >= 0 and tokens > 0 for block, tokens in ask.prefix)
    if not is_whole or ask.output_tokens < 0 or ask.input_tokens < sum(tokens for _, tokens in ask.prefix):
        raise ConfigError(f"{place}: lengths do not fit together: {line.strip()[:200]}")
    return ask


def _azure_row(line: str) -> Ask:
    moment, context, generated = next(csv.reader([line]))
    head, _, fraction = moment.partition(".")  # seven digits, one more than datetime reads
    seconds = datetime.fromisoformat(f"{head}+00:00").timestamp() + float(f"0.{fraction or 0}")
    return Ask(0, int(context), int(generated), seconds)


def _mooncake_row(line: str) -> Ask:
    row = json.loads(line)
    length, ids = int(row["input_length"]), row.get("hash_ids", [])
    ends = [min(length, (i + 1) * TRACE_BLOCK_TOKENS) for i in range(len(ids))]
    prefix = tuple(
        (int(block), end - i * TRACE_BLOCK_TOKENS) for i, (block, end) in enumerate(zip(ids, ends, strict=True))
    )
    return Ask(0, length, int(row["output_length"]), float(row["timestamp"]) / 1e3, prefix)


def _scaled(ask: Ask, index: int, start_s: float, length_factor: float, time_factor: float) -> Ask:
    """Blocks are cut at scaled positions, so that equal prefixes stay equal and the lengths add up exactly."""
    tokens = max(1, round(ask.input_tokens * length_factor))
    prefix, begin, end = [], 0, 0
    for block, size in ask.prefix:
        end += size
        stop = min(tokens, round(end * length_factor))
        prefix.append((block, stop - begin))
        begin = stop
    return Ask(
        index, tokens, max(1, round(ask.output_tokens * length_factor)), ((ask.due_s or 0.0) - start_s) * time_factor,
        tuple(prefix),
    )  # fmt: skip
