"""`xllm plugins new`: each kind, as generated, passes its own tests and conformance, and is what repository and user ask of code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.meta.source import ROOT
from tests.plugins.conftest import write_dist_info
from xllm_core.errors import ConfigError
from xllm_core.scaffold.render import KINDS, names_of, render, write

Run = Callable[..., subprocess.CompletedProcess[str]]


def generate(kind: str, folder: Path, name: str = "") -> Path:
    """A project of a kind in `folder`, and where an installer would have put its metadata, `folder/site`."""
    project = folder / kind
    write(render(kind, names_of(name or f"my-{kind}"), description='Says "hi"', author="A. N. Author"), project)
    write_dist_info(project, project / "site")
    return project


def environment(project: Path) -> dict[str, str]:
    """The project installed, as far as imports and entry points go."""
    paths = (project / "site", project / "src", ROOT)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}


def checked(command: list[str], folder: Path, **variables: str) -> str:
    """Run it in a folder; its output, or a failure that shows it."""
    done = subprocess.run(
        command, cwd=folder, env={**environment(folder), **variables}, capture_output=True, text=True, timeout=600, check=False
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_passes_as_generated(kind: str, tmp_path: Path) -> None:
    """Its own tests, one of which serves a model with it, and conformance. Dies with the template, and with a suite that it does not satisfy."""
    project = generate(kind, tmp_path)
    assert "check_plugin" in (project / "tests" / "test_conformance.py").read_text()
    done = checked([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA"], project)
    passed = re.findall(r"^PASSED \S+::(\w+)", done, re.MULTILINE)
    assert "test_conformance" in passed
    assert "test_in_an_engine" in passed or "test_tokens_are_those_of_transformers" in passed, done
    assert " skipped" not in done, done


@pytest.mark.parametrize("name", ["a", "my-plugin", "a-name-that-is-as-long-as-ids-can-become"])
def test_code_is_clean_whatever_the_name(name: str, tmp_path: Path) -> None:
    """Lint and layout, by the project's own settings and by ours: a longer name must not break a line."""
    for kind in KINDS:
        project = generate(kind, tmp_path, name)
        for settings in ([], ["--config", str(ROOT / "pyproject.toml")]):
            checked([sys.executable, "-m", "ruff", "check", "--no-cache", *settings, "."], project)
            checked([sys.executable, "-m", "ruff", "format", "--no-cache", "--check", *settings, "."], project)


@pytest.mark.slow
def test_code_is_typed(tmp_path: Path) -> None:
    """`mypy --strict` over all kinds, with the repository's settings."""
    sources = [str(generate(kind, tmp_path) / "src") for kind in KINDS]
    command = [
        sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache"),
        *sources,
    ]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, "MYPYPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_the_project_is_whole(kind: str, tmp_path: Path) -> None:
    """One entry point under the id, floors and no pins, a readme that says what was run and how to go on, a workflow that runs the tests."""
    project = generate(kind, tmp_path)
    table = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    names = names_of(f"my-{kind}")
    assert table["name"] == names.distribution and table["description"] == 'Says "hi"'
    assert table["authors"] == [{"name": "A. N. Author"}]
    assert table["entry-points"] == {"xllm_core.plugins": {names.id: f"{names.package}.plugin"}}
    (need,) = table["dependencies"]
    assert need.startswith("xllm-core>=") and "test" in table["optional-dependencies"]
    readme = (project / "README.md").read_text()
    for part in ("What was run where", "## Install", "## Choose", "## Configure", "## Test", "## Publish", "## Files"):
        assert part in readme
    for path in re.findall(r"`(src/[\w/.]+)`", readme):
        assert (project / path).exists(), path
    for sample in re.findall(r"```toml\n(.*?)```", readme, re.DOTALL):
        assert tomllib.loads(sample)
    workflow = yaml.safe_load((project / ".github" / "workflows" / "test.yml").read_text())
    assert "python -m pytest" in str(workflow["jobs"]["test"]["steps"])
    assert "A. N. Author" in (project / "LICENSE").read_text()
    for path in project.rglob("*"):
        if path.is_file() and path.suffix != ".yml":
            assert not re.search(r"\$\w|\$\{", path.read_text()), f"{path} holds what should have been filled in"


