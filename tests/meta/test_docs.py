"""Documents name what exists: files, make targets, commands, settings."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.meta.source import ROOT
from xllm_core.config_tables import TABLES
from xllm_core.plugins import builtin
from xllm_core.plugins.specs import CommandSpec

DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("plugins/*/README.md"),
        *ROOT.glob("examples/**/*.md"),
    ]
)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
COMMANDS = {spec.name for spec in builtin.xllm_cli() if isinstance(spec, CommandSpec)}
# Commands of plugins stand under their id, which is that of the entry point.
COMMANDS |= {
    plugin_id
    for path in ROOT.glob("plugins/*/pyproject.toml")
    for plugin_id in tomllib.loads(path.read_text())["project"]["entry-points"]["xllm_core.plugins"]
    if any("def xllm_cli(" in module.read_text() for module in path.parent.glob("src/*/plugin.py"))
}


def wrong_names(text: str, folder: Path) -> list[str]:
    """What a document names and nothing is."""
    links = [
        link.split("#")[0]
        for link in re.findall(r"\]\(([^)\s]+)\)", text)
        if "://" not in link and not link.startswith("#")
    ]
    wrong = [f"link to {link}" for link in links if link and not (folder / link).exists()]
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
    wrong += [
        f"make {name}"
        for name in re.findall(r"(?:^|[`$;&] ?)make ([a-z-]+)", code, re.MULTILINE)
        if name not in TARGETS
    ]
    named = re.findall(r"(?:^|[`$;&] ?)(?:\.venv/bin/)?xllm ([a-z][a-z-]*)", code, re.MULTILINE)
    wrong += [f"xllm {name}" for name in named if name not in COMMANDS]
    for table, key in re.findall(r"\[([a-z]+)\] ([a-z_]+)", code):
        if table in TABLES and key not in TABLES[table].model_fields:
            wrong.append(f"[{table}] {key}")
    return wrong


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documents_name_what_exists(path: Path) -> None:
    """Dies when a file, target, command or setting is renamed and its document is not."""
    wrong = wrong_names(path.read_text(encoding="utf-8"), path.parent)
    assert not wrong, f"{path.name}: {wrong}"


def test_the_guard_sees() -> None:
    """One wrong name of each kind, and right ones beside them."""
    text = "[a](Makefile) [b](nowhere.md) `make demo` `make tea`\n```\nxllm chat x\nxllm sing\n```\n`[kv] block_size` `[kv] blok`"
    assert wrong_names(text, ROOT) == ["link to nowhere.md", "make tea", "xllm sing", "[kv] blok"]
    assert {
        "demo",
        "test",
        "check",
        "setup",
        "nightly",
        "bench",
        "bench-peers",
        "wheels",
        "docs",
        "help",
        "clean",
    } <= TARGETS
