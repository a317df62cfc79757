"""The hostile device as a plugin."""

from __future__ import annotations
