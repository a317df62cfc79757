"""`LLM` on a tiny random model: what users type, what they get, and what they are told when it cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.fixtures.tiny_models import load_oracle
from xllm_core import LLM, SamplingParams
from xllm_core.errors import (
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    ModelNotFoundError,
    PromptTooLongError,
    RequestTooLargeError,
)

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def live_sequences(llm: LLM) -> dict[str, Any]:
    """What the engine still has to do, by request."""
    return llm.processor.client.engine.scheduler.live_sequences()  # type: ignore[attr-defined]


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
        (b"abc", GREEDY, InvalidRequestError, "prompts are a text.*b'abc'"),
        ("a\ud800", GREEDY, InvalidRequestError, "prompt holds .* at character 1, which is not valid Unicode"),
        ("abc", {"temperature": 0}, InvalidRequestError, "SamplingParams or a list of them, got dict"),
        (["a", "b"], [GREEDY, None], InvalidRequestError, "a SamplingParams, got NoneType"),
        ("abc", [GREEDY] * 2, InvalidRequestError, "2 sampling parameters for 1 prompts"),
        ("abc", SamplingParams(min_tokens=600, max_tokens=None), InvalidRequestError, "min_tokens = 600.*to 509"),
        (["fine", [3] * 511 + [4] * 9], GREEDY, PromptTooLongError, r"prompts\[1\]"),
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
    assert live_sequences(llm) == {}
    assert llm.generate("canary", GREEDY)[0].outputs[0].token_ids == before


def test_one_bad_prompt_refuses_the_call_and_frees_its_neighbours(llm: LLM) -> None:
    """All or nothing: what was queued before the bad prompt is dropped again."""
    with pytest.raises(InvalidRequestError):
        llm.generate(["good", "also good", ""], GREEDY)
    assert live_sequences(llm) == {}
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


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ({"role": "user", "content": "x"}, "a conversation is a list like"), (None, "got None"), ([], r"not empty, got \[\]"), ("hi", "got 'hi'"),
        ([[]], "not empty"), ([{"role": "user"}], r"messages\[0\] has neither"), ([{"role": "user", "content": 5}], "must be a text or a list"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": None}], r"messages\[1\] has neither"),
        ([{"role": "user", "content": "\ud83d"}], "messages holds .* not valid Unicode"), ([[{"role": "user", "content": "x"}], None], "got None"),
    ],
)  # fmt: skip
def test_bad_conversations_are_refused(llm: LLM, messages: Any, words: str) -> None:
    """Red if `chat([])` returns nothing, or a mapping is taken for several conversations."""
    with pytest.raises(InvalidRequestError, match=words):
        llm.chat(messages, GREEDY)


def test_arrays_are_token_ids(llm: LLM) -> None:
    """Rows of an array are prompts. Red if only lists of `int` pass."""
    ids = np.array([[5, 6, 7], [8, 9, 10]])
    want = [o.outputs[0].token_ids for o in llm.generate(ids.tolist(), GREEDY)]
    assert [o.outputs[0].token_ids for o in llm.generate(list(ids), GREEDY)] == want
    assert llm.generate(ids[0], GREEDY)[0].outputs[0].token_ids == want[0]  # type: ignore[arg-type]


def test_more_prompts_than_may_wait(tiny_model: str) -> None:
    """The queue's bound is no bound on a call. Red if QueueFullError comes through."""
    prompts = [[3 + i, 5, 7] for i in range(20)]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with LLM(tiny_model, dtype="float32", memory_bytes=1 << 24, max_waiting=2, max_num_seqs=3) as llm:
        narrow = llm.generate(prompts, params)
        with pytest.raises(PromptTooLongError, match=r"prompts\[19\]"):
            llm.generate([*prompts[:19], [3] * 512], params)
        assert live_sequences(llm) == {}
    with LLM(tiny_model, dtype="float32", memory_bytes=1 << 24) as llm:
        wide = llm.generate(prompts, params)
    assert [o.outputs[0].token_ids for o in narrow] == [o.outputs[0].token_ids for o in wide]
    assert [o.prompt_token_ids for o in narrow] == prompts


