"""`make bench-peers`, but for the peers: arithmetic, verdicts, table, command lines, quietness, files of the model, processes that end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch

from benchmarks.peers import __main__ as program
from benchmarks.peers import installs, models, plot, sizes, table
from benchmarks.peers.comparison import CLAIMS, SIZE, START, Claim, Measured, Row, Verdict
from benchmarks.peers.engines import ENGINES, Places, choose
from benchmarks.peers.installs import AbsentError
from benchmarks.peers.machine_use import Process, Use, family, foreign_cores, parse_busy, parse_process, wait_quiet
from benchmarks.peers.models import Models
from benchmarks.peers.processes import Guard, Running
from benchmarks.peers.rounds import rotated
from benchmarks.peers.workloads import WORKLOADS, Answer, Shape, shrink
from tests.fixtures.tiny_models import make_tiny
from xllm_core.benchmark import Load, run_round
from xllm_core.cli import root
from xllm_core.config import Settings
from xllm_core.frontend.start import start_in_process
from xllm_core.plugins.contracts.weights import TokenizerFiles
from xllm_core.runtime.formats.gguf_file import GGUFCheckpoint
from xllm_core.runtime.formats.safetensors_dir import SafetensorsDirectory
from xllm_core.testing.tiny_gguf import Kind, write_tiny_gguf

WORK = {work.name: work for work in WORKLOADS}


def rows(
    workload: str, engine: str, values: list[float], *, dirty: tuple[int, ...] = (), limit: float | None = None
) -> list[Row]:
    return [
        Row(workload, i, engine, value, {"ttft_p50_ms": 10 * value}, limit, is_clean=i not in dirty)
        for i, value in enumerate(values)
    ]


def test_ratios_are_of_turns_of_the_same_round() -> None:
    """A round that one of them has not is no pair; medians of each would say 2 here, pairs say 10."""
    ours = rows("single", "xllm", [10.0, 200.0, 3000.0])
    theirs = rows("single", "llama-bf16", [1.0, 20.0, 300.0, 4.0, 4.0, 4.0])
    found = Measured([*ours, *theirs]).ratio("single", "xllm", "llama-bf16")
    assert found is not None
    assert (found.median, found.low, found.high, found.num) == (10, 10, 10, 3)


def test_disturbed_rounds_are_left_out_while_a_clean_one_is_left() -> None:
    measured = Measured(rows("single", "xllm", [10.0, 90.0, 12.0], dirty=(1,)))
    found = measured.spread("single", "xllm")
    assert found is not None
    assert (found.median, found.high, found.num) == (11, 12, 2)
    assert measured.num_disturbed("single") == (1, 3)
    all_dirty = Measured(rows("single", "xllm", [10.0, 90.0], dirty=(0, 1), limit=50.0))
    verdict = all_dirty.verdict(Claim("single", "xllm", 0.1, of="share"))
    assert verdict.is_disturbed
    assert verdict.spread is not None
    assert verdict.spread.num == 2
    assert table.verdict_line(verdict).endswith("every round was disturbed")


def test_the_whole_interval_has_to_reach_a_target() -> None:
    """A median beyond it is not enough, in either direction."""
    pairs = Measured([*rows("burst", "xllm", [15.0, 17.0, 19.0]), *rows("burst", "vllm", [10.0, 10.0, 10.0])])
    words = [pairs.verdict(Claim("burst", "xllm", target, "vllm")).word for target in (1.5, 1.6)]
    assert words == ["met", "MISSED"]
    most = [pairs.verdict(Claim("burst", "xllm", target, must="at most")).word for target in (19, 18)]
    assert most == ["met", "MISSED"]
    first = pairs.verdict(Claim("burst", "xllm", 1.9, "vllm", of="ttft_p50_ms", must="at most"))
    assert first.word == "met"
    shares = Measured(rows("single", "xllm", [80.0, 90.0], limit=100.0))
    assert shares.verdict(Claim("single", "xllm", 0.8, of="share")).word == "met"


def test_who_is_absent_is_said_with_the_reason() -> None:
    measured = Measured(rows("single", "xllm", [1.0]), {"llama-bf16": "no compiler"})
    verdict = measured.verdict(Claim("single", "xllm", 1.08, "llama-bf16"))
    assert (verdict.word, verdict.reason, verdict.is_met) == ("absent", "llama-bf16 is absent", False)
    assert "absent  llama-bf16: no compiler" in table.render(measured)
    assert measured.verdict(Claim("single", "xllm", 1, "vllm")).reason == "vllm was not asked for"


def test_table_json_and_picture_hold_every_engine(tmp_path: Path) -> None:
    """The engine's line has its median, its share, and ours beside it."""
    measured = Measured(
        [row for engine in ENGINES for row in rows("single", engine.name, [100.0, 100.0], limit=200.0)]
        + [replace(row, value=25.0) for row in rows("prefix", "vllm", [1.0])]
        + rows(START, "xllm", [2.5]) + rows(SIZE, "xllm", [6.2])
    )  # fmt: skip
    lines = table.render(measured)
    (line,) = [line for line in table.block(measured, "single") if line.split()[:1] == ["llama-bf16"]]
    assert line.split()[1:10] == ["100", "[100,", "100]", "0.5", "[0.5,", "0.5]", "1", "[1,", "1]"]
    for title in (WORK["single"].title, WORK["prefix"].title, "start, process", "installed size"):
        assert any(line.startswith(title) for line in lines), title
    assert [line.split()[0] for line in table.verdicts(measured) if line.split()[1] == "start:"] == ["met"]
    again = json.loads(json.dumps(measured.as_json()))
    assert len(again["rows"]) == len(measured.rows)
    assert len(again["verdicts"]) == len(CLAIMS)
    plot.draw(measured, "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_claims_name_engines_and_workloads_that_take_part() -> None:
    names = {engine.name: engine for engine in ENGINES}
    for claim in CLAIMS:
        taking_part = WORK[claim.workload].engines if claim.workload in WORK else ()
        for engine in filter(None, (claim.ours, claim.theirs)):
            assert not taking_part or engine in taking_part, claim
        assert names[claim.ours].is_ours, claim
        if claim.theirs:
            assert names[claim.theirs].over == names[claim.ours].over, f"{claim}: HTTP beside a process"
        if claim.of == "share":
            assert WORK[claim.workload].limit(1e9, 1e9, names[claim.ours].precision), claim
    for engine in ENGINES:
        if engine.against:
            ours = names[engine.against]
            assert (ours.over, ours.precision, ours.is_ours) == (engine.over, engine.precision, True), engine.name


class Told:
    """Stands for an engine: answers what a test gives it, and keeps what it was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.answers, self.asked = list(answers), []

    def play(self, shape: Shape, seed: int, prefix_seed: int = 0) -> Answer:
        self.asked.append((shape, seed, prefix_seed))
        return self.answers.pop(0)


def test_what_is_read_off_answers() -> None:
    """Decoding without the first token; a prompt by its first token; the second request on a prefix, with tokens of its own."""

    def value(name: str, *answers: Answer) -> float:
        return WORK[name].play(Told(*answers), WORK[name].shape, 5).value

    assert value("single", Answer(1.37, [0.1])) == pytest.approx(127 / 1.27)
    assert value("prefill", Answer(9.0, [0.5])) == pytest.approx(2048)
    assert value("burst", Answer(8.0, [1.0] * 32)) == pytest.approx(512)
    told = Told(Answer(1, [0.9]), Answer(1, [0.02]))
    turn = WORK["prefix"].play(told, WORK["prefix"].shape, 5)
    assert (turn.value, turn.details["cold_ms"]) == (pytest.approx(20), pytest.approx(900))
    (_, first, shared), (_, second, again) = told.asked
    assert first != second
    assert shared == again
    clients = WORK["clients"].play(Told(Answer(10, [1.0, 2.0, 3.0], [0.01] * 98 + [0.5] * 2)), WORK["clients"].shape, 1)
    assert clients.value == pytest.approx(409.6)
    assert clients.details == {"ttft_p50_ms": 2000, "itl_p50_ms": 10, "itl_p99_ms": 500}
    assert all(shrink(work).shape.num_requests <= 4 for work in WORKLOADS)


def test_limits_are_those_of_the_machine() -> None:
    """At 32 GB/s and 435 GFLOP/s: what the table of targets says."""
    found = [WORK[name].limit(32e9, 435e9, "bf16") for name in ("single", "prefill", "burst")]
    assert found == [pytest.approx(119, rel=0.01), pytest.approx(1756, rel=0.01), pytest.approx(875, rel=0.01)]
    assert [WORK["single"].limit(32e9, 0, precision) for precision in ("int8", "q4_1")] == [
        pytest.approx(222, rel=0.01), pytest.approx(325, rel=0.01),
    ]  # fmt: skip


def places(tmp_path: Path) -> Places:
    homes = {peer: tmp_path / peer for peer in installs.PEERS}
    return Places(homes, Models(tmp_path / "packed.gguf", tmp_path / "models"), 8123)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_command_lines(engine, tmp_path: Path) -> None:
    """Each server listens where it is told, runs from its own environment, and reads a model of its precision."""
    command = engine.command(places(tmp_path))
    if engine.over == "http":
        assert command[command.index("--port") + 1] == "8123"
    if not engine.is_ours:
        assert command[0].startswith(str(tmp_path / engine.maker))
        model = {"bf16": "smollm2-135m-", "int8": "Q8_0.gguf", "q4_1": "packed.gguf"}[engine.precision]
        assert any(model in part for part in command), command
        return
    if engine.over == "process":
        settings = json.loads(command[command.index("--settings") + 1])
        assert Settings.from_flags(path="x", **settings).scheduler.max_num_seqs == 32
        return
    flags = {part for part in command if part.startswith("--")}
    serve = root().get_command(click.Context(root()), "serve")
    assert serve is not None
    known = {name for option in serve.params for name in option.opts}
    assert flags <= known, flags - known


def test_choosing_engines_and_workloads(capsys: pytest.CaptureFixture[str]) -> None:
    assert [engine.name for engine in choose("xllm-int8,llama")] == [
        "xllm-int8",
        "llama-bf16",
        "llama-q8_0",
        "llama-q4_1",
    ]
    assert {engine.maker for engine in choose("xllm, vllm")} == {"xllm", "vllm"}
    args = program.parse(["--only", "single,start", "--rounds", "4"])
    assert (args.only, args.extra_rounds, len(args.engines)) == (["single", "start"], 2, len(ENGINES))
    for wrong in (["--only", "singel"], ["--engines", "sglang"], ["--rounds", "0"]):
        with pytest.raises(SystemExit):
            program.parse(wrong)
        assert wrong[1] in capsys.readouterr().err or wrong[0] == "--rounds"
    assert [rotated("abc", i) for i in range(4)] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_proc_is_read_as_the_kernel_writes_it() -> None:
    """A program's name may look like fields."""
    tail = "S 7 40 41 0 -1 4194304 1 2 3 4 100 20 3 1 20 0 1 0 5 6 7"
    assert parse_process(9, f"9 (a) b (c) {tail}") == Process(9, parent=7, session=41, ticks=124)
    assert parse_busy("cpu  10 20 30 1000 500 1 2 3 0 0\ncpu0 9 9 9") == 66
    before, after = Use(0.0, 1000, 400), Use(2.0, 1400, 700)
    assert foreign_cores(before, after, ticks_per_s=100) == pytest.approx(0.5)
    assert foreign_cores(before, Use(2.0, 1100, 700), ticks_per_s=100) == 0


def test_a_family_holds_children_that_were_left() -> None:
    """By descent, and by the session that a member leads."""
    table_of = [(10, 1, 10), (11, 10, 10), (12, 1, 10), (13, 12, 13), (14, 1, 13), (20, 1, 20), (21, 20, 20)]
    processes = {pid: Process(pid, parent, session, 0) for pid, parent, session in table_of}
    assert family(10, processes) == [10, 11, 12, 13, 14]
    del processes[10]
    assert family(10, processes) == [11, 12, 13, 14]


def uses(cores: list[float]) -> list[Use]:
    """Samples a second apart during which others use so many cores."""
    ticks, found = 0.0, [Use(0.0, 0, 0)]
    for i, used in enumerate(cores):
        ticks += used * os.sysconf("SC_CLK_TCK")
        found.append(Use(i + 1.0, round(ticks), 0))
    return found


def test_waiting_for_a_quiet_machine() -> None:
    """One quiet second between two loud ones is not enough; a limit ends the waiting."""
    told: list[float] = []
    samples = iter(uses([1.0, 0.0, 1.0, 0.05, 0.05, 9.0]))
    assert wait_quiet(lambda: next(samples), sleep=lambda s: None, on_wait=told.append)[0]
    assert next(samples).at_s == 6.0
    assert told == [pytest.approx(1.0), pytest.approx(1.0)]
    loud = iter(uses([0.5] * 10))
    is_quiet, used = wait_quiet(lambda: next(loud), limit_s=4, sleep=lambda s: None)
    assert (is_quiet, used) == (False, pytest.approx(0.5))


def state(pid: int) -> str:
    """Of a process, as the kernel has it; "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def wait_for(pid: int, states: str) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        now = state(pid)
        if (now in states) if now else "gone" in states:
            return True
        time.sleep(0.02)
    return False


PARENT = "import subprocess, sys; p = subprocess.Popen(['sleep', '300']); print(p.pid, flush=True); p.wait()"


def test_an_engine_sleeps_and_ends_with_its_children(tmp_path: Path) -> None:
    guard = Guard()
    running = Running([sys.executable, "-c", PARENT], tmp_path / "log", guard, env={}, has_pipes=True)
    assert running.process.stdout is not None
    child = int(running.process.stdout.readline())
    running.pause()
    assert wait_for(running.pid, "T")
    assert wait_for(child, "T")
    running.resume()
    assert wait_for(child, "S")
    running.pause()
    running.stop()
    running.process.stdout.close()
    assert wait_for(child, "Z gone")
    assert running.process.returncode is not None
    guard.close()


def test_engines_end_with_a_bench_that_is_killed(tmp_path: Path) -> None:
    """kill -9 leaves it no time to do that itself; a sleeping engine would stay for ever."""
    script = (
        "import pathlib, sys, time\nfrom benchmarks.peers.processes import Guard, Running\n"
        f"r = Running([sys.executable, '-c', {PARENT!r}], pathlib.Path({str(tmp_path / 'log')!r}), Guard(), env={{}}, has_pipes=True)\n"
        "child = r.process.stdout.readline().strip(); r.pause(); print(r.pid, child, flush=True); time.sleep(300)"
    )
    bench = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=sizes.ROOT)
    assert bench.stdout is not None
    pids = [int(pid) for pid in bench.stdout.readline().split()]
    bench.send_signal(signal.SIGKILL)
    bench.wait()
    bench.stdout.close()
    assert len(pids) == 2
    assert all(wait_for(pid, "Z gone") for pid in pids)


def test_a_failed_installation_says_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last lines of the step stand in the message; a second call tries again, a done one does not, another pin starts anew."""
    with pytest.raises(AbsentError, match=r"making it failed with status 3: .*no compiler.*log.txt"):
        command = [sys.executable, "-c", "print('no compiler'); raise SystemExit(3)"]
        installs.run_step("llama", "making it", command, tmp_path)
    made: list[Path] = []
    monkeypatch.setitem(installs._MAKERS, "llama", made.append)
    home = installs.install("llama", tmp_path)
    (home / "kept").touch()
    assert installs.install("llama", tmp_path) == home
    assert made == [home]
    monkeypatch.setitem(installs.PINS, "llama", "another")
    installs.install("llama", tmp_path)
    assert made == [home, home]
    assert not (home / "kept").exists()


def test_models_of_the_peers_hold_the_same_weights(tmp_path: Path) -> None:
    """Q4_1 unpacked to float16 and written as a directory of bfloat16."""
    source = tmp_path / "hf"
    make_tiny("llama", source)
    packed = write_tiny_gguf(source, tmp_path / "m.gguf", kind_of=lambda name: Kind.Q4_1 if "mlp" in name else Kind.F32)
    models.write_gguf(packed, tmp_path / "f16.gguf")
    (tmp_path / "out").mkdir()
    models.write_weights(GGUFCheckpoint(packed), tmp_path / "out")
    true, half = GGUFCheckpoint(packed), GGUFCheckpoint(tmp_path / "f16.gguf")
    directory = SafetensorsDirectory().open(tmp_path / "out")
    assert directory is not None
    assert set(directory.tensors()) == set(half.tensors()) == set(true.tensors())
    for name in true.tensors():
        assert torch.equal(directory.read(name), true.read(name).to(torch.bfloat16)), name
        torch.testing.assert_close(half.read(name).float(), true.read(name).float(), rtol=1e-3, atol=1e-4)
    assert {info.dtype for name, info in half.tensors().items() if "mlp" in name} == {"float16"}
    assert directory.config["rope_theta"] == true.config["rope_parameters"]["rope_theta"]


def test_the_tokenizer_is_the_one_that_our_loader_makes(tmp_path: Path) -> None:
    (tmp_path / "made.json").write_text("{}")
    files = TokenizerFiles(None, lambda: tmp_path / "made.json", "template", (2,), bos_token="<s>", eos_token="</s>")
    (tmp_path / "out").mkdir()
    models.write_tokenizer(files, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    told = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (told["eos_token"], told["chat_template"]) == ("</s>", "template")
    with pytest.raises(AbsentError, match="no tokenizer"):
        models.write_tokenizer(replace(files, convert=None), tmp_path / "out")


def test_a_load_in_process_can_share_a_prefix(tmp_path: Path) -> None:
    """The second load finds in the cache what both begin with, and nothing where the prefix is another."""
    make_tiny("llama", tmp_path)
    processor = start_in_process(str(tmp_path), device="reference", num_blocks=64, block_size=16)
    load = Load(num_prompts=1, input_len=80, output_len=1, prefix_len=64, prefix_seed=3)
    computed = [
        sum(record.num_tokens for record in run_round(processor, play, show=False).records)
        for play in (load, replace(load, seed=1), replace(load, seed=2, prefix_seed=4))
    ]
    processor.client.close()
    assert computed == [80, 16, 80]


def test_sizes_are_of_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 1_500_000)
    (tmp_path / "mine-1.dist-info").mkdir()
    (tmp_path / "mine-1.dist-info" / "RECORD").write_text("a,,\nmissing,,\n")
    assert sizes.own(tmp_path, ["mine"]) == sizes.tree(tmp_path) == 1.5


def test_words_of_verdicts() -> None:
    assert Verdict(CLAIMS[0], None).word == "absent"
