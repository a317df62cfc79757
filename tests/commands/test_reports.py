"""`xllm doctor` and `xllm models`: what they say is what is there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.fixtures.tiny_models import make_tiny
from xllm_core.commands import doctor, models
from xllm_core.plugins import Finding


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.chdir(tmp_path)
    return CliRunner()


def test_doctor_reports_every_part(runner: CliRunner) -> None:
    """Python, torch, the core's plugin, the reference device with its memory, and the cache."""
    done = runner.invoke(doctor.command, ["--json"])
    assert done.exit_code == 0, done.output
    findings = {f["subject"]: f for f in json.loads(done.output)}
    assert {"python", "torch", "plugin core", "device core/reference", "cache"} <= set(findings)
    assert findings["plugin core"]["state"] == "ok"
    assert "GiB free" in findings["device core/reference"]["detail"]


def test_doctor_fails_with_a_remedy(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thing that cannot work makes the exit code 1, and says what to do."""

    def broken() -> Iterator[Finding]:
        yield Finding("fail", "torch", "cannot be imported", "install torch")

    monkeypatch.setattr(doctor, "check_torch", broken)
    done = runner.invoke(doctor.command, [])
    assert done.exit_code == 1
    assert "install torch" in done.output


def test_doctor_names_a_cache_that_cannot_be_written(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The variable that helps is in the remedy."""
    monkeypatch.setenv("XLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    (finding,) = doctor.check_caches()
    assert finding.state == "warn"
    assert "XLLM_CACHE_DIR" in finding.remedy


def test_models_lists_families(runner: CliRunner) -> None:
    """Every built-in family with its architecture, as text and as JSON."""
    done = runner.invoke(models.command, ["--json"])
    names = {a for family in json.loads(done.output) for a in family["architectures"]}
    assert {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"} <= names
    assert "LlamaForCausalLM" in runner.invoke(models.command, []).output


def test_models_tells_what_would_serve(runner: CliRunner, tmp_path: Path) -> None:
    """Facts of one model, without reading a weight."""
    path = make_tiny("qwen3", tmp_path / "tiny")
    done = runner.invoke(models.command, [str(path), "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.output)
    assert facts["architecture"] == "Qwen3ForCausalLM"
    assert facts["family"] == "core/qwen3"
    assert facts["layers"] == 2
    assert facts["parameters"] > 10_000
    assert facts["attention"]["full"] in ("core/paged", "cpu/paged")


def test_doctor_leaves_out_what_is_switched_off(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with settings that are wrong it says so, and still reports. Killed by: looking for plugins without the user's settings."""

    def details() -> dict[str, str]:
        return {
            finding["subject"]: finding["detail"]
            for finding in json.loads(runner.invoke(doctor.command, ["--json"]).output)
        }

    monkeypatch.setenv("XLLM_PLUGINS", "core")
    found = details()
    others = [text for name, text in found.items() if name.startswith("plugin ") and name != "plugin core"]
    assert "plugin core" in found and all("disabled" in text or "not-allowed" in text for text in others)
    assert [name for name in found if name.startswith("device ")] == ["device core/reference"]
    monkeypatch.setenv("XLLM_DEVICE__NAM", "x")
    wrong = details()
    assert "XLLM_DEVICE__NAM" in wrong["settings"] and "python" in wrong
