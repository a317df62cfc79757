"""A row is a row: equal to the bit alone and among others, in any chunk, on any number of threads. What values are right, conformance says."""

from __future__ import annotations

import random

import pytest
import torch
from xllm_cpu.attention import PagedAttention
from xllm_cpu.device import CpuDevice
from xllm_cpu.ops import AddRmsNorm, Linear, LinearSiluMul, LmHead, RmsNorm, SiluMul

from xllm_core.plugins import AttentionGeometry, BatchLayout, KVSegments
from xllm_core.reference.quantization import int8_entries

ROWS = 256


@pytest.mark.parametrize("kind", [Linear, LinearSiluMul])
@pytest.mark.parametrize(("n", "k"), [(64, 96), (130, 33), (2, 1), (34, 577)])
def test_products_of_any_number_of_rows(
    device: CpuDevice, dtype: torch.dtype, kind: type[Linear], n: int, k: int
) -> None:
    """M = 1 .. 256, each M, at a random place. Dies if a tile's height changes the order in which K is walked."""
    torch.manual_seed(n)
    op = kind(device)
    prepared = op.prepare(torch.randn(n, k).to(dtype), torch.randn(n).to(dtype))
    x = torch.randn(ROWS, k).to(dtype)
    whole = op(x, prepared)
    draw = random.Random(k)
    for rows in range(1, ROWS + 1):
        first = draw.randint(0, ROWS - rows)
        assert torch.equal(op(x[first : first + rows], prepared), whole[first : first + rows]), rows


@pytest.mark.parametrize("n", [32_784, 32_771])
def test_so_many_scores_that_they_go_past_the_caches(device: CpuDevice, dtype: torch.dtype, n: int) -> None:
    """20 rows of a vocabulary are 2.6 MB; alone each takes the other way.

    Dies if the last panel, which is not whole, is written as if it were, or if a stride that no vector fits is written by vectors.
    """
    torch.manual_seed(n)
    op = LmHead(device)
    prepared = op.prepare(torch.randn(n, 6).to(dtype), torch.randn(n).to(dtype))
    x = torch.randn(20, 6).to(dtype)
    whole = op(x, prepared)
    assert whole.dtype == torch.float32
    for row in range(20):
        assert torch.equal(whole[row], op(x[row : row + 1], prepared)[0]), row


def test_activation_of_any_size(device: CpuDevice, dtype: torch.dtype) -> None:
    """Far from zero silu is nothing, or its argument. Dies with an exponential that is made of an exponent that no float has."""
    gate = torch.tensor([-3e38, -1e6, -200.0, -89.5, -88.9, -88.0, -20.0, -1.0, 0.0, 1.0, 90.0, 3e38]).to(dtype)
    found = SiluMul(device)(torch.cat((gate, torch.ones_like(gate))).unsqueeze(0))[0].float()
    assert torch.allclose(found, torch.nn.functional.silu(gate.double()).float(), rtol=2**-8, atol=1e-30)


def test_rows_of_the_other_ops(device: CpuDevice, dtype: torch.dtype) -> None:
    """Norms and activation too."""
    torch.manual_seed(1)
    x, residual, weight = torch.randn(ROWS, 66).to(dtype), torch.randn(ROWS, 66).to(dtype), torch.randn(66).to(dtype)
    calls = {
        "rms_norm": lambda at: RmsNorm(device)(x[at], weight, 1e-5),
        "add_rms_norm": lambda at: torch.cat(AddRmsNorm(device)(x[at], residual[at], weight, 1e-5)),
        "silu_mul": lambda at: SiluMul(device)(x[at]),
    }
    for name, call in calls.items():
        whole = call(slice(None)).view(-1, ROWS, call(slice(0, 1)).shape[-1])
        for rows in (1, 2, 3, 17, 100):
            found = call(slice(5, 5 + rows)).view(-1, rows, whole.shape[-1])
            assert torch.equal(found, whole[:, 5 : 5 + rows]), (name, rows)


