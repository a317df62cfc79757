"""The matrix of ARCHITECTURE §5: the same tokens come out, whatever is switched on.

Every row runs the same prompts, greedy and seeded, with one feature forced to be active, and compares with the plain run: one request
at a time, prompt in one piece, no prefix cache, no overlap, room for everything. A row with a difference, or without activity, fails;
one that this model cannot have says why, and counts for nothing.

A device that promises row-invariant ops must match to the bit, in log probabilities too. Another is compared up to the first difference of
a sequence, where the two candidates must be a near tie under the plain run's own noised scores (1e-3 in float32, 0.25 in bfloat16, in units
of logits); the plain engine then goes on from the token that was taken, and the rest is compared with that, so that every token is. 90 % is
the least.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from xllm_core.config import Settings
from xllm_core.engine.build import BuiltEngine, build_engine, max_chunk_tokens, plan_geometry
from xllm_core.engine.engine import Engine
from xllm_core.errors import XllmError
from xllm_core.frontend.tokenizer import Tokenizer
from xllm_core.kv.manager import KVManager
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.plan import AssemblyPlan
from xllm_core.plugins.probes import Probes
from xllm_core.plugins.resolve import Assembly, assemble
from xllm_core.runtime.graphs import why_no_graphs
from xllm_core.testing import verify_kv
from xllm_core.testing.driving import Key, Tokens, drive
from xllm_core.testing.matrix import FULL as FULL
from xllm_core.testing.matrix import QUICK as QUICK
from xllm_core.testing.matrix import NotApplicableError, num_wasted
from xllm_core.testing.matrix import Outcome as Outcome
from xllm_core.testing.matrix import Report as Report
from xllm_core.testing.matrix import Row as Row
from xllm_core.testing.matrix import Scale as Scale
from xllm_core.testing.prose import PROSE
from xllm_core.types import EngineRequest, SamplingParams, StepPlan, TokenOutput

MARGINS = {"float32": 1e-3, "bfloat16": 0.25}
_ROUNDING = 1e-4  # of a difference of two float32 log probabilities
_TEMPERATURE = 0.8
_NUM_LIKELIEST = 4

Scores = dict[Key, list[list[tuple[int, float]]]]
"""Of each sequence, for each of its tokens: (token, log probability) of the one chosen, then of the likeliest."""


class Verifier:
    """Runs the matrix of one model and dtype. scale: `begin` fits it to the device. settings: flat ones, of all runs (device, use, ...)."""

    def __init__(self, model: str, *, dtype: str = "float32", scale: Scale = FULL, **settings: Any) -> None:
        self._model = model
        self._dtype = dtype
        self.scale = scale
        self._settings = settings
        self._assembly: Assembly | None = None
        self.plain: BuiltEngine | None = None
        self._probes = Probes()  # a device that is there at the first row is there at the last
        self._allowed = 0.0
        self.store = ""  # the one that the settings name
        self.baseline: Tokens = {}
        self.requests: list[EngineRequest] = []
        self._alone: Tokens = {}

    def run(self, *, on_row: Callable[[Row], None] = lambda row: None, only: Sequence[str] = ()) -> Report:
        """Run the plain pass, then every row; `on_row` hears of each as it is done. only: names of rows to run."""
        unknown = set(only) - set(ROWS)
        if unknown:
            raise ValueError(f"no such rows: {sorted(unknown)}; rows are {', '.join(ROWS)}")
        plain = self.begin()
        facts = plain.loaded.device.facts()
        report = Report(self._model, self.plan.dtype, facts.name, facts.is_row_invariant)
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
        plain = self.plain = self._build(max_num_seqs=4, enable_prefix_cache=False)
        self._allowed = 0.0 if plain.loaded.device.facts().is_row_invariant else MARGINS[self.plan.dtype]
        self.scale = self._fitted()
        self.requests = self._make_requests()
        for request in self.requests:
            self.baseline |= drive(plain.engine, [request])
        return plain

    def judge(self, name: str, outcome: Outcome, margin: float) -> Row:
        """What another engine said to the same requests, compared with the plain pass; near ties within `margin` are excused."""
        self._allowed = margin
        return self._compare(name, outcome)

    def close(self) -> None:
        """End the plain engine, and probes that nobody waited for."""
        self._probes.__exit__(None, None, None)
        if self.plain is not None:
            self.plain.engine.close()

    # ---- rows: each drives an engine on which one feature is active, and counts what it did -------------------------------------

    def batch_mates(self) -> Outcome:
        """All requests together."""
        with self.engine(max_num_seqs=len(self.requests)) as engine:
            plans: list[StepPlan] = []
            got = drive(engine, self.requests, on_plan=plans.append)
            return Outcome(got, max(len(p.slots) for p in plans) - 1, "mates in one step")

    def log_probabilities(self) -> Outcome:
        """Those of the chosen token and of the likeliest, all requests together against each alone: equal floats, not near ones."""
        assert self.plain is not None
        if not self.plain.loaded.device.facts().is_row_invariant:
            raise NotApplicableError(
                "this device does not promise that a row is the same to the bit whatever runs beside it"
            )
        length = max(1, self.scale.new_tokens // 2)
        asked = [
            replace(r, params=replace(r.params, max_tokens=length, logprobs=_NUM_LIKELIEST))
            for r in self.requests
            if r.params.temperature == 0
        ]
        self.plain.loaded.parts.bind_kv(self.plain.worker.cache)
        outputs: list[TokenOutput] = []
        expected = Tokens()
        for request in asked:
            expected |= drive(self.plain.engine, [request], into=outputs)
        alone, outputs = scores_of(outputs), []
        with self.engine(max_num_seqs=len(asked)) as engine:
            got = drive(engine, asked, into=outputs)
        together = scores_of(outputs)
        num_compared = sum(len(scores) for of_tokens in alone.values() for scores in of_tokens)
        words = unequal_scores(alone, together)
        return Outcome(got, num_compared, "log probabilities to the bit", expected, asked, words)

    def chunk(self, size: int) -> Outcome:
        """Prompts in pieces of `size` tokens; 0 computes each prompt in one piece."""
        with self.engine(max_num_seqs=len(self.requests), max_chunk_tokens=size, enable_prefix_cache=False) as engine:
            plans: list[StepPlan] = []
            got = drive(engine, self.requests, on_plan=plans.append)
            if size:
                return Outcome(got, sum(_count(p.lengths, size) for p in plans), f"pieces of {size}")
            whole = {len(r.prompt_token_ids) for r in self.requests if len(r.prompt_token_ids) > 1}
            return Outcome(got, sum(length in whole for p in plans for length in p.lengths), "whole prompts")

    def forks(self) -> Outcome:
        """n = 3 from one prompt, against three sequences that never shared anything."""
        several, expected = self._several()
        with self.engine(max_num_seqs=len(expected)) as engine:
            return Outcome(drive(engine, several), engine.scheduler.stats.num_forks, "forks", expected)

    def resume(self) -> Outcome:
        """Prompt plus the first half of the answer, as after a failover."""
        halves = {
            r.request_id: said[: len(said) // 2] for r in self.requests if (said := self.baseline[r.request_id, 0])
        }
        resumed = [replace(r, emitted=(halves[r.request_id],)) for r in self.requests]
        with self.engine(max_num_seqs=len(self.requests)) as engine:
            got = {key: [*halves[key[0]], *tokens] for key, tokens in drive(engine, resumed).items()}
        return Outcome(got, sum(map(len, halves.values())), "tokens emitted before")

    def aborts(self) -> Outcome:
        """As many neighbours again, each thrown out after a few steps."""
        with self.engine(max_num_seqs=2 * len(self.requests)) as engine:
            return Outcome(self._abort_mates(engine), engine.scheduler.stats.num_aborted, "neighbours aborted")

    def overlap_stops(self) -> Outcome:
        """Every sequence ends by a stop token, which is known when its next row is being computed already."""
        stopped, expected = [], {}
        for i, request in enumerate(self.requests):
            said = self.baseline[request.request_id, 0]
            early = said[: (1 + i % 3) * len(said) // 4]  # not all at the same step
            stop = max(early, key=early.index)  # the last to come for the first time
            stopped.append(replace(request, params=replace(request.params, stop_token_ids=(stop,))))
            expected[request.request_id, 0] = said[: said.index(stop) + 1]
        with self.overlapped(max_num_seqs=len(stopped)) as engine:
            got = drive(engine, stopped)
            return Outcome(got, num_wasted(engine), "rows beyond an end", expected, stopped)

    def overlap_forks(self) -> Outcome:
        """n = 3: siblings go on from tokens that nobody but the worker knows."""
        several, expected = self._several()
        num_ahead = 0
        with self.overlapped(max_num_seqs=len(expected)) as engine:

            def count(plan: StepPlan) -> None:
                nonlocal num_ahead
                num_ahead += _count([at >= 0 for at in plan.prev_rows], True) if engine.num_in_flight else 0

            got = drive(engine, several, on_plan=count)
            return Outcome(got, min(num_ahead, engine.scheduler.stats.num_forks), "forks, rows ahead", expected)

    def overlap_aborts(self) -> Outcome:
        """Neighbours thrown out while a row of theirs is computed."""
        with self.overlapped(max_num_seqs=2 * len(self.requests)) as engine:
            return Outcome(self._abort_mates(engine), num_wasted(engine), "rows of aborted neighbours")

    def graph_replay(self) -> Outcome:
        """Decode steps from recorded graphs, planned ahead. Requests end one after the other, so that every bucket serves fewer and fewer rows."""
        shorter, expected = [], Tokens()
        for i, request in enumerate(self.requests):
            length = max(1, self.scale.new_tokens - i % self.scale.new_tokens)
            shorter.append(replace(request, params=replace(request.params, max_tokens=length)))
            expected[request.request_id, 0] = self.baseline[request.request_id, 0][:length]
        with self.built(max_num_seqs=len(shorter), graphs=True, overlap=True) as built:
            got = drive(built.engine, shorter)
            stats = built.worker.graph_stats()
            reason = stats.why_not if stats is not None else why_no_graphs(built.loaded.device, built.loaded.kernels)
            if reason:
                raise NotApplicableError(reason)
            return Outcome(got, built.engine.num_replays, "steps replayed", expected, shorter)

    # ---- what rows share -------------------------------------------------------------------------------------------------------

    def _several(self) -> tuple[list[EngineRequest], Tokens]:
        """Requests of three sequences, and what these say when they never share anything."""
        several = [replace(r, params=replace(r.params, n=3)) for r in self.requests]
        if not self._alone:
            with self.engine(max_num_seqs=3, enable_prefix_cache=False) as engine:
                for request in several:
                    self._alone |= drive(engine, [replace(request, emitted=((), (), ()))])
        return several, self._alone

    def _abort_mates(self, engine: Engine) -> Tokens:
        """Run the requests among as many others, and throw those out at random."""
        mates = [replace(r, request_id=f"mate-{r.request_id}", seed=r.seed + 1) for r in self.requests]
        chance = random.Random(0)
        due = {m.request_id: chance.randrange(1, self.scale.new_tokens // 2) for m in mates}

        def abort_some(plan: StepPlan) -> None:
            for request_id in [i for i, left in due.items() if left <= 0]:
                engine.abort(request_id)
                del due[request_id]
            for request_id in due:
                due[request_id] -= 1

        mixed = [r for pair in zip(mates, self.requests, strict=True) for r in pair]
        got = drive(engine, mixed, on_plan=abort_some)
        return {key: tokens for key, tokens in got.items() if not key[0].startswith("mate-")}

    # ---- comparison ----------------------------------------------------------------------------------------------------------

    def _compare(self, name: str, outcome: Outcome) -> Row:
        expected = self.baseline if outcome.expected is None else outcome.expected
        requests = {r.request_id: r for r in (outcome.requests or self.requests)}
        row = Row(name, not outcome.differences, 0, 0, outcome.activity, outcome.what, [*outcome.differences])
        for key, base in expected.items():
            mine = outcome.got.get(key, [])
            at, problem = first_difference(base, mine, 0), ""
            while at < max(len(base), len(mine)):
                if problem := self._judge(requests[key[0]], key, base, mine, at):
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
        assert self.plain is not None
        params = request.params
        if said[-1] in params.stop_token_ids or len(said) >= (params.max_tokens or 0):
            return said
        resumed = replace(request, params=replace(params, n=index + 1), emitted=(said,) * (index + 1))
        return [*said, *drive(self.plain.engine, [resumed])[request.request_id, index]]

    def _judge(self, request: EngineRequest, key: Key, base: list[int], mine: list[int], at: int) -> str:
        """Words for a difference that must not be; nothing for a near tie that this device is allowed."""
        place = f"{key[0]}[{key[1]}] token {at}"
        if at >= min(len(base), len(mine)):
            return f"{place}: lengths differ, {len(base)} expected, {len(mine)} came"
        words = f"{place}: {base[at]} expected, {mine[at]} came"
        if not self._allowed:
            return words
        margin = self._margin(request, key[1], base, mine[at], at)
        return (
            ""
            if margin <= self._allowed + _ROUNDING
            else f"{words}, {margin:.2g} below the best (at most {self._allowed:g} is a near tie)"
        )

    def _margin(self, request: EngineRequest, index: int, base: list[int], other: int, at: int) -> float:
        """How far the worse of the two tokens lies below the best noised score, by the plain engine's own logits at that place."""
        import torch

        from xllm_core.runtime.noise import gumbel, stream_key

        assert self.plain is not None
        vocab = self.plain.engine.vocab_size
        params = replace(request.params, n=1, temperature=0.0, max_tokens=1, logprobs=vocab)
        prompt = [*request.prompt_token_ids, *base[:at]]
        outputs: list[TokenOutput] = []
        drive(
            self.plain.engine,
            [replace(request, request_id="margin", prompt_token_ids=prompt, params=params)],
            into=outputs,
        )
        scored = outputs[-1].logprobs
        assert scored is not None
        scores = torch.empty(vocab)
        for token, logprob in scored[0].top:
            scores[token] = logprob
        if temperature := request.params.temperature:
            stream = torch.tensor([[stream_key(request.seed, index, len(prompt))]])
            scores = (
                scores + temperature * gumbel(stream, torch.arange(vocab))[0]
            )  # in units of logits, as the limits are
        return float(scores.max() - torch.min(scores[base[at]], scores[other]))

    # ---- making engines and requests -------------------------------------------------------------------------------------------

    def _build(self, *, store: str = "", **settings: Any) -> BuiltEngine:
        """An engine under these settings; weights are read once and passed from engine to engine. store: of KV; only the rows of stores have one."""
        made = self._made(**settings)
        self.store = str(made.use.get("kv_store", ""))
        use = {kind: pin for kind, pin in made.use.items() if kind != "kv_store"} | (
            {"kv_store": store} if store else {}
        )
        made = made.model_copy(update={"use": use})
        assembly = assemble(made, PluginManager.discover(made).load(), probes=self._probes)
        if self._assembly is None:
            self._assembly = assembly
        return build_engine(assembly, made, loaded=self.plain.loaded if self.plain is not None else None)

    def _made(self, **settings: Any) -> Settings:
        plain = {"overlap": False, "graphs": False}
        flat = {"max_num_batched_tokens": 2048, "dtype": self._dtype, **self._settings, **plain, **settings}
        return Settings.from_flags(path=self._model, **flat)

    def capacity_tokens(self, **settings: Any) -> int:
        """The longest sequence that the KV pool of an engine under these settings would hold."""
        assert self._assembly is not None and self.plain is not None
        made = self._made(**settings)
        geometry = plan_geometry(self._assembly, made, self.plain.loaded.device)
        return KVManager(geometry, max_chunk_tokens=max_chunk_tokens(made)).capacity_tokens

    @contextmanager
    def built(self, **settings: Any) -> Iterator[BuiltEngine]:
        """An engine of the same weights under these settings, for one row, with what it is made of."""
        built = self._build(**settings)
        try:
            yield built
        finally:
            built.engine.close()

    @contextmanager
    def engine(self, **settings: Any) -> Iterator[Engine]:
        """The engine alone."""
        with self.built(**settings) as built:
            yield built.engine

    @contextmanager
    def overlapped(self, **settings: Any) -> Iterator[Engine]:
        """An engine whose loop runs ahead; raises NotApplicableError where this model's cannot."""
        with self.engine(overlap=True, **settings) as engine:
            if engine.depth < 2:
                raise NotApplicableError("this model's steps are planned one after the other")
            yield engine

    @property
    def plan(self) -> AssemblyPlan:
        """Of the plain engine."""
        assert self._assembly is not None
        return self._assembly.plan

    def _fitted(self) -> Scale:
        """The scale; where none of its prompts fills a block, the longest becomes one that does: caches and stores hold whole blocks only."""
        lengths, filling = self.scale.lengths, self.plan.block_size + 1
        if max(lengths) >= filling or filling + self.scale.new_tokens > self.plan.max_model_len:
            return self.scale
        return replace(self.scale, lengths=tuple(filling if n == max(lengths) else n for n in lengths))

    def _make_requests(self) -> list[EngineRequest]:
        """Greedy and seeded requests in turn, over prose where there is a tokenizer and over random tokens where there is none."""
        assert self._assembly is not None
        chance = random.Random(20)
        vocab, context = self._assembly.shape.vocab_size, self.plan.max_model_len
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
    "log probabilities": Verifier.log_probabilities,
    "chunk 16": lambda v: v.chunk(16),
    "chunk 64": lambda v: v.chunk(64),
    "chunk off": lambda v: v.chunk(0),
    "prefix cache": verify_kv.prefix_cache,
    "preemption": verify_kv.preemption,
    "host store": verify_kv.host_store,
    "plugin's store": verify_kv.chosen_store,
    "n > 1 forks": Verifier.forks,
    "resume": Verifier.resume,
    "neighbours aborted": Verifier.aborts,
    "graph replay": Verifier.graph_replay,
    "overlap, stops": Verifier.overlap_stops,
    "overlap, n > 1": Verifier.overlap_forks,
    "overlap, aborts": Verifier.overlap_aborts,
    "overlap, preemption": verify_kv.overlap_preemption,
}


