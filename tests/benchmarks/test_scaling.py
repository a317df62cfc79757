"""`make bench-scaling`: what a model costs, steps that count, the line and what lies beyond it, the command line, and a short real run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from benchmarks.peers.workloads import FLOPS_128, FLOPS_1024, FLOPS_NEW, WEIGHT_BYTES
from benchmarks.scaling import __main__ as program
from benchmarks.scaling import figures, plot
from benchmarks.scaling.costs import Costs, KVCost, costs_of, kv_costs
from benchmarks.scaling.points import CONTEXT, CURVES, DECODE, LONG, PREFILL, Sample, decode_steps, rotated
from tests.fixtures.tiny_models import make_tiny
from xllm_core.plugins.contracts.kv import KVGroupSpec, KVTensorSpec
from xllm_core.testing.tiny_gguf import Kind, write_tiny_gguf

DEMO = Costs(268_959_744, 212_336_640, 56_623_104, (KVCost(23_040, 69_120),))
"""SmolLM2-135M in bfloat16."""

READ, PEAK = 32e9, 435e9


def sizes_of(folder: Path) -> dict[str, int]:
    """Elements of every matrix."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    return {name: shape[0] * shape[1] for name, shape in shapes.items() if len(shape) == 2}


def test_costs_are_those_of_the_files(tmp_path: Path) -> None:
    """Every matrix but the table of embeddings; per pair of token and position two products of heads by their width, a layer."""
    folder = make_tiny("llama", tmp_path, tie_word_embeddings=False)
    matrices = sizes_of(folder)
    table, head = matrices.pop("model.embed_tokens.weight"), matrices.pop("lm_head.weight")
    body = sum(matrices.values())
    assert table == head == 128 * 32
    costs = costs_of(str(folder), device="core/reference", dtype="bfloat16")
    kv = KVCost(position_bytes=2 * 2 * 2 * 8 * 2, pair_ops=2 * 2 * 4 * (8 + 8))
    assert costs == Costs(2 * (body + head), 2 * body, 2 * head, (kv,))
    eight = costs_of(str(folder), device="core/reference", dtype="bfloat16", quantization="int8")
    assert isinstance(eight, Costs)
    rows = 128 + 2 * (32 + 16 + 16 + 32 + 64 + 64 + 32)
    assert (eight.weight_bytes, eight.has_peak) == (body + head + 4 * rows, False)


def test_costs_of_blocks_are_those_of_the_file(tmp_path: Path) -> None:
    """4 bits, a scale and a minimum of 16 bits for 32 weights; what the file does not pack is read in bfloat16. The table is the head, too."""
    folder = make_tiny("llama", tmp_path / "hf", tie_word_embeddings=True, intermediate_size=96)
    packed = write_tiny_gguf(
        folder, tmp_path / "m.gguf", kind_of=lambda name: Kind.Q4_1 if "mlp" in name else Kind.BF16
    )
    costs = costs_of(str(packed), device="core/reference", dtype="bfloat16", quantization="gguf")
    assert isinstance(costs, Costs)
    matrices = sizes_of(folder)
    in_blocks = sum(size for name, size in matrices.items() if "gate" in name or "up_" in name or "down" in name)
    assert costs.weight_bytes == in_blocks // 32 * 20 + 2 * (sum(matrices.values()) - in_blocks)


def test_costs_that_are_not_known_say_why(tmp_path: Path) -> None:
    experts = costs_of(str(make_tiny("mixtral", tmp_path)), device="core/reference", dtype="bfloat16")
    assert isinstance(experts, str)
    assert "experts" in experts
    state = KVGroupSpec("state", "recurrent", (0,), (KVTensorSpec("s", (4, 4), "float32"),))
    assert "state" in str(kv_costs([state], 4))


