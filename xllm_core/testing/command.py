"""`xllm plugins check`: the kit on the command line."""

from __future__ import annotations

from pathlib import Path

import click

from xllm_core.config_sources import guess
from xllm_core.errors import PluginError
from xllm_core.plugins.installed import installed_plugins
from xllm_core.testing.check import run_kit
from xllm_core.testing.report import ComponentReport, ConformanceReport


@click.command("check")
@click.argument("plugin_id", metavar="ID")
@click.option("--require-device", is_flag=True, help="A device that is missing here is a failure, not a skip.")
@click.option(
    "--report",
    "report_path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write what was proven, as JSON.",
)
@click.option("-k", "expression", metavar="EXPR", help="Only tests whose names match, as pytest's -k.")
@click.option(
    "--config",
    "config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Settings file; default ./xllm.toml.",
)
@click.option("--verbose", is_flag=True, help="Show every test.")
def command(
    plugin_id: str,
    require_device: bool,
    report_path: Path | None,
    expression: str | None,
    config: Path | None,
    verbose: bool,
) -> None:
    """Run the conformance kit on everything that a plugin offers, in a process of its own.

    Ends with a table: what was proven, what failed, and what could not run here and why. Exit status 1 if anything failed, or if nothing
    that the plugin offers could run.
    """
    known = sorted({entry.id for entry in installed_plugins()})
    if plugin_id not in known:
        raise PluginError(
            f"no plugin {plugin_id!r} is installed{guess(plugin_id, known)}; installed: {', '.join(known)}"
        )
    arguments = ["-k", expression] if expression else []
    arguments += ["-v"] if verbose else []
    default = Path("xllm.toml")
    config = config or (default if default.exists() else None)
    report = run_kit(plugin_id, require_device=require_device, config=config, arguments=arguments, shows_progress=True)
    if report_path is not None:
        report.write(report_path)
    click.echo("\n" + "\n".join(table(report)))
    if not report.ok:
        raise SystemExit(1)


def table(report: ConformanceReport) -> list[str]:
    """A line per component, then reasons; failures were shown as they happened. Where nothing came to run, the verdict alone."""
    if not report.components:
        return [report.verdict]
    width = max([len(component.name) for component in report.components] or [9])
    lines = [f"{'component':<{width}}  proven  failed  skipped"]
    for component in report.components:
        lines.append(f"{component.name:<{width}}  {component.passed:>6}  {component.failed:>6}  {component.skipped:>7}")
        lines += _reasons(component)
    return [*lines, report.verdict]


def _reasons(component: ComponentReport) -> list[str]:
    return [f"  skipped {count}: {reason}" for reason, count in component.skips.items()]
