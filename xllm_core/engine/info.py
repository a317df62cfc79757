"""Facts of a running engine, for people and front ends. Plain data that crosses processes; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xllm_core.engine.limits import AdmissionLimits

if TYPE_CHECKING:
    from xllm_core.engine.build import BuiltEngine
    from xllm_core.plugins.resolve import Assembly


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What is served, and how. capacity_tokens: the longest sequence its KV pool holds. kernels: what was chosen, by name of its use.

    num_blocks: over all KV groups. kv_tokens: tokens that the pool holds, all sequences together. is_row_invariant: the device promises
    that a row's result does not depend on the other rows, to the bit.
    """

    model: str
    architecture: str
    dtype: str
    device: str
    max_model_len: int
    vocab_size: int
    capacity_tokens: int
    num_blocks: int
    block_size: int
    max_num_seqs: int = 64
    uses_priority: bool = False
    kv_tokens: int = 0
    kernels: Mapping[str, str] = field(default_factory=dict)
    plan_hash: str = ""
    is_row_invariant: bool = False

    @property
    def admission(self) -> AdmissionLimits:
        """What can ever be served."""
        return AdmissionLimits(self.max_model_len, self.capacity_tokens, self.max_num_seqs, self.uses_priority)


def engine_info(assembly: Assembly, built: BuiltEngine) -> EngineInfo:
    """Gather the facts of an engine that was just built."""
    plan, scheduler, facts = assembly.plan, built.engine.scheduler, built.loaded.device.facts()
    kernels = {f"attention.{group}": choice.name for group, choice in plan.attention.items()}
    kernels |= {name: choice.name for name, choice in plan.ops.items()} | {"sampler": plan.sampler.name}
    limits = scheduler.admission
    return EngineInfo(
        model=str(plan.model_path), architecture=plan.architecture, dtype=plan.dtype, device=facts.name, max_model_len=plan.max_model_len,
        vocab_size=assembly.shape.vocab_size, capacity_tokens=limits.capacity_tokens, num_blocks=sum(built.geometry.num_blocks),
        block_size=plan.block_size, max_num_seqs=limits.max_num_seqs, uses_priority=limits.uses_priority,
        kv_tokens=min(built.geometry.num_blocks) * plan.block_size, kernels=kernels, plan_hash=plan.hash,
        is_row_invariant=facts.is_row_invariant,
    )  # fmt: skip
