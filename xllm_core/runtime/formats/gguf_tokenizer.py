"""tokenizer.json from a GGUF file: made once by transformers' importer in a child process, mended, and cached by content.

The importer costs six seconds and imports torch, which is why it never runs in this process. Where it does not know how a
vocabulary's text was split before merging, the splitting is put right here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from xllm_core.errors import ModelFormatError

_TIMEOUT_S = 300
# Bump when the conversion changes, so that older results are made again.
_REVISION = 1

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_SINGLE_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]}

# llama.cpp's name of a splitting rule -> what replaces the importer's, None where the importer's is right.
KNOWN_PRE_TOKENIZERS: dict[str, dict[str, Any] | None] = {
    "smollm": _SINGLE_DIGITS,
    "gpt-2": None,
    "llama3": None,
    "llama-v3": None,
    "llama-bpe": None,
    "qwen2": None,
    "deepseek-r1-qwen": None,
    "tekken": None,
}

# Runs in the child; arguments: directory, file name, output.
_CHILD = """
import sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], gguf_file=sys.argv[2], local_files_only=True)
tokenizer.backend_tokenizer.save(sys.argv[3])
"""


def cache_directory() -> Path:
    """$XLLM_CACHE_DIR, or ~/.cache/xllm."""
    given = os.environ.get("XLLM_CACHE_DIR")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "xllm"


def convert_tokenizer(source: Path, fingerprint: str, pre: str | None) -> Path:
    """The tokenizer.json of a GGUF file. Two processes may do this at once: the file appears whole, whoever is first.

    Raises ModelFormatError with the importer's last words when it fails, or when the cache cannot be written.
    """
    target = cache_directory() / "tokenizers" / f"{fingerprint[:32]}-{_REVISION}.json"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / "tokenizer.json"
            _run_importer(source, made)
            _mend(made, pre)
            made.replace(target)
    except OSError as error:
        raise ModelFormatError(
            f"{source}: its tokenizer cannot be cached in {target.parent} ({error}); set XLLM_CACHE_DIR to a folder that can be written"
        ) from error
    return target


def _run_importer(source: Path, made: Path) -> None:
    command = [sys.executable, "-c", _CHILD, str(source.parent), source.name, str(made)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ModelFormatError(
            f"{source}: converting its tokenizer took more than {_TIMEOUT_S} s; give prompts as token ids"
        ) from None
    if done.returncode != 0 or not made.exists():
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ModelFormatError(
            f"{source}: transformers cannot convert its tokenizer ({last[0]}); use the model as a Hugging Face directory with tokenizer.json"
        )


def _mend(made: Path, pre: str | None) -> None:
    right = KNOWN_PRE_TOKENIZERS.get(pre) if pre is not None else None
    if right is not None:
        tokenizer = json.loads(made.read_text(encoding="utf-8"))
        tokenizer["pre_tokenizer"] = right
        made.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