def test_limits_are_those_of_the_other_benchmarks() -> None:
    """The same machine has the same limits; of a batch, the one that takes longer."""
    one, many, deep = (DEMO.decode(batch, context, READ, PEAK) for batch, context in ((1, 0.0), (64, 0.0), (1, 8000.0)))
    assert (one.by, many.by, deep.by) == ("memory", "products", "memory")
    assert one.seconds == pytest.approx(WEIGHT_BYTES / READ, rel=0.01)
    assert many.seconds == pytest.approx(64 * 269e6 / PEAK, rel=0.01)
    assert deep.seconds == pytest.approx((WEIGHT_BYTES + 8000 * 23_040) / READ, rel=0.01)
    for length, ops in ((1024, FLOPS_1024), (128, FLOPS_128)):
        limit = DEMO.prefill(length, READ, PEAK)
        assert limit is not None
        assert limit.seconds == pytest.approx(length * ops / PEAK, rel=0.01)
    whole = DEMO.decode(1000, 192.0, READ, PEAK)
    assert whole.seconds == pytest.approx(1000 * FLOPS_NEW / PEAK, rel=0.01)
    windowed = KVCost(1, 1, window=4)
    assert [windowed.seen(3), windowed.seen(9), windowed.pairs(3), windowed.pairs(6)] == [
        3,
        4,
        6,
        1 + 2 + 3 + 4 + 4 + 4,
    ]
    bytes_only = Costs(DEMO.weight_bytes, DEMO.body_ops, DEMO.head_ops, DEMO.kv, has_peak=False)
    assert bytes_only.prefill(1024, READ, PEAK) is None
    assert bytes_only.decode(64, 0.0, READ, PEAK).by == "memory"


def test_steps_that_count() -> None:
    """Those in which all sequences decode: not the prompts', nor those where some have ended."""
    steps = [(1.0, 2, 64, 64), (5.0, 2, 2, 66), (5.5, 2, 2, 68), (6.5, 2, 2, 70), (9.5, 1, 1, 36)]
    assert decode_steps(steps, 2) == (pytest.approx(0.75), pytest.approx(34.5))
    with pytest.raises(RuntimeError, match="only 1 decoded all 1 sequences"):
        decode_steps(steps, 1)


def samples(curve: str, seconds: dict[int, float], num_rounds: int = 5) -> list[Sample]:
    """Rounds that drift by a tenth, each size as slow as told, at the limits of the demo model."""
    return [
        Sample(
            curve, size, number, took * (1 + number / 40), size / took, float(size), DEMO.decode(1, float(size), READ, PEAK), 32.0, 435.0
        )
        for number in range(num_rounds) for size, took in seconds.items()
    ]  # fmt: skip


def test_growth_is_met_by_a_line_and_missed_by_a_bend() -> None:
    """A line through all contexts would follow the bend; drift of whole rounds is no growth."""
    found = figures.growth(samples(CONTEXT, {c: 0.010 + 1e-6 * c for c in LONG.contexts}), 23_040)
    assert found is not None
    assert found.fitted == (128, 512, 1024, 2048)
    assert set(found.beyond) == {4096, 8192}
    assert [found.beyond[8192].median, found.beyond[8192].high] == pytest.approx([1, 1])
    assert found.kv_gb_s == pytest.approx(23.04, rel=0.06)
    assert figures.verdict(found).startswith("met ")
    bent = figures.growth(samples(CONTEXT, {c: 0.010 + 1e-6 * c + 1e-10 * c * c for c in LONG.contexts}))
    assert bent is not None
    assert bent.beyond[8192].median > 1.15
    assert figures.verdict(bent).startswith("MISSED")
    assert figures.verdict(figures.growth(samples(CONTEXT, {128: 0.01, 256: 0.02}))).startswith("absent")
    assert figures.growth(samples(DECODE, {1: 0.01})) is None


