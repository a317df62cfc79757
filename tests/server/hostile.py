"""Malformed and hostile requests, as a table: what is sent, the status it deserves, and a word that the message must hold.

Cases differ in the field and in the class of what is wrong with it. `V` is the vocabulary of the model under test, 264 tokens; its context
holds 512.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from tests.server.rig import Answer, Server

V, CONTEXT = 264, 512
COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "ab", "max_tokens": 2},
    CHAT: {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 2},
    TOKENIZE: {"prompt": "ab"},
    DETOKENIZE: {"tokens": [70]},
}


@dataclass(frozen=True)
class Case:
    """One request. body: text is sent as it is. word: in the message of a refusal; "" where the answer is 200."""

    path: str
    name: str
    body: str | bytes
    status: int = 400
    word: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.path.removeprefix('/v1').strip('/').partition('/')[0]}-{self.name}"


def with_field(path: str, name: str, literal: str, status: int = 400, word: str | None = None, **more: Any) -> Case:
    """A good body in which one field has this JSON text. word: the field's name unless another is given."""
    good = {key: value for key, value in {**GOOD[path], **more}.items() if key != name}
    body = json.dumps(good)[:-1] + (", " if good else "") + f"{json.dumps(name)}: {literal}}}"
    shown = literal if len(literal) < 40 else literal[:40] + "~"
    return Case(path, f"{name}={shown}", body, status, "" if status == 200 else name if word is None else word)


# ---- numbers ---------------------------------------------------------------------------------------------------------------------

NUMBERS = {
    "2147483648": 1 << 31, "9223372036854775808": 1 << 63, "-1": -1, "1.5": 1.5, "1" + 400 * "0": 10**400, "1e308": 1e308,
    "1e400": float("inf"), "-0.5": -0.5, "true": None, '"1"': None, "[1]": None, "{}": None,
}  # fmt: skip
"""JSON text -> the number that it is, None for what is none."""
NO_JSON = {"NaN": "NaN", "-Infinity": "Infinity", "9" * 5000: "thousands of digits"}
BOUNDS: dict[str, tuple[float, float, bool]] = {
    "n": (1, 16, True), "max_tokens": (1, 500, True), "min_tokens": (0, 2, True), "top_k": (-1, (1 << 31) - 1, True),
    "seed": (-(1 << 63), (1 << 63) - 1, True), "prompt_logprobs": (0, 20, True), "priority": (0, 0, True), "temperature": (0, 2, False),
    "top_p": (1e-9, 1, False), "min_p": (0, 1, False), "repetition_penalty": (1e-3, 1e3, False), "frequency_penalty": (-2, 2, False),
    "presence_penalty": (-2, 2, False),
}  # fmt: skip
"""Field -> least and most that this server takes beside the rest of a good body, and whether it is an integer."""


def _number_cases(path: str, name: str, low: float, high: float, is_integer: bool, **more: Any) -> Iterator[Case]:
    for literal, number in NUMBERS.items():
        is_whole = number is not None and "." not in literal and "e" not in literal
        is_good = number is not None and low <= number <= high and (is_whole or not is_integer)
        yield with_field(path, name, literal, 200 if is_good else 400, **more)
    for literal, word in NO_JSON.items():
        yield with_field(path, name, literal, word=word, **more)
    yield with_field(path, name, "null", 200, **more)


