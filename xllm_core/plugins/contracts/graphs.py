"""Replaying forwards: what a device and its kernels offer so that a small step costs one call instead of hundreds.

A device that has `capture` is a `GraphDevice`, an attention kernel that has `graph_plan` and `refill` a `GraphKernel`. Where one of them is not,
or a model does what cannot be recorded, steps run as they always did.
What is recorded is a step of up to so many rows of one token each, or so many tokens in all where the kernel has `refill_ragged`; tensors made
meanwhile belong to the graph and keep their places. The state machine that decides when to record and when to replay is the core's
(`runtime.graphs`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from xllm_core.errors import XllmError
from xllm_core.plugins.contracts.attention import AttentionKernel
from xllm_core.plugins.contracts.device import DeviceBackend

if TYPE_CHECKING:
    import torch

    from xllm_core.plugins.contracts.attention import BatchLayout


class NotCapturableError(XllmError):
    """A forward does what the device cannot record; the message names it. What the forward has computed counts for nothing."""


class Graph(Protocol):
    """A forward over tensors at fixed places. num_ops: calls that a replay makes. arena_bytes: what it needs of the memory that all graphs share."""

    num_ops: int
    arena_bytes: int

    def replay(self, num_rows: int) -> None:
        """Run again for the first `num_rows` rows of the inputs. Rows behind them are padding: computed or not, nobody reads them.

        Raises IndexError for a token, slot or block that is not there, as the ops do.
        """


@runtime_checkable
class GraphDevice(DeviceBackend, Protocol):
    """A `DeviceBackend` that can record."""

    def capture(self, run: Callable[[], torch.Tensor], max_rows: int) -> tuple[Graph, torch.Tensor]:
        """Record `run`, for steps of `max_rows` rows; return the graph, and what `run` returned: the results of this step, until the next replay.

        `run` may be called several times, e.g. to compile what it needs: it does the same each time. Memory of results is shared by all graphs of
        the device: read them before the next replay. Raises NotCapturableError.
        """


@runtime_checkable
class GraphKernel(AttentionKernel, Protocol):
    """An `AttentionKernel` whose plans can stay in place."""

    def graph_plan(self, max_rows: int, max_blocks: int) -> Any:
        """A plan for steps of up to `max_rows` rows of one token, with up to `max_blocks` blocks each."""

    def refill(self, plan: Any, batch: BatchLayout) -> None:
        """Lay out a step in a plan of `graph_plan`, where it is. Rows of the plan behind those of the batch are padding."""


@runtime_checkable
class RaggedGraphKernel(GraphKernel, Protocol):
    """A `GraphKernel` whose plans take rows of any length as well: prompts, and decoding beside them."""

    def refill_ragged(self, plan: Any, batch: BatchLayout) -> None:
        """As `refill`, for up to `max_rows` new tokens in all, however many each row has."""
