"""The ops that models and the runner ask for by name; `xllm_core.reference.ops` is their definition and oracle.

An op never keeps a tensor it was given beyond the call and, unless it says so, returns a new tensor. T is the number of tokens in the step.

| name | call | meaning |
|---|---|---|
| `linear` | `LinearOp` | x @ weight.T + bias |
| `embedding` | `(ids [T] int64, weight [V, H]) -> [T, H]` | rows of the table |
| `rms_norm` | `(x [T, ..., H], weight [H], eps) -> like x` | mean square in float32, result in x's dtype, then times weight |
| `add_rms_norm` | `(x [T, H], residual [T, H], weight [H], eps) -> (normed, x + residual)` | fusion of add and `rms_norm` |
| `rope` | `(q [T, Hq, D], k [T, Hk, D], cos [T, R], sin [T, R]) -> (q, k)` | rotates the first R <= D elements, half-split (NeoX) pairs |
| `silu_mul` | `(gate_up [T, 2I]) -> [T, I]` | silu(first half) * second half |
| `kv_write` | `(new: tuple of [T, ...], caches: tuple of [B, S, ...], slots [T] int64) -> None` | stores in place; slot -1 is skipped |
| `block_copy` | `(caches: tuple of [B, S, ...], src [N] int64, dst [N] int64) -> None` | copies whole blocks in place |

Ops that only some models need. A device may do without; a model that asks for one (`contracts.model.AsksForOps`) is then refused there.

| op | call | meaning |
|---|---|---|
| `linear_float32` | `LinearOp` with a float32 weight, returns [T, out] float32 | x is widened first: scores that a hard choice hangs on |
| `moe_route` | `MoeRouteOp` | which experts a token goes to, and how much each counts |
| `moe_experts` | `MoeExpertsOp` | each token through the experts it was sent to, summed by weight |

Fusions stand for several ops in a row. A device may do without: `Parts` then calls the ops one after the other.

| fusion | call | stands for |
|---|---|---|
| `linear_silu_mul` | `LinearOp` over stacked gate and up, returns [T, out / 2] | `silu_mul(linear(x))` |
| `lm_head` | `LinearOp`, returns [T, out] float32 | `linear(x)`, not rounded to the model's dtype: scores that differ stay different |
| `rope_kv_write` | `(q, k, v, cos, sin, caches: (k, v), slots) -> q rotated` | `q, k = rope(q, k, cos, sin)`, `kv_write((k, v), caches, slots)` |

Ops over quantised weights, asked for where `[model] quantization` names the format. A device may do without; the format is then refused there.

| op | call | meaning |
|---|---|---|
| `linear_int8` | `QuantizedLinearOp` over `(int8 [out, in], float32 [out])`, returns [T, out] | `linear` in 8-bit integers, see below |
| `lm_head_int8` | the same, returns [T, out] float32 | `lm_head` likewise |
| `linear_silu_mul_int8` | the same, returns [T, out / 2] | fusion of `linear_int8` and `silu_mul` |
| `linear_blocks` | `QuantizedLinearOp` over (codes, scales) or (codes, scales, minimums), returns [T, out] | `linear` over blocks, see below |
| `lm_head_blocks` | the same, returns [T, out] float32 | `lm_head` likewise |
| `linear_silu_mul_blocks` | the same, returns [T, out / 2] | fusion of `linear_blocks` and `silu_mul` |

Ops over a cache in 8 bits, asked for where `[kv] cache_dtype` names it. A device may do without; the cache is then refused there.

| op | call | meaning |
|---|---|---|
| `kv_write_int8` | `(new: n of [T, ..., D], caches: n of int8 [B, S, ..., D], then n of float32 [B, S, ...], slots)` | `kv_write`, see below |
| `rope_kv_write_int8` | as `rope_kv_write`, with such caches | fusion of `rope` and `kv_write_int8` |

Keys and values in 8 bits. D numbers of a token's head, whose largest magnitude is a, become codes round(x * (127 / a)), halves to even, and a
step a / 127. With a below 2**-100 all of them are zeros, and what is not finite becomes codes 0 with a step NaN. A code times its step is what
attention sees.

Format "int8". A row of a weight, whose largest magnitude is a, becomes round(r * (127 / a)) and a step a / 127. A token's row of x, with
lo = min(0, least) and hi = max(0, largest), becomes bytes b = min(255, round(x * f) + z), where f = 255 / (hi - lo) and z = round(-lo * f), and
a step (hi - lo) / 255. Halves go to even. Sums of (b - z) * r are exact 32-bit integers, so `in` is at most 65,536; then
sum * (step of x * step of weight) + bias, each in float32 and in this order, rounded to the model's dtype at the end. A row with a range below
2**-100 is zeros, and a row of x whose range is not finite gives NaN. So kernels agree to the bit, but for silu.

Blocks. A row of a weight is blocks of 32 columns, each with a scale d and for some kinds a minimum m, both float16 [out, in / 32]. Codes c are
int8 [out, in], or of 4 bits: uint8 [out, in / 2], where byte j of a block's 16 holds column j in its low half and column j + 16 in its high half, as
0 .. 15 where there are minimums, as 8 more than the code where there are none. A weight is d * c, or d * c + m. A block of 32 elements of x, whose
largest magnitude is a, becomes q = round(x * (127 / a)), halves to even, and a step s = a / 127: per block, as a large element then costs its 31
neighbours precision, and not the row. sum(q * c) over a block is an exact integer; sum(q * c) * (s * d), plus (s * sum(q)) * m where there are
minimums, are added up block after block from the first on, then comes the bias, each product and sum rounded to float32 by itself; the result is
rounded to the model's dtype at the end. A block with a below 2**-100 is zeros, and one that is not finite gives NaN. So kernels agree to the bit, but
for silu, and however codes are held: 4 bits may be held in 8, and a minimum of 0 changes nothing.

A plugin may fuse under names of its own, for models that ask for them: `Parts.op(name, unfused=...)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from xllm_core.plugins.contracts.weights import PackedTensor

CORE_OPS = ("linear", "embedding", "rms_norm", "add_rms_norm", "rope", "silu_mul", "kv_write", "block_copy")
"""Every device brings these."""

MODEL_OPS = ("linear_float32", "moe_route", "moe_experts")
"""What the models that need it ask for beyond `CORE_OPS`."""

CORE_FUSIONS: Mapping[str, tuple[str, ...]] = {
    "linear_silu_mul": ("linear", "silu_mul"),
    "lm_head": ("linear",),
    "rope_kv_write": ("rope", "kv_write"),
}
"""What the core's models can have fused, and what each fusion replaces."""

