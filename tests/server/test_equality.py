"""The same answer whichever way it comes: over HTTP or offline, whole or in chunks.

Options are combined pairwise, several times over with their values in another order, so that every pair of values is met in different
company. Requests run beside each other; the device under test does not promise that a row is bit-equal in every batch, so a difference
counts if it is still there when the request runs alone.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import pytest
from allpairspy import AllPairs

from tests.server.conftest import FLAGS
from tests.server.reciting import make_reciting, recited
from tests.server.rig import Answer, Server, serving
from xllm_core import LLM, SamplingParams
from xllm_core.types import RequestOutput

pytestmark = pytest.mark.slow

NUM_CLIENTS = 8
TOLERANCE = 1e-4  # of logprobs: the order of a sum depends on the batch
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LETTERS = [1, *range(70, 102)]  # printable ASCII, and the token that ends a text

Options = dict[str, list[dict[str, Any]]]


def option(name: str, *values: Any) -> dict[str, list[dict[str, Any]]]:
    """A field that may be absent, or have one of these values."""
    return {name: [{}, *({name: value} for value in values)]}


def required(name: str, *values: Any) -> dict[str, list[dict[str, Any]]]:
    """A field that every body has."""
    return {name: [{name: value} for value in values]}


SAMPLING: Options = {
    **option("n", 2, 3),
    **required("temperature", 0, 0.7, 1.6),
    **required("seed", 3, 12345678901, -7),
    **option("top_p", 0.8),
    **option("top_k", 6, -1),
    **option("min_p", 0.05),
    **option("presence_penalty", 1.5),
    **option("frequency_penalty", -0.7),
    **option("repetition_penalty", 1.3),
    **option("ignore_eos", True),
    **option("stop", "e", ["ab", "X", "\n\n"]),
    **option("include_stop_str_in_output", True),
    **option("stop_token_ids", [71, 72, 73]),
    **option("logit_bias", {"1": 2.5, "80": 3}),
    **option("allowed_token_ids", LETTERS),
    **option("skip_special_tokens", False),
    **option("return_token_ids", True),
    **option("stream_options", {}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}),
    **option("cache_salt", "salt"),
    **option("priority", 0),
    **option("add_special_tokens", False),
    **option("user", "me"),
    **option("model", "tiny"),
}
LENGTHS = [
    {"max_tokens": 1},
    {"max_tokens": 9, "min_tokens": 5},
    {"max_tokens": 20},
    {"max_tokens": 20, "min_tokens": 0},
]
COMPLETION_OPTIONS = SAMPLING | {
    **required("prompt", "abc", [10, 20, 30, 70], ["one", "two words", "€"], [[5, 6, 7], [200]]),
    "length": LENGTHS,
    "logprobs": [{}, {"logprobs": 0}, {"logprobs": 5}, {"echo": True}, {"echo": True, "logprobs": 2}],
}
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}
CHAT_OPTIONS = SAMPLING | {
    **required(
        "messages",
        [USER],
        [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "text", "text": "parts"}]}],
        [SYSTEM, USER, {"role": "assistant", "content": "Well, I", "refusal": None}],
    ),
    "length": [*LENGTHS, {"max_completion_tokens": 12}, {"max_tokens": 3, "max_completion_tokens": 8, "min_tokens": 4}],
    "logprobs": [{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 0}, {"logprobs": True, "top_logprobs": 5}],
    "end": [{}, {"add_generation_prompt": True}, {"add_generation_prompt": False}, {"continue_final_message": True}],
}


def combinations(options: Options, num_wanted: int) -> list[dict[str, Any]]:
    """Request bodies: covers of all pairs, one after the other, until there are enough."""
    found: dict[str, dict[str, Any]] = {}
    shuffled = random.Random(0)
    while len(found) < num_wanted:
        columns = [
            shuffled.sample(column, len(column)) for column in shuffled.sample(list(options.values()), len(options))
        ]
        for row in AllPairs(columns):
            body = {key: value for fragment in row for key, value in fragment.items()}
            found[json.dumps(body, sort_keys=True)] = body
    return list(found.values())


def uncovered(options: Options, bodies: list[dict[str, Any]]) -> list[Any]:
    """Pairs of values that no body has."""

    def has(body: dict[str, Any], fragment: dict[str, Any], column: list[dict[str, Any]]) -> bool:
        return {key: body[key] for other in column for key in other if key in body} == fragment

    missing = []
    for a, b in itertools.combinations(options.values(), 2):
        for x, y in itertools.product(a, b):
            if not any(has(body, x, a) and has(body, y, b) for body in bodies):
                missing.append((x, y))
    return missing


# ---- an answer as plain data, however it came --------------------------------------------------------------------------------


def parts_of(choice: dict[str, Any], is_chat: bool) -> dict[str, Any]:
    """What one choice of a whole answer says."""
    logprobs = choice["logprobs"]
    return {
        "text": choice["message"]["content"] if is_chat else choice["text"],
        "token_ids": choice.get("token_ids"),
        "finish_reason": choice["finish_reason"],
        "stop_reason": choice["stop_reason"],
        "logprobs": logprobs["content"] if is_chat and logprobs else logprobs,
    }


def whole(answer: Answer, is_chat: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Choices in their order, and the usage."""
    assert answer.status == 200, answer.body
    body = answer.json
    assert [choice["index"] for choice in body["choices"]] == list(range(len(body["choices"])))
    return [parts_of(choice, is_chat) for choice in body["choices"]], body["usage"]


