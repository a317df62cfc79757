"""Checks of the machine: findings that say something, and a remedy wherever something is missing."""

from __future__ import annotations

import pytest

from xllm_core.plugins.plan import load_target
from xllm_core.testing.plugin import Kit, kit_of
from xllm_core.testing.subject import Part


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every check."""
    parts = kit_of(metafunc.config).subject.parts("doctor")
    metafunc.parametrize("part", parts, ids=[part.offer.name for part in parts])


def test_it_finds_out(part: Part, xllm_kit: Kit) -> None:
    """It gives findings, each with a subject and a detail; its one-line summary stands in the spec."""
    from xllm_core.plugins.contracts.doctor import Finding

    found = list(load_target(xllm_kit.importable(part).spec.target, owner=part.offer.name)(**part.spec.options))
    assert found, "it finds nothing at all; say at least that all is well"
    for finding in found:
        assert isinstance(finding, Finding), f"it gives a {type(finding).__name__}, not a Finding"
        assert finding.state in ("ok", "warn", "fail") and finding.subject and finding.detail, f"{finding}"
    assert part.spec.summary, "its spec has no summary"
