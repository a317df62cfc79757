"""Text to token ids and back, straight on the `tokenizers` library: no torch, no transformers, open in a tenth of a second."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer

from xllm_core.errors import IntegrityError, ModelFormatError
from xllm_core.plugins.contracts.weights import TokenizerFiles

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # what byte-fallback vocabularies call a byte


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level vocabularies (GPT-2's and all after it) write bytes."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTE_ALPHABET = _byte_alphabet()


class Tokenizer:
    """One model's tokenizer. Thread-safe, as the library is.

    eos_token_ids: what ends a sequence, by the model's own configuration. max_token_chars: of the longest token, so that a text of N
    characters has at least N / max_token_chars tokens.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        path = (
            files.tokenizer_json
            if files.tokenizer_json is not None
            else files.convert()
            if files.convert is not None
            else None
        )
        if path is None:
            raise ModelFormatError("the model has no tokenizer; give prompts as token ids")
        self._rust = _open(path)
        self.eos_token_ids = frozenset(files.eos_token_ids)
        self.vocab_size = self._rust.get_vocab_size(with_added_tokens=True)
        self._bos_id = self._rust.token_to_id(files.bos_token) if files.bos_token else None
        self._adds_bos = files.adds_bos
        self.max_token_chars = max((len(token) for token in self._rust.get_vocab()), default=1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. add_special_tokens: as the model wants them around a plain prompt; rendered chats bring their own."""
        try:
            ids: list[int] = self._rust.encode(text, add_special_tokens=add_special_tokens).ids
        except BaseException as error:
            raise _as_error(error, f"a text of {len(text)} characters") from error
        if add_special_tokens and self._adds_bos and self._bos_id is not None and ids[:1] != [self._bos_id]:
            return [self._bos_id, *ids]
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that form no character show as U+FFFD."""
        try:
            text: str = self._rust.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        except BaseException as error:
            raise _as_error(error, f"{len(token_ids)} token ids") from error
        return text

    def token_text(self, token_id: int) -> str:
        """One token by itself, as logprobs show it; special tokens included."""
        return self.decode((token_id,), skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, which may be part of a character: those of an answer's tokens add up to its text."""
        text = self.token_text(token_id)
        if "\ufffd" not in text:
            return text.encode()
        name: str = self._rust.id_to_token(token_id) or ""
        if found := _BYTE_TOKEN.fullmatch(name):
            return bytes.fromhex(found[1])
        if name and all(letter in _BYTE_ALPHABET for letter in name):
            return bytes(_BYTE_ALPHABET[letter] for letter in name)
        return text.encode()


def _as_error(error: BaseException, what: str) -> BaseException:
    """A panic inside the library is no `Exception`, and would end everything; it concerns one request."""
    if type(error).__name__ != "PanicException":  # the library does not export it
        return error
    return IntegrityError(f"the tokenizer failed on {what}: {error}; please report this with the model's name")


def _open(path: Path) -> RustTokenizer:
    try:
        return RustTokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
        raise ModelFormatError(
            f"{path}: not a tokenizer that the tokenizers library reads ({error}); get the file again"
        ) from error
