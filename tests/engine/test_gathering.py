"""What an idle engine waits for company follows from what is there to compute, not from what was computed last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from xllm_core.engine.gathering import num_tokens_waiting, patience_s
from xllm_core.testing.engine_rig import BLOCK, Rig, request

MakeRig = Callable[..., Rig]
LONG = [1 + i % 90 for i in range(32)]


def after(rig: Rig, prompt: list[int], seconds: float) -> None:
    """Let the last step that computed something be that of a prompt, and have taken so long."""
    rig.run([request("before", prompt, max_tokens=1)])
    records = rig.engine.step_log.records
    at = max(i for i, record in enumerate(records) if record.num_tokens)
    assert records[at].num_tokens == len(prompt), "the prompt was not computed in one step"
    records[at] = replace(records[at], prepare_s=0.0, forward_s=seconds, sample_s=0.0)


def test_nothing_ran_yet(make_rig: MakeRig) -> None:
    """There is no step to compare with."""
    rig = make_rig()
    rig.engine.submit(request("a", LONG))
    assert patience_s(rig.engine) == 0.0


def test_a_known_prefix_is_not_waited_for(make_rig: MakeRig) -> None:
    """Behind a long prompt: the whole share for another as long, a part of it for one whose prefix is there."""
    rig = make_rig()
    after(rig, LONG, 0.2)
    own = 2
    rig.engine.submit(request("b", [*LONG[:-BLOCK], *[95] * own]))
    assert patience_s(rig.engine) == pytest.approx(0.02 * 0.2 * own / len(LONG))
    rig.engine.submit(request("c", [96] * len(LONG)))
    assert patience_s(rig.engine) == pytest.approx(0.02 * 0.2), "no longer than the last step, however much is there"


def test_it_ends_somewhere(make_rig: MakeRig) -> None:
    """A step of minutes is no reason to wait for seconds."""
    rig = make_rig()
    after(rig, LONG, 200.0)
    rig.engine.submit(request("b", [96] * len(LONG)))
    assert patience_s(rig.engine) == 0.02


@pytest.mark.parametrize("has_store", [False, True])
def test_looking_changes_nothing(make_rig: MakeRig, has_store: bool) -> None:
    """What was counted is what is computed, and tokens come out as without a look; a store is not asked for what is counted."""
    prompts = {"b": [*LONG[:20], 95, 94], "c": [93] * 9}
    said = []
    for looks in (False, True):
        rig = make_rig(has_store=has_store, max_num_batched_tokens=64)
        after(rig, LONG, 0.2)
        before = len(rig.engine.step_log.records)
        for name, prompt in prompts.items():
            rig.engine.submit(request(name, prompt, max_tokens=3))
        if looks:
            assert num_tokens_waiting(rig.engine.scheduler, 1000) == 2 + 9
            assert num_tokens_waiting(rig.engine.scheduler, 5) == 5
        said.append(rig.run([]))
        assert max(record.num_tokens for record in list(rig.engine.step_log.records)[before:]) == 2 + 9
    assert said[0] == said[1]
