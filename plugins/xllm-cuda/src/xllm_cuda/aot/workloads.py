"""What is compiled: every kernel, launched by the plugin's own code over tensors without memory, at the shapes of three models.

Each workload carries the arithmetic of its roofline: factors that multiply to bytes, and to operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from xllm_core.plugins import AttentionGeometry, BatchLayout, DeviceFacts, KVSegments, MemoryInfo, SamplingBatch
from xllm_cuda.attention import TritonAttention
from xllm_cuda.ops import AddRmsNorm, BlockCopy, KvWrite, RmsNorm, Rope, RopeKvWrite, SiluMul
from xllm_cuda.sampler import TritonSampler

BATCH, CONTEXT, BLOCK_SIZE = 64, 4096, 16
"""Decode: so many sequences of so many tokens. A prompt is one sequence of CONTEXT tokens."""

Term = tuple[int, ...]
"""Factors of one product."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What kernels see of a model. rotated: elements of a head that rotate. has_qk_norm: queries and keys are normed head by head."""

    name: str
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rotated: int
    inner: int
    vocab: int
    has_qk_norm: bool = False


SHAPES = (
    Shape("Llama-3-8B", 4096, 32, 8, 128, 128, 14336, 128256),
    Shape("Qwen3-32B", 5120, 64, 8, 128, 128, 25600, 151936, has_qk_norm=True),
    Shape("GLM-4-9B", 4096, 32, 2, 128, 64, 13696, 151552),
)
"""From the models' config.json."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One use of the kernels. launch: does it. data_bytes, operations: the roofline's numerators, as sums of products.

    is_hot: runs in every layer or step, so that spilled registers would cost every token.
    """

    name: str
    launch: Callable[[], object]
    data_bytes: tuple[Term, ...]
    operations: tuple[Term, ...] = ()
    is_hot: bool = True


