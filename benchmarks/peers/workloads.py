"""What every engine is asked to do, what is read off it, and what this machine allows at most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from xllm_core.benchmark import quantile

PREFIX_TOKENS, OWN_TOKENS = 1024, 16

# Of SmolLM2-135M, which all engines serve here: bytes of its weights in bfloat16; operations for a prompt token of 1,024, one of 128, and a new token
# behind 192 others. What `benchmarks.scaling.costs` finds in its headers.
WEIGHT_BYTES = 269e6
FLOPS_1024, FLOPS_128, FLOPS_NEW = 248e6, 217e6, 282e6

# Read for a token: int8 has a byte per weight and float32 scales; Q4_1 is what the file holds.
BYTES = {"bf16": WEIGHT_BYTES, "int8": 144e6, "q4_1": 98.4e6}


@dataclass(frozen=True, slots=True)
class Shape:
    """Requests that are sent together. num_clients: each sends its next request when its last is answered; 0 sends all at once."""

    num_requests: int
    input_len: int
    output_len: int
    num_clients: int = 0
    prefix_len: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. ttft_s: of each request, or one mean. gaps_s: between chunks, of all requests; a process tells none."""

    elapsed_s: float
    ttft_s: list[float]
    gaps_s: list[float] = field(default_factory=list)


class Session(Protocol):
    """An engine that runs, and can be asked."""

    def play(self, shape: Shape, seed: int, prefix_seed: int = 0) -> Answer:
        """Send the requests, wait for all. Raises AbsentError where one fails."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One engine's figure of one round. details: printed or kept beside it."""

    value: float
    details: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Workload:
    """play: one turn; the seed gives prompts that no engine has seen. limit: of the value, from bytes/s, operations/s and the precision.

    engines: which take part; empty for all that speak over one of `over`.
    """

    name: str
    title: str
    unit: str
    shape: Shape
    play: Callable[[Session, Shape, int], Turn]
    limit: Callable[[float, float, str], float | None] = lambda read, peak, precision: None
    engines: tuple[str, ...] = ()
    is_less_better: bool = False


def _single(session: Session, shape: Shape, seed: int) -> Turn:
    answer = session.play(shape, seed)
    decode_s = answer.elapsed_s - answer.ttft_s[0]
    whole = shape.output_len / answer.elapsed_s
    return Turn((shape.output_len - 1) / decode_s, {"whole_tok_s": whole, "ttft_ms": answer.ttft_s[0] * 1e3})


def _prefill(session: Session, shape: Shape, seed: int) -> Turn:
    first_s = session.play(shape, seed).ttft_s[0]
    return Turn(shape.input_len / first_s, {"ttft_ms": first_s * 1e3})


def _throughput(session: Session, shape: Shape, seed: int) -> Turn:
    answer = session.play(shape, seed)
    details = {"ttft_p50_ms": quantile(answer.ttft_s, 0.5) * 1e3}
    if answer.gaps_s:
        details |= {f"itl_p{q:.0f}_ms": quantile(answer.gaps_s, q / 100) * 1e3 for q in (50, 99)}
    return Turn(shape.num_requests * shape.output_len / answer.elapsed_s, details)


def _prefix(session: Session, shape: Shape, seed: int) -> Turn:
    cold = session.play(shape, 2 * seed, prefix_seed=seed).ttft_s[0]
    warm = session.play(shape, 2 * seed + 1, prefix_seed=seed).ttft_s[0]
    return Turn(warm * 1e3, {"cold_ms": cold * 1e3})


def _single_limit(read: float, peak: float, precision: str) -> float | None:
    return read / BYTES[precision]


def _prefill_limit(read: float, peak: float, precision: str) -> float | None:
    return peak / FLOPS_1024 if precision == "bf16" else None


def _burst_limit(read: float, peak: float, precision: str) -> float | None:
    return peak * 128 / (128 * (FLOPS_128 + FLOPS_NEW)) if precision == "bf16" else None


_BF16 = ("xllm", "xllm-process", "vllm", "openvino", "llama-bf16")
WORKLOADS = (
    Workload("single", "one request, 32 in, 128 out", "new tok/s after the first", Shape(1, 32, 128), _single, _single_limit),
    Workload("prefill", "one prompt of 1,024", "tok/s", Shape(1, 1024, 1), _prefill, _prefill_limit, _BF16),
    Workload(
        "burst", "32 requests at once, 128 in, 128 out", "new tok/s", Shape(32, 128, 128), _throughput, _burst_limit,
        (*_BF16, "xllm-int8", "llama-q8_0"),
    ),
    Workload(
        "clients", "16 clients, 64 requests, 128 in, 64 out", "new tok/s", Shape(64, 128, 64, num_clients=16), _throughput,
        engines=("xllm", "vllm", "llama-bf16"),
    ),
    Workload(
        "prefix", "second request on a prefix of 1,024, with 16 tokens of its own", "ms to the first token",
        Shape(1, PREFIX_TOKENS + OWN_TOKENS, 1, prefix_len=PREFIX_TOKENS), _prefix, engines=_BF16, is_less_better=True,
    ),
)  # fmt: skip
"""In the order in which a round goes through them. Limits are those of the demo model."""


def shrink(work: Workload) -> Workload:
    """The same with few short requests, to see that it runs."""
    shape = work.shape
    small = Shape(
        min(shape.num_requests, 4), min(shape.input_len, 144), min(shape.output_len, 12), min(shape.num_clients, 2),
        min(shape.prefix_len, 128),
    )  # fmt: skip
    return replace(work, shape=small)
