"""Real clients, unmodified, as their users have them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.server.rig import Server

pytestmark = pytest.mark.slow

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
OPTIONS: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def answer(server: Server) -> dict[str, Any]:
    """What the server says without any client between."""
    return server.post("/v1/chat/completions", {**OPTIONS, "messages": MESSAGES}).json


def text_of(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def test_openai(server: Server, answer: dict[str, Any]) -> None:
    """openai for Python: completions, chat, streams, models, logprobs, and its exception classes."""
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        chat = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **OPTIONS)
        assert chat.choices[0].message.content == text_of(answer) and chat.usage.completion_tokens == 8
        assert len(chat.choices[0].logprobs.content) == 8 and len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
        chunks = list(
            client.chat.completions.create(
                messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **OPTIONS
            )
        )
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text_of(answer)
        assert chunks[-1].usage == chat.usage
        ids = client.completions.create(prompt=[[70, 71], [72]], n=2, **{**OPTIONS, "temperature": 1})
        assert [choice.index for choice in ids.choices] == [0, 1, 2, 3]
        assert [model.id for model in client.models.list()] == ["tiny"]
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(messages=MESSAGES, **{**OPTIONS, "temperature": 9})
        with pytest.raises(openai.NotFoundError, match="huge"):
            client.chat.completions.create(messages=MESSAGES, **{**OPTIONS, "model": "huge"})


def test_openai_async_leaves_early(server: Server) -> None:
    """A stream that is closed after one chunk frees its blocks."""
    import asyncio

    import openai

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            options = {**OPTIONS, "max_tokens": 400, "extra_body": {"ignore_eos": True}}
            stream = await client.chat.completions.create(messages=MESSAGES, stream=True, **options)
            async for _ in stream:
                break
            await stream.close()

    asyncio.run(leave())
    server.wait_idle()


def test_openai_for_node(server: Server, answer: dict[str, Any]) -> None:
    """openai from npm: what its users see is what the server said."""
    node, modules = shutil.which("node"), Path(sys.prefix) / "node" / "node_modules"
    if node is None or not modules.exists():
        message = f"node and its openai package are not installed; with Node 20: npm install --prefix {modules.parent} openai@6"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    script = Path(__file__).parent / "client.cjs"
    done = subprocess.run(
        [node, str(script), server.url],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "NODE_PATH": str(modules)},
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["chat"]["choices"][0]["message"]["content"] == said["text"] == text_of(answer)
    assert said["usage"] == answer["usage"] and said["models"] == ["tiny"]
    assert (
        len(said["completion"]["choices"][0]["logprobs"]["tokens"]) == said["completion"]["usage"]["completion_tokens"]
    )
    assert said["refusal"] == {"kind": "BadRequestError", "status": 400, "param": "temperature"}


def test_langchain(server: Server, answer: dict[str, Any]) -> None:
    """langchain-openai: invoke and stream."""
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="x", model="tiny", temperature=0, max_tokens=8, max_retries=0
    )
    whole = chat.invoke("hi")
    assert whole.content == text_of(answer) and whole.usage_metadata["output_tokens"] == 8
    assert "".join(chunk.content for chunk in chat.stream("hi")) == text_of(answer)


def run_python(code: str, **environment: str) -> str:
    """In a process of its own: these set up warnings, loggers and threads as they are imported."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_litellm(server: Server, answer: dict[str, Any]) -> None:
    """litellm, as a vLLM server and as an OpenAI one."""
    code = f"""
import litellm
for model in ("hosted_vllm/tiny", "openai/tiny"):
    options = dict(model=model, api_base={server.url + "/v1"!r}, api_key="x", messages={MESSAGES!r}, temperature=0, max_tokens=8)
    print(repr(litellm.completion(**options).choices[0].message.content))
    print(repr("".join(c.choices[0].delta.content or "" for c in litellm.completion(stream=True, **options))))
"""
    said = run_python(code, LITELLM_LOCAL_MODEL_COST_MAP="True").splitlines()
    assert said == [repr(text_of(answer))] * 4


def test_llm(server: Server, answer: dict[str, Any], tmp_path: Path) -> None:
    """Simon Willison's `llm`, which streams by default."""
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: x\n  model_name: tiny\n  api_base: {server.url}/v1\n  api_key_name: none\n"
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": "", "NONE": "x"}
    command = [
        sys.executable,
        "-m",
        "llm",
        "-m",
        "x",
        "--no-log",
        "hi",
        "-o",
        "temperature",
        "0",
        "-o",
        "max_tokens",
        "8",
        "--key",
        "x",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == text_of(answer) + "\n"
