"""Every route: what it answers when it is asked properly, and in what shape it refuses."""

from __future__ import annotations

import re

import pytest

from tests.server.rig import Server


def test_completion(server: Server) -> None:
    """One prompt: fields, usage, finish."""
    answer = server.post(
        "/v1/completions", {"model": "tiny", "prompt": "abc", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    )
    assert answer.status == 200 and answer.headers["content-type"] == "application/json"
    body = answer.json
    assert body["object"] == "text_completion" and body["model"] == "tiny" and body["id"].startswith("cmpl-")
    assert [c["index"] for c in body["choices"]] == [0] and body["choices"][0]["finish_reason"] == "length"
    assert body["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8, "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip


def test_completion_streams(server: Server) -> None:
    """Chunks of the same id add up to the whole answer; one finish reason, usage when asked for, then [DONE]."""
    body = {"prompt": "abc", "max_tokens": 6, "temperature": 0, "ignore_eos": True, "seed": 3}
    whole = server.post("/v1/completions", body).json
    answer = server.post("/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = answer.events
    assert done == "[DONE]" and usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6 and len({c["id"] for c in chunks}) == 1
    assert "".join(c["choices"][0]["text"] for c in chunks) == whole["choices"][0]["text"]
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["finish_reason"]] == ["length"]


def test_chat(server: Server) -> None:
    """Role first, then content; the same text as without stream."""
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    whole = server.post("/v1/chat/completions", body).json
    assert whole["object"] == "chat.completion" and whole["choices"][0]["message"]["role"] == "assistant"
    *chunks, done = server.post("/v1/chat/completions", {**body, "stream": True}).events
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert done == "[DONE]" and deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(d.get("content", "") for d in deltas) == whole["choices"][0]["message"]["content"]


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/health/startup", "/ping"])
def test_health(server: Server, path: str) -> None:
    """A ready server is healthy in every sense, without a body."""
    answer = server.get(path)
    assert (answer.status, answer.body) == (200, b"") and answer.headers["x-request-id"]
    assert server.request("HEAD", path).status == 200
    assert server.request("POST", path).status == (200 if path == "/ping" else 405)


def test_models(server: Server) -> None:
    """The served name, its context, and 404 for another."""
    (card,) = server.get("/v1/models").json["data"]
    assert card["id"] == "tiny" and card["object"] == "model" and card["max_model_len"] == 512
    assert server.get("/v1/models/tiny").json == card
    missing = server.get("/v1/models/huge")
    assert missing.status == 404 and missing.error["code"] == "model_not_found" and "tiny" in missing.error["message"]


def test_tokenize_and_back(server: Server) -> None:
    """Text to ids to text; a conversation goes through the template."""
    found = server.post("/tokenize", {"prompt": "héllo", "return_token_strs": True}).json
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) == 6 and found["max_model_len"] == 512
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json == {"prompt": "héllo"}
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "x"}]}).json["tokens"]
    assert server.post("/detokenize", {"tokens": chat}).json["prompt"] == "<|user|>x</s><|assistant|>"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/v1/models", 405)],
)
def test_routes_that_are_not_there(server: Server, method: str, path: str, status: int) -> None:
    """Errors have OpenAI's shape there too."""
    answer = server.request(method, path)
    assert answer.status == status and set(answer.error) == {"message", "type", "param", "code"}


def test_refusals_say_which_and_where(server: Server) -> None:
    """The prompt of a list that is too long is named; what belongs to the other route is sent there."""
    for long in ([5] * 600, "abc " * 200):
        answer = server.post("/v1/completions", {"prompt": [[5, 6] if isinstance(long, list) else "ab", long]})
        assert answer.status == 400 and "prompt[1]" in answer.error["message"], answer.error
        assert answer.error["code"] == "context_length_exceeded" and answer.error["param"] == "prompt"
    chat = server.post("/v1/chat/completions", {"prompt": "ab", "messages": [{"role": "user", "content": "x"}]})
    assert "a prompt goes to /v1/completions" in chat.error["message"]
    plain = server.post("/v1/completions", {"messages": []})
    assert "a conversation goes to /v1/chat/completions" in plain.error["message"]


def test_version_load_and_docs(server: Server) -> None:
    """Small routes, and an OpenAPI document whose references resolve."""
    import xllm_core

    assert server.get("/version").json == {"version": xllm_core.__version__}
    assert server.wait_idle()["total_blocks"] == 512
    document = server.get("/openapi.json").json
    assert "StreamOptions" in document["components"]["schemas"] and "/v1/chat/completions" in document["paths"]


def test_the_start_is_told(server: Server) -> None:
    """Each phase with its seconds, then the URL, the KV blocks and how many requests they hold; no bar without a terminal."""
    for phase in ("plugins", "model", "weights", "KV cache", "warm-up", "tokenizer"):
        assert re.search(rf"^  {phase} +\d+\.\d\d s  ", server.log, re.MULTILINE), phase
    assert f"{server.url}/v1 serves tiny" in server.log
    assert (
        "KV cache: 512 blocks of 16 tokens, 8192 in all: 16.0 requests of the full context of 512 at once" in server.log
    )
    assert "\r" not in server.log
