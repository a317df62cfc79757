"""What each op means, in the plainest PyTorch that is not wasteful. Every kernel to come is compared with these.

Each class is built once with its device and then called from layers; the table in `contracts.ops` names arguments and shapes.
Rounding points are those of Hugging Face transformers, which the models are checked against.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from xllm_core.errors import ConfigError
from xllm_core.plugins.contracts.ops import BLOCK_COLUMNS
from xllm_core.reference.quantization import block_rows, int8_entries, int8_rows, unpacked_4_bit

if TYPE_CHECKING:
    from xllm_core.plugins.contracts.device import DeviceBackend
    from xllm_core.plugins.contracts.queries import OpQuery

# Up to this many rows torch multiplies bfloat16 at the speed of memory on any CPU.
_FEW_ROWS = 4
# Weight rows widened to float32 at a time: the copy stays in cache until it is multiplied.
_TILE_ROWS = 2048
# 255 * 127 * 512 < 2**24: so many products of 8-bit integers add up exactly in float32, in any order.
_EXACT_COLUMNS = 512


class Linear:
    """`linear`: x @ weight.T + bias, summed in float32, rounded once.

    CPUs without AVX-512 have no fast bfloat16 product for many rows: there the weight is widened to float32 tile by tile, which
    is several times faster than torch's own path and no less exact. The weight itself stays as it was given.
    """

    def __init__(self, device: DeviceBackend) -> None:
        self._widens = not torch.backends.cpu.get_cpu_capability().startswith("AVX512")

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Nothing to lay out: the pair is kept as it is."""
        return weight, bias

    def __call__(self, x: torch.Tensor, prepared: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        """x: [T, in]. Returns [T, out] in x's dtype."""
        weight, bias = prepared
        if not self._widens or x.dtype != torch.bfloat16 or len(x) <= _FEW_ROWS:
            return F.linear(x, weight, bias)
        wide = x.float()
        if len(weight) <= 2 * _TILE_ROWS:
            return F.linear(wide, weight.float(), None if bias is None else bias.float()).to(x.dtype)
        out = x.new_empty(len(x), len(weight))
        for start in range(0, len(weight), _TILE_ROWS):
            rows = slice(start, start + _TILE_ROWS)
            out[:, rows] = F.linear(wide, weight[rows].float(), None if bias is None else bias[rows].float())
        return out


class LmHead(Linear):
    """`lm_head`: x @ weight.T in float32, never rounded. The table is widened tile by tile."""

    def __call__(self, x: torch.Tensor, prepared: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        """x: [T, in]. Returns [T, out] float32."""
        weight, bias = prepared
        wide, out = x.float(), x.new_empty(len(x), len(weight), dtype=torch.float32)
        for start in range(0, len(weight), _TILE_ROWS):
            rows = slice(start, start + _TILE_ROWS)
            out[:, rows] = F.linear(wide, weight[rows].float(), None if bias is None else bias[rows].float())
        return out


class LinearInt8:
    """`linear_int8`: sums of 8-bit products are whole numbers, exact in float32 as long as few enough are added; then in int32."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def prepare(
        self, weight: tuple[torch.Tensor, torch.Tensor], bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """weight: int8 [out, in] and float32 [out], as `reference.quantization.Int8` makes them."""
        return *weight, None if bias is None else bias.float()

    def __call__(
        self, x: torch.Tensor, prepared: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
    ) -> torch.Tensor:
        """x: [T, in]. Returns [T, out] in x's dtype."""
        weight, steps, bias = prepared
        values, x_steps = int8_rows(x)
        sums = torch.zeros(len(x), len(weight), dtype=torch.int32, device=x.device)
        for start in range(0, len(weight), _TILE_ROWS):
            tile = weight[start : start + _TILE_ROWS].float()
            for pair in zip(torch.split(values, _EXACT_COLUMNS, 1), torch.split(tile, _EXACT_COLUMNS, 1), strict=True):
                sums[:, start : start + len(tile)] += F.linear(*pair).to(torch.int32)
        out = sums.float() * (x_steps * steps)
        return self._rounded(out if bias is None else out + bias, x.dtype)

    def _rounded(self, out: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return out.to(dtype)


class LmHeadInt8(LinearInt8):
    """`lm_head_int8`: the same, never rounded."""

    def _rounded(self, out: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return out


class LinearBlocks:
    """`linear_blocks`: products within a block are whole numbers, exact in float32; blocks are added one after the other."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def prepare(
        self, weight: tuple[torch.Tensor, ...], bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor | None]:
        """weight: codes, scales and maybe minimums, as `reference.quantization.Gguf` stacks them. Laid out by block, a byte for every code."""
        codes, *factors = weight
        if codes.dtype == torch.uint8:
            codes = unpacked_4_bit(codes, has_minimums=len(factors) > 1)
        by_block = codes.view(len(codes), -1, BLOCK_COLUMNS).transpose(0, 1).contiguous()
        return by_block, tuple(factor.T.float() for factor in factors), None if bias is None else bias.float()

    def __call__(
        self, x: torch.Tensor, prepared: tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor | None]
    ) -> torch.Tensor:
        """x: [T, in]. Returns [T, out] in x's dtype."""
        codes, (scales, *minimums), bias = prepared
        values, steps = block_rows(x)
        sums_of_x = steps * values.sum(2)
        out = torch.zeros(len(x), codes.shape[1], device=x.device)
        for start in range(0, codes.shape[1], _TILE_ROWS):
            rows = slice(start, start + _TILE_ROWS)
            for block in range(len(codes)):
                sums = F.linear(values[:, block], codes[block, rows].float())
                term = sums * (steps[:, block, None] * scales[block, rows])
                if minimums:
                    term += sums_of_x[:, block, None] * minimums[0][block, rows]
                out[:, rows] += term
        return self._rounded(out if bias is None else out + bias, x.dtype)

    def _rounded(self, out: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return out.to(dtype)


class LmHeadBlocks(LinearBlocks):
    """`lm_head_blocks`: the same, never rounded."""

    def _rounded(self, out: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return out


class LinearFloat32:
    """`linear_float32`: x @ weight.T in float32, whatever x's dtype. A rounded score could send a token to another expert."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Both float32, kept as they are."""
        return weight, bias

    def __call__(self, x: torch.Tensor, prepared: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        """x: [T, in]. Returns [T, out] float32."""
        return F.linear(x.float(), *prepared)


class MoeRoute:
    """`moe_route`: stable sorts, so that the lower number comes first among equals."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(
        self, scores: torch.Tensor, correction: torch.Tensor, top_k: int, num_groups: int, top_groups: int, is_normalised: bool, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """As `contracts.ops.MoeRouteOp` says."""
        num_tokens, num_experts = scores.shape
        size = _group_size(num_experts, top_k, num_groups, top_groups)
        p = (
            scores.double().sigmoid().float()
        )  # in float32 torch's last bit depends on where in the tensor a number stands
        ranked = (p + correction).view(num_tokens, num_groups, size)
        if top_groups == num_groups:
            groups = torch.arange(num_groups, device=scores.device).expand(num_tokens, -1)
        else:
            groups = _best(ranked.topk(2, dim=-1).values.sum(-1), top_groups).sort(dim=-1).values
        allowed = groups.unsqueeze(-1) * size + torch.arange(size, device=scores.device)
        allowed = allowed.flatten(1)  # in ascending order: the sort below keeps it among equals
        ids = allowed.gather(1, _best(ranked.flatten(1).gather(1, allowed), top_k))
        weights = p.gather(1, ids)
        if is_normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids, weights * scaling


def _group_size(num_experts: int, top_k: int, num_groups: int, top_groups: int) -> int:
    """The size of a group of `moe_route`; ValueError for what no router can mean."""
    size = num_experts // num_groups if num_groups > 0 else 0
    is_possible = (
        size * num_groups == num_experts > 0 and 1 <= top_groups <= num_groups and 1 <= top_k <= top_groups * size
    )
    if not is_possible or (top_groups < num_groups and size < 2):
        raise ValueError(
            f"{top_k} experts in the best {top_groups} of {num_groups} equal groups of {num_experts} cannot be chosen"
        )
    return size


def _best(values: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the greatest in each row, the greatest first, of equal ones the first."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def lacks_grouped_mm(query: OpQuery | None = None) -> str | None:
    """Why this torch cannot run the reference of `moe_experts`, or None. The `check` of its spec."""
    if hasattr(F, "grouped_mm"):
        return None
    return f"needs torch.nn.functional.grouped_mm, which torch {torch.__version__} lacks; install a newer torch (2.13 has it)"


class MoeExperts:
    """`moe_experts`: tokens sorted by expert, then one grouped product per map; torch goes from group to group, not Python."""

    def __init__(self, device: DeviceBackend) -> None:
        if reason := lacks_grouped_mm():
            raise ConfigError(f"the reference op moe_experts {reason}")
        self._silu_mul = SiluMul(device)

    def prepare(self, gate_up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up: [E, 2I, H], down: [E, H, I]. Kept as they are where their rows are whole vectors of 16 bytes, else filled up with zeros."""
        return _filled_up(gate_up), _filled_up(down)

    def __call__(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        counts: torch.Tensor,
        prepared: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """As `contracts.ops.MoeExpertsOp` says; the K results of a token are added in the order of its ids."""
        gate_up, down = prepared
        (num_tokens, top_k), num_experts = ids.shape, len(counts)
        is_elsewhere = ids.flatten() < 0
        expert = torch.where(is_elsewhere, num_experts, ids.flatten())
        order = torch.argsort(expert, stable=True)  # what is elsewhere comes last, beyond the end of the last group
        found = counts.new_zeros(num_experts + 1).index_add_(0, expert, torch.ones_like(expert))[:num_experts]
        counts += found
        ends = found.cumsum(0).to(torch.int32)
        inner = self._silu_mul(_grouped(x[order // top_k], gate_up, ends))
        grouped = _grouped(inner, down, ends)
        parted = torch.empty_like(grouped).index_copy_(0, order, grouped)
        weighted = (parted.float() * weights.reshape(-1, 1)).masked_fill_(is_elsewhere.unsqueeze(1), 0)
        return weighted.view(num_tokens, top_k, down.shape[1]).sum(1).to(x.dtype)


def _grouped(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows of x, group by group, times each group's weight [out, in]. Rows after the last group are undefined."""
    return F.grouped_mm(F.pad(x, (0, weight.shape[-1] - x.shape[-1])), weight.transpose(1, 2), offs=ends)


def _filled_up(weight: torch.Tensor) -> torch.Tensor:
    missing = -weight.shape[-1] % (16 // weight.element_size())
    return F.pad(weight, (0, missing)) if missing else weight


class Embedding:
    """`embedding`: rows of a table."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(self, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """ids: [T] int64, weight: [V, H]. Returns [T, H]."""
        return weight.index_select(0, ids)


class RmsNorm:
    """`rms_norm`: x / sqrt(mean(x²) + eps) * weight. Source: arXiv:1910.07467."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x: [T, ..., H], weight: [H]. Normalised in float32, rounded to x's dtype, then times weight."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * normed.to(x.dtype)


class AddRmsNorm:
    """`add_rms_norm`: the sum of a residual stream and its norm."""

    def __init__(self, device: DeviceBackend) -> None:
        self._norm = RmsNorm(device)

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual: [T, H]. Returns (norm of the sum, the sum)."""
        total = residual + x
        return self._norm(total, weight, eps), total


class Rope:
    """`rope`: rotary position embedding on half-split pairs (i, i + R / 2). Source: arXiv:2104.09864."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q: [T, Hq, D], k: [T, Hk, D], cos and sin: [T, R] in the same dtype, R <= D; the rest passes unrotated."""
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    if (size := cos.shape[-1]) < x.shape[-1]:
        return torch.cat((_rotate(x[..., :size], cos, sin), x[..., size:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class SiluMul:
    """`silu_mul`: silu(first half) * second half."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up: [T, 2I]. Returns [T, I]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


class KvWrite:
    """`kv_write`: store one new entry per token. The only op that changes a cache, beside `block_copy`."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(self, new: tuple[torch.Tensor, ...], caches: tuple[torch.Tensor, ...], slots: torch.Tensor) -> None:
        """new[i]: [T, ...], caches[i]: [B, S, ...] contiguous, slots: [T] int64 counted over B * S; -1 is skipped."""
        if (slots < 0).any():
            kept = slots >= 0
            new, slots = tuple(tensor[kept] for tensor in new), slots[kept]
        for tensor, cache in zip(new, caches, strict=True):
            cache.flatten(0, 1).index_copy_(0, slots, tensor.to(cache.dtype))


class KvWriteInt8:
    """`kv_write_int8`: the same in 8 bits, with a step for each entry's last axis."""

    def __init__(self, device: DeviceBackend) -> None:
        self._write = KvWrite(device)

    def __call__(self, new: tuple[torch.Tensor, ...], caches: tuple[torch.Tensor, ...], slots: torch.Tensor) -> None:
        """new[i]: [T, ..., D]. caches: of each the codes [B, S, ..., D] int8, then of each the steps [B, S, ...] float32; slots as in `kv_write`."""
        codes, steps = zip(*map(int8_entries, new), strict=True)
        self._write((*codes, *steps), caches, slots)


class LinearSiluMul:
    """The fusion `linear_silu_mul`: what `silu_mul` makes of `linear`. The oracle of fusions; the core itself calls the two ops."""

    def __init__(self, device: DeviceBackend) -> None:
        self._linear: Any = Linear(device)
        self._silu_mul = SiluMul(device)

    def prepare(self, weight: Any, bias: torch.Tensor | None) -> Any:
        """weight: [2I, in], gate above up."""
        return self._linear.prepare(weight, bias)

    def __call__(self, x: torch.Tensor, prepared: Any) -> torch.Tensor:
        """x: [T, in]. Returns [T, I]."""
        return self._silu_mul(self._linear(x, prepared))


class LinearSiluMulInt8(LinearSiluMul):
    """The fusion `linear_silu_mul_int8`, likewise. weight: of both, gate above up."""

    def __init__(self, device: DeviceBackend) -> None:
        self._linear, self._silu_mul = LinearInt8(device), SiluMul(device)


class LinearSiluMulBlocks(LinearSiluMul):
    """The fusion `linear_silu_mul_blocks`, likewise."""

    def __init__(self, device: DeviceBackend) -> None:
        self._linear, self._silu_mul = LinearBlocks(device), SiluMul(device)


class RopeKvWrite:
    """The fusion `rope_kv_write`: rotate, then store. The oracle of fusions; the core itself calls the two ops."""

    def __init__(self, device: DeviceBackend) -> None:
        self._rope: Rope = Rope(device)
        self._write: KvWrite | KvWriteInt8 = KvWrite(device)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        caches: tuple[torch.Tensor, ...], slots: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """As `rope` and `kv_write`. Returns q rotated; k is rotated on its way into the cache."""
        q, k = self._rope(q, k, cos, sin)
        self._write((k, v), caches, slots)
        return q


class RopeKvWriteInt8(RopeKvWrite):
    """The fusion `rope_kv_write_int8`, likewise."""

    def __init__(self, device: DeviceBackend) -> None:
        self._rope, self._write = Rope(device), KvWriteInt8(device)


class BlockCopy:
    """`block_copy`: whole blocks, for copy on write. All sources are read before any destination is written."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(self, caches: tuple[torch.Tensor, ...], src: torch.Tensor, dst: torch.Tensor) -> None:
        """caches[i]: [B, S, ...], src and dst: [N] int64 block ids."""
        for cache in caches:
            cache.index_copy_(0, dst, cache.index_select(0, src))