@pytest.mark.parametrize("kind", KINDS)
def test_settings_in_the_readme_are_those_that_exist(
    kind: str, tmp_path: Path, xllm: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every key of its TOML samples is taken by the plugin's own model, and its names by `[use]`. Dies when one is renamed and not the other."""
    project = generate(kind, tmp_path)
    samples = re.findall(r"```toml\n(.*?)```", (project / "README.md").read_text(), re.DOTALL)
    for name, value in environment(project).items():
        monkeypatch.setenv(name, value)
    config = tmp_path / "xllm.toml"
    config.write_text("\n".join(samples) + "\n[plugins]\nstrict = true\n")
    done = xllm("plugins", "why", "scheduler", "--config", str(config))
    assert done.returncode == 0, done.stderr


def test_names() -> None:
    """Spellings of one name are one plugin; what cannot be one is refused with what can."""
    assert {names_of(text).id for text in ("My.Plugin", "my_plugin", "xllm-my-plugin", "my--plugin")} == {"my-plugin"}
    assert names_of("My.Plugin").package == "xllm_my_plugin"
    for name, words in {
        "": "letters, digits",
        "-x": "letter or digit at both ends",
        "ü": "letters, digits",
        "../x": "letters, digits",
        "3d": "an id starts with a letter",
        "core": "the id of the core's own parts",
        "xllm-core": "the id of the core's own parts",
        "x" * 60: "60 characters; 40 are possible",
    }.items():
        with pytest.raises(ConfigError, match=words):
            names_of(name)


def test_the_command(tmp_path: Path, xllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes, shows what and how to go on; overwrites nothing; help names every kind with its line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = xllm("plugins", "new", "scheduler", "Fair.Share")
    assert done.returncode == 0, done.stderr
    assert "xllm-fair-share/" in done.stdout and "policy.py" in done.stdout
    assert done.stdout.splitlines()[-3:] == [
        "  pip install -e 'xllm-fair-share[test]'",
        "  python -m pytest xllm-fair-share/tests",
        "  xllm plugins show fair-share",
    ]
    before = sorted(path for path in tmp_path.rglob("*"))
    again = xllm("plugins", "new", "sampler", "fair-share")
    assert again.returncode == 1 and "xllm-fair-share is not empty, and nothing there is overwritten" in again.stderr
    (tmp_path / "file").write_text("")
    assert "file is a file" in xllm("plugins", "new", "sampler", "x", "--path", "file").stderr
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "file") == before
    taken = xllm("plugins", "new", "sampler", "chat")
    assert taken.returncode == 1 and "a command of the core, `xllm chat`" in taken.stderr
    usage = xllm("plugins", "new", "--help").stdout
    for kind, line in KINDS.items():
        assert re.search(rf"{kind}\s+{re.escape(line.partition(':')[0])}", usage), usage
    assert "is not one of" in xllm("plugins", "new", "parser", "x").stderr


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_really_installed(kind: str, tmp_path: Path) -> None:
    """pip builds its wheel and installs it into a new environment, where it is found, and its tests pass without its sources."""
    project = generate(kind, tmp_path)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True, timeout=300)
    python = str(tmp_path / "env" / "bin" / "python")
    # What this process sees, without copying gigabytes: the core and its dependencies come from here, the plugin from its wheel.
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    here = [path for path in sys.path if path.endswith("site-packages")]
    (Path(site) / "here.pth").write_text("\n".join([str(ROOT), *here]) + "\n")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "-qq"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path / "wheels"), str(project)],
        check=True,
        timeout=300,
    )
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True, timeout=300)
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    (project / "src").rename(project / "gone")
    for command, words in (
        ([python, "-m", "xllm_core.cli", "plugins", "show", f"my-{kind}"], f"xllm-my-{kind} 0.1.0"),
        ([python, "-m", "pytest", "-q", "tests"], " passed"),
    ):
        done = subprocess.run(
            command,
            cwd=project,
            env=variables | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0 and words in done.stdout, done.stdout + done.stderr