QUANTIZED_OPS: Mapping[str, tuple[str, ...]] = {
    "linear_int8": (),
    "lm_head_int8": (),
    "linear_silu_mul_int8": ("linear_int8", "silu_mul"),
    "linear_blocks": (),
    "lm_head_blocks": (),
    "linear_silu_mul_blocks": ("linear_blocks", "silu_mul"),
}
"""Ops over quantised weights, and for fusions what they replace."""

KV_WRITE_OPS: Mapping[str, str] = {"auto": "kv_write", "int8": "kv_write_int8"}
"""By `[kv] cache_dtype`: the op that stores into the cache. With `rope_` before its name: its fusion with `rope`."""

QUANTIZED_KV_OPS: Mapping[str, tuple[str, ...]] = {
    "kv_write_int8": (),
    "rope_kv_write_int8": ("rope", "kv_write_int8"),
}
"""Ops over a quantised cache, and for fusions what they replace."""

BLOCK_COLUMNS = 32
"""Columns of a weight that share a scale in the ops over blocks."""

REFERENCE_OPS = {
    op: f"xllm_core.reference.ops:{''.join(part.capitalize() for part in op.split('_'))}"
    for op in (
        *CORE_OPS,
        *MODEL_OPS,
        *(name for name, replaced in {**QUANTIZED_OPS, **QUANTIZED_KV_OPS}.items() if not replaced),
    )
}
"""Targets of the definitions, fusions left out.

They compute with torch on whatever device their tensors are: a new device offers them until it has its own.
"""

REFERENCE_ATTENTION = "xllm_core.reference.attention:ReferenceAttention"
"""Target of the reference kernel; layout "BSGD", features "sliding_window", "soft_cap" and "int8_kv". It lays steps out on the host: CPUs only."""


class LinearOp(Protocol):
    """x @ weight.T + bias, with a chance to lay the weight out once."""

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        """Lay out one weight [out, in] (and bias [out]) at load time. The result is opaque and passed to every call.

        The op may keep the tensors given or drop them after packing; the loader keeps no other reference.
        """

    def __call__(self, x: torch.Tensor, prepared: Any) -> torch.Tensor:
        """x: [T, in], model dtype, contiguous. Returns [T, out]."""


@runtime_checkable
class GivesRows(Protocol):
    """A `LinearOp` for `lm_head` that can give back what it laid out: an embedding tied to the head is then read from there, and held once."""

    def rows(self, ids: torch.Tensor, prepared: Any) -> torch.Tensor:
        """Rows of the weight that `prepare` got, to the bit, as the op `embedding` gives them. ids: [T] int64. Returns [T, in]."""


