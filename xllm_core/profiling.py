"""Steps of many shapes, measured in process, and how well a formula fitted to half of them tells the time of the other half."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from xllm_core.benchmark import engine_of
from xllm_core.engine.predictor import Accuracy, StepShape, StepTimePredictor, seconds_of, shape_of
from xllm_core.errors import InvalidRequestError
from xllm_core.frontend.processor import Processor
from xllm_core.types import EngineRequest, SamplingParams

_DECODE_STEPS = 8
_LEAST_CONTEXT = 16
_LONGEST = 2048

Samples = list[tuple[StepShape, float]]


@dataclass(frozen=True, slots=True)
class Case:
    """Requests that come at once. prefix_len: leading prompt tokens that are in the cache already; output_len: steps of decode after it."""

    num_requests: int
    prefix_len: int
    input_len: int
    output_len: int


@dataclass(frozen=True, slots=True)
class Profile:
    """A predictor, and its error on cases that it was not fitted to: of all steps, of those with a prompt in them, and of the rest."""

    predictor: StepTimePredictor
    num_fitted: int
    held_out: Accuracy
    prefill: Accuracy
    decode: Accuracy


def cases(max_model_len: int, max_num_seqs: int, max_tokens: int, kv_tokens: int) -> list[Case]:
    """Prompts alone, after prefixes, and together; decode at several batches and contexts. max_tokens: of a step. kv_tokens: room."""
    longest = min(max_model_len - _DECODE_STEPS - 1, _LONGEST)
    lengths = [n for m in (_LEAST_CONTEXT, _LEAST_CONTEXT * 3 // 2) for n in _geometric(m, longest, 2)]
    found = [Case(1, 0, length, 1) for length in sorted(lengths)]
    for prefix in _geometric(256, longest, 2):
        found += [Case(1, prefix, length, 1) for length in _geometric(32, longest - prefix, 4)]
    for count in [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if n <= max_num_seqs]:
        for context in _geometric(_LEAST_CONTEXT, longest, 4):
            room = count * (context + _DECODE_STEPS + 16)
            if room <= kv_tokens and count * context <= 2 * max_tokens:
                found.append(Case(count, 0, context, _DECODE_STEPS))
    return found


def _geometric(first: int, last: int, ratio: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= ratio


def measure(processor: Processor, *, num_runs: int, seed: int = 0, show: bool | None = None) -> tuple[Samples, Samples]:
    """Run every case `num_runs` times; the steps of a random half of the cases, and those of the other half.

    Raises InvalidRequestError where the engine is too small for cases of any use.
    """
    info = processor.client.info()
    todo = cases(
        info.max_model_len,
        info.max_num_seqs,
        engine_of(processor).scheduler.limits.max_num_batched_tokens,
        info.kv_tokens,
    )
    if len(todo) < 8:
        raise InvalidRequestError(
            f"max_model_len = {info.max_model_len} and max_num_seqs = {info.max_num_seqs} leave {len(todo)} cases to measure; raise them"
        )
    chance = random.Random(seed)
    chance.shuffle(todo)
    _run(processor, todo[0], chance)
    halves: tuple[Samples, Samples] = ([], [])
    with tqdm(
        total=num_runs * len(todo), desc="profile", unit="case", disable=None if show is None else not show
    ) as bar:
        for _ in range(num_runs):
            for i, case in enumerate(todo):
                halves[i % 2].extend(_run(processor, case, chance))
                bar.update()
    return halves


def _run(processor: Processor, case: Case, chance: random.Random) -> Samples:
    """The steps of one case: those that fill the prefix are left out."""
    engine = processor.client
    vocab = engine.info().vocab_size

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(chance.randrange(vocab) for _ in range(count))

    def play(prompts: Sequence[tuple[int, ...]], output_len: int) -> None:
        params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
        for prompt in prompts:
            engine.submit(EngineRequest(f"profile-{chance.getrandbits(64):x}", prompt, params, seed=0))
        while engine.has_work:
            engine.poll()

    prefix = tokens(case.prefix_len)
    if prefix:
        play([(*prefix, *tokens(1))], 1)
    records = engine_of(processor).step_log.records
    records.clear()
    play([(*prefix, *tokens(case.input_len)) for _ in range(case.num_requests)], case.output_len)
    return [
        (shape_of(record), seconds_of(record)) for record in records if record.num_tokens and seconds_of(record) > 0
    ]


def judge(fitted: Samples, held_out: Samples) -> Profile:
    """Fit to one half, and measure the error on the other."""
    predictor = StepTimePredictor.fit(fitted)
    prefill = [sample for sample in held_out if sample[0].num_tokens > sample[0].num_rows]
    decode = [sample for sample in held_out if sample[0].num_tokens == sample[0].num_rows]
    accuracies = (Accuracy.of(predictor, part) for part in (held_out, prefill, decode))
    return Profile(predictor, len(fitted), *accuracies)
