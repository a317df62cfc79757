"""A plugin for tests."""

from __future__ import annotations