@runtime_checkable
class KeepsPrepared(Protocol):
    """An op whose prepared weights may be kept on disk for the next start. Beside `LinearOp` and its like; where every op of a model is one, the
    core keeps them (`[model] weight_cache_bytes`). Prepared weights must then lie in memory that the host reads and writes."""

    @property
    def layout(self) -> str:
        """Names how weights are laid out: whatever would change a byte of a prepared weight must change it, as would another build of the kernels."""

    def kept(self, prepared: Any) -> Mapping[str, torch.Tensor | int]:
        """What a prepared weight is: contiguous tensors, which nobody changes, and numbers, by names of the op's own. Nothing is copied."""

    def restored(self, kept: Mapping[str, torch.Tensor | int]) -> Any:
        """The prepared weight that `kept` told of, over these tensors, which are the op's now: each begins at a multiple of 64 bytes."""


class Quantization(Protocol):
    """A format of weights. `xllm_core.reference.quantization` has the core's."""

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One weight [out, in], in the model's dtype and on the device, finite. Returns what ops of the format take in `prepare`; keeps nothing."""


class PackedQuantization(Protocol):
    """A format that files hold weights in, served as it is. Its spec names the kinds of `PackedTensor` that it takes (`QuantizationSpec.kinds`)."""

    def stack(self, tensors: Sequence[PackedTensor]) -> tuple[torch.Tensor, ...]:
        """Tensors of equal width, one above the other; kinds may differ. Returns what ops of the format take in `prepare`, on the host; may alias
        `tensors`. Floating-point tensors among them are checked to be finite."""


class QuantizedLinearOp(Protocol):
    """A linear map over a weight in some format; activations are its own affair, as the format says."""

    def prepare(self, weight: tuple[torch.Tensor, ...], bias: torch.Tensor | None) -> Any:
        """Lay out what `Quantization.quantize` or `PackedQuantization.stack` made, and bias [out] in the model's dtype. As `LinearOp.prepare`."""

    def __call__(self, x: torch.Tensor, prepared: Any) -> torch.Tensor:
        """x: [T, in], model dtype, contiguous. Returns [T, out]."""


class MoeRouteOp(Protocol):
    """The experts of each token by their scores: sigmoid, a correction that decides who is chosen and not how much they count, the best groups, then
    the best experts in them. Source: arXiv:2412.19437, section 2.1.2.

    p = sigmoid(scores) and ranked = p + correction, in float32. A number's p is the same wherever in the tensor it stands. The E experts are
    `num_groups` groups of equal size, neighbours in a group; a group is as good as the sum of its two best ranked, and experts of the `top_groups`
    best groups are allowed. With top_groups == num_groups all are, and groups mean nothing. Of equal experts, and of equal groups, the one with the
    lower number is better; NaN is better than any number.
    """

    def __call__(
        self,
        scores: torch.Tensor,
        correction: torch.Tensor,
        top_k: int,
        num_groups: int,
        top_groups: int,
        is_normalised: bool,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """scores: [T, E] float32, as `linear_float32` gives them. correction: [E] float32. Returns (ids [T, K] int64, weights [T, K] float32).

        ids: the top_k best ranked of those allowed, the best first, each once and below E whatever the scores are. weights: p of each, divided by
        (their sum + 1e-20) if `is_normalised`, then times `scaling`. ValueError where E does not divide into groups, a group of several has less
        than two experts, or fewer than top_k are allowed.
        """  # fmt: skip


class MoeExpertsOp(Protocol):
    """Gated MLPs by choice: sum over k of weights[t, k] * down(silu(gate(x[t])) * up(x[t])) of expert ids[t, k].

    E experts held here, each with H inputs and I inner elements. Tokens are grouped by expert; no host sync, and no loop over experts in Python.
    """

    def prepare(self, gate_up: torch.Tensor, down: torch.Tensor) -> Any:
        """Lay out gate_up [E, 2I, H], gate above up, and down [E, H, I] at load time. As `LinearOp.prepare` it may keep or drop them."""

    def __call__(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor, prepared: Any
    ) -> torch.Tensor:
        """x: [T, H], model dtype. ids: [T, K] int64, below E; -1 is an expert that is not here and adds nothing. weights: [T, K] float32.

        counts: [E] int64, to which the tokens that each expert got are added in place. Returns [T, H], summed in float32, rounded once.
        """
