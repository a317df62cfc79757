"""What a plugin's module loads, what its sources import of the core, and whether importing its parts changes anybody else. No torch.

python -m xllm_core.testing.imports tamper      the child of `find_tampering`: a JSON request on stdin, a JSON answer as the last line
"""

from __future__ import annotations

import ast
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

PUBLIC = ("xllm_core.plugins", "xllm_core.errors", "xllm_core.types")
"""Modules of the core that a plugin may import from, beside the names of the door (`xllm_core.__all__`)."""

PUBLIC_IN_TESTS = "xllm_core.testing"
_ROOMS = ("plugins", "reference", "models", "kv", "runtime", "engine", "frontend")
_WATCHED = ("xllm_core", "torch")
_MAX_SECONDS = 300.0


def loaded_by(module: str) -> list[str]:
    """Modules that importing a plugin's module loads beyond the standard library, `xllm_core.plugins` and its own package."""
    code = (
        "import json, sys; from importlib import import_module\n"
        "import xllm_core.plugins, xllm_core.plugins.contracts\n"
        "before = set(sys.modules); import_module(sys.argv[1]); print('\\n' + json.dumps(sorted(set(sys.modules) - before)))"
    )
    own = module.partition(".")[0]
    loaded: list[str] = json.loads(_child(["-c", code, module]).splitlines()[-1])
    return [name for name in loaded if not _is_light(name, module, own)]


def _is_light(name: str, module: str, own: str) -> bool:
    top = name.partition(".")[0]
    if top == "xllm_core":
        return f"{name}.".startswith("xllm_core.plugins.") or name == module
    return top in sys.stdlib_module_names or top == own


def sources(module: str) -> list[Path]:
    """Python files of the package that a plugin's module is in."""
    spec = find_spec(module.partition(".")[0])
    if spec is None or (spec.origin is None and not spec.submodule_search_locations):
        return []
    if not spec.submodule_search_locations:
        return [Path(str(spec.origin))]
    return sorted(path for folder in spec.submodule_search_locations for path in Path(folder).rglob("*.py"))


def private_imports(path: Path, door: Sequence[str]) -> Iterator[str]:
    """FILE:LINE imports NAME, for each import of something of the core that is not public. door: names of `xllm_core` itself."""
    is_test = path.name.startswith(("test_", "conftest")) or path.parent.name == "tests"
    allowed = (*PUBLIC, PUBLIC_IN_TESTS) if is_test else PUBLIC
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name != "xllm_core"]
        elif isinstance(node, ast.ImportFrom) and node.module == "xllm_core":
            names = [f"xllm_core.{alias.name}" for alias in node.names if alias.name not in door]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for name in names:
            if name.partition(".")[0] == "xllm_core" and not any(f"{name}.".startswith(f"{home}.") for home in allowed):
                yield f"{path.name}:{getattr(node, 'lineno', 0)} imports {name}"


def find_tampering(targets: Sequence[str]) -> list[str]:
    """Names of the core or of torch that importing these targets binds to something else. Raises RuntimeError if they cannot be imported."""
    answer: list[str] = json.loads(
        _child(["-m", "xllm_core.testing.imports", "tamper"], json.dumps(list(targets))).splitlines()[-1]
    )
    return answer


def _child(arguments: Sequence[str], stdin: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    done = subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=_MAX_SECONDS,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"it ended with status {done.returncode}: {'; '.join(done.stderr.strip().splitlines()[-3:])}"
        )
    return done.stdout


def _snapshot() -> dict[tuple[str, str], Any]:
    """Every attribute of every module, and of every class, of the core and of torch. Holds the values, so that no id is used again."""
    found: dict[tuple[str, str], Any] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in _WATCHED or not isinstance(module, ModuleType):
            continue
        for attribute, value in list(vars(module).items()):
            found[name, attribute] = value
            if isinstance(value, type) and value.__module__ == name:
                found.update({(f"{name}.{attribute}", inner): held for inner, held in list(vars(value).items())})
    return found


def _tamper_child() -> None:
    """Import the core and torch, look, import the targets, look again."""
    targets = json.load(sys.stdin)
    import torch  # noqa: F401

    import xllm_core

    for room in _ROOMS:
        package = import_module(f"xllm_core.{room}")
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            import_module(found.name)
    assert xllm_core.__version__
    before = _snapshot()
    for target in targets:
        import_module(target.partition(":")[0])
    after = _snapshot()
    rebound = [key for key, value in before.items() if key in after and after[key] is not value and _counts(key, value)]
    gone = [key for key in before if key not in after and key[0] in sys.modules]
    print("\n" + json.dumps([".".join(key) for key in (*rebound, *gone)]))


def _counts(key: tuple[str, str], value: Any) -> bool:
    """Torch keeps counters and fills in what was None; of it only functions, classes and modules must stay. Of the core everything."""
    return (
        key[0].partition(".")[0] == "xllm_core"
        or callable(value)
        or isinstance(value, ModuleType | property | classmethod | staticmethod)
    )


if __name__ == "__main__":
    _tamper_child()
