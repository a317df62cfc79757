"""Dummy distributions on sys.path, for tests of the conformance kit; its runs are children and find them through it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.plugins.conftest import DISTS, write_dist_info

Install = Callable[..., None]


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Install]:
    """install("faulty") puts a dummy of tests/plugins/dists on sys.path for the rest of the module."""
    patch = pytest.MonkeyPatch()
    packages: list[str] = []

    def do_install(*names: str) -> None:
        for name in names:
            site = tmp_path_factory.mktemp(f"site_{name}")
            write_dist_info(DISTS / name, site)
            for path in (str(site), str(DISTS / name / "src")):
                patch.syspath_prepend(path)
            packages.append(f"xllm_{name}")
        importlib.invalidate_caches()

    yield do_install
    patch.undo()
    for module in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[module]
