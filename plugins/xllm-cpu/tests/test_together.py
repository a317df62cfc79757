"""Several engines in one process share the threads of one library: each says what it says alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from xllm_cpu.device import CpuDevice
from xllm_cpu.experts import MoeExperts
from xllm_cpu.ops import Linear, RmsNorm

from xllm_core import LLM, SamplingParams
from xllm_core.plugins import NotCapturableError
from xllm_core.testing.tiny import tiny_config, write_tiny

SECONDS = 1.0
PROMPTS = [{"prompt_token_ids": [1 + (i * 7 + j) % 120 for j in range(3 + 5 * i)]} for i in range(8)]
PARAMS = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)


def at_once(*jobs: Callable[[], bool]) -> list[int]:
    """Each job again and again, on a thread of its own; how many times each was right. All fail if one is wrong."""
    until, num_right, wrong = time.monotonic() + SECONDS, [0] * len(jobs), []

    def repeat(i: int) -> None:
        try:
            while time.monotonic() < until:
                if not jobs[i]():
                    wrong.append(f"job {i} after {num_right[i]} times")
                    return
                num_right[i] += 1
        except (ValueError, IndexError, RuntimeError, AttributeError) as error:
            wrong.append(f"job {i}: {error!r}")

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    return num_right


def test_ops_of_several_threads(device: CpuDevice) -> None:
    """Products and experts, while somebody sets the number of threads. Dies if jobs overlap, or threads are joined within one."""
    device.set_num_threads(2)
    linear, experts = Linear(device), MoeExperts(device)
    weight = linear.prepare(torch.randn(512, 256), None)
    packed = experts.prepare(torch.randn(8, 64, 32), torch.randn(8, 32, 32))
    x, ids, weights = torch.randn(64, 256), torch.randint(0, 8, (40, 2)), torch.rand(40, 2)

    def send(some: torch.Tensor) -> torch.Tensor:
        return experts(some, ids, weights, torch.zeros(8, dtype=torch.int64), packed)

    few = [torch.randn(40, 32) for _ in range(2)]
    expected, sent = linear(x, weight), [send(some) for some in few]

    def set_threads() -> bool:
        device.set_num_threads(2)
        time.sleep(0.005)
        return True

    num_right = at_once(
        lambda: torch.equal(linear(x, weight), expected),
        lambda: torch.equal(linear(x, weight), expected),
        lambda: torch.equal(send(few[0]), sent[0]),
        lambda: torch.equal(send(few[1]), sent[1]),
        set_threads,
    )
    assert min(num_right) > 0


@pytest.mark.parametrize("has_graphs", [True, False])
def test_two_engines_at_once(has_graphs: bool, tmp_path: Path) -> None:
    """On a thread each, and a third one made beside them that records its own graphs. Dies if one records what another calls."""
    model = str(write_tiny(tiny_config("LlamaForCausalLM", head_dim=16), tmp_path))

    def engine() -> LLM:
        return LLM(model, device="cpu/cpu", graphs=has_graphs, num_blocks=256, max_num_seqs=8, num_threads=2)

    def ask(llm: LLM) -> list[list[int]]:
        return [list(answer.outputs[0].token_ids) for answer in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]

    def ask_another() -> bool:
        with engine() as another:
            return ask(another) == expected

    with engine() as first, engine() as second:
        expected = ask(first)
        num_right = at_once(lambda: ask(first) == expected, lambda: ask(second) == expected, ask_another)
    assert min(num_right) > 0


def test_a_capture_within_a_capture(device: CpuDevice) -> None:
    """Refused, and the outer one is not harmed. Dies if it waits for itself."""
    norm, x, weight = RmsNorm(device), torch.randn(4, 8), torch.ones(8)

    def outer() -> torch.Tensor:
        with pytest.raises(NotCapturableError, match="within another's"):
            device.capture(lambda: norm(x, weight, 1e-6), 4)
        return norm(x, weight, 1e-6)

    with torch.inference_mode():
        graph, found = device.capture(outer, 4)
        assert graph.num_ops == 1 and torch.equal(found, norm(x, weight, 1e-6))


def test_a_fork_while_another_thread_records(tmp_path: Path) -> None:
    """The child has the native functions as they are, and records for itself. Dies if it waits for a thread that it has not."""
    code = (
        "import os, threading, torch\n"
        "from xllm_cpu.device import CpuDevice\n"
        "from xllm_cpu.ops import RmsNorm\n"
        "device = CpuDevice(0)\n"
        "norm, x, weight = RmsNorm(device), torch.ones(4, 8), torch.ones(8)\n"
        "begun, done = threading.Event(), threading.Event()\n"
        "def run(is_slow=False):\n"
        "    if is_slow: begun.set(), done.wait()\n"
        "    return norm(x, weight, 1e-6)\n"
        "def record(is_slow=False):\n"
        "    with torch.inference_mode(): return device.capture(lambda: run(is_slow), 4)[0].num_ops\n"
        "other = threading.Thread(target=record, args=(True,))\n"
        "other.start(), begun.wait()\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(10 + record())\n"
        "status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
        "done.set(), other.join()\n"
        "assert status == 11, status\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_fork_by_whoever_records() -> None:
    """The parent's graph is whole, the child is told that it has none. Dies if a graph without calls is taken for one."""
    code = (
        "import os, torch\n"
        "from xllm_core.plugins import NotCapturableError\n"
        "from xllm_cpu.device import CpuDevice\n"
        "from xllm_cpu.ops import RmsNorm\n"
        "device, x, weight, children = CpuDevice(0), torch.ones(4, 8), torch.ones(8), []\n"
        "norm = RmsNorm(device)\n"
        "def run():\n"
        "    children.append(os.fork())\n"
        "    return norm(x, weight, 1e-6)\n"
        "try:\n"
        "    with torch.inference_mode(): num_ops = device.capture(run, 4)[0].num_ops\n"
        "except NotCapturableError as error: num_ops = 'was forked' in str(error) and -1\n"
        "if children == [0]: os._exit(10 + num_ops)\n"
        "assert num_ops == 1 and os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 9\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="room for threads is bounded as Linux does it")
def test_threads_that_the_system_refuses() -> None:
    """With room for the stacks of a few of 1,000 threads, jobs go on with those few. Dies, with the process, if the refusal is not caught."""
    code = (
        "import resource, torch\n"
        "from xllm_cpu.device import CpuDevice\n"
        "from xllm_cpu.ops import Linear\n"
        "device = CpuDevice(0)\n"
        "linear, x = Linear(device), torch.randn(200, 64)\n"
        "weight = linear.prepare(torch.randn(640, 64), None)\n"
        "expected = linear(x, weight)\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (400 << 20),) * 2)\n"
        "device.set_num_threads(1000)\n"
        "assert torch.equal(linear(x, weight), expected)\n"
        "num_threads = len(__import__('os').listdir('/proc/self/task'))\n"
        "assert 2 < num_threads < 1000, num_threads\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_threads_that_are_held_up(tmp_path: Path) -> None:
    """Between any two steps of theirs, while jobs run and pools end. Dies if a worker that comes late sleeps over its pool's end."""
    compiler = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler to build the pool with")
    here, program = Path(__file__).parent, tmp_path / "stalls"
    command = [
        compiler,
        "-O2",
        "-std=c++20",
        "-pthread",
        f"-I{here.parent / 'native'}",
        str(here / "stalls.cpp"),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True, timeout=60)
    done = subprocess.run([str(program), "2000"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done
