"""`xllm bench`: figures of this machine, with the conditions they were taken under."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import click

from xllm_core.commands.bench_serve import command as serve
from xllm_core.config import click_options, settings_from_flags

_Command = TypeVar("_Command", bound=Callable[..., Any])


@click.group("bench")
def command() -> None:
    """Measure MODEL in this process (throughput, latency), or a server that runs (serve).

    The last line of the output is one JSON object with every figure and its conditions.
    """


def _load_options(num_prompts: int) -> Callable[[_Command], _Command]:
    options = (
        click.option(
            "--num-prompts", type=click.IntRange(1), default=num_prompts, show_default=True, help="Requests per round."
        ),
        click.option(
            "--input-len", type=click.IntRange(1), default=128, show_default=True, help="Prompt tokens of each request."
        ),
        click.option(
            "--output-len", type=click.IntRange(1), default=128, show_default=True, help="New tokens of each request."
        ),
        click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
        click.option(
            "--rounds",
            type=click.IntRange(1),
            default=3,
            show_default=True,
            help="Measured rounds, after one to warm up.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of the random prompts."),
        click.option("--json", "is_json", is_flag=True, help="Only the JSON line."),
    )

    def decorate(function: _Command) -> _Command:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


command.add_command(serve)


@command.command("throughput")
@click.argument("model")
@_load_options(32)
@click_options("model", "device", "engine", "scheduler", "kv", "log", without=("num_engines",))
def throughput(model: str, **flags: Any) -> None:
    """All requests at once: tokens per second of the batch."""
    _measure(model, flags)


@command.command("latency")
@click.argument("model")
@_load_options(1)
@click_options("model", "device", "engine", "scheduler", "kv", "log", without=("num_engines",))
def latency(model: str, **flags: Any) -> None:
    """A few requests (one, unless --num-prompts says otherwise): time to the first token and per token."""
    _measure(model, flags)


def _measure(model: str, flags: dict[str, Any]) -> None:
    from xllm_core.benchmark import Load, report, run_round
    from xllm_core.frontend.start import start_in_process

    is_json, rounds = flags.pop("is_json"), flags.pop("rounds")
    names = ("num_prompts", "input_len", "output_len", "temperature", "seed")
    load = Load(**{name: flags.pop(name) for name in names})
    flags["max_num_seqs"] = flags.get("max_num_seqs") or max(load.num_prompts, 1)
    processor = start_in_process(model, settings=settings_from_flags(flags, path=model))
    show = False if is_json else None
    run_round(
        processor, replace(load, output_len=min(4, load.output_len), seed=load.seed - 1), name="warm-up", show=show
    )
    results = [
        run_round(processor, replace(load, seed=load.seed + i * 1000), name=f"round {i + 1}", show=show)
        for i in range(rounds)
    ]
    figures = report(processor, load, results)
    processor.client.close()
    if not is_json:
        _print(figures)
    click.echo(json.dumps(figures))


def _print(figures: dict[str, Any]) -> None:
    load, steps = figures["load"], figures["step_ms"]
    click.echo(f"{figures['model']} on {figures['device']}, {figures['dtype']}")
    click.echo(
        f"{load['num_prompts']} requests of {load['input_len']} + {load['output_len']} tokens, {len(figures['elapsed_s'])} rounds"
    )
    click.echo(
        f"  output tokens/s  {figures['output_tokens_per_s']:>10}   (with prompts {figures['total_tokens_per_s']})"
    )
    click.echo(f"  first token ms   {figures['ttft_ms']['p50']:>10} p50 {figures['ttft_ms']['p99']:>10} p99")
    click.echo(f"  per token ms     {figures['tpot_ms']['p50']:>10} p50 {figures['tpot_ms']['p99']:>10} p99")
    click.echo("  step ms          " + ", ".join(f"{part} {value}" for part, value in steps.items()))
    if figures["early_share"]:
        click.echo(f"  planned early    {figures['early_share']:.1%} of steps, while the one before ran")
    if figures["replayed_share"]:
        click.echo(f"  replayed         {figures['replayed_share']:.1%} of steps, from recorded graphs")
    click.echo(f"  peak memory      {figures['peak_memory_bytes'] / 2**20:.0f} MiB")
