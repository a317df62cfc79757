"""`xllm plugins`: what is installed, in which state, and why a part is chosen. Each subcommand is imported when it runs."""

from __future__ import annotations

from importlib import import_module

import click

from xllm_core.config_sources import guess

_SUMMARIES = {
    "list": "List every plugin found and its state.",
    "show": "Show one plugin: where it comes from and what it offers.",
    "why": "Explain which part is chosen, and why the others are not.",
    "check": "Run the conformance kit on a plugin.",
    "doctor": "Load every plugin apart from the others, and say what to mend.",
    "enable": "Let a plugin take part: edits the settings file.",
    "disable": "Keep a plugin from being imported: edits the settings file.",
    "schema": "Print a commented sample of a plugin's settings.",
    "lock": "Write down which plugins are installed, for `--locked`.",
    "new": "Write a plugin to start from.",
}


class LazyGroup(click.Group):
    """Subcommand NAME is `command` of module `xllm_core.commands.plugins_NAME`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table."""
        return list(_SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one."""
        if cmd_name not in _SUMMARIES:
            return None
        found: click.Command = import_module(f"xllm_core.commands.plugins_{cmd_name}").command
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest name when there is none."""
        if args and not args[0].startswith("-") and args[0] not in _SUMMARIES:
            ctx.fail(f"no command {args[0]!r}{guess(args[0], _SUMMARIES)}; see {ctx.command_path} --help")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table, so that help imports none of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_SUMMARIES.items()))


@click.group("plugins", cls=LazyGroup)
def command() -> None:
    """List plugins, explain why a part is chosen, and say which of them take part."""
