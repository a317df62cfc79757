"""`LLM` on a tiny random model: what users type, what they get, and what they are told when it cannot be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.fixtures.tiny_models import load_oracle
from xllm_core import LLM, SamplingParams
from xllm_core.errors import (
    ConfigError,
    InvalidRequestError,
    ModelNotFoundError,
    PromptTooLongError,
    RequestTooLargeError,
)

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_model: str) -> Iterator[LLM]:
    with LLM(tiny_model, dtype="float32", memory_bytes=1 << 24, max_num_seqs=16) as it:
        yield it


def test_greedy_equals_transformers(llm: LLM, tiny_model: str) -> None:
    """Token for token, alone and batched."""
    prompts = [[5, 6, 7], list(range(10, 90)), [200], [9] * 33]
    oracle = load_oracle(llm.info.model)
    want = []
    for prompt in prompts:
        with torch.inference_mode():
            out = oracle.generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        want.append(out[0, len(prompt) :].tolist())
    together = [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)]
    alone = [llm.generate(p, GREEDY)[0].outputs[0].token_ids for p in prompts]
    assert together == want
    assert alone == want


def test_logprobs_are_those_of_the_model(llm: LLM) -> None:
    """Chosen and likeliest tokens, for output and prompt, against one plain forward of transformers. Red if taken after temperature."""
    prompt = list(range(20, 40))
    params = SamplingParams(temperature=1.5, max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2, seed=1)
    out = llm.generate(prompt, params)[0]
    tokens = out.outputs[0].token_ids
    oracle = load_oracle(llm.info.model)
    with torch.inference_mode():
        scores = oracle(torch.tensor([prompt + tokens])).logits[0].float().log_softmax(-1)
    assert out.outputs[0].logprobs is not None
    for i, (token, found) in enumerate(zip(tokens, out.outputs[0].logprobs, strict=True)):
        row = scores[len(prompt) + i - 1]
        assert found[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert found[token].rank == int((row > row[token]).sum()) + 1
        assert set(row.topk(3).indices.tolist()) <= set(found)
    assert out.prompt_logprobs is not None
    assert out.prompt_logprobs[0] is None
    assert len(out.prompt_logprobs) == len(prompt)
    for i in range(1, len(prompt)):
        entry = out.prompt_logprobs[i]
        assert entry is not None
        assert entry[prompt[i]].logprob == pytest.approx(float(scores[i - 1, prompt[i]]), abs=1e-4)


def test_prompt_logprobs_survive_chunks_and_cache(tiny_model: str) -> None:
    """Every position is reported once, in order, whatever the chunks. Red if the prefix cache is read, or a chunk's border is lost."""
    prompt = list(range(20, 70))
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0, ignore_eos=True)
    with (
        LLM(tiny_model, dtype="float32", memory_bytes=1 << 24) as whole,
        LLM(tiny_model, dtype="float32", memory_bytes=1 << 24, max_chunk_tokens=7) as cut,
    ):
        one = whole.generate([prompt], params)[0].prompt_logprobs
        again = whole.generate([prompt], params)[0].prompt_logprobs
        two = cut.generate([prompt], params)[0].prompt_logprobs
    assert one is not None and two is not None and again is not None
    for other in (two, again):
        assert len(one) == len(other) == len(prompt)
        for token, a, b in zip(prompt[1:], one[1:], other[1:], strict=True):
            assert a is not None and b is not None
            assert a[token].logprob == pytest.approx(b[token].logprob, abs=1e-4)


def test_prompt_in_any_form(llm: LLM) -> None:
    """Text, ids, mappings; one or several; the text's ids are the tokenizer's."""
    text = "Grüße, 世界"
    ids = llm.get_tokenizer().encode(text)
    answers = [
        llm.generate(text, GREEDY)[0], llm.generate([text], GREEDY)[0], llm.generate(ids, GREEDY)[0],
        llm.generate({"prompt": text}, GREEDY)[0], llm.generate([{"prompt_token_ids": ids}], GREEDY)[0],
    ]  # fmt: skip
    assert len({tuple(a.outputs[0].token_ids) for a in answers}) == 1
    assert {a.prompt for a in answers} == {text, None}
    assert all(a.prompt_token_ids == ids and a.finished for a in answers)


