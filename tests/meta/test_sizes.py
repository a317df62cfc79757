"""Small files, short functions, a small core. Limits and exceptions stand in docs/layout.toml."""

from __future__ import annotations

from tests.meta.source import LAYOUT, ROOT, functions, num_code_lines, python_files, relative


def test_files_are_short() -> None:
    """Dies when a file outgrows its limit, and when an exception is no longer needed."""
    limit, exceptions = LAYOUT["max_file_lines"], LAYOUT["files"]
    lengths = {
        relative(p): len(p.read_text().splitlines())
        for p in python_files("xllm_core", "plugins", "tests", "benchmarks", "examples")
    }
    too_long = {name: n for name, n in lengths.items() if n > exceptions.get(name, [limit])[0]}
    assert not too_long, (
        f"more than {limit} lines; split them, or give a reason in docs/layout.toml [files]: {too_long}"
    )
    idle = [name for name in exceptions if lengths.get(name, 0) <= limit]
    assert not idle, f"exceptions that nothing needs any more: {idle}"


def test_functions_are_short() -> None:
    """Dies when a function of the core outgrows its limit, and when an exception is no longer needed."""
    limit, exceptions = LAYOUT["max_function_lines"], LAYOUT["functions"]
    lengths = {
        f"{relative(path)}::{name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in python_files("xllm_core")
        if not path.is_relative_to(ROOT / "xllm_core" / "testing")
        for name, node in functions(path)
    }
    assert len(lengths) > 300, "the guard finds too few functions to be worth anything"
    too_long = {name: n for name, n in lengths.items() if n > exceptions.get(name, [limit])[0]}
    assert not too_long, (
        f"more than {limit} lines; split them, or give a reason in docs/layout.toml [functions]: {too_long}"
    )
    idle = [name for name in exceptions if lengths.get(name, 0) <= limit]
    assert not idle, f"exceptions that nothing needs any more: {idle}"


def test_the_core_stays_small() -> None:
    """Dies when the core outgrows what one person reads. Counted: lines that run, not those that explain."""
    paths = [path for path in python_files("xllm_core") if not path.is_relative_to(ROOT / "xllm_core" / "testing")]
    total = sum(num_code_lines(path) for path in paths)
    assert 1_000 < total <= LAYOUT["max_core_lines"], f"{total} lines"


def test_exceptions_have_reasons() -> None:
    """An exception is [lines, "why"]."""
    for table in ("files", "functions"):
        for name, (lines, reason) in LAYOUT[table].items():
            assert isinstance(lines, int), name
            assert len(reason) > 20, f"{name}: say why"