def streamed(answer: Answer, body: dict[str, Any], is_chat: bool) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The same from chunks; checks on the way what every stream must keep."""
    assert answer.status == 200, answer.body
    *chunks, done = answer.events
    assert done == "[DONE]"
    options = body.get("stream_options") or {}
    usage = None
    if options.get("include_usage"):
        last = chunks.pop()
        assert last["choices"] == []
        usage = last["usage"]
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert all(("usage" in chunk) is bool(options.get("continuous_usage_stats")) for chunk in chunks)
    found: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        add(found, choice, is_chat)
    assert all(choice["finish_reason"] for choice in found.values())
    return [found[i] for i in sorted(found)], usage


def add(found: dict[int, dict[str, Any]], choice: dict[str, Any], is_chat: bool) -> None:
    """One chunk's share of one choice."""
    if is_chat:
        is_first = choice["index"] not in found
        assert (choice["delta"].get("role") == "assistant") is is_first, "the role comes first, and once"
    empty = {"text": "", "token_ids": None, "finish_reason": None, "stop_reason": None, "logprobs": None}
    whole = found.setdefault(choice["index"], empty)
    assert whole["finish_reason"] is None, "something came after the finish"
    whole["text"] += choice["delta"].get("content", "") if is_chat else choice["text"]
    if choice.get("token_ids") is not None:
        whole["token_ids"] = [*(whole["token_ids"] or []), *choice["token_ids"]]
    if logprobs := choice["logprobs"]:
        if is_chat:
            whole["logprobs"] = [*(whole["logprobs"] or []), *logprobs["content"]]
        else:
            before = whole["logprobs"] or {key: [] for key in logprobs}
            whole["logprobs"] = {key: [*before[key], *value] for key, value in logprobs.items()}
    whole["finish_reason"], whole["stop_reason"] = choice["finish_reason"], choice.get("stop_reason")


def alike(a: Any, b: Any) -> bool:
    """Equal, numbers of logprobs nearly so."""
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= TOLERANCE
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b


def counted(usage: dict[str, Any]) -> dict[str, Any]:
    """Usage without what depends on who asked before."""
    return {key: value for key, value in usage.items() if key != "prompt_tokens_details"}


# ---- offline -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tiny_model: str) -> Iterator[LLM]:
    with LLM(tiny_model, dtype="float32", num_blocks=512, max_num_seqs=16) as it:
        yield it


