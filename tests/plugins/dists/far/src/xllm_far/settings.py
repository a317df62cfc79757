"""`[plugin.far]`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class FarTable(BaseModel):
    """Where the peer is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    socket: str = Field("/tmp/xllm-far.sock", description="Unix socket of the peer.")
