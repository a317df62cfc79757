"""The same sequences fed in every way at once: what a batch of the engine may look like."""

from __future__ import annotations

import torch

from xllm_core.testing.model_harness import Harness

LENGTH, PREFILL = 41, 29


def random_prompts() -> torch.Tensor:
    """[4, LENGTH] token ids below 128."""
    return torch.randint(0, 128, (4, LENGTH), generator=torch.Generator().manual_seed(3))


def logits_in_mixed_batches(harness: Harness, prompts: torch.Tensor) -> torch.Tensor:
    """Feed four sequences side by side: whole, in chunks of 8 and of 1, and whole then decoded. prompts: [4, LENGTH]; returns [4, LENGTH, vocab]."""
    logits: list[list[torch.Tensor]] = [[], [], [], []]
    tokens = prompts.tolist()
    done = [0, 0, 0, 0]
    sizes = [lambda at: LENGTH, lambda at: 8, lambda at: 1, lambda at: 1 if at else PREFILL]
    while min(done) < LENGTH:
        new = {row: tokens[row][at : at + sizes[row](at)] for row, at in enumerate(done) if at < LENGTH}
        for row, result in harness.step(new).items():
            logits[row].append(result)
            done[row] += len(result)
    return torch.stack([torch.cat(rows) for rows in logits])
