"""The pytest plugin of the conformance kit (entry point `xllm`; where autoloading is off: `pytest -p xllm_core.testing.plugin`).

    pytest --pyargs xllm_core.testing.conformance --xllm-plugin ID      or with XLLM_CONFORMANCE=ID in the environment

Without either it does nothing and imports nothing. Fixtures that an author may define in a module given with `-p MODULE`, each only where
the kit cannot know by itself; the suites say what they are: `xllm_tiny_config` (test_model), `xllm_store_peer` (test_kv_store),
`xllm_processor_params` (test_logits_processor), `xllm_sampler_oracle` (test_sampler).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xllm_core.plugins.contracts.device import DeviceBackend
    from xllm_core.testing.subject import Part, Subject

VARIABLE = "XLLM_CONFORMANCE"
_FOLDER = Path(__file__).parent / "conformance"
_KIND_OF_MODULE = {"kv_store": "kv_store", "logits_processor": "logits_processors", "observer": "observers"}


class Kit:
    """What the suites run on: the plugin, its devices, and what to do where something is missing."""

    def __init__(self, plugin_id: str, *, config: str | None, requires_device: bool) -> None:
        self.plugin_id = plugin_id
        self.requires_device = requires_device
        self._config = config
        self._subject: Subject | None = None

    @property
    def subject(self) -> Subject:
        """Loaded at the first use."""
        if self._subject is None:
            from xllm_core.config import Settings
            from xllm_core.errors import XllmError
            from xllm_core.testing.subject import Subject

            try:
                self._subject = Subject(self.plugin_id, Settings(config_path=self._config))
            except XllmError as error:
                raise pytest.UsageError(str(error)) from error
        return self._subject

    def device(self, kinds: Iterable[str]) -> DeviceBackend:
        """A device of one of these kinds; skips with the reason where there is none, or fails if one is required."""
        found = self.subject.find_device(kinds)
        return self.no_device(found) if isinstance(found, str) else found

    def no_device(self, reason: str) -> Any:
        """Skip, or fail under --xllm-require-device."""
        if self.requires_device:
            pytest.fail(f"{reason} (--xllm-require-device)", pytrace=False)
        pytest.skip(reason)

    def importable(self, part: Part) -> Part:
        """The part itself; skips where a module that it requires is not installed."""
        if reason := part.missing():
            self.no_device(reason)
        return part


KIT = pytest.StashKey[Kit]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options live here and not in the conformance package: its conftest would be read after the command line."""
    group = parser.getgroup("xllm", "conformance of an xLLM plugin")
    group.addoption("--xllm-plugin", metavar="ID", default=None, help=f"Plugin to test; also {VARIABLE}=ID.")
    group.addoption("--xllm-config", metavar="FILE", default=None, help="Settings file (xllm.toml) to load it with.")
    group.addoption(
        "--xllm-require-device",
        action="store_true",
        help="A device that is missing here fails instead of being skipped.",
    )
    group.addoption("--xllm-report", metavar="FILE", default=None, help="Write what was proven to this file, as JSON.")


def pytest_configure(config: pytest.Config) -> None:
    """Take part only when asked."""
    plugin_id = config.getoption("--xllm-plugin") or os.environ.get(VARIABLE)
    if not plugin_id:
        return
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("the conformance kit runs in one process, where devices are; leave out -n")
    os.environ.pop(VARIABLE, None)  # it is no setting, and settings refuse variables that they do not know
    kit = Kit(
        plugin_id, config=config.getoption("--xllm-config"), requires_device=config.getoption("--xllm-require-device")
    )
    config.stash[KIT] = kit
    config.addinivalue_line("markers", "spec_only: reads what a part declares and runs nothing of it")
    assert kit.subject.record  # an id that is not installed is a wrong command line
    from xllm_core.testing.recorder import Recorder

    config.pluginmanager.register(Recorder(kit, config.getoption("--xllm-report")), "xllm-recorder")


def kit_of(config: pytest.Config) -> Kit:
    """The kit of this run; raises UsageError where no plugin is named."""
    kit = config.stash.get(KIT, None)
    if kit is None:
        raise pytest.UsageError(f"the conformance kit needs a plugin: --xllm-plugin ID, or {VARIABLE}=ID")
    return kit


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Suites of kinds that the plugin does not offer are not there, rather than skipped."""
    if collection_path.parent != _FOLDER or not collection_path.name.startswith("test_"):
        return None
    stem = collection_path.stem.removeprefix("test_")
    if stem == "static":
        return None
    return not kit_of(config).subject.parts(_KIND_OF_MODULE.get(stem, stem)) or None


@pytest.fixture(scope="session")
def xllm_kit(request: pytest.FixtureRequest) -> Kit:
    """The plugin under test."""
    return kit_of(request.config)


def optional_fixture(request: pytest.FixtureRequest, name: str) -> Any:
    """What an author's fixture gives, or None where nobody defined it."""
    try:
        return request.getfixturevalue(name)
    except pytest.FixtureLookupError as error:
        if error.argname != name:
            raise
        return None