def test_text_is_the_tokens_text(llm: LLM) -> None:
    """The pieces add up to what the tokenizer makes of all tokens."""
    out = llm.generate(
        "hello", SamplingParams(temperature=1.0, seed=3, max_tokens=60, ignore_eos=True, skip_special_tokens=False)
    )[0].outputs[0]
    assert out.text == llm.get_tokenizer().decode(out.token_ids, skip_special_tokens=False)
    assert out.finish_reason == "length"


def test_n_gives_distinct_seeded_answers_that_repeat(llm: LLM) -> None:
    """n sequences of one seed differ from each other and come back the same. Red if forks share their noise."""
    params = SamplingParams(n=4, temperature=1.5, seed=11, max_tokens=10, ignore_eos=True)
    first, second = llm.generate("abc", params)[0], llm.generate("abc", params)[0]
    texts = [tuple(o.token_ids) for o in first.outputs]
    assert len(set(texts)) == 4
    assert texts == [tuple(o.token_ids) for o in second.outputs]
    assert [o.index for o in first.outputs] == [0, 1, 2, 3]


def test_resume_from_emitted_tokens(llm: LLM) -> None:
    """Prompt plus tokens already said continues exactly there: penalties, seed, limit. Red if the emitted tokens count as prompt."""
    params = SamplingParams(
        temperature=1.0, seed=5, max_tokens=20, ignore_eos=True, frequency_penalty=1.0, repetition_penalty=1.2
    )
    whole = llm.generate("resume", params)[0].outputs[0]
    cut = llm.generate({"prompt": "resume", "emitted_token_ids": whole.token_ids[:9]}, params)[0].outputs[0]
    assert cut.token_ids == whole.token_ids
    assert cut.text == whole.text
    assert cut.finish_reason == "length"


