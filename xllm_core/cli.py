"""`xllm`: finds commands by plugin, imports one when it runs. `xllm --help` imports no plugin but the core's own list, and no torch.

The core's commands stand at the top; those of plugin ID are `xllm ID NAME`. Errors of ours become one message on stderr and exit status 1;
wrong usage is 2, an interrupt 130.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from xllm_core import __version__
from xllm_core.config_sources import guess
from xllm_core.errors import XllmError
from xllm_core.plugins.manager import CORE, Offer, PluginManager
from xllm_core.plugins.plan import load_target


class CommandGroup(click.Group):
    """Commands from one plugin's `xllm_cli` specs; each target is imported when that command is asked for."""

    def __init__(self, manager: PluginManager, plugin_id: str, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.manager = manager
        self.plugin_id = plugin_id

    def offers(self) -> dict[str, Offer]:
        """Command name -> its spec and who offers it."""
        return {offer.spec.name: offer for offer in self.manager.commands(self.plugin_id)}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which the plugin offers them."""
        return list(self.offers())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command; None if there is no such name."""
        offer = self.offers().get(cmd_name)
        if offer is None:
            return None
        command = load_target(offer.spec.target, owner=offer.name)
        if not isinstance(command, click.Command):
            raise click.ClickException(
                f"{offer.name}: its target {offer.spec.target!r} is a {type(command).__name__}, not a click.Command"
            )
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest name when there is none."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            names = self.list_commands(ctx)
            ctx.fail(f"no command {args[0]!r}{guess(args[0], names)}; see {ctx.command_path} --help")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Summaries come from the specs: help imports no command."""
        rows = [(name, offer.spec.summary) for name, offer in self.offers().items()]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


class RootGroup(CommandGroup):
    """The top: the core's commands, and one group for each other plugin that is installed."""

    def plugins(self) -> dict[str, str]:
        """Plugin id -> distribution and version, from metadata alone."""
        records = [record for record in self.manager.records if record.id != CORE and record.state == "found"]
        return {record.id: f"{record.distribution} {record.version}" for record in records}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The core's commands, then plugin ids."""
        return [*super().list_commands(ctx), *self.plugins()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command of the core, or the group of a plugin, whose module is imported here."""
        command = super().get_command(ctx, cmd_name)
        plugins = self.plugins()
        if command is not None or cmd_name not in plugins:
            return command
        if not self.manager.commands(cmd_name):
            raise click.UsageError(f"plugin {cmd_name!r} ({plugins[cmd_name]}) brings no commands", ctx)
        return CommandGroup(self.manager, cmd_name, name=cmd_name, help=f"Commands of {plugins[cmd_name]}.")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Commands, then plugins that may have some: which ones do is known only to the plugin, which is not imported for this."""
        super().format_commands(ctx, formatter)
        if rows := [(name, f"Commands of {origin}, if it has any.") for name, origin in self.plugins().items()]:
            with formatter.section("Plugins"):
                formatter.write_dl(rows)


def root() -> click.Group:
    """The click group behind `xllm`, with the plugins of this process."""
    group = RootGroup(
        PluginManager.discover(),
        CORE,
        name="xllm",
        help="Serve and run language models on whatever accelerator is here.",
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    return click.version_option(__version__, prog_name="xllm")(group)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `xllm`; returns the exit status. arguments: those of this process by default."""
    try:
        status = root().main(
            args=None if arguments is None else list(arguments), prog_name="xllm", standalone_mode=False
        )
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except XllmError as error:
        click.echo(f"Error: {error}", err=True)
        return 1
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return 130
    except BrokenPipeError:
        # The reader went away (`xllm ... | head`); Python's own flush at exit must not complain about it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