class Cache:
    """One sequence of `length` tokens in scattered blocks."""

    def __init__(
        self,
        length: int,
        size: int,
        dtype: torch.dtype,
        *,
        heads: tuple[int, int],
        head_size: int,
        is_int8: bool = False,
    ) -> None:
        torch.manual_seed(length)
        num_blocks = -(-length // size) + 3
        self.table = torch.randperm(num_blocks)[: -(-length // size)].to(torch.int32)
        self.kv = tuple(torch.randn(num_blocks, size, heads[1], head_size).to(dtype) for _ in range(2))
        if is_int8:
            (k, k_steps), (v, v_steps) = map(int8_entries, self.kv)
            self.kv = (k, v, k_steps, v_steps)
        self.q = torch.randn(length, heads[0], head_size).to(dtype)

    def attend(self, kernel: PagedAttention, first: int, last: int, copies: int = 1) -> torch.Tensor:
        """Queries first .. last - 1 of `copies` equal rows. Returns those of the last row."""
        count = last - first
        lens = torch.full((copies,), count, dtype=torch.int32)
        starts = torch.arange(copies + 1, dtype=torch.int32) * count
        tables = self.table.repeat(copies, 1)
        plan = kernel.plan(BatchLayout(lens, torch.full((copies,), last, dtype=torch.int32), starts, tables))
        q = self.q[first:last].repeat(copies, 1, 1)
        out = torch.full_like(q, float("nan"))
        kernel.run(q, KVSegments(own=self.kv), plan, out)
        return out[-count:]


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize(
    ("head_size", "heads", "size", "window", "soft_cap"),
    [(64, (9, 3), 16, None, None), (40, (4, 2), 5, None, 3.0), (16, (2, 2), 16, 70, None), (33, (4, 1), 1, 300, None)],
)
def test_attention_of_any_chunk(
    device: CpuDevice, dtype: torch.dtype, head_size: int, heads: tuple[int, int], size: int, window: int | None, soft_cap: float | None,
    kv_dtype: str | None,
) -> None:  # fmt: skip
    """A prompt at once, in chunks of every kind, token by token, among others, with one thread and three. Dies if a chunk moves the places at
    which sums begin, or splits are merged in another way when few rows share them.
    """
    length = 600
    geometry = AttentionGeometry(
        num_heads=heads[0], num_kv_heads=heads[1], head_size=head_size, scale=head_size**-0.5, block_size=size, dtype=str(dtype)[6:],
        sliding_window=window, soft_cap=soft_cap, kv_dtype=kv_dtype,
    )  # fmt: skip
    kernel = PagedAttention(device, geometry)
    cache = Cache(length, size, dtype, heads=heads, head_size=head_size, is_int8=kv_dtype is not None)
    whole = cache.attend(kernel, 0, length)
    assert bool(whole.isfinite().all())
    for chunk in (1, 7, 64, 255, 256, 300):
        for first in range(0, length, chunk) if chunk > 1 else (0, 63, 64, 255, 256, 257, 599):
            last = min(length, first + chunk)
            assert torch.equal(cache.attend(kernel, first, last), whole[first:last]), (chunk, first)
    assert torch.equal(cache.attend(kernel, 599, 600, copies=40), whole[599:])
    for threads in (1, 3):
        device.set_num_threads(threads)
        assert torch.equal(cache.attend(kernel, 0, length), whole)
        assert torch.equal(cache.attend(kernel, 599, 600), whole[599:])


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_what_was_never_written_is_never_read(device: CpuDevice, dtype: torch.dtype, kv_dtype: str | None) -> None:
    """Slots behind the last token and before the window hold NaN. Dies if a masked position is multiplied by zero instead of left out."""
    geometry = AttentionGeometry(
        num_heads=2, num_kv_heads=1, head_size=16, scale=0.25, block_size=8, dtype=str(dtype)[6:], sliding_window=20, kv_dtype=kv_dtype,
    )  # fmt: skip
    cache = Cache(75, 8, dtype, heads=(2, 1), head_size=16, is_int8=kv_dtype is not None)
    kernel = PagedAttention(device, geometry)
    clean = cache.attend(kernel, 70, 75)
    for tensor in cache.kv[-2:]:  # steps, where there are any
        flat = tensor.flatten(0, 1)
        for position in (*range(70 - 19), *range(75, 80)):
            flat[int(cache.table[position // 8]) * 8 + position % 8] = float("nan")
        for block in set(range(len(tensor))) - set(cache.table.tolist()):
            tensor[block] = float("nan")
    assert torch.equal(cache.attend(kernel, 70, 75), clean)