def offline_requests(llm: LLM, body: dict[str, Any]) -> list[tuple[list[int], SamplingParams]]:
    """Prompts as token ids, with parameters: what a body means, without any of the server's code."""
    known = {field.name for field in fields(SamplingParams)}
    given = {key: value for key, value in body.items() if key in known}
    tokenizer = llm.get_tokenizer()
    if "messages" in body:
        given["max_tokens"] = body.get("max_completion_tokens", body.get("max_tokens"))
        given["logprobs"] = body.get("top_logprobs", 0) if body.get("logprobs") else None
        prompts = [conversation_ids(llm, body)]
    else:
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        prompts = [prompts] if isinstance(prompts[0], int) else prompts
        prompts = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    if body.get("echo"):
        given["prompt_logprobs"] = body.get("logprobs")
    if "logit_bias" in given:
        given["logit_bias"] = {int(key): value for key, value in given["logit_bias"].items()}
    return [(prompt, SamplingParams(**given)) for prompt in prompts]


def conversation_ids(llm: LLM, body: dict[str, Any]) -> list[int]:
    """The test's template, written out by hand."""
    text = ""
    for message in body["messages"]:
        content = message["content"]
        words = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
        text += f"<|{message['role']}|>{words}</s>"
    if body.get("continue_final_message"):
        text = text.removesuffix("</s>")
    elif body.get("add_generation_prompt", True):
        text += "<|assistant|>"
    return llm.get_tokenizer().encode(text, add_special_tokens=False)


def offline_choices(outputs: list[RequestOutput], body: dict[str, Any], llm: LLM) -> list[dict[str, Any]]:
    found = []
    for group in outputs:
        echo = llm.get_tokenizer().decode(
            group.prompt_token_ids, skip_special_tokens=body.get("skip_special_tokens", True)
        )
        before = group.prompt_logprobs or []
        prompt = group.prompt_token_ids if before else []
        found += [
            {
                "text": (echo if body.get("echo") else "") + output.text,
                "token_ids": output.token_ids,
                "finish_reason": output.finish_reason,
                "stop_reason": output.stop_reason,
                "chosen": None if output.logprobs is None else [
                    None if scores is None else scores[token].logprob
                    for token, scores in zip([*prompt, *output.token_ids], [*before, *output.logprobs], strict=True)
                ],
            }
            for output in group.outputs
        ]  # fmt: skip
    return found


def chosen(logprobs: Any) -> list[float | None] | None:
    """Logprobs of the tokens that stand there, from either route."""
    if logprobs is None:
        return None
    return [entry["logprob"] for entry in logprobs] if isinstance(logprobs, list) else logprobs["token_logprobs"]


class Case:
    """One body on one route, answered in three ways."""

    def __init__(self, path: str, body: dict[str, Any]) -> None:
        self.path, self.body, self.is_chat = path, body, path == CHAT

    def ask(self, server: Server) -> None:
        """Whole, then streamed."""
        plain = {key: value for key, value in self.body.items() if key != "stream_options"}
        self.whole, self.usage = whole(server.post(self.path, plain), self.is_chat)
        answer = server.post(self.path, {**self.body, "stream": True})
        self.streamed, self.stream_usage = streamed(answer, self.body, self.is_chat)

    def compute(self, llm: LLM) -> None:
        """Offline, alone."""
        requests = offline_requests(llm, self.body)
        self.take(llm, llm.generate([p for p, _ in requests], [s for _, s in requests], use_tqdm=False))

    def take(self, llm: LLM, outputs: list[RequestOutput]) -> None:
        self.offline = offline_choices(outputs, self.body, llm)

    def differences(self) -> list[str]:
        found = []
        if not alike(self.whole, self.streamed):
            found.append(f"streamed: {self.streamed}\nwhole: {self.whole}")
        if self.stream_usage is not None and counted(self.stream_usage) != counted(self.usage):
            found.append(f"usage: {self.stream_usage} in the stream, {self.usage} in the whole answer")
        for here, there in zip(self.whole, self.offline, strict=True):
            ids = here["token_ids"] if here["token_ids"] is not None else there["token_ids"]
            mine = {**here, "token_ids": ids, "chosen": chosen(here["logprobs"])}
            del mine["logprobs"]
            if not alike(mine, there):
                found.append(f"over HTTP: {mine}\noffline: {there}")
        return found


