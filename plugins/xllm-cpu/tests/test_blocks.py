"""Products over blocks of 4 and 8 bits: those of the reference to the bit, on every instruction set, for any number of rows, and replayed."""

from __future__ import annotations

import random

import pytest
import torch
from xllm_cpu.device import CpuDevice
from xllm_cpu.ops import AddRmsNorm
from xllm_cpu.quantized import LinearBlocks, LinearSiluMulBlocks, LmHeadBlocks

from xllm_core.reference import ops as reference
from xllm_core.reference.device import ReferenceDevice

ROWS = 256
T = torch.randn
KINDS = ["4", "4m", "8", "8m"]  # bits, and whether there are minimums


def drawn(n: int, k: int, kind: str, scale: float = 0.1) -> tuple[torch.Tensor, ...]:
    """Random codes, scales and minimums of a kind."""
    codes = torch.randint(0, 256, (n, k // 2 if kind[0] == "4" else k), dtype=torch.uint8)
    blocks = tuple((T(n, k // 32) * scale).half() for _ in range(len(kind)))
    return codes if kind[0] == "4" else codes.view(torch.int8), *blocks


def widened(weight: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What the codes stand for, in float64."""
    codes, scales, *minimums = weight
    values = codes.view(len(codes), scales.shape[1], -1)
    if codes.dtype == torch.uint8:
        values = torch.cat((values & 15, values >> 4), 2).double() - (0 if minimums else 8)
    wide = values.double() * scales.double().unsqueeze(2)
    return (wide + minimums[0].double().unsqueeze(2) if minimums else wide).flatten(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(64, 96), (130, 32), (3, 544), (1, 4096), (2050, 64)])
def test_the_reference_to_the_bit(device: CpuDevice, dtype: torch.dtype, kind: str, n: int, k: int) -> None:
    """Numbers of every size, scales next to nothing and the largest. Dies with another order of blocks, a fused product and sum, or a wrong half."""
    torch.manual_seed(n + k)
    codes, scales, *rest = drawn(n, k, kind)
    scales[0], scales[-1, 0], scales[n // 2] = 0, 65504, 2.0**-24
    bias, x = T(n).to(dtype), (T(17, k) * torch.logspace(-28, 15, 17).unsqueeze(1)).to(dtype)
    x[3], x[4], x[5], x[6, 0], x[7, :32] = 0, 1e-38, 1, 1000, 0
    for name in ("LinearBlocks", "LmHeadBlocks"):
        op, definition = (
            {"LinearBlocks": LinearBlocks, "LmHeadBlocks": LmHeadBlocks}[name](device),
            getattr(reference, name)(ReferenceDevice(0)),
        )
        for b in (bias, None):
            weight = (codes, scales, *rest)
            assert torch.equal(op(x, op.prepare(weight, b)), definition(x, definition.prepare(weight, b)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_sums(device: CpuDevice, kind: str) -> None:
    """All codes largest, all of x largest. Dies with sums of 16 bits, or an offset that is not taken out."""
    k = 1 << 12
    for byte in (0x00, 0xFF, 0x80, 0x7F):
        codes = torch.full((2, k // 2 if kind[0] == "4" else k), byte, dtype=torch.uint8)
        ones = [torch.ones(2, k // 32).half() for _ in kind]
        weight = (codes if kind[0] == "4" else codes.view(torch.int8), *ones)
        op = LmHeadBlocks(device)
        for value in (-127.0, 127.0):
            out = op(torch.full((1, k), value), op.prepare(weight, None))
            assert torch.equal(out.double(), torch.full((1, k), value).double() @ widened(weight).T)


@pytest.mark.parametrize("kind", ["4", "8"])
def test_kinds_that_share_a_stack(device: CpuDevice, dtype: torch.dtype, kind: str) -> None:
    """4 bits held in 8, and a minimum of nothing, change no bit: so a stack may mix kinds. Dies with numbers that depend on how codes are stored."""
    torch.manual_seed(9)
    codes, scales, *rest = drawn(70, 96, f"{kind}m") if kind == "4" else drawn(70, 96, kind)
    wide = codes
    if kind == "4":
        halves = codes.view(70, 3, 16)
        wide = torch.cat((halves & 15, halves >> 4), 2).flatten(1).view(torch.int8)
    minimums = rest[0] if rest else torch.zeros_like(scales)
    op, x = LinearBlocks(device), T(5, 96).to(dtype)
    narrow, stored = op.prepare((codes, scales, *rest), None), op.prepare((wide, scales, minimums), None)
    assert torch.equal(op(x, narrow), op(x, stored))


def test_what_is_not_finite_is_told(device: CpuDevice, dtype: torch.dtype) -> None:
    """A row with NaN or infinity gives NaN everywhere; its neighbours feel nothing. Dies if it is turned into some number."""
    torch.manual_seed(3)
    op = LmHeadBlocks(device)
    prepared = op.prepare(drawn(40, 64, "4m"), None)
    x = T(5, 64).to(dtype)
    clean = op(x, prepared)
    x[1, 63], x[3, 0] = float("nan"), float("-inf")
    out = op(x, prepared)
    assert bool(out[[1, 3]].isnan().all()) and torch.equal(out[[0, 2, 4]], clean[[0, 2, 4]])


@pytest.mark.parametrize("op_class", [LinearBlocks, LmHeadBlocks, LinearSiluMulBlocks])
@pytest.mark.parametrize(("n", "k", "kind"), [(64, 96, "4m"), (130, 32, "8"), (2, 64, "4"), (34, 576, "8m")])
def test_any_number_of_rows(
    device: CpuDevice, dtype: torch.dtype, op_class: type[LinearBlocks], n: int, k: int, kind: str
) -> None:
    """M = 1 .. 256, each M, at a random place, on one thread and three; rows that lie apart. Dies with a tile that reads another row's step."""
    torch.manual_seed(n)
    op = op_class(device)
    prepared = op.prepare(drawn(n, k, kind), T(n).to(dtype))
    x = T(ROWS, k).to(dtype)
    whole = op(x, prepared)
    draw = random.Random(k)
    for rows in range(1, ROWS + 1):
        first = draw.randint(0, ROWS - rows)
        assert torch.equal(op(x[first : first + rows], prepared), whole[first : first + rows]), rows
    apart = torch.cat((x, x), 1)[:, k:]
    for threads in (1, 3):
        device.set_num_threads(threads)
        assert torch.equal(op(apart, prepared), whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner", [48, 7, 130])
def test_the_fusion(device: CpuDevice, dtype: torch.dtype, inner: int, kind: str) -> None:
    """silu(gate) * up of sums that were not rounded. Dies with gates and ups, or their scales and biases, that are not side by side."""
    torch.manual_seed(inner)
    weight, bias, x = drawn(2 * inner, 64, kind), T(2 * inner).to(dtype), T(9, 64).to(dtype)
    head, fused = LmHeadBlocks(device), LinearSiluMulBlocks(device)
    gate, up = head(x, head.prepare(weight, bias)).chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    found = fused(x, fused.prepare(weight, bias)).float()
    assert torch.allclose(found, expected, rtol=2e-6 if dtype == torch.float32 else 2**-8, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_format(device: CpuDevice, kind: str) -> None:
    """Codes are taken as they are; x's step s adds noise of s**2 / 12 to each factor, no more. Dies with a coarser step, or one per row."""
    torch.manual_seed(1)
    x, weight = T(2048, 576), drawn(96, 576, kind)
    x[:, 0] = 50  # what costs its own block precision, and no other
    op, exact = LmHeadBlocks(device), widened(weight)
    error = op(x, op.prepare(weight, None)).double() - x.double() @ exact.T
    steps = x.double().view(2048, 18, 32).abs().amax(2) / 127
    noise = (steps.square() / 12).repeat_interleave(32, 1) @ exact.square().T
    assert float((error.square() / noise).mean()) == pytest.approx(31 / 32, abs=0.1)  # the largest of a block is met


def test_it_is_replayed(device: CpuDevice, dtype: torch.dtype) -> None:
    """As one call of a graph, its room in the arena; for fewer rows, with inputs that changed. Dies if the number of rows is not where it says."""
    torch.manual_seed(4)
    op, head, norm = LinearBlocks(device), LmHeadBlocks(device), AddRmsNorm(device)
    square, out = op.prepare(drawn(64, 64, "4m"), T(64)), head.prepare(drawn(70, 64, "8"), None)
    x, weight = T(24, 64).to(dtype), T(64).to(dtype)

    def forward(rows: int) -> torch.Tensor:
        return head(norm(op(x[:rows], square), x[:rows], weight, 1e-5)[0], out)

    with torch.inference_mode():
        graph, logits = device.capture(lambda: forward(24), 24)
        for rows in (24, 1, 7):
            x.normal_()
            logits.fill_(float("nan"))
            graph.replay(rows)
            assert torch.equal(logits[:rows], forward(rows)) and bool(logits[rows:].isnan().all())
    assert graph.num_ops == 3


CODES, WIDE = torch.ones(4, 32, dtype=torch.uint8), torch.ones(4, 64, dtype=torch.int8)
SCALES = torch.ones(4, 2).half()


@pytest.mark.parametrize(
    ("weight", "x", "words"),
    [
        ((CODES, SCALES), T(2, 32), r"x must be \[T, 64\]"),
        ((CODES, SCALES), T(64), r"x must be \[T, 64\]"),
        ((CODES.float(), SCALES), T(2, 64), "4-bit codes uint8"),
        ((CODES[0], SCALES), T(2, 64), "4-bit codes uint8"),
        ((CODES, SCALES, SCALES, SCALES), T(2, 64), "4-bit codes uint8"),
        ((CODES[:, :24], SCALES), T(2, 48), "rows of 48 are not whole blocks"),
        ((CODES, SCALES[:, :1]), T(2, 64), r"must be \[4, 2\] float16"),
        ((WIDE, SCALES[:3]), T(2, 64), r"must be \[4, 2\] float16"),
        ((WIDE, SCALES.float()), T(2, 64), r"must be \[4, 2\] float16"),
        ((WIDE, SCALES, SCALES[:, :1]), T(2, 64), r"must be \[4, 2\] float16"),
    ],
)
def test_refused(device: CpuDevice, weight: tuple[torch.Tensor, ...], x: torch.Tensor, words: str) -> None:
    """What does not fit, by name, before anything is read."""
    op = LinearBlocks(device)
    with pytest.raises(ValueError, match=words):
        op(x, op.prepare(weight, None))


def test_refused_by_kind(device: CpuDevice) -> None:
    """A dtype that is not computed in, a bias of another length, halves that do not match; no rows are no reason to fail."""
    op, fused = LinearBlocks(device), LinearSiluMulBlocks(device)
    with pytest.raises(TypeError, match="neither float32 nor bfloat16"):
        op(T(2, 64).double(), op.prepare((CODES, SCALES), None))
    with pytest.raises(ValueError, match=r"a bias must be \[4\]"):
        op.prepare((CODES, SCALES), T(5))
    with pytest.raises(ValueError, match="equally many"):
        fused.prepare((CODES[:3], SCALES[:3]), None)
    assert op(T(0, 64), op.prepare((CODES, SCALES), None)).shape == (0, 4)
