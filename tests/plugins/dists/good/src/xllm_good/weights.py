"""Models that are made up: `toy:SEED` becomes a file that holds the seed, and opening it draws weights."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_core.errors import ModelNotFoundError
from xllm_core.models.llama import Llama
from xllm_core.plugins import Checkpoint, TensorInfo, TokenizerFiles

if TYPE_CHECKING:
    import torch

CONFIG: dict[str, Any] = {
    "architectures": ["ToyForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}


class ToyCheckpoint:
    """Random weights of a fixed seed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seed = int(path.read_text())
        self.config: Mapping[str, Any] = CONFIG
        self.generation_config: Mapping[str, Any] = {}

    def tensors(self) -> Mapping[str, TensorInfo]:
        """What Llama wants."""
        entries = Llama().weight_map({**CONFIG, "architectures": ["LlamaForCausalLM"]}).entries
        return {entry.name: TensorInfo(entry.shape, "float32") for entry in entries}

    def read(self, name: str) -> torch.Tensor:
        """Drawn from (seed, name)."""
        import torch

        number = int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:6])
        return torch.randn(self.tensors()[name].shape, generator=torch.Generator().manual_seed(number)) * 0.2

    def tokenizer(self) -> TokenizerFiles:
        """None: this model speaks token ids."""
        return TokenizerFiles(None, None, None, ())

    def fingerprint(self) -> str:
        """The seed is everything."""
        return hashlib.sha256(str(self.seed).encode()).hexdigest()


class ToyFormat:
    """A `WeightFormat`."""

    def resolve(self, reference: str) -> str | None:
        """`toy:SEED`, written to a file."""
        if not reference.startswith("toy:"):
            return None
        seed = reference.removeprefix("toy:")
        if not seed.isdigit():
            raise ModelNotFoundError(f"{reference!r}: a toy is named by a number, such as toy:1")
        path = Path(tempfile.mkdtemp(prefix="xllm-toy-")) / "model.toy"
        path.write_text(seed)
        return str(path)

    def open(self, path: Path) -> Checkpoint | None:
        """A .toy file."""
        return ToyCheckpoint(path) if path.suffix == ".toy" else None
