"""Damaged and hostile model files: each is refused with the file's name and a remedy, before anything large is read.

One table, one test: open, describe, load. Nothing but a ModelError may come out, whatever the damage. Killed by: removing any single check of the
formats, of `models.config` or of the loader, which lets a KeyError, a struct error or a silent success through.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.tiny_models import make_tiny
from xllm_core.errors import ModelError
from xllm_core.models.llama import Llama
from xllm_core.runtime.formats.gguf_file import GGUF
from xllm_core.runtime.formats.safetensors_dir import SafetensorsDirectory
from xllm_core.testing.model_harness import Harness
from xllm_core.testing.tiny_gguf import write_tiny_gguf

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("good"))


def split_file(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join_file(path: Path, header: Any, body: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + body)


def weights(change: Callable[[dict[str, Any]], None], cut: int = 0) -> Damage:
    """Damage the header of the one weights file, or cut its end off."""

    def apply(folder: Path) -> None:
        header, body = split_file(folder / "model.safetensors")
        change(header)
        join_file(folder / "model.safetensors", header, body[: len(body) - cut])

    return apply


def raw_weights(make: Callable[[bytes], bytes]) -> Damage:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(make(file.read_bytes()))

    return apply


def config(**changes: Any) -> Damage:
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        fields = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))

    return apply


def replaced(name: str, content: bytes | None) -> Damage:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return apply


def sharded(change: Callable[[Path, dict[str, str]], None]) -> Damage:
    """Split the weights in two shards with an index, then damage that."""

    def apply(folder: Path) -> None:
        header, body = split_file(folder / "model.safetensors")
        header.pop("__metadata__", None)
        (folder / "model.safetensors").unlink()
        homes: dict[str, str] = {}
        names = sorted(header)
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            shard, entries, at = b"", {}, 0
            for name in part:
                first, last = header[name]["data_offsets"]
                entries[name] = {**header[name], "data_offsets": [at, at + last - first]}
                shard, at = shard + body[first:last], at + last - first
                homes[name] = f"part-{number}.safetensors"
            join_file(folder / f"part-{number}.safetensors", entries, shard)
        change(folder, homes)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))

    return apply


def _set(header: dict[str, Any], key: str, value: Any) -> None:
    header["model.norm.weight"][key] = value


def _swap_offsets(header: dict[str, Any]) -> None:
    first, last = header["model.norm.weight"]["data_offsets"]
    header["model.norm.weight"]["data_offsets"] = [first - 64, last - 64] if first else [first + 64, last + 64]


def _add(header: dict[str, Any]) -> None:
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    header["model.layers.9.extra"] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}


def _reshape(header: dict[str, Any]) -> None:
    header["model.layers.1.mlp.down_proj.weight"]["shape"].reverse()


def _nan(raw: bytes) -> bytes:
    return raw[:-4] + struct.pack("<f", float("nan"))


DIRECTORIES: dict[str, tuple[Damage, str]] = {
    # name: (damage, what the message must say)
    "empty file": (raw_weights(lambda raw: b""), "0 bytes"),
    "header cut short": (raw_weights(lambda raw: raw[:100]), "claims a header"),
    "header longer than the file": (raw_weights(lambda raw: struct.pack("<Q", 2**60) + raw[8:]), str(2**60)),
    "header is not JSON": (raw_weights(lambda raw: raw[:8] + b"#" + raw[9:]), "not JSON"),
    "header is not UTF-8": (raw_weights(lambda raw: raw[:9] + b"\xff" + raw[10:]), "not JSON"),
    "header is a list": (lambda folder: join_file(folder / "model.safetensors", [1], b""), "list"),
    "header nests too deep": (lambda folder: join_file(folder / "model.safetensors", b"[" * 200_000, b""), "not JSON"),
    "a name twice": (lambda folder: join_file(folder / "model.safetensors", b'{"a": {}, "a": {}}', b""), "twice"),
    "an entry that is no object": (
        weights(lambda header: header.update({"model.norm.weight": 3})),
        "model.norm.weight",
    ),
    "offsets overlap": (weights(_swap_offsets), "model."),
    "offsets out of the file": (
        weights(lambda header: _set(header, "data_offsets", [2**40, 2**40 + 128])),
        "model.norm.weight",
    ),
    "offsets negative": (weights(lambda header: _set(header, "data_offsets", [-128, 0])), "-128"),
    "offsets of another size": (weights(lambda header: _set(header, "data_offsets", [0, 4])), "takes 128"),
    "shape of huge numbers": (weights(lambda header: _set(header, "shape", [2**62, 2**62])), "4611686018427387904"),
    "shape of text": (weights(lambda header: _set(header, "shape", ["32"])), "whole numbers"),
    "unknown dtype": (weights(lambda header: _set(header, "dtype", "F4")), "F4"),
    "another dtype": (weights(lambda header: _set(header, "dtype", "BF16")), "takes 64"),
    "data truncated": (weights(lambda header: None, cut=1000), "truncated"),
    "data too long": (raw_weights(lambda raw: raw + b"\0" * 8), "after its last tensor"),
    "a tensor too many": (weights(_add), "model.layers.9.extra"),
    "a tensor too few": (config(num_hidden_layers=3), "model.layers.2.input_layernorm.weight"),
    "a tensor of another shape": (weights(_reshape), "model.layers.1.mlp.down_proj.weight"),
    "a value that is not finite": (raw_weights(_nan), "not finite"),
    "no weights": (replaced("model.safetensors", None), "model.safetensors"),
    "only weights that run code": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin") and None,
        "pytorch_model.bin",
    ),
    "a shard missing": (
        sharded(lambda folder, homes: (folder / "part-2.safetensors").unlink()),
        "are missing: part-2.safetensors",
    ),
    "an index entry missing": (
        sharded(lambda folder, homes: homes.pop("model.norm.weight") and None),
        "model.norm.weight",
    ),
    "an index entry too many": (sharded(lambda folder, homes: homes.update(x="part-1.safetensors")), "'x'"),
    "an index that leaves the folder": (
        sharded(lambda folder, homes: homes.update(x="../part.safetensors")),
        "../part",
    ),
    "an index without a map": (
        sharded(lambda folder, homes: homes.clear() or homes.update({"model.norm.weight": 7})),  # type: ignore[dict-item, func-returns-value]
        "weight_map",
    ),
    "no config": (replaced("config.json", None), "config.json"),
    "config is not JSON": (replaced("config.json", b"{'a': 1}"), "not JSON"),
    "config is not UTF-8": (replaced("config.json", b'{"a": "\xff"}'), "not JSON"),
    "config is a list": (replaced("config.json", b"[]"), "list"),
    "config with a wrong type": (config(hidden_size="32"), "hidden_size"),
    "config without a field": (config(num_attention_heads=...), "num_attention_heads"),
    "config of another model": (config(vocab_size=130), "model.embed_tokens.weight"),
    "config of an absurd size": (config(vocab_size=10**12), "1000000000000"),
    "config of absurdly many layers": (config(num_hidden_layers=10**12), "1000000000000"),
    "config of an unknown architecture": (config(architectures=["NobodyKnowsForCausalLM"]), "NobodyKnowsForCausalLM"),
    "generation config is not JSON": (
        lambda folder: (folder / "generation_config.json").write_text("?") and None,
        "generation_config.json",
    ),
}


def serve(folder: Path) -> None:
    """All that happens to a directory before the first token."""
    checkpoint = SafetensorsDirectory().open(folder)
    assert checkpoint is not None
    Llama().shape(checkpoint.config)
    Harness(Llama(), checkpoint)
    checkpoint.tokenizer()
    checkpoint.fingerprint()


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_the_undamaged_directory_is_served(copy: Path) -> None:
    """Else the table below would prove nothing; whole and in shards."""
    serve(copy)
    whole = SafetensorsDirectory().open(copy)
    assert whole is not None
    tensors = whole.tensors()
    sharded(lambda folder, homes: None)(copy)
    serve(copy)
    parts = SafetensorsDirectory().open(copy)
    assert parts is not None
    assert parts.tensors() == tensors


@pytest.mark.parametrize("name", DIRECTORIES)
def test_damaged_directory(copy: Path, name: str) -> None:
    """See the table."""
    damage, says = DIRECTORIES[name]
    damage(copy)
    with pytest.raises(ModelError) as caught:
        serve(copy)
    assert str(copy) in str(caught.value)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 2000


def gguf_bytes(make: Callable[[bytes], bytes]) -> Damage:
    def apply(file: Path) -> None:
        file.write_bytes(make(file.read_bytes()))

    return apply


def _entry(raw: bytes, name: bytes) -> int:
    """Where a tensor's table entry goes on after its name."""
    return raw.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)


