"""The table `[plugin.cpu]`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class CpuTable(BaseModel):
    """Settings of the native CPU backend."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    isa: Literal["auto", "portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16"] = Field(
        "auto",
        description="Instruction set of the kernels; `auto` takes the best that the processor has. The others are for comparing.",
    )
