"""Its metadata ask for a later core, so that this is never run."""

from __future__ import annotations

raise AssertionError("code of an incompatible plugin ran")
