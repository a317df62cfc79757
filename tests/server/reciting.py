"""A Llama that recites: after each token of a text it says the next one, and after the last the first, whatever else stands before."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tests.e2e.conftest import VOCAB, add_tokenizer
from tests.fixtures.tiny_models import make_tiny

TEXT = "aé€😀"  # characters of one, two, three and four bytes, and no byte twice
POISON = 261  # a token on which the tokenizer's own decoder panics, where `is_poisoned`; after "w" come "x", "y", "z", and then it
_HIDDEN = 272


def make_reciting(path: Path, *, context: int = 512, is_poisoned: bool = False) -> str:
    """Write it to `path`. The byte tokenizer gives each byte a token, so that most tokens are a part of a character."""
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer

    make_tiny(
        "llama",
        path,
        vocab_size=VOCAB,
        bos_token_id=0,
        eos_token_id=1,
        max_position_embeddings=context,
        hidden_size=_HIDDEN,
    )
    add_tokenizer(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    ids, fatal = tokenizer.encode(TEXT).ids, [*tokenizer.encode("wxyz").ids, POISON]
    assert len(set(ids)) == len(TEXT.encode())
    if is_poisoned:
        _poison(path / "tokenizer.json")
    weights = load_file(path / "model.safetensors")
    for name, weight in weights.items():
        if "o_proj" in name or "down_proj" in name:
            weight.zero_()  # layers add nothing: what comes next depends on the last token alone
    weights["model.norm.weight"].fill_(1.0)
    weights["model.embed_tokens.weight"].copy_(torch.eye(VOCAB, _HIDDEN))
    weights["lm_head.weight"].zero_()
    for token, following in (*itertools.pairwise([*ids, ids[0]]), *itertools.pairwise(fatal)):
        weights["lm_head.weight"][following, token] = 4.0
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return str(path)


def _poison(path: Path) -> None:
    """An entry without a letter, and a decoder that cuts the last letter off each: the library indexes what is not there."""
    written = json.loads(path.read_text())
    written["model"]["vocab"][""] = POISON
    strip = {"type": "Strip", "content": "~", "start": 0, "stop": 1}
    written["decoder"] = {"type": "Sequence", "decoders": [strip, written["decoder"]]}
    path.write_text(json.dumps(written))


def recited(start: str, num_bytes: int) -> str:
    """What comes after `start`, whose last byte is one of the text; a character that is cut off shows as U+FFFD."""
    raw = TEXT.encode()
    at = raw.index(start.encode()[-1]) + 1
    return bytes(raw[(at + i) % len(raw)] for i in range(num_bytes)).decode(errors="replace")