def numbers() -> Iterator[Case]:
    """Every numeric field with numbers that are too large, negative, broken, or not numbers at all; null is as good as absent."""
    for name, bounds in BOUNDS.items():
        yield from _number_cases(COMPLETIONS, name, *bounds)
    yield from _number_cases(COMPLETIONS, "best_of", 1, 1, True)
    yield from _number_cases(COMPLETIONS, "logprobs", 0, 20, True)
    for case in _number_cases(CHAT, "max_completion_tokens", 1, 480, True):
        yield replace(
            case, word="tokens" if case.word == "max_completion_tokens" else case.word
        )  # of which too many is max_tokens
    yield from _number_cases(CHAT, "top_logprobs", 0, 20, True, logprobs=True)
    yield with_field(COMPLETIONS, "temperature", "1e-9")
    yield with_field(COMPLETIONS, "top_p", "0")
    yield with_field(COMPLETIONS, "top_k", "-2")
    yield with_field(COMPLETIONS, "repetition_penalty", "0")
    yield with_field(COMPLETIONS, "max_tokens", "0")
    yield with_field(COMPLETIONS, "max_tokens", "1000000000", word=str(CONTEXT))
    yield with_field(COMPLETIONS, "n", "17", word="max_num_seqs")
    yield with_field(COMPLETIONS, "seed", '"a"')
    yield with_field(COMPLETIONS, "min_tokens", "3", word="max_tokens")
    yield with_field(COMPLETIONS, "logprobs", "21", word="20")
    yield with_field(CHAT, "top_logprobs", "21", word="20", logprobs=True)
    yield with_field(CHAT, "top_logprobs", "2", word="logprobs: true")
    yield with_field(CHAT, "logprobs", "1")


# ---- token ids -------------------------------------------------------------------------------------------------------------------

BAD_IDS = (
    "-1",
    str(V),
    str(V + 1),
    "2147483648",
    "9223372036854775808",
    "1.5",
    '"1"',
    "null",
    "true",
    "[70]",
    "1" + 400 * "0",
)


def token_ids() -> Iterator[Case]:
    """Every field of token ids with ids that no vocabulary has, or that are no ids."""
    for bad in BAD_IDS:
        yield with_field(COMPLETIONS, "stop_token_ids", f"[70, {bad}]")
        yield with_field(COMPLETIONS, "allowed_token_ids", f"[70, {bad}]")
        yield with_field(COMPLETIONS, "prompt", f"[70, {bad}]")
        yield with_field(DETOKENIZE, "tokens", f"[70, {bad}]")
    for bad in (*BAD_IDS[:5], '"1"', "null", "true"):
        yield with_field(COMPLETIONS, "prompt", f"[[70], [71, {bad}]]")
    for key in ("-1", str(V), "2147483648", "1.5", "abc", "", " 1", "٣", "1" * 25, "1" * 5000):
        yield with_field(COMPLETIONS, "logit_bias", json.dumps({key: 1}))
    for value in ("101", "-101", "1e400", '"1"', "null", "true", "[]"):
        yield with_field(COMPLETIONS, "logit_bias", f'{{"70": {value}}}')
    yield with_field(COMPLETIONS, "logit_bias", json.dumps({str(i): 1 for i in range(1025)}), word="1024")
    for name in ("stop_token_ids", "allowed_token_ids"):
        for literal in ("70", '"70"', "{}", "true"):
            yield with_field(COMPLETIONS, name, literal)
    yield with_field(COMPLETIONS, "allowed_token_ids", "[]", word="at least one")
    yield with_field(COMPLETIONS, "allowed_token_ids", "[1]", word="min_tokens", min_tokens=1)
    yield with_field(COMPLETIONS, "logit_bias", "[]")
    yield with_field(DETOKENIZE, "tokens", "null")
    yield with_field(DETOKENIZE, "tokens", '"70"')


# ---- prompts and conversations ---------------------------------------------------------------------------------------------------


