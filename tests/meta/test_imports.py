"""Who may import whom. Rooms only look downwards; what must start fast loads nothing heavy."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.meta.source import LAYOUT, ROOT, imports, name_of, python_files, relative

ORDER: list[list[str]] = LAYOUT["rooms"]["order"]
LIGHT: list[str] = LAYOUT["imports"]["light"]
HEAVY: list[str] = LAYOUT["imports"]["heavy"]
CORE = python_files("xllm_core")


def level_of(module: str) -> int:
    """Height of the room that a module is in; -1 outside the core."""
    best = max(
        (room for rooms in ORDER for room in rooms if module == room or module.startswith(f"{room}.")),
        key=len,
        default="",
    )
    return next((level for level, rooms in enumerate(ORDER) if best in rooms), -1)


def is_module(name: str) -> bool:
    """A module of the core, and not something in one."""
    path = ROOT / Path(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def test_rooms_import_downwards() -> None:
    """Dies at the first import that points up or sideways, inside functions too. Moving `engine` below `kv` turns this red."""
    wrong = []
    for path in CORE:
        module = name_of(path)
        if module == "xllm_core":
            continue  # the door opens upwards by design, when a name is used
        for imported, line in imports(path):
            if imported.startswith("xllm_core") and is_module(imported):
                own, other = level_of(module), level_of(imported)
                is_same_room = any(module.startswith(room) and imported.startswith(room) for room in ORDER[own])
                if other > own or (other == own and not is_same_room):
                    wrong.append(f"{relative(path)}:{line} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_every_room_has_a_place() -> None:
    """A new room must say where it stands."""
    rooms = {f"xllm_core.{path.parent.name}" for path in (ROOT / "xllm_core").glob("*/__init__.py")}
    assert rooms <= {room for rooms in ORDER for room in rooms}


@pytest.mark.parametrize("module", LIGHT)
def test_what_starts_fast_loads_nothing_heavy(module: str) -> None:
    """In a process of its own. Dies with an `import torch` anywhere beneath. Modules that do not exist yet are passed by."""
    try:
        exists = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        exists = False
    if not exists:
        assert not is_module(module), f"{module} is there and cannot be found"
        return
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[]", f"{module} loads {done.stdout}{done.stderr}"


def test_the_door_and_the_surface_load_little() -> None:
    """`import xllm_core` loads no module but itself; plugin modules load no pydantic. Dies when a convenience import creeps in."""
    code = "import sys; before = set(sys.modules); import xllm_core; print(sorted(m for m in set(sys.modules) - before if '_core' in m))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "['xllm_core']"
    )
    code = (
        "import sys, xllm_core.plugins.builtin; print([m for m in ('pydantic', 'click', 'numpy') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_only_the_plugins_room_knows_pluggy() -> None:
    """Hooks are collected in one place. Dies with an import of pluggy elsewhere."""
    users = {
        relative(path)
        for path in CORE
        for module, _ in imports(path, with_type_checking=True)
        if module.split(".")[0] == "pluggy"
    }
    assert users, "the guard finds nothing, so it proves nothing"
    assert all(user.startswith("xllm_core/plugins/") for user in users), users


def test_models_take_everything_from_parts() -> None:
    """No linear map, norm or attention of torch's own, so that devices and weight formats can differ. Dies with one `F.linear`."""
    forbidden = (
        "F.linear",
        "functional.linear",
        "nn.Linear",
        "nn.Embedding",
        "scaled_dot_product_attention",
        "rms_norm(",
        "F.embedding",
    )
    found = [
        f"{relative(path)}: {word}"
        for path in python_files("xllm_core/models")
        for word in forbidden
        for line in path.read_text().splitlines()
        if word in line.split("#")[0] and not line.strip().startswith(('"', "`")) and f'op("{word}' not in line
    ]
    assert not found, found
    users = [
        relative(path)
        for path in python_files("xllm_core/models")
        if any(m == "torch.nn.functional" for m, _ in imports(path))
    ]
    assert not users, users


def test_plugins_use_the_public_surface() -> None:
    """What a distribution under plugins/ imports of the core is public: what third parties can have, and no more."""
    allowed = ("xllm_core.plugins", "xllm_core.errors", "xllm_core.types", "xllm_core.testing")
    wrong = [
        f"{relative(path)}:{line} imports {module}"
        for path in python_files("plugins")
        if "src" in path.parts
        for module, line in imports(path, with_type_checking=True)
        if module.startswith("xllm_core") and module != "xllm_core" and not module.startswith(allowed)
    ]
    assert not wrong, "\n".join(wrong)