def test_stops(llm: LLM) -> None:
    """A stop string cuts the text and ends the sequence; a stop token ends it and stays among the ids; min_tokens holds both back."""
    free = llm.generate("stops", SamplingParams(temperature=1.0, seed=2, max_tokens=40, ignore_eos=True))[0].outputs[0]
    stop = next(free.text[i : i + 2] for i in range(6, len(free.text) - 2) if free.text.find(free.text[i : i + 2]) == i)
    cut = llm.generate("stops", SamplingParams(temperature=1.0, seed=2, max_tokens=40, ignore_eos=True, stop=stop))[
        0
    ].outputs[0]
    assert cut.text == free.text[: free.text.find(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    token = free.token_ids[4]
    at = free.token_ids.index(token)
    ended = llm.generate(
        "stops", SamplingParams(temperature=1.0, seed=2, max_tokens=40, ignore_eos=True, stop_token_ids=[token])
    )[0].outputs[0]
    assert ended.token_ids == free.token_ids[: at + 1]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", token)
    held = llm.generate(
        "stops",
        SamplingParams(temperature=1.0, seed=2, max_tokens=40, ignore_eos=True, stop_token_ids=[token], min_tokens=30),
    )[0].outputs[0]
    assert len(held.token_ids) >= 30
    assert token not in held.token_ids[:30]


def test_allowed_tokens_and_bias(llm: LLM) -> None:
    """Only what is allowed comes out; a bias of 100 wins."""
    allowed = llm.generate(
        "x", SamplingParams(temperature=1.0, max_tokens=20, allowed_token_ids=[10, 11, 12], ignore_eos=True)
    )[0].outputs[0]
    assert set(allowed.token_ids) <= {10, 11, 12}
    biased = llm.generate("x", SamplingParams(temperature=0, max_tokens=5, logit_bias={42: 100.0}, ignore_eos=True))[
        0
    ].outputs[0]
    assert biased.token_ids == [42] * 5


def test_chat_renders_the_template(llm: LLM) -> None:
    """The prompt is the template's text, with special tokens as single ids."""
    out = llm.chat([{"role": "user", "content": "hi"}], GREEDY)[0]
    assert llm.get_tokenizer().decode(out.prompt_token_ids, skip_special_tokens=False) == "<|user|>hi</s><|assistant|>"
    several = llm.chat([[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]], GREEDY)
    assert len(several) == 2


def test_prefix_is_cached(llm: LLM) -> None:
    """The second request on a prefix reports what it did not compute."""
    prompt = [7, 8, 9] * 30
    llm.generate([prompt], GREEDY)
    again = llm.generate([prompt], GREEDY)[0]
    assert again.num_cached_tokens >= 80


@pytest.mark.parametrize(
    ("prompt", "params", "error", "words"),
    [
        ("", GREEDY, InvalidRequestError, "prompt is empty"),
        ([[]], GREEDY, InvalidRequestError, "prompt is empty"),
        ([[1, 9999]], GREEDY, InvalidRequestError, "token id 9999.*0..263"),
        ([[1, -1]], GREEDY, InvalidRequestError, "token id -1"),
        ([[1, 2.5]], GREEDY, InvalidRequestError, "text or a list of token ids"),
        ([list(range(100)) * 6], GREEDY, PromptTooLongError, "600 tokens.*512"),
        ("abc", SamplingParams(max_tokens=10**9), InvalidRequestError, "1000000000 exceeds the context of 512"),
        ("abc", SamplingParams(temperature=float("nan")), InvalidRequestError, "temperature = nan"),
        ("abc", SamplingParams(max_tokens=0), InvalidRequestError, "max_tokens = 0"),
        ("abc", SamplingParams(n=17), InvalidRequestError, "n = 17.*16"),
        ("abc", SamplingParams(min_tokens=20, max_tokens=10), InvalidRequestError, "min_tokens = 20 exceeds"),
        ({"prompt": "a", "prompt_token_ids": [1]}, GREEDY, InvalidRequestError, "either prompt or prompt_token_ids"),
        ({"promt": "a"}, GREEDY, InvalidRequestError, "promt"),
        (7, GREEDY, InvalidRequestError, "prompts are a text"),
        ({"prompt": "a", "priority": "high"}, GREEDY, InvalidRequestError, "priority = 'high'"),
        ({"prompt": "a", "emitted_token_ids": "abc"}, GREEDY, InvalidRequestError, "emitted_token_ids are lists"),
        ({"prompt": "a", "emitted_token_ids": [[1], [2]]}, GREEDY, InvalidRequestError, "2 sequences for n = 1"),
    ],
)
def test_bad_requests_are_refused_and_disturb_nobody(
    llm: LLM, prompt: object, params: SamplingParams, error: type[Exception], words: str
) -> None:
    """A message with what, which number and what to do; the engine is empty afterwards and answers the next request as before."""
    before = llm.generate("canary", GREEDY)[0].outputs[0].token_ids
    with pytest.raises(error, match=words):
        llm.generate(prompt, params)  # type: ignore[arg-type]
    assert not llm.processor.client.has_work or not llm.processor._states
    assert llm.generate("canary", GREEDY)[0].outputs[0].token_ids == before


def test_one_bad_prompt_refuses_the_call_and_frees_its_neighbours(llm: LLM) -> None:
    """All or nothing: what was queued before the bad prompt is dropped again."""
    with pytest.raises(InvalidRequestError):
        llm.generate(["good", "also good", ""], GREEDY)
    assert llm.generate("good", GREEDY)[0].finished


def test_a_request_too_large_for_the_pool_is_refused_with_both_numbers(tiny_model: str) -> None:
    """It could never run, so it must not wait."""
    with LLM(tiny_model, num_blocks=4, block_size=16) as llm:
        with pytest.raises(
            RequestTooLargeError, match=r"prompt 60 \+ max_tokens 30 exceeds the KV pool of 64.*lower max_tokens to 5"
        ):
            llm.generate([[3] * 60], SamplingParams(max_tokens=30))
        assert len(llm.generate([[3] * 60], SamplingParams(max_tokens=5, ignore_eos=True))[0].outputs[0].token_ids) == 5


def test_unknown_models_say_what_was_tried() -> None:
    """A message, not a traceback of a library."""
    with pytest.raises(ModelNotFoundError, match="/no/such/model"):
        LLM("/no/such/model")
    with pytest.raises(ConfigError, match=r"max_num_seq.*did you mean 'max_num_seqs'"):
        LLM("/no/such/model", max_num_seq=3)