def test_a_closed_model_says_so(tiny_model: str) -> None:
    """Red if a closed engine is stepped, or closed again."""
    llm = LLM(tiny_model, dtype="float32", memory_bytes=1 << 24)
    llm.close()
    llm.close()
    for ask in (
        lambda: llm.generate("x"),
        lambda: llm.chat([{"role": "user", "content": "x"}]),
        lambda: llm.generate([]),
    ):
        with pytest.raises(EngineDeadError, match="closed"):
            ask()
    with pytest.raises(EngineDeadError, match="closed"):
        llm.processor.submit("x", GREEDY)


def test_a_stop_string_ends_its_own_sequence(llm: LLM) -> None:
    """n > 1: the others go on to their length, as without the stop. Red if the whole request is aborted."""
    params = SamplingParams(n=4, temperature=1.5, seed=11, max_tokens=30, ignore_eos=True, skip_special_tokens=False)
    free = llm.generate("abc", params)[0].outputs
    texts = [o.text for o in free]
    stop = next(
        texts[0][i : i + 2]
        for i in range(8, len(texts[0]) - 2)
        if all(texts[0][i : i + 2] not in other for other in texts[1:])
    )
    cut = llm.generate("abc", replace(params, stop=[stop]))[0].outputs
    assert (cut[0].text, cut[0].finish_reason, cut[0].stop_reason) == (texts[0].split(stop)[0], "stop", stop)
    assert [(o.text, o.finish_reason) for o in cut[1:]] == [(text, "length") for text in texts[1:]]
    assert live_sequences(llm) == {}


def test_a_resumed_answer_stops_where_the_whole_one_did(llm: LLM) -> None:
    """The stop string lies across the border, or before it. Red if emitted text passes the stop strings by."""
    params = SamplingParams(temperature=1.0, seed=2, max_tokens=40, ignore_eos=True, skip_special_tokens=False)
    free = llm.generate("stops", params)[0].outputs[0]
    stop = next(
        free.text[i : i + 3]
        for i in range(6, 30)
        if free.text.find(free.text[i : i + 3]) == i and free.text[i : i + 3].isascii()
    )
    params = replace(params, stop=stop, logprobs=0)
    whole = llm.generate("stops", params)[0].outputs[0]
    assert whole.finish_reason == "stop"
    for num_emitted in range(len(whole.token_ids) - 4, len(whole.token_ids)):
        cut = llm.generate({"prompt": "stops", "emitted_token_ids": free.token_ids[:num_emitted]}, params)[0].outputs[0]
        assert (cut.text, cut.token_ids, cut.stop_reason) == (whole.text, whole.token_ids, stop)
        assert cut.logprobs is not None and whole.logprobs is not None
        assert cut.logprobs[:num_emitted] == [None] * num_emitted
        assert [list(e or ()) for e in cut.logprobs[num_emitted:]] == [
            list(e or ()) for e in whole.logprobs[num_emitted:]
        ]
    with pytest.raises(InvalidRequestError, match="nothing to resume"):
        llm.generate({"prompt": "stops", "emitted_token_ids": free.token_ids}, params)
    assert live_sequences(llm) == {}
    two = llm.generate({"prompt": "stops", "emitted_token_ids": [free.token_ids[:-1], [5]]}, replace(params, n=2))[0]
    assert (two.outputs[0].text, two.outputs[0].finish_reason) == (whole.text, "stop")
    assert len(two.outputs[1].token_ids) > 1


def test_prompt_logprobs_with_several_answers(llm: LLM) -> None:
    """Reported once, whatever n. Red if every sequence reports them."""
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=3, prompt_logprobs=1, ignore_eos=True)
    prompt = list(range(20, 60))
    one = llm.generate(prompt, params)[0].prompt_logprobs
    three = llm.generate(prompt, replace(params, n=3))[0]
    assert one is not None and three.prompt_logprobs is not None
    assert len(three.prompt_logprobs) == len(prompt)
    for token, a, b in zip(prompt[1:], one[1:], three.prompt_logprobs[1:], strict=True):
        assert a is not None and b is not None
        assert a[token].logprob == pytest.approx(b[token].logprob, abs=1e-4)
    assert len(three.outputs) == 3
