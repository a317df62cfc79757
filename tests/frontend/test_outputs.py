"""`RequestState` and `Processor` where no engine need run: resumed texts, failures of one request, ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from xllm_core.errors import InvalidRequestError, QueueFullError
from xllm_core.frontend.client import EngineInfo
from xllm_core.frontend.outputs import RequestState
from xllm_core.frontend.processor import Processor
from xllm_core.types import EngineRequest, SamplingParams, TokenLogprobs, TokenOutput


class ByteTokenizer:
    """Token id = byte; id 0xFE cannot be decoded, as no id could in a damaged tokenizer."""

    eos_token_ids = frozenset({0})
    max_token_chars = 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if 0xFE in token_ids:
            raise ValueError("no such piece")
        return bytes(token_ids).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        return self.decode((token_id,))


class Recorder:
    """An engine that runs nothing and remembers what it was told. refusal: raised by the next submit."""

    has_work = True

    def __init__(self) -> None:
        self.submitted: list[EngineRequest] = []
        self.aborted: list[tuple[str, int | None]] = []
        self.refusal: BaseException | None = None

    def info(self) -> EngineInfo:
        return EngineInfo("m", "a", "float32", "cpu", 100, 256, 90, 10, 9)

    def check(self, request: EngineRequest) -> None: ...

    def submit(self, request: EngineRequest) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.submitted.append(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        self.aborted.append((request_id, index))

    def poll(self) -> list[TokenOutput]:
        return []

    def close(self) -> None: ...


@pytest.fixture
def engine() -> Recorder:
    return Recorder()


@pytest.fixture
def processor(engine: Recorder) -> Processor:
    return Processor(engine, ByteTokenizer(), None, {})  # type: ignore[arg-type]


def state(emitted: list[bytes], **params: Any) -> RequestState:
    request = EngineRequest("r", (1,), SamplingParams(**params), seed=0, emitted=[list(e) for e in emitted])
    return RequestState(request, None, ByteTokenizer())  # type: ignore[arg-type]


def test_a_stop_string_may_begin_in_emitted_tokens() -> None:
    """Red if emitted text passes the stop strings by."""
    aborted: list[tuple[str, int]] = []
    resumed = state([b"one ST"], stop="STOP")
    assert resumed.output.outputs[0].text == "one "
    for token in b"OP more":
        resumed.feed(TokenOutput("r", 0, (token,)), lambda request_id, index: aborted.append((request_id, index)))
    output = resumed.output.outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("one ", "stop", "STOP")
    assert bytes(output.token_ids) == b"one STOP"
    assert aborted == [("r", 0)]
    assert resumed.output.finished


def test_min_tokens_count_emitted_tokens() -> None:
    """A stop string before the minimum is text, in emitted tokens too. Red if they are all fed before they are counted."""
    assert state([b"a.b.c"], stop=".", min_tokens=2).output.outputs[0].text == "a.b"
    assert state([b"a.bc"], stop=".", min_tokens=2).output.outputs[0].finish_reason is None


def test_logprobs_of_a_resumed_answer_stand_beside_their_tokens() -> None:
    """Red if the emitted part is left out of the list."""
    resumed = state([b"ab"], logprobs=0)
    resumed.feed(TokenOutput("r", 0, (99,), logprobs=[TokenLogprobs(99, -0.5, 1)]), lambda *_: None)
    output = resumed.output.outputs[0]
    assert output.logprobs is not None
    assert len(output.logprobs) == len(output.token_ids) == 3
    assert output.logprobs[:2] == [None, None]
    assert output.logprobs[2] is not None and output.logprobs[2][99].logprob == -0.5
    assert output.cumulative_logprob == -0.5


def test_a_sequence_that_stopped_before_is_not_computed_again(processor: Processor, engine: Recorder) -> None:
    """The engine hears of it at once, its sibling goes on; if all have stopped there is nothing to do. Red if the end goes unnoticed."""
    params = SamplingParams(n=2, stop="!")
    processor.submit({"prompt": "x", "emitted_token_ids": [list(b"no! more"), list(b"yes")]}, params, "r")
    assert engine.aborted == [("r", 0)]
    (output,) = processor.feed([TokenOutput("r", 1, (33,))])
    assert [(o.text, o.finish_reason) for o in output.outputs] == [("no", "stop"), ("yes", "stop")]
    assert output.finished
    over = ([list(b"a!"), list(b"b!")], [list(b"a!"), [0]], [list(b"a!"), list(b"x" * 16)])
    for emitted in over:
        with pytest.raises(InvalidRequestError, match="nothing to resume"):
            processor.submit({"prompt": "x", "emitted_token_ids": emitted}, params, "r")
    assert len(engine.submitted) == 1


def test_what_fails_for_one_request_ends_that_request(processor: Processor, engine: Recorder) -> None:
    """Its caller reads why, the engine is told, the neighbour's text goes on. Red if the error escapes `feed`."""
    processor.submit("x", SamplingParams(), "bad")
    processor.submit("x", SamplingParams(), "good")
    outputs = processor.feed(
        [TokenOutput("bad", 0, (0xFE,)), TokenOutput("good", 0, (65,)), TokenOutput("bad", 0, (65,))]
    )
    bad, good = outputs
    assert (bad.finished, bad.outputs[0].finish_reason, bad.error) == (True, "error", "ValueError: no such piece")
    assert (good.finished, good.outputs[0].text, good.error) == (False, "A", None)
    assert engine.aborted == [("bad", None)]


