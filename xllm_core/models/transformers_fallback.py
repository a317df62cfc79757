"""Any decoder of the installed transformers whose attention goes through its attention interface: transformers' own code, our paged KV.

For architectures that no family names. Linear maps, tables and attention are taken from `Parts`; norms, activations and rotary positions are
transformers' code. Unlike other families this one imports torch and transformers to read a configuration: only the class knows what it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from xllm_core.errors import ConfigError, IntegrityError, ModelError
from xllm_core.models.transformers_classes import ATTRIBUTE, PAGED, Installer, build_class, fill_buffers, layers_of
from xllm_core.models.transformers_frame import Call, Frame
from xllm_core.models.transformers_inspection import Facts, LayerAttention, inspect_config
from xllm_core.plugins.contracts.kv import KVGroupSpec, KVTensorSpec
from xllm_core.plugins.contracts.model import Attention, ForwardContext, Layer, Model, ModelShape, Parts
from xllm_core.plugins.contracts.queries import ModelQuery
from xllm_core.plugins.contracts.weights import WeightMap

_MEMO = "transformers"


def check(query: ModelQuery) -> str | None:
    """Why transformers' class cannot be served, or None."""
    try:
        inspect_config(query.config)
    except ModelError as error:
        return str(error)
    return None


class TransformersFallback:
    """`contracts.model.ModelFamily` for whatever transformers knows. Names of parameters are those of its state dict."""

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        """The facts for the core; raises ModelError with the reason why the class cannot be served."""
        return inspect_config(config).shape

    def kv_groups(self, config: Mapping[str, Any], kv_dtype: str) -> Sequence[KVGroupSpec]:
        """One group per geometry that layers ask for, so that windows and head counts may differ between layers."""
        groups = []
        for name, (attention, layers) in _groups(inspect_config(config)).items():
            slot = (attention.num_kv_heads, attention.head_size)
            tensors = (KVTensorSpec("k", slot, kv_dtype), KVTensorSpec("v", slot, kv_dtype))
            window = attention.sliding_window
            groups.append(KVGroupSpec(name, "full" if window is None else "sliding_window", layers, tensors, window))
        return groups

    def attention(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """Geometry per KV group."""
        return {name: _geometry(attention) for name, (attention, _) in _groups(inspect_config(config)).items()}

    def weight_map(self, config: Mapping[str, Any]) -> WeightMap:
        """Every tensor of the class's state dict. Divided as transformers' plan says where that is plain columns and rows, else held whole."""
        return inspect_config(config).weights

    def build(self, config: Mapping[str, Any], parts: Parts) -> Model:
        """Build the class around `parts`."""
        facts = inspect_config(config)
        if parts.world_size > 1 and not facts.divides:
            raise ConfigError(
                f"{facts.shape.architecture} as transformers writes it does not divide over {parts.world_size} ranks: its plan for that"
                " is not plain columns and rows; serve it on one device"
            )
        return _Decoder(config, facts, parts)


def _geometry(attention: LayerAttention) -> dict[str, Any]:
    return {name: getattr(attention, name) for name in LayerAttention.__slots__}


def _groups(facts: Facts) -> dict[str, tuple[LayerAttention, tuple[int, ...]]]:
    """Layers of one geometry, under names that families use: "full", "window"; further ones are numbered."""
    found: dict[LayerAttention, list[int]] = {}
    for layer, attention in enumerate(facts.attention):
        found.setdefault(attention, []).append(layer)
    groups: dict[str, tuple[LayerAttention, tuple[int, ...]]] = {}
    for attention, layers in found.items():
        kind = "full" if attention.sliding_window is None else "window"
        count = sum(name.startswith(kind) for name in groups)
        groups[f"{kind}{count + 1}" if count else kind] = (attention, tuple(layers))
    return groups


class _PagedAttention:
    """What attends in one attention module. `ctx` is set while its layer runs."""

    ctx: ForwardContext | None = None

    def __init__(self, attend: Attention) -> None:
        self._attend = attend

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """query: [1, H, T, D], key and value: [1, G, T, D], views of what the layer computed; they are stored from there, without a copy."""
        assert self.ctx is not None
        q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        return self._attend(q.contiguous(), k, v, self.ctx).view(1, *q.shape)


class _Layer:
    """One layer of the class, run by itself with what its class's loop gives it."""

    def __init__(self, frame: Frame, index: int, attention: _PagedAttention) -> None:
        self._frame, self._index, self._attention = frame, index, attention

    def __call__(self, h: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """h: [T, hidden]; returns the same shape. The first layer asked in a step runs what stands before the layers, once for all."""
        calls: list[Call] | None = ctx.memo.get(_MEMO)
        if calls is None:
            first, calls = self._frame.enter(h, ctx.positions)
            ctx.memo[_MEMO] = calls
            h = first if self._index == 0 else h
        self._attention.ctx = ctx
        h = self._frame.call(self._index, h, calls[self._index])
        self._attention.ctx = None
        return h


class _Decoder:
    """`contracts.model.Model` around one class of transformers."""

    layers: Sequence[Layer]

    def __init__(self, config: Mapping[str, Any], facts: Facts, parts: Parts) -> None:
        model = build_class(config, PAGED, parts.dtype)
        kept = sorted(model._keep_in_fp32_modules_strict or ())
        if kept and parts.dtype != torch.float32:
            raise ConfigError(
                f"{facts.shape.architecture} keeps {', '.join(kept)} in float32, and a model here has one dtype; set [model] dtype = 'float32'"
            )
        name, layers = layers_of(config, model)
        fill_buffers(config, model, parts.torch_device, list(model.modules()))
        Installer(config, model, name, facts.flat).install(parts, parts)
        left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
        if left:
            raise IntegrityError(f"{facts.shape.architecture}: {', '.join(left)} got no memory")
        modules = dict(model.named_modules())
        self._embed = model.get_input_embeddings()
        self._frame = Frame(model, layers, is_tuple=facts.is_tuple)
        bound: list[_Layer] = []
        group_of = {layer: group for group, (_, members) in _groups(facts).items() for layer in members}
        for index, attention in enumerate(facts.attention):
            paged = _PagedAttention(parts.attention(group_of[index], index, **_geometry(attention)))
            object.__setattr__(modules[facts.modules[index]], ATTRIBUTE, paged)
            bound.append(_Layer(self._frame, index, paged))
        self.layers = bound

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids: [T] int64. Returns [T, hidden]."""
        hidden: torch.Tensor = self._embed(token_ids)
        return hidden

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """h: [N, hidden]. Returns [N, vocab] float32."""
        return self._frame.leave(h).float()
