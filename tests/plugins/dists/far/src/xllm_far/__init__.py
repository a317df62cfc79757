"""A KV store in a process of its own, as small as one that keeps the contract can be."""

from __future__ import annotations
