"""`.gguf` files: one file with configuration, tokenizer and tensors, as llama.cpp writes them. Tensors are unpacked when read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf.constants import GGML_QUANT_SIZES, MODEL_ARCH, MODEL_ARCH_NAMES
from gguf.tensor_mapping import get_tensor_name_map

from xllm_core.errors import ModelFormatError, ModelNotFoundError
from xllm_core.plugins.contracts.weights import PackedTensor, TensorInfo, TokenizerFiles
from xllm_core.runtime.formats.gguf_config import config_from_header
from xllm_core.runtime.formats.gguf_header import GGUFHeader, GGUFTensor
from xllm_core.runtime.formats.gguf_tokenizer import KNOWN_PRE_TOKENIZERS, convert_tokenizer

if TYPE_CHECKING:
    import torch

# Stored kind -> dtype of the unpacked values.
_UNPACKED = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "Q8_0": "float32",
    "Q4_0": "float32",
    "Q4_1": "float32",
}
# transformers' modules of the families we read; the `gguf` package knows what llama.cpp calls each.
_MODULES = ("model.embed_tokens", "model.norm", "lm_head")
_LAYER_MODULES = (
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_SAMPLED_BYTES = 64


class GGUF:
    """`contracts.weights.WeightFormat` for paths that end in .gguf."""

    def resolve(self, reference: str) -> str | None:
        """A path to a .gguf file, as it is."""
        if not reference.lower().endswith(".gguf") or reference.startswith("pkg:"):
            return None
        path = Path(reference).expanduser()
        if path.is_file():
            return str(path)
        raise ModelNotFoundError(f"{path}: no such file; give the path of a .gguf file that exists")

    def open(self, path: Path) -> GGUFCheckpoint | None:
        """Open a file by its name's ending; what is inside must then be GGUF."""
        return GGUFCheckpoint(path) if path.suffix.lower() == ".gguf" and path.is_file() else None


