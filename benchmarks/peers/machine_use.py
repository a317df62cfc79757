"""Who uses the processor: an engine, this program, or somebody else. Read from /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

QUIET_CORES = 0.15
"""Cores that others may use while nothing is measured; kernel threads alone take a few hundredths."""

DISTURBED_CORES = 0.2
"""Cores that others may use during a measurement before it counts as disturbed."""


@dataclass(frozen=True, slots=True)
class Process:
    """A line of /proc. ticks: of processor time, with those of children that it has waited for."""

    pid: int
    parent: int
    session: int
    ticks: int


@dataclass(frozen=True, slots=True)
class Use:
    """A moment. busy, own: ticks since the machine began, of all (with what its host took away) and of our processes."""

    at_s: float
    busy: int
    own: int


def parse_process(pid: int, text: str) -> Process:
    """From /proc/PID/stat. The name of a program may hold spaces and brackets."""
    fields = text.rpartition(")")[2].split()
    return Process(pid, int(fields[1]), int(fields[3]), sum(int(fields[i]) for i in (11, 12, 13, 14)))


def parse_busy(text: str) -> int:
    """Ticks that were not idle, from the first line of /proc/stat."""
    user, nice, system, _idle, _wait, irq, soft, steal = (int(field) for field in text.split("\n", 1)[0].split()[1:9])
    return user + nice + system + irq + soft + steal


def read_processes() -> dict[int, Process]:
    """All of them."""
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                found[int(path.name)] = parse_process(int(path.name), (path / "stat").read_text(errors="replace"))
            except (OSError, IndexError):
                continue  # it has ended
    return found


def family(root: int, processes: Mapping[int, Process]) -> list[int]:
    """A process, its descendants, and everything in a session that one of them leads."""
    members = {root}
    while True:
        more = {p.pid for p in processes.values() if p.parent in members or p.session in members} - members
        if not more:
            return sorted(pid for pid in members if pid in processes)
        members |= more


def read_use(roots: Iterable[int] = ()) -> Use:
    """Now. roots: families beside this process and its descendants, for children that were left by their parents."""
    processes = read_processes()
    own = {pid for root in (os.getpid(), *roots) for pid in family(root, processes)}
    return Use(time.monotonic(), parse_busy(Path("/proc/stat").read_text()), sum(processes[pid].ticks for pid in own))


def foreign_cores(before: Use, after: Use, ticks_per_s: int | None = None) -> float:
    """Cores that neither we nor our engines used between two moments."""
    rate = ticks_per_s or os.sysconf("SC_CLK_TCK")
    elapsed_s = max(1e-6, after.at_s - before.at_s)
    return max(0.0, ((after.busy - before.busy) - (after.own - before.own)) / rate / elapsed_s)


def wait_quiet(
    sample: Callable[[], Use], *, bound: float = QUIET_CORES, for_s: float = 2.0, limit_s: float = 120.0,
    sleep: Callable[[float], object] = time.sleep, on_wait: Callable[[float], object] | None = None,
) -> tuple[bool, float]:  # fmt: skip
    """Wait until others have used less than `bound` cores for `for_s` seconds, at most `limit_s`.

    Returns whether it came to that, and what others used last. on_wait: told that, second by second, while it has not.
    """
    last = sample()
    start_s, quiet_s, used = last.at_s, 0.0, 0.0
    while quiet_s < for_s:
        if last.at_s - start_s >= limit_s:
            return False, used
        sleep(min(1.0, for_s))
        now = sample()
        used = foreign_cores(last, now)
        quiet_s = quiet_s + now.at_s - last.at_s if used < bound else 0.0
        last = now
        if on_wait is not None and not quiet_s:
            on_wait(used)
    return True, used
