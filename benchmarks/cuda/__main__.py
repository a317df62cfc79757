"""xllm-cuda on a real GPU, in one command: conformance, verify, graphs, throughput beside vLLM. The last line is JSON with everything.

    python -m benchmarks.cuda --model DIR

Each part runs in processes of its own. Graphs: our engine with decode steps replayed from recorded graphs and without them, in turns. Throughput: all
requests at once, our engine and vLLM in turns. Both say the median of the ratios with a 95 % interval.
vLLM brings its own torch, so it has an environment of its own, named by --vllm-python; without one that part says so.
Exit status 1 if a part failed, 2 if there is no GPU. A part that fails is in the JSON, and the others run all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.pairs import interleave

VLLM = """
import json, random, sys, time
model, dtype, count, prompt, new, context, seed = json.loads(sys.argv[1])
from vllm import LLM, SamplingParams
chance = random.Random(seed)
llm = LLM(model, dtype=dtype, max_model_len=context, max_num_seqs=count, seed=0, enable_prefix_caching=False)
vocab = llm.get_tokenizer().vocab_size
params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
rows = lambda: [{"prompt_token_ids": [chance.randrange(vocab) for _ in range(prompt)]} for _ in range(count)]
llm.generate(rows(), SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
started = time.perf_counter()
llm.generate(rows(), params, use_tqdm=False)
import vllm
print("\\n" + json.dumps({"output_tokens_per_s": count * new / (time.perf_counter() - started), "version": vllm.__version__}))
"""


class PartError(Exception):
    """A part came to no result."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is run. device: pin of `[use]`. vllm_python: interpreter of an environment with vLLM, "" for none."""

    model: str
    dtype: str
    device: str
    pairs: int
    num_prompts: int
    input_len: int
    output_len: int
    vllm_python: str
    is_dry: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts, print a line for each, and the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model directory or hub id; needed on a GPU, a tiny random one in a dry run")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument(
        "--pairs", type=int, default=5, help="interleaved rounds of ours and vLLM (default %(default)s)"
    )
    parser.add_argument("--num-prompts", type=int, default=256, help="requests of a round (default %(default)s)")
    parser.add_argument("--input-len", type=int, default=512, help="prompt tokens (default %(default)s)")
    parser.add_argument("--output-len", type=int, default=128, help="new tokens (default %(default)s)")
    parser.add_argument(
        "--vllm-python",
        default="",
        metavar="PATH",
        help="python of an environment with vLLM; without it there is no comparison",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="on the CPU's reference, with a tiny random model: proves this command, not the kernels",
    )
    args = parser.parse_args(arguments)
    missing = "" if args.dry_run else missing_gpu()
    if missing:
        print(f"no GPU can be used here: {missing}\n--dry-run proves this command without one", file=sys.stderr)
        print(json.dumps({"ok": False, "problem": missing}))
        return 2
    if not args.dry_run and not args.model:
        parser.error("--model is needed: a directory or hub id of a dense model")
    if args.vllm_python and not shutil.which(args.vllm_python):
        parser.error(f"--vllm-python {args.vllm_python}: no program is there")
    with tempfile.TemporaryDirectory(prefix="xllm-cuda-bench-") as folder:
        job = dry(Path(folder), args.vllm_python) if args.dry_run else Job(
            args.model, args.dtype, "cuda/cuda", args.pairs, args.num_prompts, args.input_len, args.output_len, args.vllm_python, False
        )  # fmt: skip
        results: dict[str, Any] = {"job": asdict(job), "machine": machine(job)}
        parts = {"conformance": conformance, "verify": verify, "graphs": graphs, "throughput": throughput}
        for name, part in parts.items():
            try:
                results[name] = part(job)
            except (PartError, subprocess.TimeoutExpired) as error:
                results[name] = {"ok": False, "words": str(error)}
            print(f"{name}: {results[name]['words']}", flush=True)
    results["ok"] = all(results[name]["ok"] for name in parts)
    print(json.dumps(results))
    return 0 if results["ok"] else 1


def missing_gpu() -> str:
    """Why the plugin's probe says no, in a process of its own; "" if it says yes."""
    code = "import json; from xllm_cuda.probe import probe; print(json.dumps(probe()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        return f"xllm-cuda cannot be asked: {(done.stderr.strip().splitlines() or ['no message'])[-1]}; pip install xllm-cuda"
    return json.loads(done.stdout.splitlines()[-1]) or ""


def dry(folder: Path, vllm_python: str) -> Job:
    """A few tokens of a tiny model on the reference device."""
    from xllm_core.testing.tiny import tiny_config, write_tiny

    model = write_tiny(tiny_config("LlamaForCausalLM", initializer_range=0.5), folder / "tiny")
    return Job(str(model), "float32", "core/reference", 2, 4, 8, 4, vllm_python, True)