def first_difference(base: Sequence[int], mine: Sequence[int], start: int) -> int:
    """The first place from `start` where two sequences differ; where one ends before the other, or both end, that is the place."""
    shorter = min(len(base), len(mine))
    return next((i for i in range(start, shorter) if base[i] != mine[i]), shorter)


def scores_of(outputs: Iterable[TokenOutput]) -> Scores:
    """What outputs tell of their tokens, where log probabilities were asked for."""
    scores: Scores = {}
    for output in outputs:
        told = scores.setdefault((output.request_id, output.index), [])
        for token, entry in zip(output.new_token_ids, output.logprobs or (), strict=False):
            told.append([(token, entry.chosen), *entry.top])
    return scores


def unequal_scores(alone: Scores, together: Scores) -> list[str]:
    """The first difference of each sequence, in words."""
    words = []
    for key, expected in alone.items():
        got = together.get(key, [])
        for at, (one, other) in enumerate(zip(expected, got, strict=False)):
            if one != other:
                (token, score), (theirs, beside) = next((a, b) for a, b in zip(one, other, strict=True) if a != b)
                of = f"of token {token}" if token == theirs else f"of token {token} and token {theirs}"
                words.append(f"{key[0]} token {at}: log probability {of} is {score!r} alone, {beside!r} with others")
                break
        else:
            if len(got) != len(expected):
                words.append(f"{key[0]}: {len(expected)} tokens have log probabilities alone, {len(got)} with others")
    return words


def _count(values: Sequence[int], wanted: int) -> int:
    return sum(value == wanted for value in values)
