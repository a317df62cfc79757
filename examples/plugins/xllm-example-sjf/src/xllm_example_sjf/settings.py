"""The table `[plugin.example-sjf]`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class SjfTable(BaseModel):
    """Settings of the policy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ageing_tokens_per_s: float = Field(
        200.0, ge=0, description="A second of waiting counts as so many tokens less to do; 0 lets long requests starve."
    )