def prompts() -> Iterator[Case]:
    """Prompts of every wrong shape and size."""
    for literal, word in {
        '""': "empty", "[]": "prompt", "[[]]": "empty", "[[1], []]": "prompt[1]", '[1, "a"]': "mixes", '["a", 1]': "mixes",
        '[["a"]]': "mixes", '["a", [1]]': "mixes", '["a", null]': "mixes", "{}": "prompt", "null": "prompt", "5": "prompt",
        "true": "prompt", "[1.5]": "mixes", "[true]": "mixes", "[[[1]]]": "mixes", '["a", ""]': "prompt[1]", '{"text": "a"}': "prompt",
    }.items():  # fmt: skip
        yield with_field(COMPLETIONS, "prompt", literal, word=word)
    yield Case(COMPLETIONS, "no prompt", "{}", word="prompt is missing")
    yield with_field(COMPLETIONS, "prompt", json.dumps([[70]] * 513), word="max_prompts_per_request")
    ids = [70] * CONTEXT
    yield with_field(COMPLETIONS, "prompt", json.dumps(ids), word="511", max_tokens=1)
    yield with_field(COMPLETIONS, "prompt", json.dumps(ids[:-1]), 200, max_tokens=1)
    yield with_field(COMPLETIONS, "prompt", json.dumps(ids[:-1]), word="lower max_tokens to 1", max_tokens=2)
    yield with_field(COMPLETIONS, "prompt", json.dumps([[70], ids]), word="512")
    for name, text in {
        "a": "a",
        "space": " ",
        "CJK": "字",
        "emoji": "👩‍👩‍👧",
        "base64": "QUJD",
        "newline": "\n",
    }.items():
        literal = json.dumps(text * (1_000_000 // len(text)))
        yield Case(COMPLETIONS, f"a megabyte of {name}", f'{{"prompt": {literal}}}', word="shorten")
        yield Case(
            CHAT, f"a megabyte of {name}", f'{{"messages": [{{"role": "user", "content": {literal}}}]}}', word="shorten"
        )
    yield Case(TOKENIZE, "a megabyte", json.dumps({"prompt": "a" * 1_000_000}), word="shorten")
    for special in ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|image_pad|>", "\x00", "\u202e", "\ufdd0"):
        yield with_field(COMPLETIONS, "prompt", json.dumps(f"a{special}b"), 200)
        yield with_field(CHAT, "messages", json.dumps([{"role": "user", "content": f"a{special}b"}]), 200)


def messages() -> Iterator[Case]:
    """Conversations of every wrong shape."""
    for literal, word in {
        "[]": "not empty", "null": "messages", '"hi"': "messages", "{}": "messages", "[[]]": "messages", "[5]": "messages", "[null]": "messages",
        "[{}]": "role", '[{"role": "user"}]': "content", '[{"content": "a"}]': "role", '[{"role": 5, "content": "a"}]': "role",
        '[{"role": null, "content": "a"}]': "role", '[{"role": "user", "content": 5}]': "content", '[{"role": "user", "content": {}}]': "content",
        '[{"role": "user", "content": null}]': "content", '[{"role": "user", "content": true}]': "content",
        '[{"role": "user", "content": "a", "contents": "b"}]': "contents", '[{"role": "user", "content": "a", "audio": {"id": "x"}}]': "audio",
        '[{"role": "user", "content": "a", "__class__": "b"}]': "__class__",
    }.items():  # fmt: skip
        yield with_field(CHAT, "messages", literal, word=word)
    yield Case(CHAT, "no messages", "{}", word="messages is missing")
    for part, word in {
        '{"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}}': "image_url",
        '{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}': "image_url",
        '{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}': "image_url",
        '{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}': "image_url",
        '{"type": "image_url", "image_url": {"url": "https://a@b\\\\c/x"}}': "image_url",
        '{"type": "video_url", "video_url": {"url": "http://[::ffff:127.0.0.1]/x"}}': "video_url",
        '{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}': "input_audio",
        '{"type": "file", "file": {"file_id": "../../etc/passwd"}}': "file", '{"type": "image_embeds", "image_embeds": "AAAA"}': "image_embeds",
        '{"type": "text"}': "text", '{"type": "text", "text": null}': "text", '{"type": "text", "text": 5}': "text",
        '{"type": "text", "text": ["a"]}': "text", '{"type": "text", "text": "a", "cache": 1}': "cache", '{"text": "a"}': "type",
        '{"type": null, "text": "a"}': "type", '{"type": ["text"], "text": "a"}': "type", '"a"': "content[0]", "5": "content[0]",
        "null": "content[0]", "[]": "content[0]",
    }.items():  # fmt: skip
        yield with_field(CHAT, "messages", f'[{{"role": "user", "content": [{part}]}}]', word=word)
    yield with_field(CHAT, "add_generation_prompt", "true", word="both", continue_final_message=True)
    yield with_field(CHAT, "continue_final_message", "true", messages=[{"role": "user", "content": ""}])
    yield with_field(CHAT, "continue_final_message", '"yes"')
    for name in ("messages", "tokenize", "add_generation_prompt", "bos_token", "chat_template", "return_dict"):
        yield with_field(CHAT, "chat_template_kwargs", json.dumps({name: True}), word=name)
    yield with_field(CHAT, "chat_template_kwargs", "[]")
    yield with_field(CHAT, "chat_template", json.dumps("{{ ''.__class__.__mro__ }}"))
    yield with_field(TOKENIZE, "messages", '[{"role": "user", "content": "a"}]', word="either")
    yield Case(TOKENIZE, "neither", "{}", word="either")
    yield with_field(TOKENIZE, "prompt", "5")
    yield with_field(TOKENIZE, "return_token_strs", '"yes"')


# ---- other fields ----------------------------------------------------------------------------------------------------------------

UNSUPPORTED = {
    "suffix": '"b"', "bad_words": '["a"]', "truncate_prompt_tokens": "5", "prompt_embeds": '"gASVAAAA"', "structured_outputs": '{"regex": "(a+)+"}',
    "guided_json": '{"type": "object"}', "guided_regex": '"(a{1,1000}){1,1000}"', "guided_choice": '["a"]', "guided_grammar": '"root ::= root"',
    "regex": '"(?="', "ebnf": '"x"', "response_format": '{"type": "json_object"}', "documents": '[{"text": "a"}]', "tools": '[{"type": "function"}]',
    "tool_choice": '"required"', "functions": '[{"name": "f"}]', "function_call": '"auto"', "reasoning_effort": '"high"',
    "prediction": '{"type": "content"}', "audio": '{"voice": "x"}', "modalities": '["audio"]', "use_beam_search": "true", "beam_width": "1000000000",
    "length_penalty": "2.0", "return_tokens_as_token_ids": "true", "kv_transfer_params": '{"remote_host": "10.0.0.1"}',
    "logits_processors": '["os.system"]', "mm_processor_kwargs": '{"a": 1}', "lora_path": '"/etc/passwd"', "offline": "true", "ttft_slo_ms": "5",
    "web_search_options": '{"a": 1}', "verbosity": '"low"', "vllm_xargs": '{"a": 1}',
}  # fmt: skip


def fields() -> Iterator[Case]:
    """Fields that are unknown, not supported yet, or of the wrong type."""
    for name, literal in UNSUPPORTED.items():
        yield with_field(CHAT, name, literal)
        yield with_field(COMPLETIONS, name, "null", 200)
    for name in ("echo", "best_of"):
        yield with_field(CHAT, name, "true" if name == "echo" else "2")
    for name, guess in {
        "max_token": "max_tokens",
        "temprature": "temperature",
        "Stop": "stop",
        "top-p": "top_p",
    }.items():
        yield with_field(COMPLETIONS, name, "1", word=guess)
    for name in ("", "__class__", "__proto__", "$where", "model_config", "x" * 5000, "a\nb"):
        yield with_field(COMPLETIONS, name, "1", word="unknown field")
    for name, literal in {"user": '"u"', "metadata": '{"a": "b"}', "store": "true", "service_tier": '"auto"'}.items():
        yield with_field(CHAT, name, literal, 200)
    for name in (
        "ignore_eos",
        "skip_special_tokens",
        "include_stop_str_in_output",
        "return_token_ids",
        "add_special_tokens",
        "echo",
        "stream",
    ):
        for literal in ('"true"', "1", "[]"):
            yield with_field(COMPLETIONS, name, literal)
    for literal, word in {
        '""': "empty", '["a", ""]': "empty", "5": "stop", "[1]": "stop", '{"a": 1}': "stop", '[["a"]]': "stop", "true": "stop",
        json.dumps(["a"] * 17): "16", json.dumps(["a"] * 100_000): "16",
    }.items():  # fmt: skip
        yield with_field(COMPLETIONS, "stop", literal, word=word)
    yield with_field(COMPLETIONS, "stop", json.dumps("a" * 1_000_000), 200)
    for literal in (
        '"x"',
        "[]",
        "true",
        '{"include_usages": true}',
        '{"include_usage": "yes"}',
        '{"include_usage": 1}',
    ):
        yield with_field(COMPLETIONS, "stream_options", literal, stream=True)
    yield with_field(COMPLETIONS, "stream_options", '{"include_usage": null}', 200, stream=True)
    yield with_field(COMPLETIONS, "stream_options", "{}", word="stream: true", stream=False)
    yield with_field(COMPLETIONS, "prompt_logprobs", "1", word="stream", stream=True)
    yield with_field(COMPLETIONS, "prompt_logprobs", "2", word="stream", stream=True, echo=True, logprobs=2)
    yield with_field(COMPLETIONS, "prompt_logprobs", "3", stream=False, echo=True, logprobs=1)
    yield with_field(COMPLETIONS, "best_of", "3", n=2)
    for literal, status in {
        '"nope"': 404,
        '""': 404,
        '"../../etc/passwd"': 404,
        '"tiny\\u0000"': 404,
        "5": 400,
        "[]": 400,
    }.items():
        yield with_field(COMPLETIONS, "model", literal, status)
        yield with_field(TOKENIZE, "model", literal, status)
    for literal in ("5", "[]", "true", json.dumps("s" * 1025), '"\\ud800"'):
        yield with_field(COMPLETIONS, "cache_salt", literal)
    for literal in ("5", '""', '"a b"', '"a\\r\\nSet-Cookie: x"', json.dumps("r" * 129), '"é"'):
        yield with_field(COMPLETIONS, "request_id", literal)


# ---- bodies ----------------------------------------------------------------------------------------------------------------------

BODIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "JSON"), "null": (b"null", "null"), "array": (b"[]", "array"), "string": (b'"x"', "string"), "number": (b"1", "number"),
    "true": (b"true", "boolean"), "open": (b"{", "line 1"), "single quotes": (b"{'prompt': 'a'}", "line 1"), "comma": (b'{"prompt": "a",}', "line 1"),
    "comment": (b'{"prompt": "a"} // x', "line 1"), "two objects": (b"{}{}", "line 1"), "BOM": (b'\xef\xbb\xbf{"prompt": "a"}', "BOM"),
    "control character": (b'{"prompt": "a\nb"}', "line 1"), "bad escape": (b'{"prompt": "\\x41"}', "line 1"), "hex": (b'{"n": 0x10}', "line 1"),
    "leading zero": (b'{"n": 01}', "line 1"), "plus": (b'{"n": +1}', "line 1"), "bare key": (b'{prompt: "a"}', "line 1"),
    "utf-16": ('{"prompt": "a"}'.encode("utf-16"), "UTF-8"), "latin-1": (b'{"prompt": "\xe9"}', "UTF-8"),
    "overlong": (b'{"prompt": "\xc0\x80"}', "UTF-8"),
    "cut off": (b'{"prompt": "\xf0\x9f\x98"}', "UTF-8"), "surrogate in UTF-8": (b'{"prompt": "\xed\xa0\x80"}', "UTF-8"),
    "above Unicode": (b'{"prompt": "\xf5\x80\x80\x80"}', "UTF-8"), "lone surrogate": (b'{"prompt": "\\ud83d"}', "surrogate"),
    "lone low surrogate": (b'{"prompt": ["a", "b\\uDE00c"]}', "prompt[1]"), "surrogate in a key": (b'{"\\ud800": 1}', "surrogate"),
    "surrogate deep": (b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "\\ud800"}]}]}', "messages[0].content[0].text"),
    "surrogate key twice": (b'{"\\ud800": 1, "\\ud800": 2}', "twice"), "key twice": (b'{"prompt": "a", "prompt": "b"}', "prompt"),
    "key twice inside": (b'{"logit_bias": {"70": 1, "70": 2}}', "twice"), "empty key twice": (b'{"": 1, "": 1}', "twice"),
    "deep arrays": (b'{"prompt": ' + b"[" * 65 + b"]" * 65 + b"}", "64 levels"), "deep objects": (b'{"a":' * 65 + b"1" + b"}" * 65, "64 levels"),
    "very deep arrays": (b"[" * 100_000, "64 levels"), "very deep objects": (b'{"a":' * 100_000, "64 levels"),
    "NaN inside": (b'{"chat_template_kwargs": {"x": [NaN]}}', "NaN"), "Infinity": (b'{"user": Infinity}', "Infinity"),
    "pickle": (b"\x80\x04\x95\x1f\x00\x00\x00cos\nsystem\n", "UTF-8"), "zeros": (b"\x00" * 1000, "line 1"), "form": (b"prompt=a&n=1", "line 1"),
    "gzip": (b"\x1f\x8b\x08\x00" + b"\x00" * 100, "UTF-8"),
}  # fmt: skip
TYPES = {
    "text": "text/plain", "form": "application/x-www-form-urlencoded", "multipart": "multipart/form-data; boundary=x", "none": "",
    "xml": "application/xml", "near": "application/jsonp", "ndjson": "application/x-ndjson", "list": "application/json, text/plain",
}  # fmt: skip