def machine(job: Job) -> dict[str, Any]:
    """What it ran on."""
    code = (
        "import json, torch; p = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None; "
        "print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda, 'gpu': p and p.name, 'bytes': p and p.total_memory}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def conformance(job: Job) -> dict[str, Any]:
    """The kit on the device; in a dry run its static part, which needs none."""
    with tempfile.TemporaryDirectory(prefix="xllm-cuda-bench-") as folder:
        path = Path(folder) / "report.json"
        more = ["-k", "test_static"] if job.is_dry else ["--require-device"]
        done = xllm("plugins", "check", "cuda", "--report", str(path), *more)
        report = json.loads(path.read_text()) if path.exists() else {"problem": last_line(done)}
    return {"ok": done.returncode == 0, "report": report, "words": last_line(done)}


def verify(job: Job) -> dict[str, Any]:
    """The whole matrix, of one prompt length in a dry run."""
    more = ["--quick", "--row", "prefix cache"] if job.is_dry else []
    done = xllm("verify", job.model, "--dtype", job.dtype, "--use", f"device={job.device}", "--json", *more)
    if done.returncode not in (0, 1) or not done.stdout.strip():
        return {"ok": False, "report": None, "words": last_line(done)}
    (report,) = json.loads(done.stdout.splitlines()[-1])
    wrong = [row["feature"] for row in report["rows"] if not row["is_identical"]]
    words = f"{len(report['rows'])} rows on {report['device']}" + (
        f", different: {', '.join(wrong)}" if wrong else ", all identical"
    )
    return {"ok": bool(report["has_passed"]), "report": report, "words": words}


def throughput(job: Job) -> dict[str, Any]:
    """Output tokens per second, ours and vLLM's in turns. Ours against ours where a dry run has no vLLM."""
    if not job.vllm_python and not job.is_dry:
        figures = [ours(job, seed) for seed in range(job.pairs)]
        return {
            "ok": True,
            "ours": figures,
            "vllm": None,
            "words": f"{max(figures):.1f} tokens/s at best; give --vllm-python to compare",
        }
    them = vllm if job.vllm_python else ours
    ratio = interleave(lambda seed: ours(job, seed), lambda seed: them(job, seed), job.pairs)
    name = "vLLM" if job.vllm_python else "ourselves (dry run)"
    words = f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] of {name}, {job.pairs} pairs"
    return {
        "ok": True,
        "ours": list(ratio.ours),
        "vllm": list(ratio.theirs),
        "ratio": asdict(ratio),
        "against": name,
        "words": words,
    }


def graphs(job: Job) -> dict[str, Any]:
    """Output tokens per second with graphs over those without. On a GPU it is an error if nothing was replayed."""
    shares: list[float] = []

    def replaying(seed: int) -> float:
        figures = bench(job, seed, "--graphs")
        shares.append(float(figures["replayed_share"]))
        return float(figures["output_tokens_per_s"])

    ratio = interleave(replaying, lambda seed: float(bench(job, seed, "--no-graphs")["output_tokens_per_s"]), job.pairs)
    words = f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] of steps launched one by one, {min(shares):.1%} replayed, {job.pairs} pairs"
    return {"ok": job.is_dry or min(shares) > 0, "ratio": asdict(ratio), "replayed_share": shares, "words": words}


def ours(job: Job, seed: int) -> float:
    """One round of ours."""
    return float(bench(job, seed)["output_tokens_per_s"])


def bench(job: Job, seed: int, *more: str) -> dict[str, Any]:
    """A warm-up, then the measured round."""
    done = xllm(
        "bench", "throughput", job.model, "--dtype", job.dtype, "--use", f"device={job.device}", "--num-prompts", str(job.num_prompts),
        "--input-len", str(job.input_len), "--output-len", str(job.output_len), "--rounds", "1", "--seed", str(seed), "--json", *more,
    )  # fmt: skip
    if done.returncode:
        raise PartError(f"xllm bench failed: {last_line(done)}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def vllm(job: Job, seed: int) -> float:
    """One round of vLLM, with the same number of requests and tokens."""
    context = job.input_len + job.output_len + 16
    question = json.dumps([job.model, job.dtype, job.num_prompts, job.input_len, job.output_len, context, seed])
    done = subprocess.run(
        [job.vllm_python, "-c", VLLM, question], capture_output=True, text=True, timeout=3600, check=False
    )
    if done.returncode:
        raise PartError(f"vLLM failed: {last_line(done)}")
    return float(json.loads(done.stdout.splitlines()[-1])["output_tokens_per_s"])


def xllm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-m", "xllm_core.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=7200, check=False)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The last thing that a process said."""
    said = (done.stdout if done.returncode in (0, 1) and done.stdout.strip() else done.stderr).strip().splitlines()
    return said[-1] if said else f"it ended with status {done.returncode} and said nothing"


if __name__ == "__main__":
    sys.exit(main())
