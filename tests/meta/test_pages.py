"""Pages made from the code are those that the code makes now."""

from __future__ import annotations

import json

from tests.meta.pages import HOOKS_PAGE, SURFACE, hooks_page, surface
from xllm_core.plugins import hookspecs


def test_the_page_of_hooks_is_fresh() -> None:
    """Dies when a hook or a spec changes and docs/hooks.md does not."""
    assert HOOKS_PAGE.read_text(encoding="utf-8") == hooks_page(), "stale; run: python -m tests.meta.pages"
    for name in hookspecs.HOOKS:
        assert f"\n## {name}\n" in hooks_page()


def test_the_public_surface_is_pinned() -> None:
    """Every field, type, default and signature that a plugin can depend on. A change here breaks somebody: see docs/hooks.md, and API_VERSION."""
    pinned = json.loads(SURFACE.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(surface()))
    changed = {name for name in pinned.keys() | now.keys() if pinned.get(name) != now.get(name)}
    assert not changed, f"changed: {sorted(changed)}; if that is meant, run: python -m tests.meta.pages"


def test_the_snapshot_sees_fields_methods_and_defaults() -> None:
    """One of each kind, so that an empty snapshot cannot pass."""
    found = surface()
    assert found["AttentionSpec"]["fields"]["layouts"] == "tuple[str, ...] = ('BSGD',)"
    assert "ctx" not in found["KVStore"] and "index" in found["KVStore"]["methods"]
    assert "plan" in found["AttentionKernel"]["methods"] and "__call__" in found["LinearOp"]["methods"]
    assert found["SchedulerPolicy"]["attributes"]["is_static"] == "bool"
    assert found["AttentionSpec"]["is"] == ["frozen", "kw_only"] and found["AttentionSpec"]["bases"] == ["Spec"]
    assert "expert" in found["Axis"] and found["xllm_models"] == "(ctx: 'PluginContext') -> 'Iterable[ModelSpec]'"
    assert found["gumbel"].startswith("(keys: ") and found["Checkpoint"]["methods"]["config"].startswith("property ")
    assert found["API_VERSION"] == "'0.1'"