def bodies() -> Iterator[Case]:
    """What is not one JSON object in UTF-8, on every route that takes one."""
    for path, good in GOOD.items():
        for name, (body, word) in BODIES.items():
            yield Case(path, f"body {name}", body, 400, word)
        for name, kind in TYPES.items():
            yield Case(path, f"type {name}", json.dumps(good), 415, "application/json", {"Content-Type": kind})
        for encoding in ("gzip", "deflate", "br"):
            yield Case(
                path, f"encoding {encoding}", json.dumps(good), 415, "Content-Encoding", {"Content-Encoding": encoding}
            )
        yield Case(
            path, "type with charset", json.dumps(good), 200, "", {"Content-Type": "Application/JSON; charset=utf-8"}
        )


ROUTES = {
    ("GET", "/nothing"): 404, ("GET", "/v1"): 404, ("GET", "/v1/"): 404, ("POST", "/v1/embeddings"): 404, ("POST", "//v1/completions"): 404,
    ("POST", "/v1/completions/"): 404, ("POST", "/V1/completions"): 404, ("POST", "/v1/../v1/completions"): 404, ("POST", "/v1%2fcompletions/x"): 404,
    ("GET", "/v1/models/"): 404, ("GET", "/v1/models/../../etc/passwd"): 404, ("GET", "/v1/models/%00"): 404, ("GET", "/%ff%fe"): 404,
    ("GET", "/docs/../../etc/passwd"): 404, ("GET", "/static/app.js"): 404, ("GET", "/v1/completions"): 405, ("PUT", "/v1/completions"): 405,
    ("DELETE", "/v1/models"): 405, ("PATCH", "/tokenize"): 405, ("POST", "/health"): 405, ("POST", "/metrics"): 405,
    ("OPTIONS", "/v1/completions"): 405,
    ("TRACE", "/health"): 405, ("BREW", "/v1/completions"): 405, ("PROPFIND", "/"): 404, ("POST", "/v1/load_lora_adapter"): 404,
    ("POST", "/sleep"): 404,
    ("GET", "/server_info"): 404, ("GET", "/.env"): 404, ("GET", "/" + "a" * 5000): 404,
}  # fmt: skip


