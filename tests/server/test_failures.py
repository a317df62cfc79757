"""An answer that fails: alone, in OpenAI's shape, and with an end that a client can see.

The tokenizer of the model under test has a token on which its own library panics: a fault that a real model can have, and that no switch
in the server is needed for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import FLAGS
from tests.server.hostile import REVEALING
from tests.server.reciting import POISON, make_reciting, recited
from tests.server.rig import Answer, Server, serving

pytestmark = pytest.mark.slow

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD: dict[str, Any] = {"prompt": "a", "max_tokens": 40, "temperature": 0}
FATAL: dict[str, Any] = {"prompt": "w", "max_tokens": 40, "temperature": 0}
AT_ONCE: dict[str, Any] = {**GOOD, "allowed_token_ids": [POISON]}
FATAL_CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "w"}], "continue_final_message": True, "max_tokens": 40,
    "temperature": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """After "w" it says "xyz", and then the token that nobody can turn into text."""
    path: Path = tmp_path_factory.mktemp("poisoned")
    with serving(make_reciting(path / "model", is_poisoned=True), path / "log.txt", *FLAGS) as running:
        yield running


def check_error(error: dict[str, Any]) -> None:
    """A 500 that tells nothing of our insides."""
    assert (error["type"], error["code"], error["param"]) == ("internal_server_error", "internal_error", None)
    assert "log" in error["message"] and not REVEALING.search(error["message"]) and "token" not in error["message"]


def check_plain_failure(server: Server, answer: Answer) -> None:
    """Not worth another try, and the log tells more under the id that the client has."""
    assert answer.status == 500 and answer.headers["content-type"] == "application/json"
    check_error(answer.error)
    assert answer.headers["x-should-retry"] == "false" and "retry-after" not in answer.headers
    assert re.search(rf"request '{answer.headers['x-request-id']}-0' failed", server.log)


def post_until_streamed(server: Server, path: str, body: dict[str, Any]) -> Answer:
    """An answer whose first chunk left before the failure. All tokens may reach a busy API process at once: then nothing was said yet, and
    the failure is a plain one.
    """
    for _ in range(20):
        answer = server.post(path, {**body, "stream": True})
        if answer.status == 200:
            return answer
        check_plain_failure(server, answer)
    raise AssertionError("20 of 20 answers failed before their first chunk")


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, FATAL), (CHAT, FATAL_CHAT)])
@pytest.mark.parametrize("n", [1, 3])
def test_after_the_first_chunk(poisoned: Server, path: str, body: dict[str, Any], n: int) -> None:
    """What was said stays said; then one error chunk and [DONE]: no finish reason, no usage."""
    answer = post_until_streamed(poisoned, path, {**body, "n": n, "stream_options": {"include_usage": True}})
    *chunks, failed, done = answer.events
    assert done == "[DONE]" and set(failed) == {"error"}
    check_error(failed["error"])
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices and not any(choice["finish_reason"] for choice in choices)
    said = "".join(
        c["text"] if path == COMPLETIONS else c["delta"].get("content", "") for c in choices if c["index"] == 0
    )
    assert said and "xyz".startswith(said)


@pytest.mark.parametrize("stream", [False, True])
def test_before_the_first_token(poisoned: Server, stream: bool) -> None:
    """An ordinary error response with its status, streamed or not."""
    check_plain_failure(poisoned, poisoned.post(COMPLETIONS, {**AT_ONCE, "stream": stream}))


@pytest.mark.parametrize("prompts", [["w"], ["w", "a"]])
def test_without_a_stream(poisoned: Server, prompts: list[str]) -> None:
    """Half an answer is none; a list of prompts fails with its first at once, and the rest of it is dropped."""
    before = poisoned.metric("vllm:request_success_total", finished_reason="abort")
    check_plain_failure(poisoned, poisoned.post(COMPLETIONS, {**FATAL, "prompt": prompts, "max_tokens": 500}))
    poisoned.wait_idle()
    assert poisoned.metric("vllm:request_success_total", finished_reason="abort") == before + len(prompts) - 1


def test_a_logprob_of_the_token(poisoned: Server) -> None:
    """It fails in another place, as a candidate beside the chosen one; it is this request's failure too."""
    body = {**GOOD, "prompt": "z", "allowed_token_ids": [70]}
    assert poisoned.post(COMPLETIONS, body).status == 200
    check_plain_failure(poisoned, poisoned.post(COMPLETIONS, {**body, "logprobs": 1}))


def test_other_routes_survive(poisoned: Server) -> None:
    """Where the token is asked for directly."""
    assert poisoned.post("/detokenize", {"tokens": [POISON]}).status == 500
    assert poisoned.post("/detokenize", {"tokens": [70]}).status == 200


def test_neighbours_notice_nothing(poisoned: Server) -> None:
    """Good answers beside failing ones are whole and right; the processes are the same; nothing is held; failures are counted as such."""
    poisoned.wait_idle()
    pids, before = poisoned.engine_pids, poisoned.metric("vllm:request_success_total", finished_reason="error")
    bodies = [{**(FATAL, GOOD, AT_ONCE, GOOD)[i % 4], "stream": i % 3 == 0} for i in range(48)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda body: poisoned.post(COMPLETIONS, body), bodies))
    for body, answer in zip(bodies, answers, strict=True):
        if body["prompt"] == "w" or "allowed_token_ids" in body:
            assert b'"internal_error"' in answer.body
        elif body["stream"]:
            assert "".join(chunk["choices"][0]["text"] for chunk in answer.events[:-1]) == recited("a", 40)
        else:
            assert answer.json["choices"][0]["text"] == recited("a", 40)
    poisoned.wait_idle()
    assert poisoned.engine_pids == pids and poisoned.get("/health").status == 200
    assert poisoned.metric("vllm:request_success_total", finished_reason="error") == before + 24
    assert poisoned.metric("vllm:num_requests_running") == poisoned.metric("vllm:kv_cache_usage_perc") == 0
