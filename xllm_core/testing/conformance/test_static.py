"""What holds without any device: what the plugin's module loads, what it imports of the core, where its targets lead, what it leaves alone."""

from __future__ import annotations

import importlib_metadata
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import xllm_core
from xllm_core.plugins.installed import GROUP
from xllm_core.plugins.plan import load_target
from xllm_core.plugins.records import CORE
from xllm_core.plugins.specs import API_VERSION
from xllm_core.testing.imports import find_tampering, loaded_by, private_imports, sources
from xllm_core.testing.plugin import Kit, kit_of
from xllm_core.testing.subject import KINDS, Part, Subject


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every part of every kind."""
    if "part" in metafunc.fixturenames:
        subject = kit_of(metafunc.config).subject
        parts = [part for kind in KINDS for part in subject.parts(kind)]
        metafunc.parametrize("part", parts, ids=[f"{part.kind}-{part.offer.name}" for part in parts])


@pytest.fixture
def module(xllm_kit: Kit) -> str:
    """The module that the entry point names; skips for a plugin without one."""
    entries = [e for e in importlib_metadata.entry_points(group=GROUP) if e.name == xllm_kit.plugin_id]
    if not entries:
        if xllm_kit.plugin_id == CORE:
            return "xllm_core.plugins.builtin"
        pytest.skip("the plugin was given in process and has no entry point")
    return str(entries[0].module)


def test_it_loads(xllm_kit: Kit) -> None:
    """The plugin loads: metadata, API version, hooks, settings and specs are accepted."""
    record = xllm_kit.subject.record
    assert record.state == "loaded", f"{record.id} is {record.state}: {record.reason}"


def test_importing_it_is_light(module: str) -> None:
    """Importing the plugin's module loads nothing but the standard library, xllm_core.plugins and its own package."""
    heavy = loaded_by(module)
    assert not heavy, (
        f"importing {module} loads {', '.join(sorted({name.partition('.')[0] for name in heavy}))}: every start pays for it"
    )


def test_it_uses_the_public_surface(module: str, xllm_kit: Kit) -> None:
    """Of the core its sources import public modules only."""
    if xllm_kit.plugin_id == CORE:
        pytest.skip("plugin core is the core")
    files = sources(module)
    assert files, f"no source of {module} is found"
    found = [line for path in files for line in private_imports(path, xllm_core.__all__)]
    assert not found, "\n".join([*found, "what is missing in the public surface is a missing hook: please report it"])


def test_targets_resolve(part: Part, xllm_kit: Kit) -> None:
    """Every target, check and probe can be imported and called."""
    xllm_kit.importable(part)
    for target in _targets(part):
        value = load_target(target, owner=part.offer.name)
        assert callable(value) or part.kind in ("command", "model"), (
            f"{target} is a {type(value).__name__}, and will be called"
        )


def test_loading_twice_is_harmless(xllm_kit: Kit) -> None:
    """Loaded again, the plugin offers equal parts."""
    first = xllm_kit.subject
    again = Subject(xllm_kit.plugin_id, first.settings)
    assert again.record.specs == first.record.specs


def test_settings_have_a_model(xllm_kit: Kit, module: str) -> None:
    """Settings are described by a pydantic model that refuses unknown keys."""
    from importlib import import_module

    from pydantic import BaseModel

    config = import_module(module).xllm_plugin.config
    if config is None:
        pytest.skip("it takes no settings")
    model = load_target(config, owner=xllm_kit.plugin_id)
    assert isinstance(model, type) and issubclass(model, BaseModel), f"{config} is no pydantic model"
    assert model.model_config.get("extra") == "forbid", (
        f"{config} accepts unknown keys, so a misspelt one would be ignored"
    )
    assert model.model_json_schema()["type"] == "object"


def test_metadata(xllm_kit: Kit) -> None:
    """The distribution requires xllm-core, and has one entry point under the plugin's id."""
    if xllm_kit.plugin_id == CORE:
        pytest.skip("plugin core needs no core")
    record = xllm_kit.subject.record
    if record.distribution.startswith("in-process:"):
        pytest.skip("the plugin was given in process and has no distribution")
    distribution = importlib_metadata.distribution(record.distribution)
    required = [Requirement(text) for text in distribution.requires or ()]
    core = [need for need in required if canonicalize_name(need.name) == "xllm-core"]
    assert core, f"{record.distribution} does not require xllm-core, so pip may leave it beside any version of it"
    entries = [entry.name for entry in distribution.entry_points if entry.group == GROUP]
    assert entries == [record.id], f"{record.distribution} has the entry points {entries}; one plugin, one distribution"


def test_it_speaks_this_api(xllm_kit: Kit, module: str) -> None:
    """PluginInfo names the API versions that it was made for, and this is one."""
    from importlib import import_module

    info = import_module(module).xllm_plugin
    assert info.id == xllm_kit.plugin_id
    assert SpecifierSet(info.xllm_api).contains(API_VERSION, True)


def test_it_changes_nobody_else(xllm_kit: Kit) -> None:
    """Importing all its parts rebinds no name of the core or of torch."""
    parts = [part for kind in KINDS for part in xllm_kit.subject.parts(kind)]
    targets = sorted({target for part in parts if not part.missing() for target in _targets(part)})
    if not targets:
        pytest.skip("nothing that it offers can be imported here")
    rebound = find_tampering(targets)
    assert not rebound, f"importing its parts rebinds {', '.join(rebound)}; what needs that has found a missing hook"


def _targets(part: Part) -> list[str]:
    spec = part.spec
    return [target for target in (spec.target, spec.check, getattr(spec, "probe", None)) if target is not None]
