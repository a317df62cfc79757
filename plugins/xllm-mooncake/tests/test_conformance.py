"""Everything that the kit knows of plugins and of KV stores, with a master that it kills, restarts and pauses."""

from __future__ import annotations

from pathlib import Path

import pytest

from xllm_core.testing import check_plugin


def test_conformance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing failed, and nothing of the store was skipped."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    report = check_plugin("mooncake", arguments=("-p", "real_master"))
    assert report.ok, report.text
    store = report.component("kv_store mooncake/store")
    assert store.skipped == 0 and store.passed >= 12, report.text
