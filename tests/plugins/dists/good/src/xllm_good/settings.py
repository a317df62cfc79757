"""`[plugin.good]`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class GoodTable(BaseModel):
    """Settings of the plugin, all with defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host_store_bytes: int = 1 << 20
    greeting: str = "hello"
