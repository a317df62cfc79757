"""The layers of dense decoders, made of `Parts`. Shapes inside are this rank's share; T is the number of tokens in the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xllm_core.models.dense import DenseConfig
from xllm_core.models.rope import Rotary
from xllm_core.plugins.contracts.model import ForwardContext, Layer, Parts


class SelfAttention:
    """Grouped-query attention with rotary positions; Qwen3 also normalises each query and key head."""

    def __init__(self, config: DenseConfig, parts: Parts, layer: int, rotary: Rotary) -> None:
        self._num_heads, self._num_kv_heads = parts.share(config.num_heads), parts.share(config.num_kv_heads)
        self._head_size, self._norm_eps = config.head_size, config.norm_eps
        name, group = f"layers.{layer}", config.group_of(layer)
        q_rows, kv_rows = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self._qkv = parts.linear(
            f"{name}.qkv", config.hidden_size, q_rows + 2 * kv_rows, axis="column", has_bias=config.has_qkv_bias
        )
        self._output = parts.linear(
            f"{name}.o", q_rows, config.hidden_size, axis="row", has_bias=config.has_output_bias
        )
        self._head_norms: tuple[torch.Tensor, torch.Tensor] | None = None
        if config.has_qk_norm:
            self._head_norms = (
                parts.parameter(f"{name}.q_norm", (config.head_size,)),
                parts.parameter(f"{name}.k_norm", (config.head_size,)),
            )
        self._rotary, self._norm = rotary, parts.op("rms_norm")
        self._attend = parts.attention(group, layer, **config.attention()[group])

    def __call__(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """x: [T, hidden], normed. Returns [T, hidden], or the wanted rows of it."""
        heads = self._qkv(x).view(len(x), -1, self._head_size)
        q, k, v = torch.split(heads, [self._num_heads, self._num_kv_heads, self._num_kv_heads], dim=1)
        if self._head_norms is not None:
            q, k = (
                self._norm(part, weight, self._norm_eps) for part, weight in zip((q, k), self._head_norms, strict=True)
            )
        return self._output(ctx.keep(self._attend(q, k, v, ctx, self._rotary(ctx))))


class GatedMlp:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DenseConfig, parts: Parts, layer: int) -> None:
        hidden, inner, has_bias = config.hidden_size, config.intermediate_size, config.has_mlp_bias
        name = f"layers.{layer}"
        self._gate_up = parts.linear_silu_mul(f"{name}.gate_up", hidden, inner, has_bias=has_bias)
        self._down = parts.linear(f"{name}.down", inner, hidden, axis="row", has_bias=has_bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, hidden], normed. Returns [T, hidden]."""
        return self._down(self._gate_up(x))


class DecoderLayer:
    """Norm, attention, norm, MLP; each half adds to the residual stream `h`."""

    def __init__(self, config: DenseConfig, parts: Parts, layer: int, rotary: Rotary) -> None:
        self._input_norm = parts.parameter(f"layers.{layer}.input_norm", (config.hidden_size,))
        self._mlp_norm = parts.parameter(f"layers.{layer}.mlp_norm", (config.hidden_size,))
        self._attention = SelfAttention(config, parts, layer, rotary)
        self._mlp = GatedMlp(config, parts, layer)
        self._norm, self._add_norm, self._norm_eps = parts.op("rms_norm"), parts.op("add_rms_norm"), config.norm_eps

    def __call__(self, h: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """h: [T, hidden]; returns the same shape, or the wanted rows of it."""
        attended = self._attention(self._norm(h, self._input_norm, self._norm_eps), ctx)
        normed, h = self._add_norm(attended, ctx.keep(h), self._mlp_norm, self._norm_eps)
        return h + self._mlp(normed)


class DenseDecoder:
    """`contracts.model.Model` for every dense family."""

    layers: Sequence[Layer]

    def __init__(self, config: DenseConfig, parts: Parts) -> None:
        rotary = Rotary(config.rope, parts.dtype, parts.torch_device)
        self._embed = parts.embedding("embed", config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, parts, layer, rotary) for layer in range(config.num_layers)]
        self._norm_weight = parts.parameter("norm", (config.hidden_size,))
        self._norm, self._norm_eps = parts.op("rms_norm"), config.norm_eps
        tied_to = "embed" if config.is_tied else None
        self._lm_head = parts.lm_head("lm_head", config.hidden_size, config.vocab_size, tied_to=tied_to)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids: [T] int64. Returns [T, hidden]."""
        return self._embed(token_ids)

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """h: [N, hidden]. Returns [N, vocab] float32."""
        return self._lm_head(self._norm(h, self._norm_weight, self._norm_eps)).float()
