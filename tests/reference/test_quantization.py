"""The formats "int8" and "gguf" and their ops: sums are exact, and the loss is the one that the format has."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from xllm_core.plugins import PackedTensor
from xllm_core.reference.device import ReferenceDevice
from xllm_core.reference.ops import (
    LinearBlocks,
    LinearInt8,
    LinearSiluMulBlocks,
    LinearSiluMulInt8,
    LmHeadBlocks,
    LmHeadInt8,
)
from xllm_core.reference.quantization import Gguf, Int8, block_rows, int8_rows

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


def packed(kind: str, *shape: int) -> tuple[PackedTensor, torch.Tensor]:
    """A random weight as the `gguf` package packs it, and what that package unpacks."""
    values = torch.randn(*shape).numpy()
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    blocks = torch.from_numpy(raw.view(np.uint8).copy()).view(shape[0], shape[1] // 32, -1)
    return PackedTensor(kind, blocks), torch.from_numpy(
        gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).copy()
    )


@pytest.mark.parametrize(
    "kinds", [("Q4_0",), ("Q4_1",), ("Q8_0",), ("Q4_1", "Q4_1", "Q4_1"), ("Q4_0", "Q4_1", "Q8_0"), ("Q8_0", "Q4_0")]
)
def test_blocks_mean_what_the_file_says(kinds: tuple[str, ...]) -> None:
    """Against the `gguf` package's own unpacking, alone, stacked, mixed. Killed by: halves exchanged, an offset forgotten, rows out of order."""
    torch.manual_seed(5)
    made = [packed(kind, rows, 96) for kind, rows in zip(kinds, (5, 3, 7), strict=False)]
    weight = Gguf().stack([tensor for tensor, _ in made])
    exact = torch.cat([values for _, values in made])
    x = torch.randint(-127, 128, (4, 96)).float()
    x[:, ::32] = 127  # steps of one: nothing is lost
    op = LmHeadBlocks(DEVICE)
    found = op(x, op.prepare(weight, None))
    assert torch.allclose(found.double(), x.double() @ exact.double().T, rtol=1e-5, atol=1e-4)
    assert weight[0].dtype == (torch.uint8 if set(kinds) <= {"Q4_0"} or set(kinds) <= {"Q4_1"} else torch.int8)
    assert len(weight) == (3 if "Q4_1" in kinds else 2)


def test_mixed_kinds_change_no_bit() -> None:
    """Rows of a stack of several kinds are those of each kind alone. Killed by: codes that lose something on their way to 8 bits."""
    torch.manual_seed(6)
    tensors = [packed(kind, 4, 64)[0] for kind in ("Q4_1", "Q8_0", "Q4_0")]
    op, x = LmHeadBlocks(DEVICE), torch.randn(3, 64)
    alone = [op(x, op.prepare(Gguf().stack([tensor]), None)) for tensor in tensors]
    assert torch.equal(op(x, op.prepare(Gguf().stack(tensors), None)), torch.cat(alone, 1))


def test_blocks_of_activations() -> None:
    """A step per 32, from the largest magnitude; halves to even; nothing stays nothing, and what is not finite is told where it is."""
    x = torch.zeros(2, 96)
    x[0, :5] = torch.tensor([127.0, -127.0, 0.5, 1.5, -2.5])
    x[0, 32], x[0, 64], x[1, 0], x[1, 40] = 254.0, 1e-38, float("inf"), 1.0
    values, steps = block_rows(x)
    assert values[0, 0, :5].tolist() == [127, -127, 0, 2, -2] and values[0, 1, 0] == 127
    assert steps[0].tolist() == [1, 2, 0] and bool(steps[1, 0].isnan()) and steps[1, 1] == pytest.approx(1 / 127)
    assert not bool(values[1, 0].any())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_the_loss_of_blocks_is_that_of_activations(kind: str) -> None:
    """Weights are taken as they are; x's step s adds s**2 / 12 per factor. Killed by: a step per row, which the large element here would spoil."""
    torch.manual_seed(7)
    tensor, exact = packed(kind, 256, 576)
    x = torch.randn(32, 576)
    x[:, 0] = 60
    op = LmHeadBlocks(DEVICE)
    error = op(x, op.prepare(Gguf().stack([tensor]), None)).double() - x.double() @ exact.double().T
    steps = x.double().view(32, 18, 32).abs().amax(2) / 127
    noise = (steps.square() / 12).repeat_interleave(32, 1) @ exact.double().square().T
    assert float((error.square() / noise).mean()) == pytest.approx(31 / 32, abs=0.1)  # the largest of a block is met


def test_the_fusion_of_blocks() -> None:
    """It is the two ops; the bias is added before."""
    torch.manual_seed(8)
    weight, x, bias = (
        Gguf().stack([packed("Q4_1", 10, 64)[0]]),
        torch.randn(4, 64).bfloat16(),
        torch.randn(10).bfloat16(),
    )
    plain, wide, fused = LinearBlocks(DEVICE), LmHeadBlocks(DEVICE), LinearSiluMulBlocks(DEVICE)
    biased = plain(x, plain.prepare(weight, bias))
    assert torch.equal(biased, (wide(x, wide.prepare(weight, None)) + bias.float()).bfloat16())
    assert torch.equal(fused(x, fused.prepare(weight, bias)), torch.nn.functional.silu(biased[:, :5]) * biased[:, 5:])
