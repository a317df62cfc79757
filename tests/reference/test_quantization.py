"""The format "int8" and its ops: sums are exact, and the loss is the one that the format has."""

from __future__ import annotations

import pytest
import torch

from xllm_core.reference.device import ReferenceDevice
from xllm_core.reference.ops import LinearInt8, LinearSiluMulInt8, LmHeadInt8
from xllm_core.reference.quantization import Int8, int8_rows

DEVICE = ReferenceDevice(0)


def test_a_weight_row_of_whole_numbers() -> None:
    """Largest magnitude is 127, halves go to even, zero is zero. Killed by: cutting off, or a step of 128."""
    weight = torch.tensor([[-127.0, 0.0, 63.5, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0, -0.25], [0.0] * 5, [1e-38] * 5])
    values, steps = Int8().quantize(weight)
    assert values.tolist() == [[-127, 0, 64, 0, 2], [0, 0, 0, 0, -127], [0] * 5, [0] * 5]
    assert steps.tolist() == pytest.approx([1.0, 0.25 / 127, 0, 0])


def test_rows_of_bytes() -> None:
    """From least to largest in 255 steps, zero among them; one side alone uses all of them. Killed by: a byte of 256, or half the steps."""
    x = torch.tensor([[-55.0, 0.0, 200.0, 0.5, 1.5], [0.0, 255.0, 0.0, 1.0, 2.0], [-127.5, 127.5, 0.0, 1.0, -1.0]])
    values, steps = int8_rows(x)
    assert values.tolist() == [[-55, 0, 200, 0, 2], [0, 255, 0, 1, 2], [-128, 127, 0, 1, -1]]
    assert steps.flatten().tolist() == [1, 1, 1]


def test_rows_that_have_no_step() -> None:
    """Zeros and what is next to zero stay zeros without a division by it; what is not finite is told, not hidden."""
    values, step = int8_rows(
        torch.tensor([[0.0, 0.0], [1e-38, -1e-40], [float("inf"), 1.0], [1.0, float("nan")], [3e38, -3e38]])
    )
    assert values.tolist() == [[0, 0]] * 5
    assert step[:2].flatten().tolist() == [0, 0] and bool(step[2:].isnan().all())


def test_sums_are_exact() -> None:
    """Against 64-bit integers, over more columns than float32 adds exactly. Killed by: one product over all columns."""
    torch.manual_seed(0)
    x = torch.randint(-127, 128, (5, 40_000)).float()
    x[:, 0], x[:, 1], x[0], x[1, 2:] = 127, -128, 255, 127
    weight = torch.randint(-127, 128, (3, 40_000), dtype=torch.int8)
    weight[0] = 127
    exact = (x.long() @ weight.T.long()).to(torch.float32)
    assert torch.equal(LmHeadInt8(DEVICE)(x, (weight, torch.ones(3), None)), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_the_format(dtype: torch.dtype) -> None:
    """Rounding random numbers to a step s adds s**2 / 12 of noise to each factor of each product, no more. Killed by: a wider step."""
    torch.manual_seed(1)
    x, weight = torch.randn(64, 576).to(dtype), torch.randn(512, 576).to(dtype)
    op = LmHeadInt8(DEVICE)
    error = op(x, op.prepare(Int8().quantize(weight), None)).double() - x.double() @ weight.double().T
    steps = (x.float().amax(1) - x.float().amin(1)) / 255, weight.float().abs().amax(1) / 127
    noise = [step.double().square().mean() / 12 for step in steps]
    expected = 576 * (noise[0] * weight.double().square().mean() + noise[1] * x.double().square().mean())
    assert float(error.square().mean() / expected) == pytest.approx(1, abs=0.05)
    assert float(576 / expected) > 10**3.8  # 38 dB


def test_bias_and_rounding() -> None:
    """A bias is added to the scaled sum; the head's result is float32; the fusion is the two ops."""
    torch.manual_seed(2)
    x, weight, bias = torch.randn(4, 24).bfloat16(), torch.randn(10, 24).bfloat16(), torch.randn(10).bfloat16()
    made = Int8().quantize(weight)
    plain, wide = LinearInt8(DEVICE), LmHeadInt8(DEVICE)
    biased, head = plain(x, plain.prepare(made, bias)), wide(x, wide.prepare(made, None))
    assert head.dtype == torch.float32
    assert torch.equal(biased, (head + bias.float()).bfloat16())
    fused = LinearSiluMulInt8(DEVICE)
    assert torch.equal(fused(x, fused.prepare(made, bias)), torch.nn.functional.silu(biased[:, :5]) * biased[:, 5:])
