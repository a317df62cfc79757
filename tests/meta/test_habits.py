"""Habits that a linter does not know."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.meta.source import ROOT, functions, imports, name_of, python_files, relative, tree

CORE = python_files("xllm_core")
TESTS = [path for path in python_files("tests", "plugins") if "tests" in path.parts and "dists" not in path.parts]


def test_files_have_names_that_say_something() -> None:
    """No utils, helpers, common, misc; no todo left in code."""
    vague = [
        relative(path)
        for path in python_files("xllm_core", "plugins")
        if path.stem in ("utils", "util", "helpers", "common", "misc")
    ]
    assert not vague, vague
    mark = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    found = [
        f"{relative(path)}:{number}"
        for path in python_files("xllm_core", "plugins", "benchmarks", "examples")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if mark.search(line)
    ]
    assert not found, found


def test_what_is_offered_works() -> None:
    """No NotImplementedError, no pickle, no eval, no torch.load, no `except ImportError` around plugin code."""
    found = []
    for path in python_files("xllm_core", "plugins"):
        for node in ast.walk(tree(path)):
            text = ast.unparse(node) if isinstance(node, ast.Raise | ast.Call | ast.ExceptHandler) else ""
            is_bad = (
                (isinstance(node, ast.Raise) and "NotImplementedError" in text)
                or (isinstance(node, ast.Call) and re.match(r"(eval|exec|torch\.load|pickle\.\w+)\(", text))
                or (
                    isinstance(node, ast.ExceptHandler)
                    and node.type is not None
                    and "ImportError" in ast.unparse(node.type)
                    and path.name != "doctor.py"  # whose work is to report what cannot be imported
                )
            )
            if is_bad:
                found.append(f"{relative(path)}:{node.lineno}: {text.splitlines()[0]}")  # type: ignore[attr-defined]
        found += [
            f"{relative(path)}:{line}: import {module}"
            for module, line in imports(path)
            if module in ("pickle", "dill", "marshal")
        ]
    assert not found, "\n".join(found)


def test_public_names_are_documented() -> None:
    """Modules, classes and functions; what a Protocol says of a method need not be said again by those who implement it."""
    contracts = {name for path in CORE if "contracts" in path.parts for name in _protocol_methods(path)}
    bare = []
    for path in CORE:
        if tree(path).body and not ast.get_docstring(tree(path)):
            bare.append(f"{relative(path)}: no docstring")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                bare.append(f"{relative(path)}:{node.lineno}: class {node.name}")
        told = contracts | _protocol_methods(path)
        names = {name for name, _ in functions(path)}
        for name, function in functions(path):
            outer, _, last = name.rpartition(".")
            is_private = any(part.startswith("_") for part in name.split("."))
            is_told = bool(outer) and (last in told or outer in names)
            if not is_private and not is_told and not ast.get_docstring(function) and not _is_overload(function):
                bare.append(f"{relative(path)}:{function.lineno}: {name}")
    assert not bare, "\n".join(bare)


def _protocol_methods(path: Path) -> set[str]:
    protocols = [
        n
        for n in ast.walk(tree(path))
        if isinstance(n, ast.ClassDef) and any(ast.unparse(b) == "Protocol" for b in n.bases)
    ]
    return {
        m.name
        for p in protocols
        for m in p.body
        if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(m)
    }


def _is_overload(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(decorator) in ("overload", "typing.overload") for decorator in function.decorator_list)


def test_first_lines() -> None:
    """Every file begins with its annotations import, after the docstring."""
    bare = [
        relative(p)
        for p in python_files("xllm_core", "plugins", "tests")
        if not any(m == "__future__" for m, _ in imports(p)) and len(tree(p).body) > 1
    ]
    assert not bare, bare


@pytest.mark.parametrize("path", [p for p in TESTS if p.name.startswith("test_")], ids=relative)
def test_test_files_test(path: Path) -> None:
    """Each holds a test, and says what it is about. A file that pytest passes over in silence proves nothing."""
    names = [name.rsplit(".", 1)[-1] for name, _ in functions(path)]
    cases = [
        node.name for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef) and node.name.startswith("Test")
    ]
    assigned = [ast.unparse(t) for n in tree(path).body if isinstance(n, ast.Assign) for t in n.targets]
    assert [name for name in [*names, *cases, *assigned] if name.startswith(("test", "Test"))], (
        f"{relative(path)} holds no test"
    )
    assert ast.get_docstring(tree(path)), f"{relative(path)} does not say what it is about"


def test_skips_have_reasons() -> None:
    """A skip says why and what would help; `skip()` and `xfail` without a word are refused."""
    found = []
    for path in TESTS:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and node.attr in ("skip", "skipif", "xfail", "importorskip"):
                text = ast.unparse(node)
                if not text.startswith(("pytest.", "unittest.")):
                    continue
                calls = [c for c in ast.walk(tree(path)) if isinstance(c, ast.Call) and c.func is node]
                has_reason = any(c.args or c.keywords for c in calls) and (
                    node.attr in ("skip",) or any(k.arg == "reason" for c in calls for k in c.keywords)
                )
                if not has_reason:
                    found.append(f"{relative(path)}:{node.lineno}: {text}")
    assert not found, found


def test_every_module_can_be_imported_by_name() -> None:
    """Rooms are packages: a missing __init__.py would leave a folder out of the wheel's type information."""
    bare = [name_of(path.parent / "x.py") for path in CORE if not (path.parent / "__init__.py").exists()]
    assert not bare, bare
    assert (ROOT / "xllm_core" / "py.typed").exists()


def test_root_is_clean() -> None:
    """An xllm.toml here would change every test that makes settings."""
    assert not (ROOT / "xllm.toml").exists()