class GGUFCheckpoint:
    """`contracts.weights.Checkpoint` of one file, kept mapped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._header = GGUFHeader(path)
        except OSError as error:
            raise ModelFormatError(
                f"{path}: cannot be read ({error.strerror}); check that it exists and who may read it"
            ) from error
        self._config = config_from_header(self._header)
        self._stored = self._name_tensors()
        self._tensors = {
            name: TensorInfo(tensor.shape, _UNPACKED[tensor.kind.name]) for name, tensor in self._stored.items()
        }

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def config(self) -> Mapping[str, Any]:
        """Made from the metadata."""
        return self._config

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The ids of the tokens that begin and end a text."""
        config: dict[str, Any] = {"eos_token_id": list(self._eos_token_ids())}
        if (bos := self._token_id("bos")) is not None:
            config["bos_token_id"] = bos
        return config

    def tensors(self) -> Mapping[str, TensorInfo]:
        """By transformers' names."""
        return self._tensors

    def read(self, name: str) -> torch.Tensor:
        """Unpack one tensor; llama's query and key rows go back into the order of half-split rotation."""
        from xllm_core.runtime.formats.gguf_quants import unpack

        stored = self._find(name)
        return self._in_order(unpack(self._raw(stored), stored.kind, stored.shape), name)

    def packed(self) -> Mapping[str, str]:
        """Matrices whose rows are blocks of a scale and codes."""
        return {
            name: tensor.kind.name
            for name, tensor in self._stored.items()
            if len(tensor.shape) == 2 and GGML_QUANT_SIZES[tensor.kind][0] > 1
        }

    def read_packed(self, name: str) -> PackedTensor:
        """Blocks as they lie in the file; only llama's query and key rows, which change places, are copied."""
        stored = self._find(name)
        items, size = GGML_QUANT_SIZES[stored.kind]
        blocks = self._raw(stored).view(stored.shape[0], stored.shape[1] // items, size)
        return PackedTensor(stored.kind.name, self._in_order(blocks, name))

    def tokenizer(self) -> TokenizerFiles:
        """Conversion is left to `convert`. extra: "pre_tokenizer", and "warnings" where its splitting is not known to be right."""
        header = self._header
        model, pre = header.get("tokenizer.ggml.model", str, None), header.get("tokenizer.ggml.pre", str, None)
        extra: dict[str, Any] = {"pre_tokenizer": pre}
        if model == "gpt2" and pre not in KNOWN_PRE_TOKENIZERS:
            extra["warnings"] = (
                f"{self._path}: text is split by the rules of {pre!r}, which are not known here; token ids may differ from the"
                " original tokenizer's. Put the original tokenizer.json into a Hugging Face directory to be sure",
            )
        has_tokens = "tokenizer.ggml.tokens" in header.metadata
        bos, eos = self._token_id("bos"), self._token_id("eos")
        return TokenizerFiles(
            tokenizer_json=None,
            convert=partial(convert_tokenizer, self._path, self.fingerprint(), pre) if has_tokens else None,
            chat_template=header.get("tokenizer.chat_template", str, None),
            eos_token_ids=self._eos_token_ids(),
            bos_token=header.item("tokenizer.ggml.tokens", bos) if bos is not None else None,
            eos_token=header.item("tokenizer.ggml.tokens", eos) if eos is not None else None,
            adds_bos=header.get("tokenizer.ggml.add_bos_token", bool, model == "llama"),
            extra=extra,
        )

    def fingerprint(self) -> str:
        """SHA-256 over the header, the size, and the first, middle and last bytes of each tensor."""
        header, data = self._header, self._header.data
        digest = hashlib.sha256(data[: header.header_bytes])
        digest.update(header.size_bytes.to_bytes(8, "little"))
        for tensor in header.tensors.values():
            for start in (0, max(0, tensor.num_bytes // 2), max(0, tensor.num_bytes - _SAMPLED_BYTES)):
                first = tensor.offset + start
                digest.update(data[first : min(first + _SAMPLED_BYTES, tensor.offset + tensor.num_bytes)])
        return digest.hexdigest()

    def _find(self, name: str) -> GGUFTensor:
        if name not in self._stored:
            raise ModelFormatError(f"{self._path}: holds no tensor for {name!r}")
        return self._stored[name]

    def _raw(self, stored: GGUFTensor) -> torch.Tensor:
        import torch

        return torch.frombuffer(self._header.data, dtype=torch.uint8, count=stored.num_bytes, offset=stored.offset)

    def _in_order(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        heads = {".self_attn.q_proj.": "num_attention_heads", ".self_attn.k_proj.": "num_key_value_heads"}
        field = next((field for part, field in heads.items() if part in name), None)
        if field is None or self._config["model_type"] != "llama":
            return rows
        return _halves(rows, self._config[field])

    def _eos_token_ids(self) -> tuple[int, ...]:
        """End of text, of turn, of message: llama.cpp stops at any of them."""
        found = (self._token_id(name) for name in ("eos", "eot", "eom"))
        return tuple(dict.fromkeys(token for token in found if token is not None))

    def _token_id(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        token = self._header.get(key, int, None)
        if token is not None and not 0 <= token < self._config["vocab_size"]:
            raise self._header.error(
                f"{key} is {token}, the vocabulary has {self._config['vocab_size']} tokens; convert the model again"
            )
        return token

    def _name_tensors(self) -> dict[str, GGUFTensor]:
        """Tensors under transformers' names; those without one keep their own, for the loader to report as surplus."""
        num_layers = self._config["num_hidden_layers"]
        if not isinstance(num_layers, int) or not 0 < num_layers <= len(self._header.tensors):
            raise self._header.error(
                f"block_count is {num_layers!r} with {len(self._header.tensors)} tensors; convert the model again"
            )
        architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == self._config["model_type"])
        known = get_tensor_name_map(MODEL_ARCH(architecture), num_layers)
        modules = (
            *_MODULES,
            *(f"model.layers.{layer}.{module}" for layer in range(num_layers) for module in _LAYER_MODULES),
        )
        theirs = {known.get_name(module): module for module in modules}
        named: dict[str, GGUFTensor] = {}
        for name, tensor in self._header.tensors.items():
            if name == "rope_freqs.weight":
                continue  # part of the configuration
            if tensor.kind.name not in _UNPACKED:
                raise self._header.error(
                    f"tensor {name!r} is packed as {tensor.kind.name}; read are {', '.join(_UNPACKED)}: take another quantisation"
                )
            stem, _, suffix = name.rpartition(".")
            named[f"{theirs[stem]}.{suffix}" if stem in theirs else name] = tensor
        return named


def _halves(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp interleaves the two halves of each head's rows, to rotate neighbours; undo that. rows: [heads * D, ...]."""
    size = len(rows) // num_heads
    return rows.view(num_heads, size // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
