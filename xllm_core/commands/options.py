"""Flags that several commands share: how tokens are chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import click

from xllm_core.types import SamplingParams

_Command = TypeVar("_Command", bound=Callable[..., Any])

_SAMPLING = (
    click.option(
        "--max-tokens",
        type=int,
        default=None,
        help="Most new tokens of an answer; default 128 for generate, 512 for chat.",
    ),
    click.option("--min-tokens", type=int, default=None, help="New tokens before which nothing ends the text."),
    click.option("--temperature", type=float, default=None, help="0 is greedy; default is the model's own."),
    click.option("--top-p", type=float, default=None, help="Nucleus: smallest set of tokens with this probability."),
    click.option("--top-k", type=int, default=None, help="Only the K likeliest tokens; 0 is off."),
    click.option(
        "--min-p", type=float, default=None, help="Only tokens at least this likely, relative to the likeliest."
    ),
    click.option("--repetition-penalty", type=float, default=None, help="Above 1 discourages tokens seen before."),
    click.option("--frequency-penalty", type=float, default=None, help="Per occurrence in the output."),
    click.option("--presence-penalty", type=float, default=None, help="Once per token in the output."),
    click.option("--seed", type=int, default=None, help="Repeats the same answer whatever else runs."),
    click.option("--stop", multiple=True, help="Text that ends the answer. Repeatable."),
    click.option("--ignore-eos", is_flag=True, default=None, help="Do not end at the model's end token."),
)


def sampling_options(command: _Command) -> _Command:
    """Add the sampling flags; read them with `sampling_params`."""
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


def sampling_params(flags: dict[str, Any], default: SamplingParams) -> SamplingParams:
    """Take the sampling flags out of `flags`: what was given, over `default`."""
    names = {field.name for field in fields(SamplingParams)} & set(flags)
    given = {name: flags.pop(name) for name in names}
    return replace(default, **{name: value for name, value in given.items() if value not in (None, ())})
