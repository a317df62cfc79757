"""A plugin for a device that no machine has."""

from __future__ import annotations