def test_the_whole_interval_has_to_lie_below() -> None:
    """A round in three that is much slower at the longest context lifts the upper end beyond the target, not the median."""
    rounds = [s for s in samples(CONTEXT, {128: 0.01, 512: 0.01, 2048: 0.01}, 3) if (s.size, s.round) != (2048, 1)]
    rounds += [s for s in samples(CONTEXT, {2048: 0.02}, 3) if s.round == 1]
    found = figures.growth(rounds)
    assert found is not None
    assert found.beyond[2048].median == pytest.approx(1)
    assert not found.is_met


def test_a_falling_line_is_level() -> None:
    """Noise in the shorter contexts must not excuse nor condemn the longer ones."""
    assert figures.fit([(100, 0.012), (200, 0.010)]) == figures.Line(pytest.approx(0.011), 0.0)
    assert figures.fit([(0, 1.0), (1, 3.0), (2, 5.0)]) == figures.Line(pytest.approx(1.0), pytest.approx(2.0))


def test_table_and_picture_hold_every_point(tmp_path: Path) -> None:
    seconds = {n: 0.010 + 1e-4 * n for n in (1, 4, 16)}
    measured = [s for curve in CURVES for s in samples(curve, seconds)]
    found = figures.points(measured, DECODE)
    assert [point.size for point in found] == [1, 4, 16]
    assert found[0].gain is not None
    assert found[0].gain.median == 1
    assert found[2].ms.median == pytest.approx(11.6 * 1.05)
    assert found[2].share is not None
    assert found[2].share.median == pytest.approx(DEMO.decode(1, 16.0, READ, PEAK).seconds / 0.0116 / 1.05, rel=1e-3)
    lines = figures.table(found)
    assert [line.split()[0] for line in lines[2:5]] == ["1", "4", "16"]
    assert all("memory" in line for line in lines[2:5])
    assert figures.table([]) == []
    told = json.loads(json.dumps(figures.as_json(measured, figures.growth(measured))))
    assert len(told["points"]) == 9
    assert len(told["samples"]) == len(measured)
    plot.draw(measured, (1, 4), "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong is said with what is right; a missing matplotlib before anything runs, with the way around it."""
    args = program.parse(["--only", "context, decode", "--quick"])
    assert (args.only, args.rounds, program.parse([]).rounds) == ([CONTEXT, DECODE], 1, 10)
    for wrong, said in ((["--only", "contxt"], "contxt"), (["--rounds", "0"], "at least 1")):
        with pytest.raises(SystemExit):
            program.parse(wrong)
        assert said in capsys.readouterr().err
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        program.parse([])
    assert "pip install 'xllm-core[plots]'" in capsys.readouterr().err
    assert program.parse(["--no-picture"]).no_picture
    assert rotated((1, 2, 3), 1) == [2, 3, 1]


def test_a_short_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every curve of a tiny model, in an engine's process; sizes that it cannot hold are left out by name."""
    model = make_tiny("llama", tmp_path / "model", max_position_embeddings=128)
    arguments = ["--model", str(model), "--device", "core/reference", "--quick", "--results", str(tmp_path / "out")]
    assert program.main(arguments) == 0
    said = capsys.readouterr().out
    assert "prefill: without 128; the model takes 128 tokens" in said
    assert "context: without 256" in said
    (written,) = (tmp_path / "out").glob("*.json")
    told = json.loads(written.read_text())
    assert {curve: [p["size"] for p in told["points"] if p["curve"] == curve] for curve in CURVES} == {
        DECODE: [1, 2, 4], PREFILL: [32, 64], CONTEXT: [32, 64, 128],
    }  # fmt: skip
    assert all(sample["seconds"] > 0 and sample["limit"]["seconds"] > 0 for sample in told["samples"])
    contexts = {s["size"]: s["context"] for s in told["samples"] if s["curve"] == CONTEXT}
    for size, context in contexts.items():
        assert size - 8 < context <= size
    assert told["arguments"]["rounds"] == 1
    assert told["costs"]["has_peak"]
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