class NoDevice:
    """A `DeviceBackend` whose tensors have shapes and no memory."""

    def facts(self) -> DeviceFacts:
        """As of a GPU."""
        return DeviceFacts("cuda", "no device", "meta", ("bfloat16", "float32"), block_sizes=(BLOCK_SIZE,))

    def memory(self) -> MemoryInfo:
        """None."""
        return MemoryInfo(0, 0)

    def peak_memory_bytes(self) -> int:
        """None."""
        return 0

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Without memory."""
        return torch.empty(tuple(shape), dtype=dtype, device="meta")

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """On the host."""
        return torch.zeros(tuple(shape), dtype=dtype)

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """The shape alone."""
        return host.to("meta")

    def synchronize(self) -> None:
        """Nothing runs."""

    def num_threads(self) -> int:
        """One."""
        return 1

    def set_num_threads(self, count: int) -> None:
        """Nothing runs."""


def workloads(shape: Shape, dtype: torch.dtype) -> Iterator[Workload]:
    """Every kernel at the shapes of a model."""
    device, size = NoDevice(), dtype.itemsize
    kv = shape.num_kv_heads * shape.head_size

    def new(*sizes: int) -> torch.Tensor:
        return device.allocate(sizes, dtype)

    def ids(count: int) -> torch.Tensor:
        return device.allocate((count,), torch.int64)

    caches = (
        new(CONTEXT, BLOCK_SIZE, shape.num_kv_heads, shape.head_size),
        new(CONTEXT, BLOCK_SIZE, shape.num_kv_heads, shape.head_size),
    )
    yield from _attention(shape, dtype, caches)

    # Queries, keys and values are views of one product, as models make them.
    qkv = new(BATCH, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_size)
    q, k, v = (
        part.unflatten(1, (-1, shape.head_size))
        for part in qkv.split((shape.num_heads * shape.head_size, kv, kv), dim=1)
    )
    cos, sin, slots = new(BATCH, shape.rotated), new(BATCH, shape.rotated), ids(BATCH)
    q_terms: Term = (2, BATCH, shape.num_heads, shape.head_size, size)
    x, weight = new(BATCH, shape.hidden), new(shape.hidden)

    yield Workload("rms_norm", lambda: RmsNorm(device)(x, weight, 1e-5), ((2, BATCH, shape.hidden, size),))
    yield Workload("add_rms_norm", lambda: AddRmsNorm(device)(x, x, weight, 1e-5), ((4, BATCH, shape.hidden, size),))
    if shape.has_qk_norm:
        norm = new(shape.head_size)
        yield Workload("rms_norm, heads of q", lambda: RmsNorm(device)(q, norm, 1e-6), (q_terms,))
    yield Workload("rope", lambda: Rope(device)(q, k, cos, sin), (q_terms, (2, BATCH, kv, size)), is_hot=False)
    yield Workload(
        "rope_kv_write", lambda: RopeKvWrite(device)(q, k, v, cos, sin, caches, slots), (q_terms, (4, BATCH, kv, size))
    )
    yield Workload("kv_write", lambda: KvWrite(device)((k, v), caches, slots), ((4, BATCH, kv, size),), is_hot=False)
    gate_up = new(BATCH, 2 * shape.inner)
    yield Workload("silu_mul", lambda: SiluMul(device)(gate_up), ((3, BATCH, shape.inner, size),))
    yield Workload(
        "block_copy, 4 blocks", lambda: BlockCopy(device)(caches, ids(4), ids(4)), ((2, 2, 4, 2, BLOCK_SIZE, kv, size),), is_hot=False
    )  # fmt: skip
    yield _sampling(shape)


def _attention(shape: Shape, dtype: torch.dtype, caches: tuple[torch.Tensor, ...]) -> Iterator[Workload]:
    name = str(dtype).removeprefix("torch.")
    geometry = AttentionGeometry(
        num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, head_size=shape.head_size, scale=shape.head_size**-0.5,
        block_size=BLOCK_SIZE, dtype=name,
    )  # fmt: skip
    kernel = TritonAttention(NoDevice(), geometry)

    def attend(num_rows: int, num_queries: int, *, in_place: bool = False) -> object:
        lens = torch.full((num_rows,), num_queries, dtype=torch.int32)
        starts = torch.arange(num_rows + 1, dtype=torch.int32) * num_queries
        tables = torch.zeros((num_rows, CONTEXT // BLOCK_SIZE), dtype=torch.int32)
        q = torch.empty((num_rows * num_queries, shape.num_heads, shape.head_size), dtype=dtype, device="meta")
        layout = BatchLayout(lens, torch.full_like(lens, CONTEXT), starts, tables)
        plan = kernel.graph_plan(*tables.shape) if in_place else kernel.plan(layout)
        kernel.run(q, KVSegments(own=(caches[0], caches[1])), plan, torch.empty_like(q))
        return None

    kv: Term = (2, CONTEXT, shape.num_kv_heads, shape.head_size, dtype.itemsize)
    q: Term = (2, shape.num_heads, shape.head_size, dtype.itemsize)
    scores: Term = (4, shape.num_heads, shape.head_size, CONTEXT)
    decode = ((BATCH, *kv), (BATCH, *q)), ((BATCH, *scores),)
    yield Workload(f"attention, {BATCH} decoding", lambda: attend(BATCH, 1), *decode)
    yield Workload(f"attention, {BATCH} decoding from a graph", lambda: attend(BATCH, 1, in_place=True), *decode)
    # Half of the scores of a causal prompt are computed: 2 for 4.
    yield Workload(
        f"attention, prompt of {CONTEXT}", lambda: attend(1, CONTEXT), (kv, (CONTEXT, *q)), ((CONTEXT, 2, *scores[1:]),)
    )


def _sampling(shape: Shape) -> Workload:
    device = NoDevice()

    def sample() -> object:
        column = device.allocate((BATCH,), torch.float32)
        zeros = torch.zeros(BATCH, dtype=torch.int64)
        batch = SamplingBatch(
            False,
            column,
            device.allocate((BATCH,), torch.int64),
            column,
            column,
            seeds=zeros,
            indices=zeros,
            positions=zeros,
        )
        return TritonSampler(device).sample(device.allocate((BATCH, shape.vocab), torch.float32), batch)

    # The likeliest, the bins, what a threshold must part: each reads the row. What is left of it then is little.
    passes = 3
    return Workload("sampling, top-k and top-p", sample, ((passes, BATCH, shape.vocab, 4),))
