"""How long will a step take? A few coefficients over what it computes, fitted by least squares from steps that were measured.

After xLLM's time predictor (arXiv:2510.14686, section 3; `xllm/core/scheduler/profile/time_predictor.cpp`): there prefill and decode have a
formula each; here a step may hold both, so one formula over its sums serves all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from xllm_core.plugins.contracts.observer import StepRecord

_FREE_TOKENS = 8  # so many rows of a weight cost about as much as one: it has to come from memory anyway
_OUTLIER = 4.0  # times the median error: a step that something else on the machine disturbed
_MIN_SAMPLES = 32
_WINDOW = 1024
_REFIT_STEPS = 256


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step computes. num_rows: sequences. num_tokens: their new tokens. kv_tokens: positions whose KV is read, summed over rows.

    attended: pairs of a new token and a position it sees; for rows of one token the same as kv_tokens.
    """

    num_rows: int
    num_tokens: int
    kv_tokens: int
    attended: int

    @classmethod
    def of(cls, starts: Sequence[int], lengths: Sequence[int], num_tokens: int) -> StepShape:
        """Of a plan's columns. Rows of one token, which are nearly all, cost one sum."""
        kv_tokens = sum(starts) + num_tokens
        if num_tokens == len(starts):
            return cls(num_tokens, num_tokens, kv_tokens, kv_tokens)
        attended = sum(n * start + n * (n + 1) // 2 for start, n in zip(starts, lengths, strict=True))
        return cls(len(starts), num_tokens, kv_tokens, attended)


FEATURES = ("step", "row", "token", f"token beyond {_FREE_TOKENS}", "position read", "pair attended")


def _features(shape: StepShape) -> tuple[float, ...]:
    beyond = max(0, shape.num_tokens - _FREE_TOKENS)
    return (1.0, shape.num_rows, shape.num_tokens, beyond, shape.kv_tokens, shape.attended)


@dataclass(frozen=True, slots=True)
class StepTimePredictor:
    """seconds = sum of coefficient times feature. coefficients: seconds per `FEATURES`, none negative."""

    coefficients: tuple[float, ...]

    def predict(self, shape: StepShape) -> float:
        """Seconds that the worker needs for such a step."""
        return sum(c * f for c, f in zip(self.coefficients, _features(shape), strict=True))

    @classmethod
    def fit(cls, samples: Sequence[tuple[StepShape, float]]) -> StepTimePredictor:
        """Least squares of the relative error, twice: the second time without steps that are far off, which something else disturbed.

        Raises ValueError for no samples, or times that are not positive.
        """
        if not samples or min(seconds for _, seconds in samples) <= 0:
            raise ValueError(f"{len(samples)} samples; at least one is needed, and all must have taken some time")
        first = cls(_solve(samples))
        errors = [abs(first.predict(shape) / seconds - 1) for shape, seconds in samples]
        limit = _OUTLIER * max(median(errors), 0.01)
        kept = [sample for sample, error in zip(samples, errors, strict=True) if error <= limit]
        return cls(_solve(kept)) if kept else first


def _solve(samples: Sequence[tuple[StepShape, float]]) -> tuple[float, ...]:
    """Coefficients that are not negative: what would be is left out, the most negative first, and the rest solved again."""
    import numpy as np

    rows = np.array([[f / seconds for f in _features(shape)] for shape, seconds in samples])
    scale = np.abs(rows).max(axis=0)
    scale[scale == 0] = 1.0
    active = list(range(rows.shape[1]))
    found = np.zeros(rows.shape[1])
    while active:
        values = np.linalg.lstsq(rows[:, active] / scale[active], np.ones(len(rows)), rcond=None)[0]
        if values.min() >= 0:
            found[active] = values / scale[active]
            break
        del active[int(values.argmin())]
    return tuple(float(value) for value in found)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Of predictions for steps. mean_error_s: mean absolute error. share: mean absolute error relative to each step's time."""

    num_steps: int
    mean_error_s: float
    share: float

    @classmethod
    def of(cls, predictor: StepTimePredictor, samples: Sequence[tuple[StepShape, float]]) -> Accuracy:
        """Over samples that the predictor was not fitted to, if it is to mean anything."""
        errors = [(abs(predictor.predict(shape) - seconds), seconds) for shape, seconds in samples]
        count = max(1, len(errors))
        return cls(len(errors), sum(e for e, _ in errors) / count, sum(e / seconds for e, seconds in errors) / count)


def shape_of(record: StepRecord) -> StepShape:
    """Of a step that was recorded."""
    return StepShape(record.num_rows, record.num_tokens, record.kv_tokens, record.attended)


def seconds_of(record: StepRecord) -> float:
    """What the worker needed for it."""
    return record.prepare_s + record.forward_s + record.sample_s


class StepTimes:
    """Predicts while it serves: keeps the last steps, and fits again every so many. None until there are enough."""

    def __init__(self) -> None:
        self.predictor: StepTimePredictor | None = None
        self._samples: deque[tuple[StepShape, float]] = deque(maxlen=_WINDOW)
        self._num_new = 0

    def add(self, record: StepRecord) -> None:
        """Take a step in. Fitting takes some milliseconds, once in `_REFIT_STEPS` steps."""
        seconds = seconds_of(record)
        if not record.num_tokens or seconds <= 0:
            return
        self._samples.append((shape_of(record), seconds))
        self._num_new += 1
        if self._num_new >= (_REFIT_STEPS if self.predictor is not None else _MIN_SAMPLES):
            self.predictor = StepTimePredictor.fit(list(self._samples))
            self._num_new = 0

    def predict(self, shape: StepShape) -> float | None:
        """Seconds, or None while too few steps were seen."""
        return self.predictor.predict(shape) if self.predictor is not None else None
