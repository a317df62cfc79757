"""Names of dtypes, as configuration and plans write them."""

from __future__ import annotations

import torch

from xllm_core.errors import ConfigError

_BY_NAME = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64,
    "int8": torch.int8, "uint8": torch.uint8, "int32": torch.int32, "int64": torch.int64,
}  # fmt: skip


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name; ConfigError lists the known ones."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise ConfigError(f"dtype {name!r} is unknown; known are {', '.join(_BY_NAME)}") from None
