"""A Hugging Face directory: config.json, model.safetensors (or shards with an index), and the tokenizer's files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_core.errors import ModelFormatError, ModelNotFoundError
from xllm_core.plugins.contracts.weights import TensorInfo, TokenizerFiles
from xllm_core.runtime.formats.json_file import read_object
from xllm_core.runtime.formats.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    import torch

_CONFIG, _SINGLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SAMPLED_BYTES = 64


class SafetensorsDirectory:
    """`contracts.weights.WeightFormat` for directories with a config.json."""

    def resolve(self, reference: str) -> str | None:
        """A directory that exists, or a path that can only be meant as one."""
        if reference.startswith("pkg:"):
            return None
        path = Path(reference).expanduser()
        if path.is_dir():
            return str(path)
        if reference.startswith(("/", "./", "../", "~")) or "\\" in reference:
            raise ModelNotFoundError(
                f"{path}: no such directory; give a Hugging Face directory, a .gguf file, a hub id or pkg:NAME"
            )
        return None

    def open(self, path: Path) -> SafetensorsCheckpoint | None:
        """Open a directory; every directory is taken to be ours."""
        return SafetensorsCheckpoint(path) if path.is_dir() else None


class SafetensorsCheckpoint:
    """`contracts.weights.Checkpoint` of a directory; its files stay mapped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if not (path / _CONFIG).exists():
            raise ModelFormatError(
                f"{path}: holds no {_CONFIG}; is this the model's directory, and is the download complete?"
            )
        self._config = {**read_object(path / _CONFIG), "_source": str(path / _CONFIG)}
        self._generation_config = read_object(path / "generation_config.json", is_optional=True)
        self._files = self._open_files()
        self._home = {name: file for file in self._files for name in file.tensors}

    @property
    def path(self) -> Path:
        """The directory."""
        return self._path

    @property
    def files(self) -> list[Path]:
        """Those with tensors."""
        return [file.path for file in self._files]

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""
        return self._config

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """generation_config.json, or nothing."""
        return self._generation_config

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Of all files."""
        return {name: file.tensors[name].info for name, file in self._home.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor; aliases the mapped file."""
        if name not in self._home:
            raise ModelFormatError(f"{self._path}: holds no tensor {name!r}")
        return self._home[name].read(name)

    def tokenizer(self) -> TokenizerFiles:
        """tokenizer.json and what lies beside it. A directory without one still serves prompts of token ids."""
        made = self._path / "tokenizer.json"
        config = read_object(self._path / "tokenizer_config.json", is_optional=True)
        special = read_object(self._path / "special_tokens_map.json", is_optional=True)
        adds_bos = config.get("add_bos_token")
        return TokenizerFiles(
            tokenizer_json=made if made.exists() else None,
            convert=None,
            chat_template=self._chat_template(config),
            eos_token_ids=self._eos_token_ids(),
            bos_token=_token_text(config.get("bos_token", special.get("bos_token"))),
            eos_token=_token_text(config.get("eos_token", special.get("eos_token"))),
            adds_bos=adds_bos if isinstance(adds_bos, bool) else None,
            extra=config,
        )

    def fingerprint(self) -> str:
        """SHA-256 over the configuration, each file's header and size, and the first, middle and last bytes of each tensor."""
        config = {key: value for key, value in self._config.items() if not key.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for file in self._files:
            digest.update(file.size_bytes.to_bytes(8, "little"))
            digest.update(file.header_bytes)
            for name in sorted(file.tensors):
                stored = file.tensors[name]
                for start in (0, stored.num_bytes // 2, max(0, stored.num_bytes - _SAMPLED_BYTES)):
                    digest.update(file.sample(stored, start, _SAMPLED_BYTES))
        return digest.hexdigest()

    def _open_files(self) -> list[SafetensorsFile]:
        single, index = self._path / _SINGLE, self._path / _INDEX
        if index.exists():
            return self._open_shards(index)
        if single.exists():
            return [SafetensorsFile(single)]
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in self._path.glob(pattern))
        hint = (
            f"; {', '.join(others[:3])} would run code when opened and is not read: save it as safetensors"
            if others
            else ""
        )
        raise ModelFormatError(
            f"{self._path}: holds neither {_SINGLE} nor {_INDEX}{hint or '; is the download complete?'}"
        )

    def _open_shards(self, index: Path) -> list[SafetensorsFile]:
        """The shards of an index, which must name exactly what they hold."""
        homes = read_object(index).get("weight_map")
        if not isinstance(homes, dict) or not all(isinstance(home, str) for home in homes.values()):
            raise ModelFormatError(f"{index}: holds no 'weight_map' from tensor to file name; download the file again")
        names = sorted(set(homes.values()))
        if outside := [name for name in names if Path(name).name != name or name in (".", "..")]:
            raise ModelFormatError(
                f"{index}: names the shard {outside[0]!r}, which is not a plain file name; download the file again"
            )
        if absent := [name for name in names if not (self._path / name).exists()]:
            raise ModelFormatError(
                f"{self._path}: {len(absent)} of {len(names)} shards named by {index.name} are missing: {', '.join(absent[:3])}; download them again"
            )
        files = [SafetensorsFile(self._path / name) for name in names]
        for name, file in zip(names, files, strict=True):
            named = {tensor for tensor, home in homes.items() if home == name}
            if different := sorted(named ^ set(file.tensors)):
                where = "not in the index" if different[0] in file.tensors else "not in the shard"
                raise ModelFormatError(
                    f"{file.path}: {len(different)} tensors differ from {index.name}, first {different[0]!r} ({where}); download both again"
                )
        return files

    def _chat_template(self, config: Mapping[str, Any]) -> str | None:
        """chat_template.jinja, else the field of tokenizer_config.json; of several named ones the one called "default"."""
        file = self._path / "chat_template.jinja"
        if file.exists():
            try:
                return file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ModelFormatError(f"{file}: cannot be read as UTF-8 ({error}); download the file again") from error
        template = config.get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def _eos_token_ids(self) -> tuple[int, ...]:
        """generation_config.json decides, config.json stands in; one number or a list."""
        value = self._generation_config.get("eos_token_id", self._config.get("eos_token_id"))
        ids = value if isinstance(value, list) else [value]
        return tuple(token for token in ids if isinstance(token, int))


def _token_text(value: Any) -> str | None:
    """Special tokens are written as a string or as an object with its "content"."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