def test_an_error_of_the_engine_reaches_the_answer(processor: Processor) -> None:
    """Red if `TokenOutput.error` is dropped."""
    processor.submit("x", SamplingParams(), "r")
    (output,) = processor.feed([TokenOutput("r", 0, (), "error", error="device lost")])
    assert (output.finished, output.error, output.outputs[0].finish_reason) == (True, "device lost", "error")


def test_own_ids_pass_over_those_in_use(processor: Processor) -> None:
    """Red if the counter alone decides."""
    processor.submit("x", SamplingParams(), "req-0")
    assert processor.submit("x", SamplingParams()) == "req-1"
    with pytest.raises(InvalidRequestError, match="in use"):
        processor.submit("x", SamplingParams(), "req-1")
    with pytest.raises(InvalidRequestError, match="request id is a text"):
        processor.submit("x", SamplingParams(), 7)  # type: ignore[arg-type]


def test_a_submit_that_fails_leaves_nothing(processor: Processor, engine: Recorder) -> None:
    """Refused: as if never asked. Interrupted: the engine may have it, so it is told. Red if the state stays, or comes too late."""
    engine.refusal = QueueFullError("full")
    with pytest.raises(QueueFullError):
        processor.submit("x", SamplingParams(), "r")
    assert engine.aborted == []
    engine.refusal = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        processor.submit("x", SamplingParams(), "r")
    assert engine.aborted == [("r", None)]
    engine.refusal = None
    assert processor.submit("x", SamplingParams(), "r") == "r"
    assert processor.feed([TokenOutput("r", 0, (65,))])


def test_a_prompt_is_copied_when_it_is_prepared(processor: Processor) -> None:
    """Red if the request shares the caller's lists."""
    prompt, emitted = [1, 2], [3]
    prepared = processor.prepare({"prompt_token_ids": prompt, "emitted_token_ids": emitted}, SamplingParams())
    prompt.append(999), emitted.append(999)
    assert (prepared.request.prompt_token_ids, prepared.request.emitted) == ([1, 2], [[3]])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (b"bytes", "text or a list of token ids, got bytes"), ({1, 2}, "got set"), ([1, True], "got list"), ([1, "a"], "got list"),
        (np.array([1.5]), "got ndarray"), ([1, 10**5000], "outside the vocabulary 0..255"), (None, "got NoneType"), ("a\ud800b", "not valid Unicode"),
        ({"prompt": "x", "emitted_token_ids": [1, "a"]}, "emitted_token_ids are lists"),
        ({"prompt": "x", "emitted_token_ids": 5}, "emitted_token_ids are lists"), ({"prompt": "x", "emitted_token_ids": b"a"}, "are lists"),
        ({"prompt": "x", "emitted_token_ids": [[1.5]]}, "are lists"), ({"prompt": "x", "emitted_token_ids": [256]}, "token id 256 in emitted"),
        ({"prompt": "x", "priority": 1 << 63}, "64-bit"), ({"prompt": "x", "cache_salt": 5}, "cache_salt = 5"),
    ],
)  # fmt: skip
def test_bad_prompts_say_why(processor: Processor, engine: Recorder, prompt: Any, words: str) -> None:
    """Always an InvalidRequestError. Red if a library's own error comes through."""
    with pytest.raises(InvalidRequestError, match=words):
        processor.submit(prompt, SamplingParams())
    assert not engine.submitted


def test_numpy_ids_are_ids(processor: Processor, engine: Recorder) -> None:
    """Arrays and their scalars, as prompt and as emitted tokens; the engine gets plain integers. Red if only `int` passes."""
    ids = np.array([5, 6], dtype=np.int32)
    for prompt in (ids, list(ids)):
        for emitted in (ids, [ids], list(ids), None):
            processor.submit(
                {"prompt_token_ids": prompt, "emitted_token_ids": emitted, "cache_salt": None}, SamplingParams()
            )
    lists = [ids for r in engine.submitted for ids in (r.prompt_token_ids, *r.emitted)]
    assert all(type(token) is int for ids in lists for token in ids)
    assert engine.submitted[0].emitted == [[5, 6]]


def test_a_minimum_longer_than_the_context_is_refused(processor: Processor) -> None:
    """The pool of 90 tokens leaves 81 after 10; more can never be said. Red if only max_tokens is compared."""
    with pytest.raises(InvalidRequestError, match=r"min_tokens = 82 exceeds .*lower min_tokens to 81"):
        processor.submit([1] * 10, SamplingParams(max_tokens=None, min_tokens=82))
    processor.submit([1] * 10, SamplingParams(max_tokens=None, min_tokens=81))
