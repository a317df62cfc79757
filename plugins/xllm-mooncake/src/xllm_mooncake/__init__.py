"""KV blocks in a Mooncake store."""

from __future__ import annotations
