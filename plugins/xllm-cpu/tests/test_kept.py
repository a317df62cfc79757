"""Laid out weights on disk: a later start reads them and answers to the bit as the first did; whatever is wrong with a file costs time alone."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from xllm_cpu.device import CpuDevice
from xllm_cpu.experts import LinearFloat32, MoeExperts

from xllm_core import LLM, SamplingParams
from xllm_core.runtime import kept_weights, loader
from xllm_core.runtime.formats.safetensors_dir import SafetensorsCheckpoint
from xllm_core.testing.tiny import tiny_config, write_tiny
from xllm_core.testing.tiny_gguf import Kind, write_tiny_gguf

PROMPTS = [{"prompt_token_ids": [(i * 7 + j * j) % 128 for j in range(length)]} for i, length in enumerate((1, 33))]
MODELS = {
    "llama": ("LlamaForCausalLM", {"head_dim": 16}),
    "tied": ("LlamaForCausalLM", {"head_dim": 16, "tie_word_embeddings": True}),
    "biases": ("Qwen2ForCausalLM", {}),
}


@pytest.fixture(autouse=True)
def everything_is_worth_keeping(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Models of tests are small, and their files are theirs alone."""
    monkeypatch.setattr(kept_weights.KeptWeights.__init__, "__kwdefaults__", {"worth_bytes": 0})
    monkeypatch.setenv("XLLM_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where files are."""
    return tmp_path / "cache" / "weights"


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random, of two layers: with a head of its own, with a tied one, with biases."""
    architecture, changes = MODELS[request.param]
    return str(write_tiny(tiny_config(architecture, **changes), tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One of them."""
    return str(write_tiny(tiny_config("LlamaForCausalLM", head_dim=16), tmp_path_factory.mktemp("plain")))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Checkpoints whose tensors are read."""
    seen: list[Path] = []
    read: Callable[..., Any] = loader.load_weights

    def watched(checkpoint: Any, *rest: Any, **named: Any) -> Any:
        seen.append(checkpoint.path)
        return read(checkpoint, *rest, **named)

    monkeypatch.setattr(loader, "load_weights", watched)
    return iter([seen])


def answers(model: str, **settings: Any) -> list[tuple[list[int], list[float]]]:
    """Tokens and their log probabilities, which tell a changed bit of a weight."""
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    with LLM(model, **{"device": "cpu/cpu", "num_blocks": 64, "max_num_seqs": 4, **settings}) as llm:
        found = llm.generate(PROMPTS, params, use_tqdm=False)
    return [
        (list(one.token_ids), [entry[token].logprob for token, entry in zip(one.token_ids, one.logprobs, strict=True)])
        for one in (answer.outputs[0] for answer in found)
    ]


@pytest.mark.parametrize("settings", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"quantization": "int8"}], ids=str)
def test_the_second_start_reads_what_the_first_laid_out(
    model: str, settings: dict[str, Any], folder: Path, loads: Iterator[list[Path]]
) -> None:
    """And answers to the bit as without. Dies where a field, a bias or a tied table is lost, and where nothing is kept or read."""
    (seen,) = loads
    without = answers(model, weight_cache_bytes=0, **settings)
    assert not folder.exists() and len(seen) == 1
    assert answers(model, **settings) == without and len(seen) == 2
    (file,) = folder.iterdir()
    before = file.read_bytes()
    os.utime(file, (1, 1))
    assert answers(model, **settings) == without
    assert len(seen) == 2, "the checkpoint was read again"
    assert file.read_bytes() == before and file.stat().st_mtime > 1, "its use was not noted"


def test_blocks_of_a_file(tmp_path: Path, folder: Path, loads: Iterator[list[Path]]) -> None:
    """Weights served as a GGUF file packs them are laid out as well."""
    (seen,) = loads
    source = write_tiny(tiny_config("LlamaForCausalLM", head_dim=16, tie_word_embeddings=True), tmp_path / "source")
    file = write_tiny_gguf(
        source, tmp_path / "m.gguf", kind_of=lambda name: Kind.Q4_1, metadata={"tokenizer.ggml.tokens": None}
    )
    first = answers(str(file), quantization="gguf")
    assert answers(str(file), quantization="gguf") == first and len(seen) == 1
    assert answers(str(file), dtype="float32") != first
    assert len(seen) == 2 and len(list(folder.iterdir())) == 2, "another format took the same file"


@pytest.mark.parametrize("op", ["moe_experts", "linear_float32"])
def test_experts_and_routers(op: str) -> None:
    """What is kept of them is all that they need: the other tests' models have none."""
    device = CpuDevice(0)
    x, ids, weights = torch.randn(5, 32), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    bound: Any = MoeExperts(device) if op == "moe_experts" else LinearFloat32(device)
    given = (torch.randn(4, 32, 32), torch.randn(4, 32, 16)) if op == "moe_experts" else (torch.randn(7, 32), None)
    prepared = bound.prepare(*given)
    restored = bound.restored(
        json.loads(json.dumps({n: v for n, v in bound.kept(prepared).items() if isinstance(v, int)}))
        | {n: v.clone() for n, v in bound.kept(prepared).items() if not isinstance(v, int)}
    )
    rest = (ids, weights, torch.zeros(4, dtype=torch.int64)) if op == "moe_experts" else ()
    assert torch.equal(bound(x, *rest, restored), bound(x, *rest, prepared))
    with pytest.raises(TypeError):
        bound.restored({})


DAMAGES: dict[str, tuple[Callable[[bytearray], bytearray], str]] = {
    "empty": (lambda data: data[:0], "its 0 bytes do not begin as such a file does"),
    "cut in its header": (lambda data: data[:100], "do not begin as such a file does|header is damaged"),
    "cut at its end": (lambda data: data[:-1], "bytes, .* are needed"),
    "longer": (lambda data: data + b"x", "bytes, .* are needed"),
    "another kind of file": (lambda data: b"GGUF" + data[4:], "do not begin as such a file does"),
    "a bit of the header": (lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:], "its header is damaged"),
    "a bit of the last weight": (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "from .* on are damaged"),
    "zeros at its end": (lambda data: data[:-4096] + bytes(4096), "from .* on are damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_told_and_made_again(
    plain: str, folder: Path, damage: str, loads: Iterator[list[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    """Answers are those of the checkpoint; the third start has a good file."""
    (seen,) = loads
    first = answers(plain)
    (file,) = folder.iterdir()
    good = file.read_bytes()
    change, reason = DAMAGES[damage]
    file.write_bytes(change(bytearray(good)))
    with caplog.at_level(logging.WARNING, "xllm.engine"):
        assert answers(plain) == first
    (warning,) = [record.getMessage() for record in caplog.records if str(file) in record.getMessage()]
    assert re.search(reason, warning), warning
    assert file.read_bytes() == good and len(seen) == 2
    assert answers(plain) == first and len(seen) == 2


def test_a_file_of_another_model(
    plain: str, tmp_path: Path, folder: Path, loads: Iterator[list[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    """Put in this one's place it is not believed."""
    (seen,) = loads
    other = str(write_tiny(tiny_config("LlamaForCausalLM", head_dim=16), tmp_path / "other", seed=5))
    answers(other)
    (theirs,) = folder.iterdir()
    first = answers(plain)
    (ours,) = set(folder.iterdir()) - {theirs}
    ours.write_bytes(theirs.read_bytes())
    assert answers(plain) == first and len(seen) == 3
    assert "made for another model, device or version" in caplog.text


def edit_the_middle(file: Path, tensor: str) -> None:
    """Other bytes a quarter into a tensor of a safetensors file, where no fingerprint looks; header and size stay."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    first, end = json.loads(raw[8 : 8 + length])[tensor]["data_offsets"]
    with file.open("r+b") as there:
        there.seek(8 + length + first + (end - first) // 4)
        there.write(bytes((end - first) // 8))


def test_an_edit_between_the_samples_of_a_fingerprint(tmp_path: Path, loads: Iterator[list[Path]]) -> None:
    """Of a file changed in place the next start serves the new weights; KV stores, which machines share, keep their keys."""
    (seen,) = loads
    model = write_tiny(tiny_config("LlamaForCausalLM", head_dim=16), tmp_path / "edited")
    first = answers(str(model))
    known = SafetensorsCheckpoint(model).fingerprint()
    edit_the_middle(model / "model.safetensors", "model.layers.0.mlp.down_proj.weight")
    assert SafetensorsCheckpoint(model).fingerprint() == known, "the edit lies where the fingerprint looks"
    second = answers(str(model))
    assert second != first and len(seen) == 2
    assert second == answers(str(model), weight_cache_bytes=0)


def test_an_edit_of_a_gguf_file(tmp_path: Path, loads: Iterator[list[Path]]) -> None:
    """The same of a model that is one file: here its time alone tells."""
    (seen,) = loads
    source = write_tiny(tiny_config("LlamaForCausalLM", head_dim=16), tmp_path / "source")
    file = write_tiny_gguf(source, tmp_path / "m.gguf", metadata={"tokenizer.ggml.tokens": None})
    answers(str(file))
    os.utime(file, ns=(1, 1))
    answers(str(file))
    assert len(seen) == 2


def test_what_tells_files_apart(tmp_path: Path) -> None:
    """Size and time of every file of a model, also behind links, in one order; never of hidden ones, nor of what lies in other folders."""
    folder, elsewhere = tmp_path / "m", tmp_path / "blob"
    (folder / "parts").mkdir(parents=True)
    elsewhere.write_bytes(b"1234")
    (folder / "b.some").symlink_to(elsewhere)
    (folder / "gone.json").symlink_to(tmp_path / "nowhere")
    for around in ("one", "two"):
        (folder / around).symlink_to(folder)
    for name, size in (("a.json", 1), ("parts/c.some", 3), (".lock", 1)):
        (folder / name).write_bytes(bytes(size))
    os.mkfifo(folder / "pipe")

    def marks(path: Path, **more: Any) -> list[tuple[str, int, int]]:
        return kept_weights.file_marks(SimpleNamespace(path=path, **more))  # type: ignore[arg-type]

    before = marks(folder)
    assert [mark[:2] for mark in before] == [("a.json", 1), ("b.some", 4)]
    os.utime(elsewhere, ns=(5, 5))
    assert [mark for mark in marks(folder) if mark not in before] == [("b.some", 4, 5)]
    assert marks(elsewhere) == [("blob", 4, 5)] and not marks(tmp_path / "nowhere")
    assert marks(folder, files=[folder / "parts" / "c.some"])[0][:2] == ("c.some", 3)


def test_a_log_beside_the_weights_is_no_other_model(tmp_path: Path, loads: Iterator[list[Path]]) -> None:
    """As a server writes one that is started there. Dies if a start lays the weights out anew for it."""
    (seen,) = loads
    model = write_tiny(tiny_config("LlamaForCausalLM", head_dim=16), tmp_path / "model")
    answers(str(model))
    (model / "server.log").write_text("started\n")
    answers(str(model))
    assert len(seen) == 1


@pytest.mark.parametrize(
    "place", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)], ids=["pipe", "folder", "device"]
)
def test_what_is_no_file(
    plain: str,
    folder: Path,
    place: Callable[[Path], None],
    loads: Iterator[list[Path]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the file's place it is told and not waited for; what can be replaced is."""
    (seen,) = loads
    first = answers(plain)
    (file,) = folder.iterdir()
    file.unlink()
    place(file)
    with caplog.at_level(logging.WARNING, "xllm.engine"):
        assert answers(plain) == first and len(seen) == 2
    assert f"{file}: " in caplog.text and "weights are read from the checkpoint" in caplog.text
    assert answers(plain) == first and len(seen) == (3 if file.is_dir() else 2)


def test_the_oldest_goes_first(tmp_path: Path, folder: Path) -> None:
    """Together they take no more than the bound; one that is larger than all of it is not kept, and nothing goes for it."""
    models = [str(write_tiny(tiny_config("LlamaForCausalLM"), tmp_path / str(i), seed=i)) for i in range(3)]
    answers(models[0])
    (oldest,) = folder.iterdir()
    size = oldest.stat().st_size
    os.utime(oldest, (100, 100))
    answers(models[1])
    (second,) = set(folder.iterdir()) - {oldest}
    os.utime(second, (50, 50))
    answers(models[0], weight_cache_bytes=2 * size + 4096)  # used again
    answers(models[2], weight_cache_bytes=2 * size + 4096)
    assert oldest.exists() and not second.exists() and len(list(folder.iterdir())) == 2
    answers(models[1], weight_cache_bytes=size // 2)
    assert oldest.exists() and len(list(folder.iterdir())) == 2


def test_what_a_killed_process_left_goes(plain: str, folder: Path) -> None:
    """An unfinished file that is written to is another process's, and stays."""
    folder.mkdir(parents=True)
    old, young = folder / f"a{kept_weights._UNFINISHED}", folder / f"b{kept_weights._UNFINISHED}"
    for file in (old, young):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    answers(plain)
    assert not old.exists() and young.exists()


def test_where_nothing_can_be_written(
    plain: str, tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning with what helps; the answers come. A file in the folder's place stands for any reason that the system has."""
    folder.parent.mkdir(parents=True)
    folder.write_text("")
    without = answers(plain, weight_cache_bytes=0)
    assert answers(plain) == without
    assert (
        "cannot be kept" in caplog.text and "XLLM_CACHE_DIR" in caplog.text and "weight_cache_bytes = 0" in caplog.text
    )


def test_a_full_disk(
    plain: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning, and no half of a file."""

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    answers(plain)
    assert "No space left on device" in caplog.text and not list(folder.iterdir())


_CHILD = """
import json, sys
from xllm_core import LLM, SamplingParams
from xllm_core.runtime import kept_weights
kept_weights.KeptWeights.__init__.__kwdefaults__ = {"worth_bytes": 0}
with LLM(sys.argv[1], device="cpu/cpu", num_blocks=64, max_num_seqs=4) as llm:
    out = llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
print(json.dumps(list(out[0].outputs[0].token_ids)))
"""


def test_two_processes_at_once(plain: str, folder: Path) -> None:
    """Both write the same file, and a third reads it whole."""
    command = [sys.executable, "-c", _CHILD, plain]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in both]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert said[0] == said[1] == json.loads(done.stdout.splitlines()[-1]) and "weights are read" not in done.stderr
    (file,) = folder.iterdir()
    assert file.suffix == ".weights"
