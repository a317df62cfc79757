"""What plugin authors test with: the conformance kit, fakes, a hostile device, and the matrix of `xllm verify`.

    from xllm_core.testing import check_plugin

    def test_conformance() -> None:
        report = check_plugin("ID")
        assert report.ok, report.text

or `xllm plugins check ID`, or `pytest --pyargs xllm_core.testing.conformance --xllm-plugin ID`. Importing this package loads next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xllm_core.testing.check import check_plugin
    from xllm_core.testing.report import ComponentReport, ConformanceReport

_HOMES = {"check_plugin": "check", "ComponentReport": "report", "ConformanceReport": "report"}

__all__ = ["ComponentReport", "ConformanceReport", "check_plugin"]


def __getattr__(name: str) -> object:
    """Import what a public name belongs to, once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'xllm_core.testing' has no attribute {name!r}")
    value: object = getattr(import_module(f"xllm_core.testing.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