@pytest.mark.parametrize(
    ("path", "options"), [(COMPLETIONS, COMPLETION_OPTIONS), (CHAT, CHAT_OPTIONS)], ids=["completions", "chat"]
)
def test_every_pair_of_options(server: Server, llm: LLM, path: str, options: Options) -> None:
    """Text, tokens, finish and stop reasons, logprobs and usage of 100 combinations: offline, whole and streamed are one."""
    bodies = combinations(options, 100)
    assert not uncovered(options, bodies)
    cases = [Case(path, body) for body in bodies]
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        list(pool.map(lambda case: case.ask(server), cases))
    requests = [offline_requests(llm, case.body) for case in cases]
    flat = [one for several in requests for one in several]
    outputs = iter(llm.generate([p for p, _ in flat], [s for _, s in flat], use_tqdm=False))
    for case, several in zip(cases, requests, strict=True):
        case.take(llm, list(itertools.islice(outputs, len(several))))
    for case in cases:
        if case.differences():
            case.ask(server)
            case.compute(llm)
            assert not case.differences(), f"{case.body}\n" + "\n".join(case.differences())
    ends = Counter(
        (choice["finish_reason"], type(choice["stop_reason"]).__name__) for case in cases for choice in case.whole
    )
    wanted = {("length", "NoneType"), ("stop", "str"), ("stop", "int")}
    assert wanted <= set(ends) and min(ends[end] for end in wanted) >= 5, f"too little happened: {ends}"


def test_every_pair_is_in_company() -> None:
    """About two hundred bodies in all; a value that is never met would be proven by nobody."""
    assert len(combinations(COMPLETION_OPTIONS, 100)) + len(combinations(CHAT_OPTIONS, 100)) >= 200
    assert uncovered(COMPLETION_OPTIONS, combinations(COMPLETION_OPTIONS, 1)[:-1]), "a body less, and no pair is missed"


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_echo_with_logprobs(server: Server, llm: LLM, max_tokens: int) -> None:
    """Prompt and answer in one list, as lm-eval reads it: the first token has no score, the others are those of the model."""
    prompts = [[10, 20, 30, 40], [70, 71]]
    body = {
        "prompt": prompts,
        "max_tokens": max_tokens,
        "logprobs": 3,
        "echo": True,
        "temperature": 0,
        "ignore_eos": True,
    }
    answer = server.post(COMPLETIONS, {**body, "return_token_ids": True}).json
    params = SamplingParams(
        max_tokens=max(1, max_tokens), temperature=0, ignore_eos=True, logprobs=3, prompt_logprobs=3
    )
    for choice, prompt, group in zip(answer["choices"], prompts, llm.generate(prompts, params), strict=True):
        output = group.outputs[0]
        tokens, scores = output.token_ids[:max_tokens], [*group.prompt_logprobs, *output.logprobs[:max_tokens]]
        found = choice["logprobs"]
        assert choice["text"] == llm.get_tokenizer().decode(prompt) + (output.text if max_tokens else "")
        assert choice["token_ids"] == tokens and choice["prompt_token_ids"] == prompt
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        expected = [s[token].logprob for token, s in zip([*prompt, *tokens][1:], scores[1:], strict=True)]
        assert alike(found["token_logprobs"][1:], expected)
        assert {len(column) for column in found.values()} == {len(prompt) + max_tokens}
        for top, likeliest in zip(found["top_logprobs"][1:], scores[1:], strict=True):
            assert alike(max(top.values()), max(one.logprob for one in likeliest.values()))
    events = server.post(COMPLETIONS, {**body, "return_token_ids": True, "stream": True})
    assert alike(
        streamed(events, body, is_chat=False)[0], [parts_of(choice, is_chat=False) for choice in answer["choices"]]
    )
    assert answer["usage"]["completion_tokens"] == 2 * max_tokens
    assert answer["usage"]["prompt_tokens"] == 6


