"""Products of 8-bit integers: those of the reference to the bit, on every instruction set, for any number of rows, and replayed."""

from __future__ import annotations

import random

import pytest
import torch
from xllm_cpu.device import CpuDevice
from xllm_cpu.ops import AddRmsNorm
from xllm_cpu.quantized import LinearInt8, LinearSiluMulInt8, LmHeadInt8

from xllm_core.reference import ops as reference
from xllm_core.reference.device import ReferenceDevice
from xllm_core.reference.quantization import Int8

ROWS = 256
T = torch.randn
KINDS = [LinearInt8, LmHeadInt8, LinearSiluMulInt8]


@pytest.mark.parametrize("kind", ["LinearInt8", "LmHeadInt8"])
@pytest.mark.parametrize(("n", "k"), [(64, 96), (130, 33), (3, 1), (34, 577), (1, 4096), (4100, 64)])
def test_the_reference_to_the_bit(device: CpuDevice, dtype: torch.dtype, kind: str, n: int, k: int) -> None:
    """Rows of every size of numbers, bias too. Dies with another rounding of x, another order of scaling, or sums that saturate."""
    torch.manual_seed(n + k)
    weight = T(n, k) * torch.logspace(-20, 20, n).unsqueeze(1)
    made, bias = Int8().quantize(weight.to(dtype)), T(n).to(dtype)
    x = (T(17, k) * torch.logspace(-28, 15, 17).unsqueeze(1)).to(dtype)
    x[3], x[4], x[5], x[7], x[8] = 0, 1e-38, 1, x[7].abs(), -x[8].abs()
    x[6, 0] = 1000
    op, definition = (
        {"LinearInt8": LinearInt8, "LmHeadInt8": LmHeadInt8}[kind](device),
        getattr(reference, kind)(ReferenceDevice(0)),
    )
    for b in (bias, None):
        assert torch.equal(op(x, op.prepare(made, b)), definition(x, definition.prepare(made, b)))


def test_the_largest_sums(device: CpuDevice) -> None:
    """As many columns as are taken, all of them largest. Dies with sums of 16 bits, or an offset that is not taken out modulo 2**32."""
    k = 1 << 16
    made = (torch.full((2, k), 127, dtype=torch.int8) * torch.tensor([[1], [-1]], dtype=torch.int8), torch.ones(2))
    op = LmHeadInt8(device)
    for x in (-255.0, 255.0):
        out = op(torch.full((1, k), x), op.prepare(made, None))
        assert out.tolist() == [[x * 127 * k, -x * 127 * k]]


def test_what_is_not_finite_is_told(device: CpuDevice, dtype: torch.dtype) -> None:
    """A row with NaN or infinity gives NaN everywhere; its neighbours feel nothing. Dies if it is turned into some number."""
    torch.manual_seed(3)
    op = LmHeadInt8(device)
    prepared = op.prepare(Int8().quantize(T(40, 70)), None)
    x = T(5, 70).to(dtype)
    clean = op(x, prepared)
    x[1, 69], x[3, 0] = float("nan"), float("-inf")
    out = op(x, prepared)
    assert bool(out[[1, 3]].isnan().all()) and torch.equal(out[[0, 2, 4]], clean[[0, 2, 4]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(64, 96), (130, 33), (2, 1), (34, 577)])
def test_any_number_of_rows(device: CpuDevice, dtype: torch.dtype, kind: type[LinearInt8], n: int, k: int) -> None:
    """M = 1 .. 256, each M, at a random place, on one thread and three; rows that lie apart. Dies with a tile that reads another row's step."""
    torch.manual_seed(n)
    op = kind(device)
    prepared = op.prepare(Int8().quantize(T(n, k).to(dtype)), T(n).to(dtype))
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


@pytest.mark.parametrize("inner", [48, 7, 130])
def test_the_fusion(device: CpuDevice, dtype: torch.dtype, inner: int) -> None:
    """silu(gate) * up of sums that were not rounded. Dies with gates and ups, or their steps and biases, that are not side by side."""
    torch.manual_seed(inner)
    made, bias, x = Int8().quantize(T(2 * inner, 50).to(dtype)), T(2 * inner).to(dtype), T(9, 50).to(dtype)
    head, fused = LmHeadInt8(device), LinearSiluMulInt8(device)
    gate, up = head(x, head.prepare(made, bias)).chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    found = fused(x, fused.prepare(made, bias)).float()
    assert torch.allclose(found, expected, rtol=2e-6 if dtype == torch.float32 else 2**-8, atol=1e-6)


def test_the_loss_is_that_of_the_format(device: CpuDevice) -> None:
    """Random numbers: a step s adds noise of s**2 / 12 to each factor, no more. Dies with a coarser step anywhere."""
    torch.manual_seed(1)
    x, weight = T(64, 576), T(512, 576)
    op = LmHeadInt8(device)
    error = op(x, op.prepare(Int8().quantize(weight), None)).double() - x.double() @ weight.double().T
    steps = (x.amax(1) - x.amin(1)) / 255, weight.abs().amax(1) / 127
    noise = sum(float(step.double().square().mean()) / 12 for step in steps)
    assert float(error.square().mean()) == pytest.approx(576 * noise, rel=0.05)


def test_it_is_replayed(device: CpuDevice, dtype: torch.dtype) -> None:
    """As one call of a graph, its room in the arena; for fewer rows, with inputs that changed. Dies if the number of rows is not where it says."""
    torch.manual_seed(4)
    op, head, norm = LinearInt8(device), LmHeadInt8(device), AddRmsNorm(device)
    square, out = op.prepare(Int8().quantize(T(48, 48)), T(48)), head.prepare(Int8().quantize(T(70, 48)), None)
    x, weight = T(24, 48).to(dtype), T(48).to(dtype)

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


VALUES, STEPS = torch.ones(4, 6, dtype=torch.int8), torch.ones(4)


@pytest.mark.parametrize(
    ("weight", "x", "words"),
    [
        ((VALUES, STEPS), T(2, 5), r"x must be \[T, 6\]"),
        ((VALUES, STEPS), T(6), r"x must be \[T, 6\]"),
        ((VALUES.float(), STEPS), T(2, 6), r"int8 \[out, in\]"),
        ((VALUES, STEPS[:3]), T(2, 6), r"int8 \[out, in\]"),
        ((VALUES, STEPS.double()), T(2, 6), r"int8 \[out, in\]"),
        ((VALUES[0], STEPS), T(2, 6), r"int8 \[out, in\]"),
        ((torch.ones(1, 1, dtype=torch.int8).expand(4, (1 << 16) + 1), STEPS), T(1, 1), "at most 65536"),
    ],
)
def test_refused(device: CpuDevice, weight: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor, words: str) -> None:
    """What does not fit, by name, before anything is read."""
    op = LinearInt8(device)
    with pytest.raises(ValueError, match=words):
        op(x, op.prepare(weight, None))


def test_refused_by_kind(device: CpuDevice) -> None:
    """A dtype that is not computed in, a bias of another length, halves that do not match; no rows are no reason to fail."""
    op, fused = LinearInt8(device), LinearSiluMulInt8(device)
    with pytest.raises(TypeError, match="neither float32 nor bfloat16"):
        op(T(2, 6).double(), op.prepare((VALUES, STEPS), None))
    with pytest.raises(ValueError, match=r"a bias must be \[4\]"):
        op.prepare((VALUES, STEPS), T(5))
    with pytest.raises(ValueError, match="equally many"):
        fused.prepare((VALUES[:3], STEPS[:3]), None)
    assert op(T(0, 6), op.prepare((VALUES, STEPS), None)).shape == (0, 4)
