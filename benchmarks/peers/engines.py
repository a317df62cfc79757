"""The engines that are compared, as data: what each is started with, and what it is compared to."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.peers import pins
from benchmarks.peers.installs import tcmalloc
from benchmarks.peers.models import MODEL, Models

Over = Literal["http", "process"]

MAX_SEQS = 32
"""Most requests at once, of every engine."""

CONTEXT = 1280
"""Tokens that a sequence may have: the prefix of 1,024, its own tokens and the answer, with room."""

KV_BYTES = 2 << 30
"""Of ours and of OpenVINO; see the pins for vLLM. No load fills a tenth of it."""


@dataclass(frozen=True, slots=True)
class Places:
    """homes: of the installed peers. port: for a server, 0 for a process."""

    homes: Mapping[str, Path]
    models: Models
    port: int = 0


@dataclass(frozen=True, slots=True)
class Engine:
    """One way to run a model.

    maker: "xllm", or the peer that must be installed. against: the engine of ours that it is compared to: the same transport and precision.
    health: the path that answers 200 when a server is ready.
    """

    name: str
    maker: str
    over: Over
    precision: str
    command: Callable[[Places], list[str]]
    against: str = ""
    health: str = "/health"
    env: Callable[[Places], dict[str, str | None]] = field(default=lambda places: {})

    @property
    def is_ours(self) -> bool:
        """Not a peer."""
        return self.maker == "xllm"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _serve(*flags: str) -> Callable[[Places], list[str]]:
    def command(places: Places) -> list[str]:
        settings = ["--max-num-seqs", str(MAX_SEQS), "--memory-bytes", str(KV_BYTES), "--dtype", "bfloat16"]
        address = ["--port", str(places.port), "--served-model-name", "model"]
        return [sys.executable, "-m", "xllm_core.cli", "serve", MODEL, *address, *settings, *flags]

    return command


def _arm(places: Places) -> list[str]:
    settings = {"dtype": "bfloat16", "max_num_seqs": MAX_SEQS, "memory_bytes": KV_BYTES}
    return [sys.executable, "-m", "benchmarks.arms", "--model", MODEL, "--settings", json.dumps(settings)]


def _vllm(places: Places) -> list[str]:
    python = str(places.homes["vllm"] / "env" / "bin" / "python")
    model = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(places.models.directory)]
    limits = ["--max-model-len", str(2 * CONTEXT), "--max-num-seqs", str(MAX_SEQS), "--dtype", "bfloat16"]
    return [*model, *limits, "--served-model-name", "model", "--host", "127.0.0.1", "--port", str(places.port)]


def _vllm_env(places: Places) -> dict[str, str | None]:
    """As its documentation advises for CPUs: tcmalloc and Intel's OpenMP loaded first, threads bound to the cores."""
    home = places.homes["vllm"]
    preloads = [tcmalloc(home), home / "env" / "lib" / "libiomp5.so"]
    return {
        "LD_PRELOAD": ":".join(str(path) for path in preloads if path is not None) or None,
        "VLLM_CPU_KVCACHE_SPACE": str(pins.VLLM_KV_GIB), "VLLM_CPU_OMP_THREADS_BIND": f"0-{_cores() - 1}", "VLLM_CACHE_ROOT": str(home / "cache"),
        "VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONPATH": None,
    }  # fmt: skip


def _llama(kind: str) -> Callable[[Places], list[str]]:
    def command(places: Places) -> list[str]:
        path = places.models.packed if kind == "Q4_1" else places.models.gguf(kind)
        server = [str(places.homes["llama"] / "build" / "bin" / "llama-server"), "-m", str(path), "--alias", "model"]
        # The cache of prompts outside the slots is off: prompts come once here, and slots keep the prefix that is asked for again.
        limits = ["--parallel", str(MAX_SEQS), "-c", str(MAX_SEQS * CONTEXT), "--cache-ram", "0"]
        threads = ["-t", str(_cores()), "-tb", str(_cores())]
        return [*server, *limits, *threads, "--host", "127.0.0.1", "--port", str(places.port), "--no-webui"]

    return command


def _openvino(places: Places) -> list[str]:
    python = str(places.homes["openvino"] / "env" / "bin" / "python")
    script = str(Path(__file__).with_name("openvino_arm.py"))
    return [python, script, str(places.models.gguf("F16")), str(MAX_SEQS), str(KV_BYTES), str(_cores())]


ENGINES = (
    Engine("xllm", "xllm", "http", "bf16", _serve(), health="/health/ready"),
    Engine("xllm-process", "xllm", "process", "bf16", _arm),
    Engine("xllm-int8", "xllm", "http", "int8", _serve("--quantization", "int8"), health="/health/ready"),
    Engine("xllm-q4_1", "xllm", "http", "q4_1", _serve("--quantization", "gguf"), health="/health/ready"),
    Engine("vllm", "vllm", "http", "bf16", _vllm, against="xllm", env=_vllm_env),
    Engine("openvino", "openvino", "process", "bf16", _openvino, against="xllm-process", env=lambda places: {"PYTHONPATH": None}),
    Engine("llama-bf16", "llama", "http", "bf16", _llama("BF16"), against="xllm"),
    Engine("llama-q8_0", "llama", "http", "int8", _llama("Q8_0"), against="xllm-int8"),
    Engine("llama-q4_1", "llama", "http", "q4_1", _llama("Q4_1"), against="xllm-q4_1"),
)  # fmt: skip


def choose(wanted: str | None) -> list[Engine]:
    """Engines by their names or makers, separated by commas; all for None. Raises ValueError for a name that is none of them."""
    if wanted is None:
        return list(ENGINES)
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    known = {engine.name for engine in ENGINES} | {engine.maker for engine in ENGINES}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no engine {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return [engine for engine in ENGINES if engine.name in names or engine.maker in names]
