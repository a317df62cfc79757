"""The kernels of xllm-cuda beside the card's limits, at the shapes of Llama-3-8B in bfloat16. The last line is JSON.

    python -m benchmarks.cuda.kernels

The limits are measured first: a copy within the card's memory (bytes read and written), and a product of 8,192 cubed in bfloat16. A kernel's limit is
what its bytes and operations need at these, whichever takes longer. Medians of launches; small kernels from a recorded graph, as steps replay
them, the others one by one after the card's cache was emptied, which includes their launch where that takes longer than the emptying.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from xllm_core.plugins import DeviceBackend

HIDDEN, INNER, VOCAB, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 4096, 14336, 128256, 32, 8, 128
CONTEXT, BATCH, BLOCK_SIZE = 4096, 64, 16


@dataclass(frozen=True, slots=True)
class Row:
    """A use of a kernel. us: median. limit_us: at the measured rates."""

    name: str
    us: float
    limit_us: float

    def __str__(self) -> str:
        return f"{self.name:44s} {self.us:9.1f} us, limit {self.limit_us:8.1f} us, {self.limit_us / self.us:6.1%}"


class Bench:
    """Rates of one device, and rows of what ran on it."""

    def __init__(self, device: DeviceBackend) -> None:
        import torch

        self.device, self.where = device, device.facts().torch_device
        source = torch.empty(1 << 30, dtype=torch.uint8, device=self.where)
        there, square = torch.empty_like(source), self.new(8192, 8192)
        self.bytes_per_s = 2 * source.numel() / self.cold_us(lambda: there.copy_(source)) * 1e6
        self.operations_per_s = 2 * 8192**3 / self.cold_us(lambda: square @ square) * 1e6

    def new(self, *sizes: int) -> torch.Tensor:
        """Random numbers in bfloat16: zeros are multiplied faster."""
        import torch

        return torch.randn(sizes, dtype=torch.bfloat16, device=self.where)

    @staticmethod
    def cold_us(launch: Callable[[], object]) -> float:
        """Median of launches, each with an empty cache."""
        import triton

        return 1e3 * float(triton.testing.do_bench(launch, warmup=8, rep=40, return_mode="median"))

    @staticmethod
    def replayed_us(launch: Callable[[], object]) -> float:
        """Median within a graph."""
        import triton

        return 1e3 * float(triton.testing.do_bench_cudagraph(launch, rep=20, return_mode="median"))

    def row(self, name: str, us: float, num_bytes: int, operations: int = 0) -> Row:
        """With its limit, printed."""
        row = Row(name, us, 1e6 * max(num_bytes / self.bytes_per_s, operations / self.operations_per_s))
        print(row, flush=True)
        return row


def main() -> None:
    """All rows; without a GPU, what is missing."""
    import torch
    from xllm_cuda.device import CudaDevice

    from benchmarks.cuda.__main__ import missing_gpu

    if missing := missing_gpu():
        sys.exit(f"no GPU can be used here: {missing}")
    bench = Bench(CudaDevice(0))
    rates = f"{bench.bytes_per_s / 1e12:.2f} TB/s copied, {bench.operations_per_s / 1e12:.0f} TFLOP/s of bfloat16"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {rates}", flush=True)
    rows = [row for part in (products, small, attention, sampling) for row in part(bench)]
    print(
        json.dumps(
            {"bytes_per_s": bench.bytes_per_s, "operations_per_s": bench.operations_per_s, "rows": [*map(asdict, rows)]}
        )
    )


def products(bench: Bench) -> Iterator[Row]:
    """Linear maps of one row and of a batch."""
    from xllm_cuda.linear import Linear

    linear = Linear(bench.device)
    widths = {
        "qkv": ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_SIZE, HIDDEN), "gate and up": (2 * INNER, HIDDEN), "down": (HIDDEN, INNER),
        "head": (VOCAB, HIDDEN),
    }  # fmt: skip
    for name, (out, into) in widths.items():
        weight = linear.prepare(bench.new(out, into), None)
        for count in (1, BATCH):
            x = bench.new(count, into)
            us = bench.cold_us(lambda x=x, weight=weight: linear(x, weight))  # type: ignore[misc]
            yield bench.row(f"linear {name}, {count} rows", us, 2 * out * into, 2 * count * out * into)


def small(bench: Bench) -> Iterator[Row]:
    """What runs between products, for a batch."""
    import torch
    from xllm_cuda.ops import AddRmsNorm, RmsNorm, RopeKvWrite, SiluMul

    device = bench.device
    x, weight, gate_up = bench.new(BATCH, HIDDEN), bench.new(HIDDEN), bench.new(BATCH, 2 * INNER)
    sizes = [heads * HEAD_SIZE for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]
    q, k, v = (part.unflatten(1, (-1, HEAD_SIZE)) for part in bench.new(BATCH, sum(sizes)).split(sizes, dim=1))
    turn, caches = (
        bench.new(BATCH, HEAD_SIZE),
        tuple(bench.new(1024, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE) for _ in range(2)),
    )
    slots = torch.randperm(1024 * BLOCK_SIZE, device=bench.where)[:BATCH]
    uses: dict[str, tuple[Callable[[], object], int]] = {
        "rms_norm": (lambda: RmsNorm(device)(x, weight, 1e-5), 2 * x.nbytes),
        "add_rms_norm": (lambda: AddRmsNorm(device)(x, x, weight, 1e-5), 4 * x.nbytes),
        "silu_mul": (lambda: SiluMul(device)(gate_up), gate_up.nbytes * 3 // 2),
        "rope_kv_write": (lambda: RopeKvWrite(device)(q, k, v, turn, turn, caches, slots), 2 * 2 * BATCH * sum(sizes)),
    }
    for name, (launch, num_bytes) in uses.items():
        yield bench.row(f"{name}, {BATCH} rows, replayed", bench.replayed_us(launch), num_bytes)


def attention(bench: Bench) -> Iterator[Row]:
    """Decoding, as a step launches it and as a graph does; a prompt; a chunk behind a long prefix."""
    import torch
    from xllm_cuda.attention import TritonAttention

    from xllm_core.plugins import AttentionGeometry, BatchLayout, KVSegments

    geometry = AttentionGeometry(
        num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, head_size=HEAD_SIZE, scale=HEAD_SIZE**-0.5, block_size=BLOCK_SIZE, dtype="bfloat16"
    )  # fmt: skip
    kernel = TritonAttention(bench.device, geometry)
    num_blocks = BATCH * CONTEXT // BLOCK_SIZE
    kv = KVSegments(own=(*(bench.new(num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE) for _ in range(2)),))

    def attend(name: str, rows: int, queries: int, context: int, *, in_place: bool = False) -> Row:
        lens = torch.full((rows,), queries, dtype=torch.int32)
        tables = torch.randperm(num_blocks)[: rows * (context // BLOCK_SIZE)].view(rows, -1).int()
        layout = BatchLayout(
            lens, torch.full_like(lens, context), torch.arange(rows + 1, dtype=torch.int32) * queries, tables
        )
        q = bench.new(rows * queries, NUM_HEADS, HEAD_SIZE)
        plan: Any = kernel.graph_plan(rows, CONTEXT // BLOCK_SIZE) if in_place else kernel.plan(layout)
        if in_place:
            kernel.refill(plan, layout)
        out = torch.empty_like(q)
        pairs = rows * sum(range(context - queries + 1, context + 1))
        num_bytes = rows * context * NUM_KV_HEADS * HEAD_SIZE * 2 * 2 + 2 * q.nbytes
        us = bench.cold_us(lambda: kernel.run(q, kv, plan, out))
        return bench.row(name, us, num_bytes, 4 * NUM_HEADS * HEAD_SIZE * pairs)

    yield attend(f"attention, {BATCH} decoding at {CONTEXT}", BATCH, 1, CONTEXT)
    yield attend(f"attention, {BATCH} at {CONTEXT} from a graph's plan", BATCH, 1, CONTEXT, in_place=True)
    yield attend(f"attention, one at {CONTEXT} from a graph's plan", 1, 1, CONTEXT, in_place=True)
    yield attend(f"attention, prompt of {CONTEXT}", 1, CONTEXT, CONTEXT)
    yield attend("attention, 8 prompts of 512", 8, 512, 512)
    yield attend(f"attention, chunk of 512 at {CONTEXT}", 1, 512, CONTEXT)


def sampling(bench: Bench) -> Iterator[Row]:
    """A batch of rows over the vocabulary; a limit reads the logits once."""
    import torch
    from xllm_cuda.sampler import TritonSampler

    from xllm_core.plugins import SamplingBatch

    sampler, zeros = TritonSampler(bench.device), torch.zeros(BATCH, dtype=torch.int64)
    logits = torch.randn(BATCH, VOCAB, device=bench.where) * 3

    def column(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((BATCH,), value, dtype=dtype, device=bench.where)

    some_k, some_p = column(50, torch.int64), column(0.9)
    for name, top_k, top_p in (
        ("temperature", None, None),
        ("top-p", None, some_p),
        ("top-k and top-p", some_k, some_p),
    ):
        batch = SamplingBatch(False, column(0.7), top_k, top_p, None, seeds=zeros, indices=zeros, positions=zeros)
        us = bench.cold_us(lambda batch=batch: sampler.sample(logits, batch))  # type: ignore[misc]
        yield bench.row(f"sampling, {name}, {BATCH} rows", us, logits.nbytes)


if __name__ == "__main__":
    main()
