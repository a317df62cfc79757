"""The row of `xllm verify` for the store that is chosen, and that a wrong block turns it red."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from xllm_mooncake.mover import MooncakeMover

from xllm_core.testing.verify import Scale, Verifier

from .real_master import Master

ROW = "plugin's store"


def verifier(model: str, master: Master, block_size: int = 4) -> Verifier:
    """One that offloads into the store and brings back. Another size of block finds nothing of what the others left, nor waits for it to go."""
    settings: dict[str, Any] = {"use": {"kv_store": "mooncake/store"}, "plugin": {"mooncake": dict(master.settings)}}
    return Verifier(model, scale=Scale((1, 17, 33, 70), 12), num_blocks=128, block_size=block_size, **settings)


def test_the_row(model: str, master: Master, monkeypatch: pytest.MonkeyPatch) -> None:
    """Identical and active; with the blocks of a value interchanged it is neither."""
    report = verifier(model, master).run(only=[ROW])
    assert report.has_passed and report.rows[0].activity > 0, report.rows
    write = MooncakeMover._write

    def wrong(self: MooncakeMover, entry: Any, value: Sequence[torch.Tensor]) -> None:
        write(self, entry, [data.roll(64) for data in value])

    monkeypatch.setattr(MooncakeMover, "_write", wrong)
    report = verifier(model, master, block_size=8).run(only=[ROW])
    assert not report.has_passed and report.rows[0].differences, report.rows
