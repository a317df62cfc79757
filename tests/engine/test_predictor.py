"""Times of steps: what is counted of a plan, what a fit recovers, what it says of steps it never saw, and who is told."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from xllm_core.engine.policy import Fcfs
from xllm_core.engine.predictor import FEATURES, Accuracy, StepShape, StepTimePredictor, StepTimes, shape_of
from xllm_core.plugins.contracts.observer import StepRecord
from xllm_core.plugins.contracts.scheduler import SequenceView
from xllm_core.testing.engine_rig import Rig, request
from xllm_core.testing.fakes import ChecksumWorker, FakeHandle
from xllm_core.types import StepPlan

TRUE = StepTimePredictor((3e-3, 2e-5, 1e-5, 4e-4, 2e-7, 5e-9))


def random_shapes(count: int, seed: int) -> list[StepShape]:
    """Decode and prompts, alone and mixed."""
    chance = random.Random(seed)
    shapes = []
    for _ in range(count):
        lengths = [1] * chance.randint(0, 48) + [chance.randint(2, 700) for _ in range(chance.choice((0, 0, 1, 2)))]
        lengths = lengths or [1]
        starts = [chance.randint(0, 2000) for _ in lengths]
        shapes.append(StepShape.of(starts, lengths, sum(lengths)))
    return shapes


def noisy(shapes: Sequence[StepShape], seed: int, noise: float = 0.03) -> list[tuple[StepShape, float]]:
    chance = random.Random(seed)
    return [(shape, TRUE.predict(shape) * (1 + chance.gauss(0, noise))) for shape in shapes]


def test_a_shape_counts_what_is_seen() -> None:
    """Against counting pairs one by one. Mutation: the last position left out, or prompts counted as decode."""
    chance = random.Random(0)
    for lengths in ([1, 1, 1], [5, 1], [7], [3, 1, 1, 9]):
        starts = [chance.randint(0, 50) for _ in lengths]
        seen = [position + 1 for start, n in zip(starts, lengths, strict=True) for position in range(start, start + n)]
        kv_tokens = sum(start + n for start, n in zip(starts, lengths, strict=True))
        assert StepShape.of(starts, lengths, sum(lengths)) == StepShape(
            len(lengths), sum(lengths), kv_tokens, sum(seen)
        )


def test_a_fit_tells_steps_that_it_never_saw() -> None:
    """Within the noise, though one step in five was disturbed and took more than twice as long. Mutation: no second fit without outliers."""
    fitted = noisy(random_shapes(300, 1), 2)
    disturbed = [(s, t * 2.5 if i % 5 == 0 else t) for i, (s, t) in enumerate(fitted)]
    predictor = StepTimePredictor.fit(disturbed)
    held_out = noisy(random_shapes(300, 3), 4)
    assert Accuracy.of(predictor, held_out).share < 0.05
    assert min(predictor.coefficients) >= 0 and len(predictor.coefficients) == len(FEATURES)


def test_no_coefficient_is_negative() -> None:
    """Times that fall with the context would give one: a longer step must never be predicted to be shorter."""
    shapes = random_shapes(200, 5)
    samples = [(shape, 0.05 - 1e-7 * shape.kv_tokens) for shape in shapes]
    assert min(StepTimePredictor.fit(samples).coefficients) >= 0


@pytest.mark.parametrize("samples", [[], [(StepShape(1, 1, 1, 1), 0.0)]])
def test_what_cannot_be_fitted_is_refused(samples: list[tuple[StepShape, float]]) -> None:
    with pytest.raises(ValueError, match="samples"):
        StepTimePredictor.fit(samples)


def test_a_machine_that_gets_slower_is_noticed() -> None:
    """The old steps fall out of the window. Mutation: no refit after the first."""
    times = StepTimes()
    base = StepRecord(0, 0.0, 0, 0, 0, 0, 0, 0.0, 0, 0, 0, 0, 0, 0, 0)
    for factor, count in ((1.0, 40), (3.0, 1500)):
        for i, shape in enumerate(random_shapes(count, 7)):
            record = replace(
                base, step=i, forward_s=TRUE.predict(shape) * factor, num_rows=shape.num_rows, num_tokens=shape.num_tokens,
                kv_tokens=shape.kv_tokens, attended=shape.attended,
            )  # fmt: skip
            assert shape_of(record) == shape
            assert (times.predictor is None) == (factor == 1.0 and i < 32)
            times.add(record)
        probe = random_shapes(1, 9)[0]
        assert times.predict(probe) == pytest.approx(TRUE.predict(probe) * factor, rel=0.02)


class Listening(Fcfs):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, float | None]] = []

    def chunk(self, view: SequenceView, budget_tokens: int) -> int:
        self.told.append((view.todo_tokens, view.predicted_step_s))
        return super().chunk(view, budget_tokens)


class Asking(Listening):
    uses_step_times = True


class TimedWorker(ChecksumWorker):
    """Its forwards take as long as the formula says, though nobody waits."""

    def execute(self, plan: StepPlan) -> FakeHandle:
        handle = super().execute(plan)
        handle.times.forward_s = TRUE.predict(StepShape.of(plan.starts, plan.lengths, plan.num_tokens))
        return handle


@pytest.mark.parametrize("policy", [Listening(), Asking()])
def test_policies_that_ask_are_told(make_rig: Callable[..., Rig], policy: Listening) -> None:
    """After enough steps, what such steps took. Mutation: views without the time, or fitting for nobody."""
    rig = make_rig(policy=policy, worker_type=TimedWorker)
    for i, length in enumerate([3, 9, 17, 30] * 4):
        rig.run([request(f"r{i}", range(length), max_tokens=6)])
    last = dict(policy.told[-4:])
    if isinstance(policy, Asking):
        assert policy.told[0][1] is None
        for length, told in last.items():
            assert told == pytest.approx(TRUE.predict(StepShape.of([0], [length], length)), rel=0.1)
    else:
        assert rig.engine.scheduler.step_times is None and {time for _, time in policy.told} == {None}
