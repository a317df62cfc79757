"""The matrix of ARCHITECTURE §5: the same tokens come out, whatever is switched on.

Every row runs the same prompts, greedy and seeded, with one feature forced to be active, and compares with the plain run: one request
at a time, prompt in one piece, no prefix cache, no overlap, room for everything. A row with a difference, or without activity, fails;
one that this model cannot have says why, and counts for nothing.

A device that promises row-invariant ops must match to the bit. Another is compared up to the first difference of a sequence, where the
two candidates must be a near tie under the plain run's own noised scores (1e-3 in float32, 0.25 in bfloat16, in units of logits); the plain
engine then goes on from the token that was taken, and the rest is compared with that, so that every token is. 90 % is the least.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from xllm_core.config import Settings
from xllm_core.engine.build import BuiltEngine, build_engine
from xllm_core.engine.engine import Engine
from xllm_core.errors import XllmError
from xllm_core.frontend.tokenizer import Tokenizer
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.plan import AssemblyPlan
from xllm_core.plugins.probes import Probes
from xllm_core.plugins.resolve import Assembly, assemble
from xllm_core.testing.driving import Key, Tokens, drive, settle
from xllm_core.testing.prose import PROSE
from xllm_core.types import EngineRequest, SamplingParams, StepPlan, TokenOutput

MARGINS = {"float32": 1e-3, "bfloat16": 0.25}
MIN_COMPARED = 0.9
_ROUNDING = 1e-4  # of a difference of two float32 log probabilities
_TEMPERATURE = 0.8


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is run. lengths: prompt tokens of each request."""

    lengths: tuple[int, ...]
    new_tokens: int


FULL = Scale((1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 65, 100, 150, 257, 400, 600), 64)
QUICK = Scale((1, 16, 33, 100), 16)


@dataclass(slots=True)
class Row:
    """One line of the report. activity counts what the feature did; `what` says what that is. differences: first few, in words.

    not_applicable: why this model or device cannot have the feature; "" where it can.
    """

    feature: str
    is_identical: bool
    num_compared: int
    num_tokens: int
    activity: int
    what: str
    differences: list[str] = field(default_factory=list)
    not_applicable: str = ""

    @property
    def has_passed(self) -> bool:
        """Identical, active, and enough was compared; or not applicable."""
        if self.not_applicable:
            return True
        return self.is_identical and self.activity > 0 and self.num_compared >= MIN_COMPARED * self.num_tokens


