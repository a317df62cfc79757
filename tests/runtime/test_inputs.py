"""From a plan to the tensors of a forward: every kind of row, and the short cut that steady decoding takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xllm_core.plugins.contracts.kv import KVGroupSpec
from xllm_core.reference.device import ReferenceDevice
from xllm_core.runtime.inputs import InputBuffers, ResidentInputs, StepInputs
from xllm_core.types import StepPlan

BLOCK = 4
GROUPS = (
    KVGroupSpec("full", "full", (0,), ()),
    KVGroupSpec("state", "recurrent", (1,), ()),
)


def buffers() -> InputBuffers:
    """Four slots; block j of slot s is 10 s + j in the one group, state s + 70 in the other."""
    made = InputBuffers(ReferenceDevice(0), GROUPS, num_slots=4, max_model_len=16, block_size=BLOCK)
    made.write_tables([(0, slot, 0, [10 * slot + j for j in range(5)]) for slot in range(4)])
    made.write_tables([(1, slot, 0, [70 + slot]) for slot in range(4)])
    return made


def gathered(plan: StepPlan, previous: list[int] | None = None) -> StepInputs:
    plan.num_tokens = sum(plan.lengths)
    return buffers().gather(plan, torch.tensor(previous or [], dtype=torch.int64), previous or [])


def test_rows_of_any_length() -> None:
    """A prompt of three, a token that was sampled before, and a token that is known: each at its own place."""
    plan = StepPlan(
        1, slots=[2, 0, 3], starts=[0, 5, 9], lengths=[3, 1, 1], prev_rows=[-1, 1, -1], token_ids=[41, 42, 43, 44]
    )
    found = gathered(plan, previous=[91, 92])
    assert found.token_ids.tolist() == [41, 42, 43, 92, 44]
    assert found.positions.tolist() == [0, 1, 2, 5, 9]
    assert found.kv_slots["full"].tolist() == [80, 81, 82, 1 * BLOCK + 1, 32 * BLOCK + 1]
    assert found.kv_slots["state"].tolist() == [72, 72, 72, 70, 73]
    layout = found.layouts["full"]
    assert layout.query_lens.tolist() == [3, 1, 1] and layout.kv_lens.tolist() == [3, 6, 10]
    assert layout.query_starts.tolist() == found.row_starts.tolist() == [0, 3, 4, 5]
    assert layout.block_tables.tolist() == [[20, 21, 22], [0, 1, 2], [30, 31, 32]]


@pytest.mark.parametrize(
    ("prev_rows", "token_ids", "expected"),
    [
        ([0, 1, 2], [], [91, 92, 93]),
        ([2, 0, 1], [], [93, 91, 92]),
        ([0, 1, -1], [55], [91, 92, 55]),
        ([-1, -1, -1], [5, 6, 7], [5, 6, 7]),
    ],
)
def test_one_token_a_row(prev_rows: list[int], token_ids: list[int], expected: list[int]) -> None:
    """All go on where they were, some changed places, one came in. Killed by: the short cut taken for rows in another order."""
    plan = StepPlan(1, slots=[3, 1, 0], starts=[7, 0, 12], lengths=[1, 1, 1], prev_rows=prev_rows, token_ids=token_ids)
    found = gathered(plan, previous=[91, 92, 93])
    assert found.token_ids.tolist() == expected
    assert found.positions.tolist() == [7, 0, 12]
    assert found.kv_slots["full"].tolist() == [31 * BLOCK + 3, 10 * BLOCK, 3 * BLOCK]
    layout = found.layouts["full"]
    assert layout.query_lens.tolist() == [1, 1, 1] and layout.kv_lens.tolist() == [8, 1, 13]
    assert layout.query_starts.tolist() == [0, 1, 2, 3] and found.row_starts.dtype == np.int32


def test_fewer_rows_than_were_sampled() -> None:
    """The first of two goes on alone. Killed by: every token that was sampled taken for this step's."""
    found = gathered(StepPlan(1, slots=[3], starts=[7], lengths=[1], prev_rows=[0]), previous=[91, 92])
    assert found.token_ids.tolist() == [91]


def step(starts: list[int], sampled: list[int]) -> StepPlan:
    """Slots 3, 1 and 0 at these positions, each going on with what it was sampled."""
    return StepPlan(
        1, slots=[3, 1, 0], starts=starts, lengths=[1] * 3, prev_rows=list(range(len(sampled))), num_tokens=3
    )