# ---- below HTTP ------------------------------------------------------------------------------------------------------------------

_HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
_GET = "GET /health HTTP/1.1\r\nHost: localhost\r\n"
_CHUNKED = _HEAD + "Transfer-Encoding: chunked\r\n\r\n"
_BODY = json.dumps(GOOD[COMPLETIONS])
RAW: dict[str, tuple[str, int, str]] = {
    "zeros": ("\x00\x01\x02\r\n\r\n", 400, "request line"), "TLS": ("\x16\x03\x01\x00\xa5\x01" + "x" * 100, 400, "request line"),
    "HTTP 0.9": ("GET /health\r\n\r\n", 400, "request line"), "HTTP 2 preface": ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404, "PRI"),
    "redis": ("*1\r\n$4\r\nINFO\r\n\r\n", 400, "request line"), "pickle": ("\x80\x04cos\nsystem\n(S'true'\ntR.\r\n\r\n", 400, "request line"),
    "no Host": ("GET /health HTTP/1.1\r\n\r\n", 400, "Host"), "two Hosts": (_GET + "Host: localhost\r\n\r\n", 400, "Host"),
    "space before the colon": (_GET + "X : a\r\n\r\n", 400, "header line"), "NUL in a header": (_GET + "X: a\x00b\r\n\r\n", 400, "header line"),
    "CR in a header": (_GET + "X: a\rb\r\n\r\n", 400, "header line"), "no colon": (_GET + "nonsense\r\n\r\n", 400, "header line"),
    "odd method": ("B@D /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "request line"),
    "letters beyond ASCII": ("GET /h\xe9alth HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "request line"),
    "space in the target": ("GET /health /x HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "request line"),
    "absolute target": ("GET http://evil/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 404, "no route"),
    "CONNECT": ("CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", 404, "no route"),
    "star": ("OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 404, ""),
    "both lengths": (_HEAD + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "both"),
    "gzip, chunked": (_HEAD + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400, "Transfer-Encoding"),
    "xchunked": (_HEAD + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400, "Transfer-Encoding"),
    "chunked twice": (_HEAD + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "Transfer-Encoding"),
    "negative length": (_HEAD + "Content-Length: -5\r\n\r\n", 400, "Content-Length"),
    "plus length": (_HEAD + "Content-Length: +5\r\n\r\n", 400, "Content-Length"),
    "hex length": (_HEAD + "Content-Length: 0x5\r\n\r\n", 400, "Content-Length"),
    "endless length": (_HEAD + f"Content-Length: {'9' * 30}\r\n\r\n", 400, "Content-Length"),
    "two lengths": (_HEAD + "Content-Length: 30\r\nContent-Length: 31\r\n\r\n", 400, "Content-Length"),
    "list of lengths": (_HEAD + "Content-Length: 30, 31\r\n\r\n", 400, "Content-Length"),
    "terabyte": (_HEAD + "Content-Length: 1000000000000\r\n\r\n", 413, "max_body_bytes"),
    "terabyte, expects": (_HEAD + "Expect: 100-continue\r\nContent-Length: 1000000000000\r\n\r\n", 413, "max_body_bytes"),
    "chunk size zz": (_CHUNKED + "zz\r\n", 400, "chunk"), "chunk size -5": (_CHUNKED + "-5\r\nabc\r\n", 400, "chunk"),
    "chunk size endless": (_CHUNKED + "f" * 30 + "\r\n", 400, "chunk"), "chunk size 0x1": (_CHUNKED + "0x1\r\na\r\n", 400, "chunk"),
    "chunk longer than said": (_CHUNKED + "2\r\nabcdef\r\n0\r\n\r\n", 400, "chunk"),
    "tiny chunks": (_CHUNKED + "1\r\n \r\n" * 100_000, 400, "max_header_bytes"),
    "chunk of a terabyte": (_CHUNKED + "ffffffffff\r\n" + "a" * (34 << 20), 413, "max_body_bytes"),
    "bad trailer": (_CHUNKED + "0\r\nX : a\r\n\r\n", 400, "header line"), "no body": (_HEAD + "\r\n", 400, "JSON"),
    "200 headers": (_GET + "".join(f"X{i}: a\r\n" for i in range(200)) + "\r\n", 431, "100"),
    "10,000 headers": (_GET + "".join(f"X{i}: a\r\n" for i in range(10_000)) + "\r\n", 431, "max_header_bytes"),
    "a header of 100 KB": (_GET + "X: " + "a" * 100_000 + "\r\n\r\n", 431, "max_header_bytes"),
    "a header of 20 MB": (_GET + "X: " + "a" * 20_000_000 + "\r\n\r\n", 431, "max_header_bytes"),
    "a line of 100 KB": ("GET /" + "a" * 100_000 + " HTTP/1.1\r\nHost: localhost\r\n\r\n", 431, "max_header_bytes"),
    "a query of 100 KB": ("GET /health?" + "a" * 100_000 + " HTTP/1.1\r\nHost: localhost\r\n\r\n", 431, "max_header_bytes"),
    "an endless line": ("A" * 500_000, 431, "max_header_bytes"),
    "an endless trailer": (_CHUNKED + "0\r\nX: " + "a" * 500_000, 431, "max_header_bytes"),
    "foreign Host": ("GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403, "allowed_hosts"),
    "path in Host": ("GET /v1/models HTTP/1.1\r\nHost: localhost/health?\r\n\r\n", 403, "allowed_hosts"),
    "user in Host": ("GET /v1/models HTTP/1.1\r\nHost: localhost@evil.example\r\n\r\n", 403, "allowed_hosts"),
    "subdomain": ("GET /v1/models HTTP/1.1\r\nHost: localhost.evil.example\r\n\r\n", 403, "allowed_hosts"),
}  # fmt: skip
"""What goes over the wire (latin-1) -> status and word of the first answer."""
ODD_BUT_GOOD = {
    "websocket": _GET + "Connection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    "h2c": _GET + "Connection: upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n\r\n",
    "body on GET": _GET + "Content-Length: 3\r\n\r\nabc",
    "HTTP 1.0": "GET /health HTTP/1.0\r\n\r\n",
    "expects": _HEAD + f"Expect: 100-continue\r\nContent-Length: {len(_BODY)}\r\n\r\n{_BODY}",
    "expects the unknown": _HEAD + f"Expect: miracles\r\nContent-Length: {len(_BODY)}\r\n\r\n{_BODY}",
    "small chunks": _CHUNKED + "".join(f"1\r\n{c}\r\n" for c in _BODY) + "0\r\n\r\n",
    "chunk extension and trailer": _CHUNKED + f"{len(_BODY):x};a=b\r\n{_BODY}\r\n0\r\nX-Evil: a\r\n\r\n",
    "IPv6": "GET /health HTTP/1.1\r\nHost: [::1]:80\r\n\r\n",
    "query": f"{_HEAD.replace('completions ', 'completions?n=9&key=x ')}Content-Length: {len(_BODY)}\r\n\r\n{_BODY}",
}
"""Unusual, and served all the same."""


# ---- answers ---------------------------------------------------------------------------------------------------------------------

REVEALING = re.compile(
    r"Traceback|\.py\b|site-packages|xllm_core|/tmp/|/home/|/root/|0x[0-9a-f]{6,}|object at|<class|pydantic|msgspec|h11|bytearray|[A-Z]\w+Error\b"
)
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


def check_refusal(answer: Answer, status: int, word: str) -> None:
    """OpenAI's shape, the right status and type, a message that says what is wrong and nothing of our insides."""
    assert answer.status == status, (answer.status, answer.body[:500])
    assert answer.headers["content-type"] == "application/json", answer.headers
    assert set(answer.json) == {"error"} and set(answer.error) == {"message", "type", "param", "code"}, answer.body[
        :500
    ]
    message = answer.error["message"]
    assert word in message, f"{word!r} is not in {message!r}"
    assert answer.error["type"] == KINDS.get(status, "invalid_request_error")
    assert answer.error["param"] is None or isinstance(answer.error["param"], str)
    assert 0 < len(message) < 600 and not REVEALING.search(message), message


def exchange(server: Server, data: bytes, method: str | None = None) -> Answer:
    """Send bytes as they are; the first final response. method: where the answer depends on it (HEAD)."""
    with server.connect() as connection:
        with contextlib.suppress(OSError):  # refused before it was all sent; the answer is there already
            connection.sendall(data)
        response = http.client.HTTPResponse(connection, method=method)
        response.begin()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
