"""Flags of commands, made from the tables: `[scheduler] max_num_seqs` is `--max-num-seqs`."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Collection
from typing import Any, Literal, TypeVar

from pydantic.fields import FieldInfo

from xllm_core.config_tables import TABLES, flag_name, holds_secret, is_list

_PLUGIN_FLAGS = ("strict", "locked")  # lists of plugins belong in a file, where the next start finds them

_Command = TypeVar("_Command", bound=Callable[..., Any])


def click_options(*tables: str, without: Collection[str] = ()) -> Callable[[_Command], _Command]:
    """Give a click command `--config`, `--use KIND=NAME` and one flag per field of these tables; read them with `settings_from_flags`.

    without: fields that mean nothing to this command. Values stay text until `Settings` checks them, so that a flag, a variable and a
    line of the file fail with one message.
    """
    import click

    def decorate(command: _Command) -> _Command:
        for table in reversed((*tables, "plugins") if tables else ()):
            for name, entry in reversed(list(TABLES[table].model_fields.items())):
                flat = flag_name(name, entry)
                if name in without or (table == "plugins" and name not in _PLUGIN_FLAGS):
                    continue
                if holds_secret(entry.annotation):
                    command = _refused_flag(flat, f"XLLM_{table}__{name}".upper())(command)
                elif (table, name) != ("model", "path"):  # the model is each command's argument
                    command = click.option(*_flag(flat, entry), **_flag_type(name, entry))(command)
        pins = click.option(
            "--use", multiple=True, metavar="KIND=NAME", help="Pin a part, e.g. attention=core/paged. Repeatable."
        )
        config = click.option(
            "--config", "config_path", type=click.Path(), metavar="FILE", help="Settings file; default ./xllm.toml."
        )
        return config(pins(command))

    return decorate


def _flag(flat: str, entry: FieldInfo) -> tuple[str, ...]:
    flag = flat.replace("_", "-")
    if entry.annotation is bool:
        off = flag.replace("enable-", "disable-") if flag.startswith("enable-") else f"no-{flag}"
        return (f"--{flag}/--{off}", flat)
    return (f"--{flag}", flat)


def _refused_flag(flat: str, variable: str) -> Callable[[_Command], _Command]:
    """A flag that only explains why there is none: command lines show in `ps` and in shell histories."""
    import click

    flag = flat.removesuffix("s").replace("_", "-")

    def refuse(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            raise click.UsageError(
                f"--{flag} is not offered: a secret on a command line shows in ps; use --{flag}-file FILE or the variable {variable}"
            )

    return click.option(
        f"--{flag}", f"--{flag}s", expose_value=False, hidden=True, is_eager=True, flag_value="", is_flag=False, callback=refuse
    )  # fmt: skip


def _flag_type(name: str, entry: FieldInfo) -> dict[str, Any]:
    default = "" if entry.default is None or entry.default == () else f"  [default: {entry.default}]"
    options: dict[str, Any] = {"default": None, "help": f"{entry.description}{default}"}
    if entry.annotation is bool:
        return options
    if is_list(entry):
        return options | {"multiple": True, "metavar": "TEXT", "help": f"{entry.description}  [repeatable]"}
    arguments = typing.get_args(entry.annotation)
    if typing.get_origin(entry.annotation) is Literal:
        options["metavar"] = "|".join(str(argument) for argument in arguments)
        return options
    plain = [a for a in arguments if a is not types.NoneType] if arguments else [entry.annotation]
    number = "SECONDS" if name.endswith("_s") else "BYTES" if name.endswith("_bytes") else "N"
    options["metavar"] = number if plain in ([int], [float]) else "TEXT"
    return options
