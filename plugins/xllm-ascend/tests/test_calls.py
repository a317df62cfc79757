"""Every call of ours against torch_npu itself: its schemas, its meta kernels, its host code, and the kernel of CANN that it launches."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_npu
import xllm_ascend
from xllm_ascend.attention import FusedInferAttention
from xllm_ascend.device import NpuDevice
from xllm_ascend.fused import AddRmsNorm, KvWrite, RmsNorm, Rope, SiluMul
from xllm_ascend.plain import BlockCopy, Embedding, Linear
from xllm_ascend_soft.activate import launched

from xllm_core.plugins import AttentionGeometry, BatchLayout, KVSegments

GEOMETRY = AttentionGeometry(num_heads=4, num_kv_heads=2, head_size=64, scale=0.125, block_size=128, dtype="bfloat16")
BF16 = torch.bfloat16
Make = Callable[..., torch.Tensor]


class MetaDevice(NpuDevice):
    """Its tensors have shapes and no bytes."""

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """The shape."""
        return host.to("meta")


def norm(device: NpuDevice, make: Make) -> Any:
    """One of the calls below: returns what the op returns."""
    return RmsNorm(device)(make(7, 3, 64), make(64), 1e-6)


def add_norm(device: NpuDevice, make: Make) -> Any:
    """As `norm`."""
    return AddRmsNorm(device)(make(7, 64), make(7, 64), make(64), 1e-6)


def rope(device: NpuDevice, make: Make) -> Any:
    """As `norm`."""
    return Rope(device)(make(7, 4, 64), make(7, 2, 64), make(7, 64), make(7, 64))


def partial_rope(device: NpuDevice, make: Make) -> Any:
    """As `norm`."""
    return Rope(device)(make(7, 4, 64), make(7, 2, 64), make(7, 32), make(7, 32))


def swiglu(device: NpuDevice, make: Make) -> Any:
    """As `norm`."""
    return SiluMul(device)(make(7, 64))


def write(device: NpuDevice, make: Make) -> Any:
    """As `norm`."""
    return KvWrite(device)(
        (make(7, 2, 64),) * 2, (make(3, 128, 2, 64), make(3, 128, 2, 64)), make(7, dtype=torch.int64)
    )


def product(device: NpuDevice, make: Make) -> Any:
    """As `norm`."""
    op = Linear(device)
    return op(make(7, 64), op.prepare(make(48, 64), None))


def look_up(device: NpuDevice, make: Make) -> Any:
    """As `norm`."""
    return Embedding(device)(make(7, dtype=torch.int64), make(50, 64))


def copy_blocks(device: NpuDevice, make: Make) -> Any:
    """As `norm`."""
    return BlockCopy(device)((make(3, 128, 2, 64),), make(2, dtype=torch.int64), make(2, dtype=torch.int64))


def attend(device: NpuDevice, make: Make, geometry: AttentionGeometry = GEOMETRY) -> Any:
    """Decode, a chunk and a prompt in one call."""
    lens = [torch.tensor(values, dtype=torch.int32) for values in ([1, 5, 3], [200, 130, 3], [0, 1, 6, 9])]
    tables = torch.tensor([[2, 0], [1, 3], [4, -1]], dtype=torch.int32)
    kernel = FusedInferAttention(device, geometry)
    out, cache = make(9, 4, 64), make(5, 128, 2, 64)
    kernel.run(make(9, 4, 64), KVSegments(own=(cache, cache)), kernel.plan(BatchLayout(*lens, tables)), out)
    return out


SHAPES: dict[Callable[..., Any], list[tuple[int, ...]]] = {
    norm: [(7, 3, 64)], add_norm: [(7, 64), (7, 64)], rope: [(7, 4, 64), (7, 2, 64)], partial_rope: [(7, 4, 64), (7, 2, 64)],
    swiglu: [(7, 32)], write: [], product: [(7, 48)], look_up: [(7, 64)], copy_blocks: [], attend: [(9, 4, 64)],
}  # fmt: skip
KERNELS: dict[Callable[..., Any], list[str]] = {
    norm: ["aclnnRmsNorm"],
    add_norm: ["aclnnAddRmsNorm"],
    rope: ["aclnnRotaryPositionEmbeddingV2"] * 2,
    partial_rope: ["aclnnRotaryPositionEmbeddingV2"] * 2,
    swiglu: ["aclnnSwiGlu"],
    write: ["aclnnScatterPaKvCache"],
    attend: ["aclnnFusedInferAttentionScoreV2"],
}


def named(values: list[Any]) -> dict[str, Any]:
    """For parametrize."""
    return {"argvalues": values, "ids": [function.__name__ for function in values]}


def on(device: str) -> Make:
    """Makes zeros there, in bfloat16 unless told otherwise."""
    return lambda *shape, dtype=BF16: torch.zeros(shape, dtype=dtype, device=device)


def flat(answer: Any) -> list[torch.Tensor]:
    """The tensors of an answer."""
    return [answer] if isinstance(answer, torch.Tensor) else list(answer or ())


@pytest.mark.parametrize("call", **named(list(SHAPES)))
@pytest.mark.parametrize("place", ["meta", "npu"])
def test_shapes_and_dtypes_are_torch_npu_s(call: Callable[..., Any], place: str) -> None:
    """By its meta kernels and by its host code, which allocates outputs. Killed by: a renamed keyword, a wrong layout, a wrong number of axes."""
    device = MetaDevice() if place == "meta" else NpuDevice()
    answer = flat(call(device, on(place)))
    assert [tuple(tensor.shape) for tensor in answer] == SHAPES[call]
    assert {(tensor.dtype, tensor.device.type) for tensor in answer} <= {(BF16, place)}


@pytest.mark.parametrize("call", **named(list(KERNELS)))
def test_the_kernel_of_cann_is_the_one_that_is_meant(call: Callable[..., Any]) -> None:
    """Its name, as torch_npu looks it up. Killed by: another operator, or one that falls back to a chain of small ones."""
    call(NpuDevice(), on("npu"))
    launched()
    call(NpuDevice(), on("npu"))
    assert launched() == KERNELS[call]


def test_nothing_of_torch_npu_is_called_unseen() -> None:
    """Every `torch_npu.npu_...` in the sources is an operator with a schema, and one of the calls above reaches it. Killed by: a new call
    without a line here.
    """
    called = set()
    for path in Path(xllm_ascend.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch_npu":
                called.add(node.attr)
    called.discard("__version__")
    known = {
        schema.name.removeprefix("npu::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("npu::")
    }
    assert called <= known
    assert called == {
        "npu_rms_norm", "npu_add_rms_norm", "npu_rotary_mul", "npu_swiglu", "npu_scatter_pa_kv_cache", "npu_fused_infer_attention_score",
    }  # fmt: skip


def test_torch_npu_refuses_what_it_does_not_know() -> None:
    """Its schema, and its check of layouts, are the real ones. Killed by: a stand-in for torch_npu."""
    query, cache = on("npu")(3, 4, 64), on("npu")(5, 128, 128)
    wanted = {"num_heads": 4, "num_key_value_heads": 2, "actual_seq_lengths": [3], "actual_seq_lengths_kv": [3]}
    with pytest.raises(RuntimeError, match="Unknown keyword argument 'num_kv_heads'"):
        torch_npu.npu_fused_infer_attention_score(query, cache, cache, input_layout="TND", num_kv_heads=2)
    with pytest.raises(RuntimeError, match="layout only support BSH, BSND, TND"):
        torch_npu.npu_fused_infer_attention_score(query, cache, cache, input_layout="TDN", **wanted)
    with pytest.raises(RuntimeError, match="Layout TDN is not supported"):
        torch_npu.npu_fused_infer_attention_score(
            *(tensor.to("meta") for tensor in (query, cache, cache)), input_layout="TDN", **wanted
        )


def test_what_the_operator_cannot_do_is_refused_before() -> None:
    """Killed by: a check that was forgotten; CANN would refuse in the first step."""
    from dataclasses import replace

    from xllm_ascend.limits import check_attention

    from xllm_core.plugins import AttentionQuery

    def reason(**changes: Any) -> str | None:
        return check_attention(AttentionQuery(device_kind="npu", geometry=replace(GEOMETRY, **changes)))

    assert reason() is None and reason(head_size=256) is None
    assert "head_size 40" in str(reason(head_size=40)) and "head_size 512" in str(reason(head_size=512))
    assert "head_size 80" in str(reason(num_kv_heads=4, head_size=80)) and reason(num_kv_heads=4, head_size=128) is None
    assert "128 heads share" in str(reason(num_heads=128, num_kv_heads=1))
    assert "512 heads" in str(reason(num_heads=512, num_kv_heads=8))
    assert "65536" in str(reason(num_heads=256, num_kv_heads=256, head_size=256, block_size=128))
