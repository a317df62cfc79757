"""Real weights: the demo model against transformers on the same file, the matrix, and the command line as a stranger types it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from xllm_core import LLM, SamplingParams
from xllm_core.testing.prose import PROSE
from xllm_core.testing.verify import MARGINS

pytestmark = pytest.mark.slow

PROMPTS = [
    "The capital of France is", "Once upon a time, in a small village by the sea,", "def quicksort(values):\n", "1 2 3 4 5 6 7 8",
    "The three laws of thermodynamics are:\n1.", "Dear Sir or Madam,\n\nI am writing to", "Q: What is 17 + 25?\nA:",
    "import numpy as np\n\ndef softmax(x):\n    ", "人工智能的未来是", "请用一句话介绍北京:", "SELECT name, COUNT(*) FROM orders",
    "<html>\n<head>\n<title>", "In 1969, the first", "To be, or not to be,", "Ingredients: 200 g flour, 3 eggs,",
    "The mitochondria is", "x² + 2x + 1 =", "Translate to French: good morning ->", "!@#$%^&*()", "A",
]  # fmt: skip
NEW_TOKENS = 64
LONG = 600


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def llm(demo_model: str, dtype: str) -> Iterator[LLM]:
    with LLM(demo_model, dtype=dtype, max_num_seqs=32, num_blocks=1024, enable_prefix_cache=False) as it:
        yield it


class Oracle:
    """The same file, unpacked by transformers itself; one model per dtype, loaded when it is first asked."""

    def __init__(self, package: str) -> None:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        (self.path,) = Path(spec.origin).parent.glob("*.gguf")
        self._models: dict[str, Any] = {}

    def margins(self, prompt: list[int], said: list[int], dtype: str) -> list[float]:
        """One teacher-forced pass: how far below the argmax each token lies."""
        from transformers import AutoModelForCausalLM, GgufConfig

        if dtype not in self._models:
            config = GgufConfig(dequantize=True)
            self._models[dtype] = AutoModelForCausalLM.from_pretrained(
                self.path.parent, gguf_file=self.path.name, dtype=getattr(torch, dtype), quantization_config=config
            ).eval()
        with torch.inference_mode():
            logits = self._models[dtype](torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1].float()
        return [float(row.max() - row[token]) for row, token in zip(logits, said, strict=True)]


@pytest.fixture(scope="module")
def oracle(demo_model: str) -> Oracle:
    return Oracle(demo_model.removeprefix("pkg:"))


@pytest.fixture(scope="module")
def prompts(llm: LLM) -> list[list[int]]:
    """Twenty: short ones in several languages and in code, and one of 600 tokens."""
    encode = llm.get_tokenizer().encode
    long = encode(PROSE * 2)[:LONG]
    assert len(long) == LONG
    return [*(encode(p) for p in PROMPTS[:-1]), long]


def assert_is_argmax(oracle: Oracle, prompt: list[int], said: list[int], dtype: str) -> tuple[int, int]:
    """Each token is the argmax or a near tie, which is printed. Returns (tokens, near ties).

    float32 judges first, being exact and fast; what it finds too far off in bfloat16 is for transformers in bfloat16 to judge.
    """
    margins = oracle.margins(prompt, said, "float32")
    if dtype != "float32" and max(margins) > MARGINS[dtype]:
        margins = oracle.margins(prompt, said, dtype)
    for i, margin in enumerate(margins):
        if margin > 0:
            print(f"near tie: prompt of {len(prompt)} tokens, token {i} lies {margin:.2g} below the argmax")
        assert margin <= MARGINS[dtype], (
            f"prompt {prompt[:8]}..., token {i}: {said[i]} lies {margin:.3g} below the argmax"
        )
    return len(said), sum(margin > 0 for margin in margins)


def assert_all_are_argmax(llm: LLM, oracle: Oracle, prompts: list[list[int]], dtype: str, *, is_together: bool) -> None:
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    answers = llm.generate(prompts, params) if is_together else [llm.generate([p], params)[0] for p in prompts]
    total = ties = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.outputs[0].token_ids) == NEW_TOKENS
        counted, tied = assert_is_argmax(oracle, prompt, answer.outputs[0].token_ids, dtype)
        total, ties = total + counted, ties + tied
    print(f"{total} tokens compared, {ties} near ties")
    assert total == len(prompts) * NEW_TOKENS
    assert ties <= total // (100 if dtype == "float32" else 10), (
        f"{ties} near ties in {total} tokens are too many to be chance"
    )


def test_greedy_tokens_are_the_argmax_of_transformers(
    llm: LLM, oracle: Oracle, prompts: list[list[int]], dtype: str
) -> None:
    """20 prompts together, 64 new tokens. Red if RoPE, the unpermuted q and k, the tied head, or one chunk border is wrong."""
    assert len(prompts) == 20
    assert_all_are_argmax(llm, oracle, prompts, dtype, is_together=True)


def test_alone_they_are_the_argmax_too(llm: LLM, oracle: Oracle, prompts: list[list[int]], dtype: str) -> None:
    """One request at a time: code, Chinese, and the long one. All twenty follow at night."""
    assert_all_are_argmax(llm, oracle, [prompts[2], prompts[8], prompts[-1]], dtype, is_together=False)


@pytest.mark.nightly
def test_all_twenty_alone(llm: LLM, oracle: Oracle, prompts: list[list[int]], dtype: str) -> None:
    """As above, every prompt by itself."""
    assert_all_are_argmax(llm, oracle, prompts, dtype, is_together=False)


def test_it_speaks_english(llm: LLM) -> None:
    """Real words, not only equal numbers."""
    answer = llm.chat(
        [{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0, max_tokens=20)
    )[0]
    assert "Paris" in answer.outputs[0].text
    assert answer.outputs[0].finish_reason == "stop"


def test_rendered_chats_equal_transformers(llm: LLM) -> None:
    """The same text from our sandbox and from transformers, with and without system prompt, several turns, odd characters."""
    from transformers import AutoTokenizer

    directory, name = os.path.split(llm.info.model)
    theirs = AutoTokenizer.from_pretrained(directory, gguf_file=name)
    chats: list[list[dict[str, str]]] = [
        [{"role": "user", "content": "Hello"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": '你好 <b>& "quotes"</b>\n\n'}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    ]
    assert llm.processor.template is not None
    for chat in chats:
        for is_open in (True, False):
            want = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=is_open)
            assert llm.processor.template.render(chat, add_generation_prompt=is_open) == want