def _poke(name: bytes, offset: int, letter: str, value: int) -> Damage:
    def make(raw: bytes) -> bytes:
        at = _entry(raw, name) + offset
        return raw[:at] + struct.pack(f"<{letter}", value) + raw[at + struct.calcsize(letter) :]

    return gguf_bytes(make)


# After a tensor's name: dimension count (4), two dimensions (16), type (4), offset (8). After a metadata key: value type (4), value.
_MATRIX, _KEY, _LIST = b"blk.0.ffn_down.weight", b"llama.block_count", b"tokenizer.ggml.tokens"
FILES: dict[str, tuple[Damage, str]] = {
    "empty": (gguf_bytes(lambda raw: b""), "0 bytes"),
    "another magic": (gguf_bytes(lambda raw: b"GGML" + raw[4:]), "GGML"),
    "version 1": (gguf_bytes(lambda raw: raw[:4] + struct.pack("<I", 1) + raw[8:]), "version 1"),
    "big-endian": (gguf_bytes(lambda raw: raw[:4] + struct.pack(">I", 3) + raw[8:]), "big-endian"),
    "metadata cut short": (gguf_bytes(lambda raw: raw[: raw.index(_KEY) + 19]), "convert the file again"),
    "table cut short": (gguf_bytes(lambda raw: raw[: _entry(raw, _MATRIX) + 6]), "truncated"),
    "data cut short": (gguf_bytes(lambda raw: raw[:-700]), "truncated"),
    "too many tensors": (gguf_bytes(lambda raw: raw[:8] + struct.pack("<Q", 2**61) + raw[16:]), str(2**61)),
    "too many keys": (gguf_bytes(lambda raw: raw[:16] + struct.pack("<Q", 2**61) + raw[24:]), str(2**61)),
    "more tensors than there are": (gguf_bytes(lambda raw: raw[:8] + struct.pack("<Q", 40) + raw[16:]), "again"),
    "an array too long": (_poke(_LIST, 8, "Q", 2**60), f"claims {2**60} strings"),
    "an array of arrays": (_poke(_LIST, 4, "I", 9), "array of type 9"),
    "a string too long": (_poke(_LIST, 16, "Q", 2**60), "truncated"),
    "an unknown value type": (_poke(_KEY, 0, "I", 77), "77"),
    "a key that is not UTF-8": (gguf_bytes(lambda raw: raw.replace(_KEY, b"llama.block_coun\xff")), "UTF-8"),
    "a key twice": (
        gguf_bytes(lambda raw: raw.replace(b"ggml.bos_token_id", b"ggml.eos_token_id")),
        "'tokenizer.ggml.eos_token_id' twice",
    ),
    "no dimensions": (_poke(_MATRIX, 0, "I", 0), "dimensions"),
    "too many dimensions": (_poke(_MATRIX, 0, "I", 400), "400"),
    "a dimension of zero": (_poke(_MATRIX, 4, "Q", 0), "holds nothing"),
    "huge dimensions": (_poke(_MATRIX, 4, "Q", 2**63), "truncated"),
    "an unknown tensor type": (_poke(_MATRIX, 20, "I", 999), "999"),
    "an unread quantisation": (_poke(_MATRIX, 20, "I", 6), "blk.0.ffn_down"),
    "rows that fill no block": (_poke(_MATRIX, 20, "I", 12), "packs 256 at a time"),
    "an offset out of the file": (_poke(_MATRIX, 24, "Q", 2**50), "truncated"),
    "an offset into another tensor": (_poke(_MATRIX, 24, "Q", 32), "inside another"),
    "an offset unaligned": (_poke(_MATRIX, 24, "Q", 2**20 + 1), "unaligned"),
    "a tensor twice": (gguf_bytes(lambda raw: raw.replace(_MATRIX, b"blk.1.ffn_down.weight")), "twice"),
    "a tensor nobody knows": (gguf_bytes(lambda raw: raw.replace(_MATRIX, b"blk.0.ffn_side.weight")), "ffn_side"),
    "no embedding": (gguf_bytes(lambda raw: raw.replace(b"token_embd.weight", b"token_embX.weight")), "token_embd"),
    "sizes that do not fit": (_poke(b"llama.feed_forward_length", 4, "I", 63), "gate_proj"),
    "a head count of zero": (_poke(b"llama.attention.head_count", 4, "I", 0), "head_count"),
    "another architecture": (
        gguf_bytes(lambda raw: raw.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0bloom")),
        "bloom",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_gguf(good: Path, tmp_path: Path, name: str) -> None:
    """See the table."""
    path = write_tiny_gguf(good, tmp_path / "m.gguf")
    damage, says = FILES[name]
    damage(path)
    with pytest.raises(ModelError) as caught:
        checkpoint = GGUF().open(path)
        assert checkpoint is not None
        Llama().shape(checkpoint.config)
        Harness(Llama(), checkpoint)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("value", [0x00, 0x7F, 0xFF])
def test_any_single_flipped_byte_of_a_header(good: Path, tmp_path: Path, value: int) -> None:
    """Every few bytes of both headers, set to something else: refused with a ModelError, or served. Killed by: any unchecked length or name."""
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in good.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    packed = write_tiny_gguf(good, tmp_path / "m.gguf", metadata={"tokenizer.ggml.tokens": ["a", "b"]})
    for path, length in ((folder / "model.safetensors", 600), (packed, 1500)):
        whole = path.read_bytes()
        for at in range(0, length, 5):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            try:
                checkpoint = SafetensorsDirectory().open(folder) if path.parent == folder else GGUF().open(path)
                assert checkpoint is not None
                Llama().shape(checkpoint.config)
                Harness(Llama(), checkpoint)
            except ModelError as error:
                assert str(tmp_path) in str(error)
        path.write_bytes(whole)


def test_unreadable_files_say_so(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed by: a bare PermissionError. Permissions do not bind root, so the system's answer is played."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    path = write_tiny_gguf(copy, copy / "m.gguf")
    monkeypatch.setattr(Path, "open", refuse)
    for act in (lambda: SafetensorsDirectory().open(copy), lambda: GGUF().open(path)):
        with pytest.raises(ModelError, match="Permission denied"):
            act()