def resident() -> ResidentInputs:
    """Room for five rows, full of something else."""
    token_ids, positions, full, state = (torch.full((5,), -7, dtype=torch.int64) for _ in range(4))
    return ResidentInputs(token_ids, positions, {"state": state, "full": full})


@pytest.mark.parametrize("is_resident", [False, True])
def test_steps_that_follow_each_other_are_those_that_would_be_gathered(is_resident: bool) -> None:
    """Nine positions: rows begin blocks, tables change beside and outside what the step has of them, and become wider.

    Killed by: a row that begins a block where the last one ended, a table write that the step at hand does not see, one that is seen in another row,
    and tables that stay as narrow as they were.
    """
    made = buffers()
    made.resident = resident() if is_resident else None
    starts, sampled = [5, 2, 0], [11, 12, 13]
    made.gather(step(starts, sampled), torch.tensor(sampled), sampled)
    for i in range(9):
        if (
            i == 3
        ):  # slot 1 gets another block where it is now, slot 2 has no row, and slot 0 gets one that it reaches later
            made.write_tables([(0, 1, 1, [600]), (0, 2, 1, [700]), (0, 0, 2, [800, 801])])
        starts, sampled = [start + 1 for start in starts], [token + 10 for token in sampled]
        found = made.gather(step(starts, sampled), torch.tensor(sampled), sampled)
        afresh = buffers()
        if i >= 3:
            afresh.write_tables([(0, 1, 1, [600]), (0, 2, 1, [700]), (0, 0, 2, [800, 801])])
        wanted = afresh.gather(step(starts, sampled), torch.tensor(sampled), sampled)
        assert found.is_resident == is_resident
        assert found.token_ids.tolist() == wanted.token_ids.tolist() == sampled
        assert found.positions.tolist() == wanted.positions.tolist() == starts
        assert {name: slots.tolist() for name, slots in found.kv_slots.items()} == {
            name: slots.tolist() for name, slots in wanted.kv_slots.items()
        }
        for name, layout in wanted.layouts.items():
            same, width = found.layouts[name], layout.block_tables.shape[1]
            assert same.kv_lens.tolist() == layout.kv_lens.tolist()
            assert same.query_starts.tolist() == layout.query_starts.tolist()
            assert same.block_tables[:, :width].tolist() == layout.block_tables.tolist()


def test_other_rows_are_gathered_anew() -> None:
    """Places changed, a row gone, a token that is known: none is the successor of what was there. Killed by: any of the three taken for it."""
    for plan, wanted in [
        (StepPlan(1, slots=[1, 3, 0], starts=[3, 6, 1], lengths=[1] * 3, prev_rows=[1, 0, 2], num_tokens=3), [3, 6, 1]),
        (StepPlan(1, slots=[3, 0], starts=[6, 1], lengths=[1] * 2, prev_rows=[0, 2], num_tokens=2), [6, 1]),
        (
            StepPlan(
                1, slots=[3, 1, 0], starts=[6, 0, 1], lengths=[1] * 3, prev_rows=[0, -1, 2], token_ids=[5], num_tokens=3
            ),
            [6, 0, 1],
        ),
    ]:
        made = buffers()
        made.gather(step([5, 2, 0], [1, 2, 3]), torch.tensor([1, 2, 3]), [1, 2, 3])
        assert made.gather(plan, torch.tensor([1, 2, 3]), [1, 2, 3]).positions.tolist() == wanted


def test_a_state_that_moves_is_seen() -> None:
    """A recurrent group's table changes between two steps. Killed by: the slots of the step before kept."""
    made = buffers()
    made.gather(step([5, 2, 0], [1, 2, 3]), torch.tensor([1, 2, 3]), [1, 2, 3])
    made.write_tables([(1, 1, 0, [99])])
    found = made.gather(step([6, 3, 1], [1, 2, 3]), torch.tensor([1, 2, 3]), [1, 2, 3])
    assert found.kv_slots["state"].tolist() == [73, 99, 70]


def test_what_is_behind_the_rows_is_not_taken_for_empty() -> None:
    """Three rows lie where graphs read, over what was filled behind two. Killed by: the third left in the bucket of the next two."""
    made = buffers()
    made.resident = resident()
    made.resident.filled = (2, 4)
    made.gather(step([5, 2, 0], [1, 2, 3]), torch.tensor([1, 2, 3]), [1, 2, 3])
    assert made.resident.filled == (0, 0)
