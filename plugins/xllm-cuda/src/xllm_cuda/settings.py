"""The table `[plugin.cuda]`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator


class PluginTable(BaseModel):
    """Settings of the kernels."""

    model_config = ConfigDict(extra="forbid")

    kv_split_tokens: int = Field(
        default=512,
        ge=16,
        le=65536,
        description="Keys that one program of the attention kernel reads for a row of few queries; a power of two. Another number rounds "
        "otherwise, in the last bits.",
    )

    @field_validator("kv_split_tokens")
    @classmethod
    def _is_power_of_2(cls, number: int) -> int:
        """Splits begin at multiples of a step, which is a power of two."""
        if number & (number - 1):
            raise ValueError(
                f"{number} is no power of two; the nearest are {1 << (number.bit_length() - 1)} and {1 << number.bit_length()}"
            )
        return number
