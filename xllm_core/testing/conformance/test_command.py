"""Commands: click commands that can say what they do."""

from __future__ import annotations

import pytest

from xllm_core.plugins.plan import load_target
from xllm_core.testing.plugin import Kit, kit_of
from xllm_core.testing.subject import Part


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every command."""
    parts = kit_of(metafunc.config).subject.parts("command")
    metafunc.parametrize("part", parts, ids=[part.offer.name for part in parts])


def test_it_shows_its_help(part: Part, xllm_kit: Kit) -> None:
    """Its help is shown, says something, and its one-line summary stands in the spec."""
    import click
    from click.testing import CliRunner

    command = load_target(xllm_kit.importable(part).spec.target, owner=part.offer.name)
    assert isinstance(command, click.Command), f"{part.spec.target} is a {type(command).__name__}, no click command"
    done = CliRunner().invoke(command, ["--help"])
    assert done.exit_code == 0, done.output
    assert command.help, "it has no help text"
    assert part.spec.summary, "its spec has no summary, so the list of commands shows nothing beside its name"
