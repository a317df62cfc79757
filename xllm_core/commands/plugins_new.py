"""`xllm plugins new`."""

from __future__ import annotations

from pathlib import Path

import click

from xllm_core.plugins import builtin
from xllm_core.scaffold.render import KINDS, names_of, render, write


@click.command("new", epilog="Kinds:\n\n\b\n" + "\n".join(f"  {kind:<17} {line}" for kind, line in KINDS.items()))
@click.argument("kind", type=click.Choice(list(KINDS)), metavar="KIND")
@click.argument("name", metavar="NAME")
@click.option(
    "--path", type=click.Path(path_type=Path), metavar="DIR", help="Folder to write, empty or new; default ./xllm-NAME."
)
@click.option("--description", default="", metavar="TEXT", help="One line for pyproject.toml and README.md.")
@click.option("--author", default="", metavar="TEXT", help="Your name, for pyproject.toml and LICENSE.")
def command(kind: str, name: str, path: Path | None, description: str, author: str) -> None:
    """Write a plugin to start from: a distribution that installs, does something small and real, and passes conformance as it is.

    NAME becomes the plugin's id, the distribution xllm-NAME and the package xllm_NAME. Nothing is overwritten.
    """
    names = names_of(name, frozenset(spec.name for spec in builtin.xllm_cli()))
    folder = path if path is not None else Path(names.distribution)
    contents = render(kind, names, description=description, author=author)
    write(contents, folder)
    click.echo(f"{folder}/")
    for line in _tree(list(contents)):
        click.echo(f"  {line}")
    click.echo("\nnext:")
    click.echo(f"  pip install -e '{folder}[test]'")
    click.echo(f"  python -m pytest {folder}/tests")
    click.echo(f"  xllm plugins show {names.id}")


def _tree(paths: list[str]) -> list[str]:
    """Paths as lines, each folder said once, files of a folder before its folders."""
    lines: list[str] = []
    folders = sorted({path.partition("/")[0] for path in paths if "/" in path})
    lines += sorted(path for path in paths if "/" not in path)
    for folder in folders:
        inner = [path.partition("/")[2] for path in paths if path.startswith(f"{folder}/")]
        lines += [f"{folder}/", *(f"  {line}" for line in _tree(inner))]
    return lines