@dataclass(slots=True)
class Report:
    """All rows of one model, dtype and device."""

    model: str
    dtype: str
    device: str
    is_row_invariant: bool
    rows: list[Row] = field(default_factory=list)

    @property
    def has_passed(self) -> bool:
        """Whether every row passed, and there is one."""
        return bool(self.rows) and all(row.has_passed for row in self.rows)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a row's engine gave out.

    expected: instead of the plain run, where the row has a comparison of its own; requests: those that it asked, where they differ.
    """

    got: Tokens
    activity: int
    what: str
    expected: Tokens | None = None
    requests: Sequence[EngineRequest] | None = None


class NotApplicableError(XllmError):
    """A row asks for something that this model or device cannot have."""


class Verifier:
    """Runs the matrix of one model and dtype. scale: `begin` fits it to the device. settings: flat ones, of all runs (device, use, ...)."""

    def __init__(self, model: str, *, dtype: str = "float32", scale: Scale = FULL, **settings: Any) -> None:
        self._model = model
        self._dtype = dtype
        self.scale = scale
        self._settings = settings
        self._assembly: Assembly | None = None
        self._plain: BuiltEngine | None = None
        self._probes = Probes()  # a device that is there at the first row is there at the last
        self._allowed = 0.0
        self._store = ""  # the one that the settings name
        self.baseline: Tokens = {}
        self._requests: list[EngineRequest] = []
        self._alone: Tokens = {}

    def run(self, *, on_row: Callable[[Row], None] = lambda row: None, only: Sequence[str] = ()) -> Report:
        """Run the plain pass, then every row; `on_row` hears of each as it is done. only: names of rows to run."""
        unknown = set(only) - set(ROWS)
        if unknown:
            raise ValueError(f"no such rows: {sorted(unknown)}; rows are {', '.join(ROWS)}")
        plain = self.begin()
        facts = plain.loaded.device.facts()
        report = Report(self._model, self._plan.dtype, facts.name, facts.is_row_invariant)
        for name, play in ROWS.items():
            if only and name not in only:
                continue
            try:
                outcome = play(self)
                plain.loaded.parts.bind_kv(plain.worker.cache)  # near ties are judged by the plain engine
                row = self._compare(name, outcome)
            except NotApplicableError as error:
                row = Row(name, True, 0, 0, 0, "", not_applicable=str(error))
            report.rows.append(row)
            on_row(row)
        self.close()
        return report

    def begin(self) -> BuiltEngine:
        """The plain pass, which everything is compared with."""
        plain = self._plain = self._build(max_num_seqs=4, enable_prefix_cache=False)
        self._allowed = 0.0 if plain.loaded.device.facts().is_row_invariant else MARGINS[self._plan.dtype]
        self.scale = self._fitted()
        self._requests = self._make_requests()
        for request in self._requests:
            self.baseline |= drive(plain.engine, [request])
        return plain

    def judge(self, name: str, outcome: Outcome, margin: float) -> Row:
        """What another engine said to the same requests, compared with the plain pass; near ties within `margin` are excused."""
        self._allowed = margin
        return self._compare(name, outcome)

    def close(self) -> None:
        """End the plain engine, and probes that nobody waited for."""
        self._probes.__exit__(None, None, None)
        if self._plain is not None:
            self._plain.engine.close()

    # ---- rows: each drives an engine on which one feature is active, and counts what it did -------------------------------------

    def batch_mates(self) -> Outcome:
        """All requests together."""
        with self._engine(max_num_seqs=len(self._requests)) as engine:
            plans: list[StepPlan] = []
            got = drive(engine, self._requests, on_plan=plans.append)
            return Outcome(got, max(len(p.slots) for p in plans) - 1, "mates in one step")

    def chunk(self, size: int) -> Outcome:
        """Prompts in pieces of `size` tokens; 0 computes each prompt in one piece."""
        with self._engine(max_num_seqs=len(self._requests), max_chunk_tokens=size, enable_prefix_cache=False) as engine:
            plans: list[StepPlan] = []
            got = drive(engine, self._requests, on_plan=plans.append)
            if size:
                return Outcome(got, sum(_count(p.lengths, size) for p in plans), f"pieces of {size}")
            whole = {len(r.prompt_token_ids) for r in self._requests if len(r.prompt_token_ids) > 1}
            return Outcome(got, sum(length in whole for p in plans for length in p.lengths), "whole prompts")

    def prefix_cache(self) -> Outcome:
        """Everything twice; the second time the prompts are in the cache."""
        self._need_whole_blocks()
        with self._engine(max_num_seqs=4, enable_prefix_cache=True) as engine:
            drive(engine, self._requests)
            before = engine.scheduler.kv.stats().hit_tokens
            got = drive(engine, self._requests)
            return Outcome(got, engine.scheduler.kv.stats().hit_tokens - before, "tokens hit")

    def preemption(self) -> Outcome:
        """A pool so small that sequences are thrown out and computed again."""
        requests, expected = self._pressing()
        with self._engine(**self._tight(len(requests))) as engine:
            got = drive(engine, requests)
            return Outcome(got, engine.scheduler.stats.num_preemptions, "preemptions", expected, requests)

    def host_store(self) -> Outcome:
        """KV goes to host memory, the device forgets it, and it comes back."""
        return self._offloaded("core/host")

    def chosen_store(self) -> Outcome:
        """The same through the store of a plugin, which `[use] kv_store` names."""
        if self._store in ("", "core/host", "host"):
            raise NotApplicableError("no plugin's store is chosen; install one, and name it: --use kv_store=ID/NAME")
        return self._offloaded(self._store)

    def _offloaded(self, store: str) -> Outcome:
        self._need_whole_blocks()
        with self._engine(max_num_seqs=4, enable_prefix_cache=True, store=store) as engine:
            drive(engine, self._requests)
            settle(engine)
            engine.scheduler.kv.reset_prefix_cache()
            return Outcome(drive(engine, self._requests), engine.scheduler.kv.stats().store_tokens, "tokens loaded")

    def forks(self) -> Outcome:
        """n = 3 from one prompt, against three sequences that never shared anything."""
        several, expected = self._several()
        with self._engine(max_num_seqs=len(expected)) as engine:
            return Outcome(drive(engine, several), engine.scheduler.stats.num_forks, "forks", expected)

    def resume(self) -> Outcome:
        """Prompt plus the first half of the answer, as after a failover."""
        halves = {
            r.request_id: said[: len(said) // 2] for r in self._requests if (said := self.baseline[r.request_id, 0])
        }
        resumed = [replace(r, emitted=(halves[r.request_id],)) for r in self._requests]
        with self._engine(max_num_seqs=len(self._requests)) as engine:
            got = {key: [*halves[key[0]], *tokens] for key, tokens in drive(engine, resumed).items()}
        return Outcome(got, sum(map(len, halves.values())), "tokens emitted before")

    def aborts(self) -> Outcome:
        """As many neighbours again, each thrown out after a few steps."""
        with self._engine(max_num_seqs=2 * len(self._requests)) as engine:
            return Outcome(self._abort_mates(engine), engine.scheduler.stats.num_aborted, "neighbours aborted")

    def overlap_stops(self) -> Outcome:
        """Every sequence ends by a stop token, which is known when its next row is being computed already."""
        stopped, expected = [], {}
        for i, request in enumerate(self._requests):
            said = self.baseline[request.request_id, 0]
            early = said[: (1 + i % 3) * len(said) // 4]  # not all at the same step
            stop = max(early, key=early.index)  # the last to come for the first time
            stopped.append(replace(request, params=replace(request.params, stop_token_ids=(stop,))))
            expected[request.request_id, 0] = said[: said.index(stop) + 1]
        with self._overlapped(max_num_seqs=len(stopped)) as engine:
            got = drive(engine, stopped)
            return Outcome(got, num_wasted(engine), "rows beyond an end", expected, stopped)

    def overlap_forks(self) -> Outcome:
        """n = 3: siblings go on from tokens that nobody but the worker knows."""
        several, expected = self._several()
        num_ahead = 0
        with self._overlapped(max_num_seqs=len(expected)) as engine:

            def count(plan: StepPlan) -> None:
                nonlocal num_ahead
                num_ahead += _count([at >= 0 for at in plan.prev_rows], True) if engine.num_in_flight else 0

            got = drive(engine, several, on_plan=count)
            return Outcome(got, min(num_ahead, engine.scheduler.stats.num_forks), "forks, rows ahead", expected)

    def overlap_aborts(self) -> Outcome:
        """Neighbours thrown out while a row of theirs is computed."""
        with self._overlapped(max_num_seqs=2 * len(self._requests)) as engine:
            return Outcome(self._abort_mates(engine), num_wasted(engine), "rows of aborted neighbours")

    def overlap_preemption(self) -> Outcome:
        """Sequences that give way while a row of theirs is computed."""
        requests, expected = self._pressing()
        with self._overlapped(**self._tight(len(requests))) as engine:
            got = drive(engine, requests)
            return Outcome(got, num_wasted(engine), "rows of preempted sequences", expected, requests)

    # ---- what rows share -------------------------------------------------------------------------------------------------------

    def _several(self) -> tuple[list[EngineRequest], Tokens]:
        """Requests of three sequences, and what these say when they never share anything."""
        several = [replace(r, params=replace(r.params, n=3)) for r in self._requests]
        if not self._alone:
            with self._engine(max_num_seqs=3, enable_prefix_cache=False) as engine:
                for request in several:
                    self._alone |= drive(engine, [replace(request, emitted=((), (), ()))])
        return several, self._alone

    def _tight(self, max_num_seqs: int) -> dict[str, int]:
        """Settings under which sequences have to give way."""
        return {"max_num_seqs": max_num_seqs, "num_blocks": self._num_tight_blocks(), "max_num_batched_tokens": 64}

    def _num_tight_blocks(self) -> int:
        longest = max(self.scale.lengths) + self.scale.new_tokens
        return max(2, -(-longest // self._plan.block_size))

    def _pressing(self) -> tuple[list[EngineRequest], Tokens]:
        """Requests that outgrow a tight pool, and what the plain engine says to them.

        Ours do where blocks are small. Where an answer fits into the block that its prompt has begun, nobody asks for another: there, as many
        requests as the pool has blocks, each of which is about to fill its own.
        """
        size, new_tokens = self._plan.block_size, self.scale.new_tokens
        if size <= new_tokens:
            return self._requests, self.baseline
        if size - 1 + new_tokens > self._plan.max_model_len:
            raise NotApplicableError(f"no sequence of this model outgrows a block of {size} tokens")
        assert self._plain is not None
        pool = [token for request in self._requests for token in request.prompt_token_ids] * (1 + size)
        first, requests = self._requests[0], list[EngineRequest]()
        expected: Tokens = {}
        for i in range(self._num_tight_blocks()):
            prompt = tuple(pool[i : i + size - 1])
            requests.append(replace(first, request_id=f"pressing-{i}", prompt_token_ids=prompt, seed=2000 + i))
            expected |= drive(self._plain.engine, requests[-1:])
        return requests, expected

    def _abort_mates(self, engine: Engine) -> Tokens:
        """Run the requests among as many others, and throw those out at random."""
        mates = [replace(r, request_id=f"mate-{r.request_id}", seed=r.seed + 1) for r in self._requests]
        chance = random.Random(0)
        due = {m.request_id: chance.randrange(1, self.scale.new_tokens // 2) for m in mates}

        def abort_some(plan: StepPlan) -> None:
            for request_id in [i for i, left in due.items() if left <= 0]:
                engine.abort(request_id)
                del due[request_id]
            for request_id in due:
                due[request_id] -= 1

        mixed = [r for pair in zip(mates, self._requests, strict=True) for r in pair]
        got = drive(engine, mixed, on_plan=abort_some)
        return {key: tokens for key, tokens in got.items() if not key[0].startswith("mate-")}

    # ---- comparison ----------------------------------------------------------------------------------------------------------

    def _compare(self, name: str, outcome: Outcome) -> Row:
        expected = self.baseline if outcome.expected is None else outcome.expected
        requests = {r.request_id: r for r in (outcome.requests or self._requests)}
        row = Row(name, True, 0, 0, outcome.activity, outcome.what)
        for key, base in expected.items():
            mine = outcome.got.get(key, [])
            at, problem = first_difference(base, mine, 0), ""
            while at < max(len(base), len(mine)):
                if problem := self._judge(key, base, mine, at):
                    break
                # A near tie: the plain engine goes on from the token that was taken, and is compared again.
                base = self._go_on(requests[key[0]], key[1], mine[: at + 1])
                at = first_difference(base, mine, at + 1)
            row.num_tokens += len(base)
            row.num_compared += at
            if problem:
                row.is_identical = False
                row.differences.append(problem)
        return row

    def _go_on(self, request: EngineRequest, index: int, said: list[int]) -> list[int]:
        """What the plain engine says after these tokens of sequence `index`, those included."""
        assert self._plain is not None
        params = request.params
        if said[-1] in params.stop_token_ids or len(said) >= (params.max_tokens or 0):
            return said
        resumed = replace(request, params=replace(params, n=index + 1), emitted=(said,) * (index + 1))
        return [*said, *drive(self._plain.engine, [resumed])[request.request_id, index]]

    def _judge(self, key: Key, base: list[int], mine: list[int], at: int) -> str:
        """Words for a difference that must not be; nothing for a near tie that this device is allowed."""
        place = f"{key[0]}[{key[1]}] token {at}"
        if at >= min(len(base), len(mine)):
            return f"{place}: lengths differ, {len(base)} expected, {len(mine)} came"
        words = f"{place}: {base[at]} expected, {mine[at]} came"
        if not self._allowed:
            return words
        margin = self._margin(key, base, mine[at], at)
        return (
            ""
            if margin <= self._allowed + _ROUNDING
            else f"{words}, {margin:.2g} below the best (at most {self._allowed:g} is a near tie)"
        )

    def _margin(self, key: Key, base: list[int], other: int, at: int) -> float:
        """How far the worse of the two tokens lies below the best noised score, by the plain engine's own logits at that place."""
        import torch

        from xllm_core.runtime.noise import gumbel, stream_key

        request = next(r for r in self._requests if r.request_id == key[0])
        assert self._plain is not None
        vocab = self._plain.engine.vocab_size
        params = replace(request.params, n=1, temperature=0.0, max_tokens=1, logprobs=vocab)
        prompt = [*request.prompt_token_ids, *base[:at]]
        outputs: list[TokenOutput] = []
        drive(
            self._plain.engine,
            [replace(request, request_id="margin", prompt_token_ids=prompt, params=params)],
            into=outputs,
        )
        scored = outputs[-1].logprobs
        assert scored is not None
        scores = torch.empty(vocab)
        for token, logprob in scored[0].top:
            scores[token] = logprob
        if temperature := request.params.temperature:
            stream = torch.tensor([[stream_key(request.seed, key[1], len(prompt))]])
            scores = (
                scores + temperature * gumbel(stream, torch.arange(vocab))[0]
            )  # in units of logits, as the limits are
        return float(scores.max() - torch.min(scores[base[at]], scores[other]))

    # ---- making engines and requests -------------------------------------------------------------------------------------------

    def _build(self, *, store: str = "", **settings: Any) -> BuiltEngine:
        """An engine under these settings; weights are read once and passed from engine to engine. store: of KV; only the rows of stores have one."""
        flat = {"max_num_batched_tokens": 2048, "dtype": self._dtype, **self._settings, "overlap": False, **settings}
        made = Settings.from_flags(path=self._model, **flat)
        self._store = str(made.use.get("kv_store", ""))
        use = {kind: pin for kind, pin in made.use.items() if kind != "kv_store"} | (
            {"kv_store": store} if store else {}
        )
        made = made.model_copy(update={"use": use})
        assembly = assemble(made, PluginManager.discover(made).load(), probes=self._probes)
        if self._assembly is None:
            self._assembly = assembly
        return build_engine(assembly, made, loaded=self._plain.loaded if self._plain is not None else None)

    @contextmanager
    def _engine(self, **settings: Any) -> Iterator[Engine]:
        built = self._build(**settings)
        try:
            yield built.engine
        finally:
            built.engine.close()

    @contextmanager
    def _overlapped(self, **settings: Any) -> Iterator[Engine]:
        with self._engine(overlap=True, **settings) as engine:
            if engine.depth < 2:
                raise NotApplicableError("this model's steps are planned one after the other")
            yield engine

    @property
    def _plan(self) -> AssemblyPlan:
        assert self._assembly is not None
        return self._assembly.plan

    def _fitted(self) -> Scale:
        """The scale; where none of its prompts fills a block, the longest becomes one that does: caches and stores hold whole blocks only."""
        lengths, filling = self.scale.lengths, self._plan.block_size + 1
        if max(lengths) >= filling or filling + self.scale.new_tokens > self._plan.max_model_len:
            return self.scale
        return replace(self.scale, lengths=tuple(filling if n == max(lengths) else n for n in lengths))

    def _need_whole_blocks(self) -> None:
        if max(self.scale.lengths) <= self._plan.block_size:
            raise NotApplicableError(f"no prompt of this model fills a block of {self._plan.block_size} tokens")

    def _make_requests(self) -> list[EngineRequest]:
        """Greedy and seeded requests in turn, over prose where there is a tokenizer and over random tokens where there is none."""
        assert self._assembly is not None
        chance = random.Random(20)
        vocab, context = self._assembly.shape.vocab_size, self._plan.max_model_len
        files = self._assembly.checkpoint.tokenizer()
        has_tokenizer = files.tokenizer_json is not None or files.convert is not None
        pool = Tokenizer(files).encode(PROSE) if has_tokenizer else [chance.randrange(vocab) for _ in range(4096)]
        while len(pool) < sum(self.scale.lengths):
            pool += pool
        requests, at = [], 0
        for i, length in enumerate(self.scale.lengths):
            if length + self.scale.new_tokens > context:
                raise XllmError(
                    f"verify needs a context of {length + self.scale.new_tokens} tokens, this model has {context}; use --quick"
                )
            prompt, at = pool[at : at + length], at + length
            for kind, temperature in (("greedy", 0.0), ("seeded", _TEMPERATURE)):
                params = SamplingParams(max_tokens=self.scale.new_tokens, temperature=temperature, ignore_eos=True)
                requests.append(EngineRequest(f"{kind}-{length}", tuple(prompt), params, seed=1000 + i))
        return requests


