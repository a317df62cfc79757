"""The layers of a GLM, made of `Parts`. Shapes inside are this rank's share; T is the number of tokens in the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xllm_core.plugins import ForwardContext, Layer, Parts, Rotary
from xllm_models_glm.configuration import GROUP, GlmConfig, MoeConfig


class SelfAttention:
    """Grouped-query attention of which a part of each head is rotated; GLM-4.6 also normalises each query and key head."""

    def __init__(self, c: GlmConfig, parts: Parts, layer: int, rotary: Rotary) -> None:
        self._num_heads, self._num_kv_heads = parts.share(c.num_heads), parts.share(c.num_kv_heads)
        self._head_size, self._norm_eps = c.head_size, c.norm_eps
        name, q_rows, rows = (
            f"layers.{layer}",
            c.num_heads * c.head_size,
            (c.num_heads + 2 * c.num_kv_heads) * c.head_size,
        )
        self._qkv = parts.linear(f"{name}.qkv", c.hidden_size, rows, axis="column", has_bias=c.has_qkv_bias)
        self._output = parts.linear(f"{name}.o", q_rows, c.hidden_size, axis="row")
        names = ("q_norm", "k_norm") if c.has_qk_norm else ()
        self._head_norms = [parts.parameter(f"{name}.{norm}", (c.head_size,)) for norm in names]
        self._rotary, self._norm = rotary, parts.op("rms_norm")
        self._attend = parts.attention(GROUP, layer, **c.geometry())

    def __call__(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """x: [T, hidden], normed. Returns [T, hidden]."""
        heads = self._qkv(x).view(len(x), -1, self._head_size)
        q, k, v = torch.split(heads, [self._num_heads, self._num_kv_heads, self._num_kv_heads], dim=1)
        if self._head_norms:
            q, k = (
                self._norm(part, weight, self._norm_eps) for part, weight in zip((q, k), self._head_norms, strict=True)
            )
        return self._output(ctx.keep(self._attend(q, k, v, ctx, self._rotary(ctx))))


class GatedMlp:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, parts: Parts, name: str, hidden: int, inner: int) -> None:
        self._gate_up = parts.linear_silu_mul(f"{name}.gate_up", hidden, inner)
        self._down = parts.linear(f"{name}.down", inner, hidden, axis="row")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, hidden], normed. Returns [T, hidden]."""
        return self._down(self._gate_up(x))


class Router:
    """Which experts a token goes to, and how much each counts (op `moe_route`). In float32: a rounded score would send tokens elsewhere."""

    def __init__(self, c: GlmConfig, moe: MoeConfig, parts: Parts, name: str) -> None:
        self._route = parts.op("moe_route")
        self._options = (moe.top_k, moe.num_groups, moe.top_groups, moe.is_normalised, moe.scaling)
        self._scores = parts.router(name, c.hidden_size, moe.num_experts)
        self._correction = parts.parameter(f"{name}.correction", (moe.num_experts,), is_float32=True)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [T, hidden]. Returns (experts [T, K] int64, weights [T, K] float32)."""
        routed: tuple[torch.Tensor, torch.Tensor] = self._route(self._scores(x), self._correction, *self._options)
        return routed


class MoeMlp:
    """The experts that the router chose, and one that every token goes through."""

    def __init__(self, c: GlmConfig, moe: MoeConfig, parts: Parts, name: str) -> None:
        self._route = Router(c, moe, parts, f"{name}.router")
        self._experts = parts.experts(f"{name}.experts", moe.num_experts, c.hidden_size, moe.inner)
        self._shared = GatedMlp(parts, f"{name}.shared", c.hidden_size, moe.shared_inner)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, hidden], normed. Returns [T, hidden]."""
        ids, weights = self._route(x)
        return self._experts(x, ids, weights) + self._shared(x)


class DecoderLayer:
    """Norm, attention, norm, MLP; each half adds to the residual stream `h`, Glm4's after a norm of its own."""

    def __init__(self, c: GlmConfig, parts: Parts, layer: int, rotary: Rotary) -> None:
        name = f"layers.{layer}"
        self._input_norm, self._mlp_norm = (
            parts.parameter(f"{name}.{norm}", (c.hidden_size,)) for norm in ("input_norm", "mlp_norm")
        )
        names = ("attention_post_norm", "mlp_post_norm") if c.has_post_norms else ()
        self._post_norms = [parts.parameter(f"{name}.{norm}", (c.hidden_size,)) for norm in names]
        self._attention = SelfAttention(c, parts, layer, rotary)
        self._mlp: GatedMlp | MoeMlp
        if c.moe is not None and c.is_moe(layer):
            self._mlp = MoeMlp(c, c.moe, parts, name)
        else:
            self._mlp = GatedMlp(parts, f"{name}.mlp", c.hidden_size, c.intermediate_size)
        self._norm, self._add_norm, self._norm_eps = parts.op("rms_norm"), parts.op("add_rms_norm"), c.norm_eps

    def __call__(self, h: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """h: [T, hidden]; returns the same shape."""
        attended = self._after(0, self._attention(self._norm(h, self._input_norm, self._norm_eps), ctx))
        normed, h = self._add_norm(attended, ctx.keep(h), self._mlp_norm, self._norm_eps)
        return h + self._after(1, self._mlp(normed))

    def _after(self, half: int, x: torch.Tensor) -> torch.Tensor:
        if not self._post_norms:
            return x
        out: torch.Tensor = self._norm(x, self._post_norms[half], self._norm_eps)
        return out


class Decoder:
    """The model: embed, layers, head."""

    layers: Sequence[Layer]

    def __init__(self, c: GlmConfig, parts: Parts) -> None:
        rotary = Rotary(c.rope, parts.dtype, parts.torch_device)
        self._embed = parts.embedding("embed", c.vocab_size, c.hidden_size)
        self.layers = [DecoderLayer(c, parts, layer, rotary) for layer in range(c.num_layers)]
        self._norm_weight, self._norm, self._norm_eps = (
            parts.parameter("norm", (c.hidden_size,)),
            parts.op("rms_norm"),
            c.norm_eps,
        )
        self._head = parts.lm_head("lm_head", c.hidden_size, c.vocab_size, tied_to="embed" if c.is_tied else None)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids: [T] int64. Returns [T, hidden]."""
        return self._embed(token_ids)

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """h: [N, hidden]. Returns [N, vocab] float32."""
        return self._head(self._norm(h, self._norm_weight, self._norm_eps)).float()
