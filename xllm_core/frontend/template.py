"""Chat templates: a conversation to the one text the model was trained on. Rendered in jinja2's sandbox, as transformers does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from xllm_core.errors import InvalidRequestError, ModelFormatError
from xllm_core.frontend.validation import shown

Message = Mapping[str, Any]


class _Generation(Extension):
    """`{% generation %}`: templates mark what the assistant said, for training. Here it is only its contents."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 reads it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # jinja2's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


class ChatTemplate:
    """One compiled template. special_tokens: `bos_token` and `eos_token`, as templates name them."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ModelFormatError(
                f"the model's chat template does not compile: {error}; give another with --chat-template"
            ) from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **options: Any) -> str:
        """The text of a conversation. options: further variables of the template (tools, switches). Raises InvalidRequestError."""
        check_messages(messages)
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._special_tokens, **options
            )
        except TemplateError as error:
            raise InvalidRequestError(
                f"the chat template refuses this conversation: {error}", param="messages"
            ) from error
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise InvalidRequestError(
                f"the chat template cannot render this conversation ({type(error).__name__}: {error}); check roles and contents",
                param="messages",
            ) from error


def check_messages(messages: object) -> None:
    """A conversation is a list of {"role": str, "content": str or list of parts, ...}, not empty. Raises InvalidRequestError.

    `content` may be missing or None only beside `tool_calls`.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError(
            f'a conversation is a list like [{{"role": "user", "content": "Hello"}}] and not empty, got {shown(messages)}',
            param="messages",
        )
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequestError(
                f"messages[{i}] must be a mapping with a string `role`, got {shown(message)}", param="messages"
            )
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise InvalidRequestError(
                f"messages[{i}] has neither `content` nor `tool_calls`; give it a content, be it an empty text",
                param="messages",
            )
        if content is not None and not isinstance(content, str | list | tuple):
            raise InvalidRequestError(
                f"messages[{i}]: `content` must be a text or a list of parts, got {shown(content)}", param="messages"
            )


def cut_after_content(text: str, messages: Sequence[Message]) -> str:
    """A rendered conversation up to the end of its last message's content. Raises InvalidRequestError if that cannot be found."""
    content = messages[-1].get("content")
    words = content.strip() if isinstance(content, str) else ""
    at = text.rfind(words) if words else -1
    if at < 0:
        raise InvalidRequestError(
            "continue_final_message needs a last message with a text that the chat template writes as it is",
            param="continue_final_message",
        )
    return text[: at + len(words)]