ROWS: dict[str, Callable[[Verifier], Outcome]] = {
    "batch mates": Verifier.batch_mates,
    "chunk 16": lambda v: v.chunk(16),
    "chunk 64": lambda v: v.chunk(64),
    "chunk off": lambda v: v.chunk(0),
    "prefix cache": Verifier.prefix_cache,
    "preemption": Verifier.preemption,
    "host store": Verifier.host_store,
    "plugin's store": Verifier.chosen_store,
    "n > 1 forks": Verifier.forks,
    "resume": Verifier.resume,
    "neighbours aborted": Verifier.aborts,
    "overlap, stops": Verifier.overlap_stops,
    "overlap, n > 1": Verifier.overlap_forks,
    "overlap, aborts": Verifier.overlap_aborts,
    "overlap, preemption": Verifier.overlap_preemption,
}


def first_difference(base: Sequence[int], mine: Sequence[int], start: int) -> int:
    """The first place from `start` where two sequences differ; where one ends before the other, or both end, that is the place."""
    shorter = min(len(base), len(mine))
    return next((i for i in range(start, shorter) if base[i] != mine[i]), shorter)


def num_wasted(engine: Engine) -> int:
    """Rows computed in vain, with those of steps that nobody waits for any more."""
    settle(engine)
    return engine.scheduler.stats.num_wasted_rows


def _count(values: Sequence[int], wanted: int) -> int:
    return sum(value == wanted for value in values)
