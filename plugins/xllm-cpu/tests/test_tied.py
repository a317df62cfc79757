"""A tied embedding reads what the head has packed: to the bit, and one table is held."""

from __future__ import annotations

import weakref

import pytest
import torch
from xllm_cpu.device import CpuDevice
from xllm_cpu.ops import Embedding, LmHead

from xllm_core.runtime.parts import CoreParts


@pytest.mark.parametrize(("vocab", "size"), [(37, 33), (64, 576), (1, 1)])
def test_rows_come_back_as_they_were(device: CpuDevice, dtype: torch.dtype, vocab: int, size: int) -> None:
    """Of every panel and lane, the last, which is not full, too. Dies with a wrong lane, step or pair."""
    table = torch.randn(vocab, size).to(dtype)
    head = LmHead(device)
    ids = torch.cat((torch.arange(vocab), torch.tensor([vocab - 1, 0])))
    assert torch.equal(head.rows(ids, head.prepare(table, None)), table[ids])


@pytest.mark.parametrize("bad", [-1, 37])
def test_an_id_outside_the_table(device: CpuDevice, bad: int) -> None:
    """Never a read beside it."""
    head = LmHead(device)
    with pytest.raises(IndexError, match=f"token id {bad} at 1 is outside 0 .. 36"):
        head.rows(torch.tensor([0, bad]), head.prepare(torch.randn(37, 8), None))


def test_one_table_is_held(device: CpuDevice, dtype: torch.dtype) -> None:
    """Dies where the embedding keeps its own: of a small model with many tokens that is a fifth of all weights."""
    parts = CoreParts(device, dtype, {"embedding": Embedding(device), "lm_head": LmHead(device), "linear": None}, {})
    embed = parts.embedding("tokens", 37, 32)
    head = parts.lm_head("head", 32, 37, tied_to="tokens")
    table = parts.parameters["tokens.weight"].tensor
    assert table is not None
    expected = table.copy_(torch.randn(37, 32)).clone()
    seen = weakref.ref(table)
    del table
    parts.finish()
    assert seen() is None, "the unpacked table is still there"
    assert torch.equal(embed(torch.tensor([36, 0, 5])), expected[[36, 0, 5]])
    assert torch.allclose(head(expected[:2]), expected[:2].float() @ expected.float().T, atol=1e-2)
    assert not parts.handed_out(), "it would be kept on disk twice"
