"""xllm.toml as tables, with the line and column of every key. `tomllib` parses; it keeps no positions, so a small scanner finds them."""

from __future__ import annotations

import bisect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from xllm_core.config_sources import KeyPath, Layer
from xllm_core.errors import ConfigError

_BLANK = re.compile(r"[ \t]*")
_BLANKS_AND_COMMENTS = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_KEY = re.compile(r"""[A-Za-z0-9_-]+|"(?:\\.|[^"\\\n])*"|'[^'\n]*'""")
_STRING = re.compile(
    r'''"""(?:\\.|[^\\])*?"""(?:"{0,2})|"(?:\\.|[^"\\\n])*"|'''  # up to two quotes may stand before the three that end it
    r"""'''.*?'''(?:'{0,2})|'[^'\n]*'""",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}#\n]+")  # numbers, booleans, dates; a date may hold a space


def read_toml(path: Path) -> Layer:
    """Tables and places ("FILE:LINE:COLUMN") of one file. Raises ConfigError if it cannot be read or is not TOML."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read settings from {path}: {error}; check the path given as --config") from error
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax_error(path, text, str(error))) from error
    spots = key_positions(text)
    return Layer(tables, {keys: f"{path}:{line}:{column}" for keys, (line, column) in spots.items()})


def key_positions(text: str) -> dict[KeyPath, tuple[int, int]]:
    """(line, column) of every key of a TOML document, both from 1; an element of an array has its index as key, "0", "1", ...

    text: a document that `tomllib` has accepted; what this returns for others means nothing.
    A table that is named in several places stands where it is named first.
    """
    text = text.replace("\r\n", "\n")
    scanner = _Scanner(text)
    scanner.document()
    starts = [0, *(match.end() for match in re.finditer("\n", text))]
    spots = {}
    for keys, offset in scanner.offsets.items():
        line = bisect.bisect_right(starts, offset)
        spots[keys] = (line, offset - starts[line - 1] + 1)
    return spots


class _Scanner:
    """Walks over a valid document and notes where keys begin. Values are stepped over, not understood."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.offsets: dict[KeyPath, int] = {}
        self._lengths: dict[KeyPath, int] = {}  # of the arrays of tables so far

    def document(self) -> None:
        table: KeyPath = ()
        while True:
            self._skip(_BLANKS_AND_COMMENTS)
            if self.at >= len(self.text):
                return
            if self.text[self.at] == "[":
                table = self._header()
            else:
                self._entry(table)

    def _header(self) -> KeyPath:
        is_array = self.text.startswith("[[", self.at)
        self.at += 2 if is_array else 1
        table: KeyPath = ()
        for part, offset in self._key():
            if table in self._lengths:
                table = (*table, str(self._lengths[table] - 1))  # [a.b] belongs to the last of [[a]]
            table = (*table, part)
            self.offsets.setdefault(table, offset)
        if is_array:
            index = self._lengths.get(table, 0)
            self._lengths[table] = index + 1
            table = (*table, str(index))
            self.offsets[table] = offset
        elif table in self._lengths:
            table = (*table, str(self._lengths[table] - 1))
        self.at += 2 if is_array else 1
        return table

    def _entry(self, table: KeyPath) -> None:
        for part, offset in self._key():
            table = (*table, part)
            self.offsets.setdefault(table, offset)
        self.at += 1  # the equals sign
        self._skip(_BLANK)
        self._value(table)

    def _key(self) -> Iterator[tuple[str, int]]:
        """Parts of a dotted key with their offsets; leaves the position at what follows."""
        while True:
            self._skip(_BLANK)
            offset = self.at
            raw = self._skip(_KEY)
            yield (tomllib.loads(f"key = {raw}")["key"] if raw[0] in "\"'" else raw), offset
            self._skip(_BLANK)
            if not self.text.startswith(".", self.at):
                return
            self.at += 1

    def _value(self, keys: KeyPath) -> None:
        first = self.text[self.at]
        if first in "\"'":
            self._skip(_STRING)
        elif first == "[":
            self._members(keys, "]")
        elif first == "{":
            self._members(keys, "}")
        else:
            self._skip(_SCALAR)

    def _members(self, keys: KeyPath, closing: str) -> None:
        """An array, or an inline table; commas part them, and may follow the last."""
        self.at += 1
        index = 0
        while True:
            self._skip(_BLANKS_AND_COMMENTS)
            if self.text[self.at] == closing:
                self.at += 1
                return
            if closing == "}":
                self._entry(keys)
            else:
                self.offsets[(*keys, str(index))] = self.at
                self._value((*keys, str(index)))
                index += 1
            self._skip(_BLANKS_AND_COMMENTS)
            if self.text[self.at] == ",":
                self.at += 1

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        if match is None:
            raise ValueError(f"not TOML at offset {self.at}: {self.text[self.at : self.at + 20]!r}")
        self.at = match.end()
        return match[0]


def _syntax_error(path: Path, text: str, message: str) -> str:
    """tomllib says "reason (at line 3, column 7)", or "(at end of document)"."""
    reason, _, where = message.rpartition(" (at ")
    if match := re.fullmatch(r"line (\d+), column (\d+)\)", where):
        line, column = int(match[1]), int(match[2])
    else:
        lines = text.replace("\r\n", "\n").split("\n")
        line, column = len(lines), len(lines[-1]) + 1
    return f"{path}:{line}:{column}: not valid TOML: {(reason or message)[:1].lower()}{(reason or message)[1:]}"
