"""The code as data, for the guards: files, functions, imports."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
LAYOUT: dict[str, Any] = tomllib.loads((ROOT / "docs" / "layout.toml").read_text(encoding="utf-8"))

_SKIPPED = {".venv", "build", "dist", "node_modules", "__pycache__"}


def python_files(*folders: str) -> list[Path]:
    """Python files under these folders of the checkout; folders that do not exist hold none."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in found if not _SKIPPED & set(path.relative_to(ROOT).parts))


@cache
def tree(path: Path) -> ast.Module:
    """A file, parsed once."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name_of(path: Path) -> str:
    """xllm_core/kv/manager.py -> xllm_core.kv.manager."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def relative(path: Path) -> str:
    """As docs/layout.toml writes it."""
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """("Class.method", node) of every function of a file, inner ones as part of their outer name."""

    def walk(node: ast.AST, above: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            name = f"{above}{child.name}" if hasattr(child, "name") else above
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield name, child
            yield from walk(
                child, f"{name}." if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) else above
            )

    yield from walk(tree(path), "")


def num_code_lines(path: Path) -> int:
    """Lines with something on them that is neither a comment nor a docstring."""
    explained: set[int] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            explained.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    return sum(
        1 for number, line in lines if number not in explained and line.strip() and not line.strip().startswith("#")
    )


def imports(path: Path, *, with_type_checking: bool = False) -> list[tuple[str, int]]:
    """(module, line) of every import of a file, inside functions too; those for the type checker alone only if asked."""
    found: list[tuple[str, int]] = []

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not with_type_checking:
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno) for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append((node.module, node.lineno))
            found.extend((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(tree(path))
    return found
