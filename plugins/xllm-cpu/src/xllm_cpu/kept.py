"""Prepared weights that can be kept on disk: what `KeepsPrepared` asks of an op, for weights that are dataclasses of tensors and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from xllm_cpu.native import Library

# Bump when `prepare` of an op lays out differently what the kernels pack: a build of those is told from another by itself.
_REVISION = 1


class Kept:
    """An op whose `prepare` returns a `_prepared_type`."""

    _prepared_type: type[Any]
    _native: Library

    @property
    def layout(self) -> str:
        """The build of the kernels, instruction set included."""
        return f"{self._native.name} {self._native.build} {_REVISION}"

    def kept(self, prepared: Any) -> Mapping[str, torch.Tensor | int]:
        """The fields that are there; tensors are not copied."""
        values = {field.name: getattr(prepared, field.name) for field in fields(prepared)}
        return {name: value for name, value in values.items() if value is not None}

    def restored(self, kept: Mapping[str, torch.Tensor | int]) -> Any:
        """Over the tensors given. TypeError for a field too many or too few; only a bias may be absent."""
        has_bias = any(field.name == "bias" for field in fields(self._prepared_type))
        return self._prepared_type(**({"bias": None} if has_bias else {}) | kept)
