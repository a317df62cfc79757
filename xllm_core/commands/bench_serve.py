"""`xllm bench serve`: load on a server that speaks OpenAI's API, and what its clients see."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from xllm_core.errors import ConfigError

if TYPE_CHECKING:
    from xllm_core.loadgen.client import Target
    from xllm_core.loadgen.runner import Run
    from xllm_core.loadgen.workload import Ask

_DEFAULT_CLIENTS = 8
_DEFAULT_VOCAB = 1000
_POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command("serve")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server, with or without /v1.")
@click.option("--uds", type=click.Path(), help="Unix socket to reach the server through.")
@click.option("--model", help="Model to ask for; default is the first that the server lists.")
@click.option(
    "--clients",
    type=click.IntRange(1),
    help=f"Closed loop: so many clients, each with one request at a time. [default: {_DEFAULT_CLIENTS}]",
)
@click.option("--rate", type=_POSITIVE, help="Open loop: so many requests per second, with Poisson arrivals.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="Lengths and arrival times of a trace: Azure's .csv or Mooncake's .jsonl. With --clients or --rate only the lengths.",
)
@click.option("--length-factor", type=_POSITIVE, default=1.0, show_default=True, help="Multiplies a trace's lengths.")
@click.option(
    "--time-factor",
    type=_POSITIVE,
    default=1.0,
    show_default=True,
    help="Multiplies a trace's arrival times; 0.1 is ten times the load.",
)
@click.option("--num-requests", type=click.IntRange(1), help="Requests to send; default 100, or the whole trace.")
@click.option(
    "--input-len", type=click.IntRange(1), default=128, show_default=True, help="Prompt tokens, without a trace."
)
@click.option(
    "--output-len", type=click.IntRange(1), default=128, show_default=True, help="New tokens, without a trace."
)
@click.option(
    "--prompt-mode",
    type=click.Choice(["ids", "text"]),
    default="ids",
    show_default=True,
    help="Random token ids, or random words.",
)
@click.option(
    "--vocab-size", type=click.IntRange(2), default=_DEFAULT_VOCAB, show_default=True, help="Random ids lie below it."
)
@click.option(
    "--endpoint",
    type=click.Choice(["completions", "chat"]),
    default="completions",
    show_default=True,
    help="chat needs --prompt-mode text.",
)
@click.option(
    "--ignore-eos/--no-ignore-eos",
    default=True,
    show_default=True,
    help="Ask for exactly the new tokens that were planned.",
)
@click.option("--extra-body", default="{}", help="JSON object with further fields of each request; null takes one out.")
@click.option(
    "--api-key-env", metavar="NAME", default="XLLM_API_KEY", show_default=True,
    help="Variable that holds the server's API key; without it none is sent.",
)  # fmt: skip
@click.option(
    "--num-warmups", type=click.IntRange(0), default=1, show_default=True, help="Requests before the measured ones."
)
@click.option("--timeout-s", type=_POSITIVE, default=600.0, show_default=True, help="Longest silence of the server.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of prompts and arrivals.")
@click.option(
    "--goodput", multiple=True, metavar="TARGETS", help='What a good request keeps, e.g. "ttft:500ms tpot:50ms e2e:2s".'
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write figures, conditions and every sample to this file.",
)
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write latency.png and timeline.png into this folder.",
)
@click.argument("more_targets", nargs=-1, metavar="")
def command(**options: Any) -> None:
    """Measure a running server through its API, of xllm or of anybody.

    Sends streaming requests in a closed loop (--clients), at random times (--rate) or as a trace did (--trace), and
    prints the times to the first token, per further token, between chunks and to the end, and the tokens per second.

    \b
      xllm bench serve --url http://127.0.0.1:8000 --clients 16 --num-requests 64
      xllm bench serve --rate 4 --num-requests 200 --goodput ttft:500ms tpot:50ms --json run.json --plot plots
      xllm bench serve --trace azure_code.csv --length-factor 0.05 --time-factor 0.5

    Exit status: 0, 1 if a request failed, 130 after Ctrl-C, which prints what was measured so far.
    """
    from xllm_core.loadgen import plots, report

    _check_together(options)
    targets = report.parse_targets([*options["goodput"], *options["more_targets"]])
    if options["plot_path"] is not None:
        plots.check_matplotlib()
    run, conditions = asyncio.run(_measure(options))
    figures = report.summarise(run, targets)
    click.echo(
        "\n".join([_title(conditions), *report.lines(figures, is_sharing_expected="trace" in conditions["load"])])
    )
    if options["json_path"] is not None:
        whole = {"figures": figures, "conditions": conditions, "samples": [sample.to_json() for sample in run.samples]}
        options["json_path"].write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if options["plot_path"] is not None:
        for path in plots.draw(run.samples, figures, _title(conditions), options["plot_path"]):
            click.echo(f"  plot               {path}")
    click.echo(json.dumps({**figures, "conditions": conditions}))
    click.get_current_context().exit(130 if run.is_interrupted else 1 if figures["failed"] else 0)


def _check_together(options: Mapping[str, Any]) -> None:
    """Raise UsageError for options that do not go together: none is passed over in silence."""
    ctx = click.get_current_context()
    given = {name for name in options if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    has_times = "trace" in given and not given & {"clients", "rate"}
    rules = {
        "targets follow --goodput, not the command": "more_targets" in given and "goodput" not in given,
        "--endpoint chat takes no token ids; add --prompt-mode text": options["endpoint"] == "chat"
        and options["prompt_mode"] == "ids",
        "--clients is a closed loop and --rate an open one; give one of them": {"clients", "rate"} <= given,
        "--length-factor scales a trace; add --trace": "length_factor" in given and "trace" not in given,
        "--time-factor scales the times of a trace; add --trace, without --clients and --rate": "time_factor" in given
        and not has_times,
        "--trace brings its own lengths; drop --input-len and --output-len": "trace" in given
        and bool(given & {"input_len", "output_len"}),
        "--vocab-size bounds token ids; drop it or --prompt-mode text": "vocab_size" in given
        and options["prompt_mode"] == "text",
    }
    for message, is_broken in rules.items():
        if is_broken:
            raise click.UsageError(message)


async def _measure(options: Mapping[str, Any]) -> tuple[Run, dict[str, Any]]:
    from xllm_core.loadgen.client import Failure, LoadClient
    from xllm_core.loadgen.runner import run_load, warm_up
    from xllm_core.loadgen.workload import Prompts, check_context

    target = _target(options)
    asks, load = _asks(options)
    prompts = Prompts.of_vocabulary(options["seed"], options["vocab_size"])
    async with LoadClient(target) as client:
        try:
            facts = await client.facts()
        except Failure as error:
            raise click.ClickException(
                f"{target.uds or target.url}: {error}; is the server up, and --url right?"
            ) from error
        model, max_model_len = _model(facts["models"], options["model"])
        client.target = replace(target, model=model)
        if max_model_len is not None:
            check_context(asks, max_model_len, options["length_factor"] if options["trace"] else None)
        # Their numbers follow those of the measured ones, so that no prompt is in the server's cache already.
        warm_ups = [replace(asks[0], index=len(asks) + i, prefix=()) for i in range(options["num_warmups"])]
        failed = await warm_up(client, warm_ups, prompts)
        if failed is not None:
            hint = (
                "; --vocab-size must not exceed the model's"
                if failed.status == 400 and target.prompt_mode == "ids"
                else ""
            )
            raise click.ClickException(
                f"the first request failed ({failed.error} {failed.status or ''}): {failed.message}{hint}"
            )
        closed = options["clients"] or (None if asks[0].due_s is not None else _DEFAULT_CLIENTS)
        run = await run_load(client, asks, prompts, num_clients=closed)
    return run, _conditions(client.target, facts, load)


def _target(options: Mapping[str, Any]) -> Target:
    from xllm_core.loadgen.client import Target

    try:
        extra = json.loads(options["extra_body"])
    except json.JSONDecodeError as error:
        raise ConfigError(f"--extra-body: not valid JSON: {error}") from error
    if not isinstance(extra, dict):
        raise ConfigError(f"--extra-body: a JSON object is due, not {options['extra_body'][:80]}")
    name = options["api_key_env"]
    key = os.environ.get(name)
    if not key and click.get_current_context().get_parameter_source("api_key_env") is ParameterSource.COMMANDLINE:
        raise ConfigError(f"--api-key-env {name}: the variable is not set, or empty")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return Target(
        url=options["url"], model="", endpoint=options["endpoint"], prompt_mode=options["prompt_mode"],
        uds=options["uds"], headers=headers, timeout_s=options["timeout_s"],
        extra={**({"ignore_eos": True} if options["ignore_eos"] else {}), **extra},
    )  # fmt: skip


def _asks(options: Mapping[str, Any]) -> tuple[Sequence[Ask], dict[str, Any]]:
    """The requests, and how they are described."""
    from xllm_core.loadgen.workload import fixed_lengths, poisson, read_trace

    load: dict[str, Any] = {"seed": options["seed"], "prompt_mode": options["prompt_mode"]}
    if options["trace"] is not None:
        factors = {name: options[name] for name in ("length_factor", "time_factor")}
        asks = read_trace(options["trace"], num_requests=options["num_requests"], **factors)
        load |= {"trace": options["trace"].name, **factors}
    else:
        load |= {"input_len": options["input_len"], "output_len": options["output_len"]}
        asks = fixed_lengths(options["num_requests"] or 100, options["input_len"], options["output_len"])
    if options["rate"] is not None:
        asks = poisson(asks, options["rate"], options["seed"])
        load["rate"] = options["rate"]
    elif options["clients"] is not None or options["trace"] is None:
        asks = [replace(ask, due_s=None) for ask in asks]
        load["clients"] = options["clients"] or _DEFAULT_CLIENTS
    return asks, load | {"num_requests": len(asks)}


def _model(models: Any, wanted: str | None) -> tuple[str, int | None]:
    """(name to ask for, its context where the server tells it)."""
    listed = models.get("data") if isinstance(models, dict) else None
    entries = [entry for entry in listed or () if isinstance(entry, dict) and "id" in entry]
    if wanted is None and not entries:
        raise ConfigError("the server lists no model at /v1/models; name one with --model")
    name = wanted if wanted is not None else str(entries[0]["id"])
    context = next((entry.get("max_model_len") for entry in entries if entry["id"] == name), None)
    return name, context if isinstance(context, int) else None


def _conditions(target: Target, facts: Mapping[str, Any], load: Mapping[str, Any]) -> dict[str, Any]:
    import aiohttp

    from xllm_core import __version__

    return {
        "command": shlex.join(["xllm", *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"xllm-core": __version__, "python": platform.python_version(), "aiohttp": aiohttp.__version__},
        "machine": {"platform": platform.platform(), "processor": _processor(), "cores": os.cpu_count()},
        "server": {"url": target.uds or target.url, "version": facts["version"], "models": facts["models"]},
        "model": target.model,
        "endpoint": target.endpoint,
        "extra_body": dict(target.extra),
        "load": dict(load),
    }


def _processor() -> str:
    """The name of the processor; Python knows it only on some systems."""
    facts = Path("/proc/cpuinfo")
    names = [line for line in facts.read_text().splitlines() if line.startswith("model name")] if facts.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _title(conditions: Mapping[str, Any]) -> str:
    load = conditions["load"]
    how = (
        f"{load['rate']:g} requests/s" if "rate" in load else f"{load['clients']} clients" if "clients" in load else ""
    )
    what = f"{load['num_requests']} requests"
    if "trace" in load:
        what += f" of {load['trace']}, lengths x {load['length_factor']:g}"
        what += "" if how else f", times x {load['time_factor']:g}"
    else:
        what += f" of {load['input_len']} + {load['output_len']} tokens"
    parts = [conditions["server"]["url"], conditions["model"], *([how] if how else []), what, f"seed {load['seed']}"]
    return ", ".join(parts)