@pytest.mark.parametrize("n", [1, 3])
def test_cached_tokens_are_told_alike(server: Server, n: int) -> None:
    """What a prefix hit saved stands in the usage of both kinds of answers; 40 tokens are two blocks of 16 and a rest."""
    body = {"prompt": list(range(100, 140)), "max_tokens": 3, "n": n, "cache_salt": f"told alike {n}", "seed": 1}
    first = server.post(COMPLETIONS, body).json["usage"]
    again = server.post(COMPLETIONS, body).json["usage"]
    events = server.post(COMPLETIONS, {**body, "stream": True, "stream_options": {"include_usage": True}}).events
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    assert again["prompt_tokens_details"] == {"cached_tokens": 32}
    assert events[-2]["usage"] == again


# ---- characters of several bytes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reciter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Says "aé€😀" for ever, a byte per token."""
    path = tmp_path_factory.mktemp("reciting")
    with serving(make_reciting(path / "model"), path / "log.txt", *FLAGS) as running:
        yield running


@pytest.mark.parametrize("num_tokens", [*range(1, 12), 60])
def test_no_chunk_ends_inside_a_character(reciter: Server, num_tokens: int) -> None:
    """Each chunk is whole characters; only a text that the limit cut off inside one ends with U+FFFD."""
    expected = recited("a", num_tokens)
    for stop, n in ((None, 1), ("never said", 2)):  # a stop string holds text back too
        body = {"prompt": "a", "max_tokens": num_tokens, "temperature": 0, "stop": stop, "n": n, "logprobs": 1}
        assert {c["text"] for c in reciter.post(COMPLETIONS, body).json["choices"]} == {expected}
        texts: dict[int, list[str]] = {i: [] for i in range(n)}
        for chunk in reciter.post(COMPLETIONS, {**body, "stream": True}).events[:-1]:
            texts[chunk["choices"][0]["index"]].append(chunk["choices"][0]["text"])
        for pieces in texts.values():
            assert "".join(pieces) == expected
            assert not any("\ufffd" in piece for piece in pieces[:-1]) and "\ufffd" not in expected[:-1]


def test_a_stop_string_of_several_bytes(reciter: Server) -> None:
    """It ends the text before its first byte, whole and streamed, and counts the tokens that it took."""
    body = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}],
        "continue_final_message": True,
    }
    body |= {"max_tokens": 60, "temperature": 0, "stop": "€😀aé€", "stream_options": {"include_usage": True}}
    whole = reciter.post(CHAT, {key: value for key, value in body.items() if key != "stream_options"}).json
    assert whole["choices"][0]["message"]["content"] == "é" and whole["choices"][0]["stop_reason"] == "€😀aé€"
    *chunks, usage, _ = reciter.post(CHAT, {**body, "stream": True}).events
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "é"
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == len("é€😀aé€".encode())


def test_bytes_of_logprobs_add_up(reciter: Server) -> None:
    """A token that is half a character shows as U+FFFD, but its bytes are its own."""
    body = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}],
        "continue_final_message": True,
    }
    body |= {"max_tokens": 19, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    choice = reciter.post(CHAT, body).json["choices"][0]
    content = choice["logprobs"]["content"]
    assert (
        bytes(byte for entry in content for byte in entry["bytes"]).decode()
        == choice["message"]["content"]
        == recited("a", 19)
    )
    assert all(entry["top_logprobs"][0]["bytes"] == entry["bytes"] for entry in content)
    assert all(entry["logprob"] > -1e-3 for entry in content)
