"""The measurement: starts, then rounds in which engine after engine plays the same load while all others sleep."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from tqdm import tqdm

from benchmarks.machine import SETTLE_S, peak_gflops, read_bandwidth_gb_s
from benchmarks.peers.comparison import START, Row
from benchmarks.peers.engines import Engine, Places
from benchmarks.peers.installs import AbsentError
from benchmarks.peers.machine_use import DISTURBED_CORES, foreign_cores, read_use, wait_quiet
from benchmarks.peers.processes import Guard
from benchmarks.peers.sessions import EngineSession
from benchmarks.peers.workloads import Shape, Workload

_T = TypeVar("_T")

WARM_UP = Shape(1, 32, 8)
_LEAST_FREE_BYTES = 3 << 30
_MIX = 1_000  # turns of a run have seeds of their own, so that nobody finds a prompt in its cache


@dataclass(slots=True)
class Bench:
    """Engines that run, and what came of them. quiet_limit_s: how long to wait for others to be done before a round."""

    places: Places
    logs: Path
    quiet_limit_s: float = 120.0
    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    started_with: dict[str, Any] = field(default_factory=dict)
    sessions: dict[str, EngineSession] = field(default_factory=dict)
    guard: Guard = field(default_factory=Guard)
    seed: int = field(default_factory=lambda: int(time.time()) % 100_000 * _MIX)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for session in self.sessions.values():
            session.stop()
        self.guard.close()

    def measure_starts(self, engines: Sequence[Engine], num_rounds: int) -> None:
        """Seconds to the first token, one process at a time; a start before the rounds fills the caches of files."""
        for number in range(-1, num_rounds):
            is_quiet = self._wait_quiet(f"start {number + 1}")
            for engine in rotated(engines, number):
                if engine.name in self.absent:
                    continue
                before = read_use()
                session = EngineSession(engine, self.places, self.guard, self.logs)
                self.started_with[engine.name] = session.started_with
                try:
                    first_s = session.wait_first_token()
                except AbsentError as error:
                    self._drop(engine.name, str(error))
                    continue
                finally:
                    after = read_use([session.pid])
                    session.stop()
                foreign = foreign_cores(before, after)
                tqdm.write(f"start {number + 1}: {engine.name} {first_s:.2f} s" + (" (warm-up)" if number < 0 else ""))
                if number >= 0:
                    is_clean = is_quiet and foreign <= DISTURBED_CORES
                    self.rows.append(Row(START, number, engine.name, first_s, foreign_cores=foreign, is_clean=is_clean))

    def start(self, engines: Sequence[Engine]) -> None:
        """All of them, to stay; each sleeps as soon as it has answered."""
        for engine in engines:
            if engine.name in self.absent:
                continue
            if (free := free_bytes()) < _LEAST_FREE_BYTES:
                self._drop(engine.name, f"only {free / 2**30:.1f} GiB of memory are free; choose fewer with --engines")
                continue
            tqdm.write(f"starting {engine.name}")
            session = EngineSession(engine, self.places, self.guard, self.logs)
            self.sessions[engine.name] = session
            self.started_with[engine.name] = session.started_with
            try:
                tqdm.write(f"{engine.name} answers after {session.wait_first_token():.1f} s")
                session.pause()
            except AbsentError as error:
                self._drop(engine.name, str(error))

    def play_rounds(
        self, works: Sequence[Workload], num_rounds: int, num_extra: int, *, after_round: Callable[[], None]
    ) -> None:
        """Rounds until each workload has `num_rounds` clean ones, at most `num_extra` more. The first, unmeasured, warms everything up."""
        with tqdm(total=num_rounds * len(works), unit="round", disable=None) as bar:
            clean = dict.fromkeys((work.name for work in works), 0)
            for number in range(-1, num_rounds + num_extra):
                for work in works:
                    if clean[work.name] >= num_rounds:
                        continue
                    bar.set_description(f"{work.name}, round {number + 1}")
                    rows = self.play_round(work, number)
                    if number < 0:
                        continue
                    self.rows += rows
                    clean[work.name] += bool(rows) and rows[0].is_clean
                    bar.n = sum(clean.values())
                    bar.refresh()
                    tqdm.write(describe(work, number, rows))
                after_round()

    def play_round(self, work: Workload, number: int) -> list[Row]:
        """Every engine of the workload once, with probes before and after each."""
        self.seed += 1
        is_quiet = self._wait_quiet(f"{work.name}, round {number + 1}")
        rows = []
        before = (read_bandwidth_gb_s(), peak_gflops())
        for name in rotated([name for name in self.sessions if not work.engines or name in work.engines], number):
            try:
                row = self._play_turn(work, name, number)
            except AbsentError as error:
                self._drop(name, str(error))
                continue
            after = (read_bandwidth_gb_s(), peak_gflops())
            read, peak = ((a + b) / 2 * 1e9 for a, b in zip(before, after, strict=True))
            limit = work.limit(read, peak, self.sessions[name].engine.precision)
            rows.append(replace(row, limit=limit, read_gb_s=(before[0], after[0]), peak_gflops=(before[1], after[1])))
            before = after
        is_clean = is_quiet and all(row.foreign_cores <= DISTURBED_CORES for row in rows)
        return [replace(row, is_clean=is_clean) for row in rows]

    def _play_turn(self, work: Workload, name: str, number: int) -> Row:
        session = self.sessions[name]
        session.resume()
        try:
            session.play(WARM_UP, self.seed)
            use = read_use([session.pid])
            turn = work.play(session, work.shape, self.seed)
            foreign = foreign_cores(use, read_use([session.pid]))
            time.sleep(SETTLE_S)
        finally:
            session.pause()
        return Row(work.name, number, name, turn.value, dict(turn.details), foreign_cores=round(foreign, 3))

    def _wait_quiet(self, what: str) -> bool:
        def told(used: float) -> None:
            if not waits:
                tqdm.write(f"{what}: others use {used:.2f} cores; waiting for at most {self.quiet_limit_s:g} s")
            waits.append(used)

        waits: list[float] = []
        roots = [session.pid for session in self.sessions.values()]
        is_quiet, used = wait_quiet(lambda: read_use(roots), limit_s=self.quiet_limit_s, on_wait=told)
        if not is_quiet:
            tqdm.write(f"{what}: others still use {used:.2f} cores; this round counts as disturbed")
        return is_quiet

    def _drop(self, name: str, reason: str) -> None:
        self.absent[name] = reason
        tqdm.write(f"{name} is absent from here on: {reason}")
        if (session := self.sessions.pop(name, None)) is not None:
            session.stop()


def rotated(items: Sequence[_T], number: int) -> list[_T]:
    """Who goes first changes from round to round."""
    at = number % len(items) if items else 0
    return [*items[at:], *items[:at]]


def describe(work: Workload, number: int, rows: Sequence[Row]) -> str:
    """A line while it runs."""
    figures = ", ".join(f"{row.engine} {row.value:.4g}" for row in rows)
    return f"{work.name}, round {number + 1}: {figures}" + ("" if rows and rows[0].is_clean else "  (disturbed)")


def free_bytes() -> int:
    """What the machine could still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
