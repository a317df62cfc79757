"""Plugins that end the process, print, lie in their metadata or leave children behind: each costs a line, and nobody else anything."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.tiny_models import make_tiny
from tests.plugins.conftest import MakeDist
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.plan import describe
from xllm_core.plugins.probes import Probes

Run = Callable[..., subprocess.CompletedProcess[str]]

EXIT = "import sys\nsys.exit(0)\n"
PARTS = {
    "hook": "@hookimpl\ndef xllm_cli():\n    raise SystemExit(0)\n",
    "check": (
        "from xllm_core.plugins import SchedulerSpec\n@hookimpl\ndef xllm_schedulers():\n"
        "    yield SchedulerSpec(name='s', target='a:b', rank=5, check='xllm_check.plugin:bye')\n"
        "def bye(query):\n    raise SystemExit(0)\n"
    ),
    "opens": (
        "from xllm_core.plugins import WeightFormatSpec\n@hookimpl\ndef xllm_weight_formats():\n"
        "    yield WeightFormatSpec(name='f', target='xllm_opens.ends:F', rank=5)\n"
    ),
    "prober": (
        "from xllm_core.plugins import DeviceSpec\n@hookimpl\ndef xllm_devices():\n"
        "    yield DeviceSpec(name='d', target='a:b', probe='xllm_prober.ends:probe', is_accelerator=True)\n"
    ),
}


def test_none_of_its_parts_ends_the_process_in_silence(make_dist: MakeDist, xllm: Run, tmp_path: Path) -> None:
    """`sys.exit(0)` in a hook, a check, a weight format and a probe: a plan comes out, and each is named with it. Dies with `except Exception`."""
    for name, source in PARTS.items():
        make_dist(name, source, {"ends.py": EXIT})
    done = xllm("plan", str(make_tiny("llama", tmp_path / "m")), "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)["plan"]
    assert plan["device"]["name"] == "core/reference"
    assert ["check/s", "its check failed: SystemExit: 0 (plugin.py:8)"] in plan["scheduler"]["rejected"]
    assert "plugin hook (xllm-hook 1.0) is left out: SystemExit: 0" in done.stderr
    assert "weight format opens/f is not asked" in done.stderr and "SystemExit: 0 (ends.py:2)" in done.stderr
    assert "device prober/d is not used: its probe ended the process and gave no answer" in done.stderr
    own = xllm("hook")
    assert own.returncode == 1 and "SystemExit: 0" in own.stderr


def test_what_a_plugin_prints_does_not_stand_in_the_json(make_dist: MakeDist, xllm: Run, tmp_path: Path) -> None:
    """At import, in a hook, and when its target is imported. Dies if any of these keeps stdout."""
    plugin = (
        "print('at import')\nfrom xllm_core.plugins import WeightFormatSpec\n@hookimpl\ndef xllm_weight_formats():\n"
        "    print('in a hook')\n    yield WeightFormatSpec(name='f', target='xllm_chatty.part:F')\n"
    )
    part = "print('in a target')\nclass F:\n    def resolve(self, reference): return None\n    def open(self, path): return None\n"
    make_dist("chatty", plugin, {"part.py": part})
    done = xllm("plan", str(make_tiny("llama", tmp_path / "m")), "--json")
    assert json.loads(done.stdout)["hash"]
    assert done.stderr.split("\n")[:3] == ["at import", "in a hook", "in a target"]


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (b"Metadata-Version: 2.1\nName: xllm-odd\nVersion: 1\nSummary: caf\xe9\n", "failed: its metadata cannot be read"),
        (b"Metadata-Version: 2.1\nVersion: 1\n", "failed: its metadata cannot be read: KeyError: 'Name'"),
        (None, "failed: its metadata cannot be read: MetadataNotFound"),
        (
            b"Metadata-Version: 2.1\nName: xllm-odd\nVersion: 1\nRequires-Dist: xllm-core >>= 1\n",
            "incompatible: its metadata says Requires-Dist: xllm-core >>= 1, which is no requirement",
        ),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_read(make_dist: MakeDist, xllm: Run, metadata: bytes | None, reason: str) -> None:
    """Help, list, disable and doctor go on, a start too, and none runs its code. Dies if one of them reads METADATA unguarded."""
    package = make_dist("odd", "raise SystemExit('ran')")
    make_dist("even", "")
    (path,) = package.parents[1].glob("site/*.dist-info/METADATA")
    path.unlink() if metadata is None else path.write_bytes(metadata)
    assert "odd" in xllm("--help").stdout
    found = {entry["id"]: entry for entry in json.loads(xllm("plugins", "list", "--json").stdout)}
    assert f"{found['odd']['state']}: {found['odd']['reason']}".startswith(reason)
    assert found["even"]["state"] == "found"
    loaded = {record.id: record for record in PluginManager.discover().load().records}
    assert (loaded["odd"].state, loaded["even"].state) == (found["odd"]["state"], "loaded")
    doctor = xllm("plugins", "doctor")
    assert doctor.returncode == 1 and found["odd"]["reason"] in doctor.stdout
    assert found["odd"]["reason"] in xllm("plugins", "show", "odd").stdout
    config = package.parent / "my.toml"
    config.touch()
    assert xllm("plugins", "disable", "odd", "--config", str(config)).returncode == 0


def test_a_probe_answers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are no text, words at the exit, an exit without an answer, an answer that cannot be printed: its word is what it returned."""
    (tmp_path / "odd_probes.py").write_text(
        "import atexit, os\n"
        "atexit.register(lambda: print('bye'))\n"
        "def noisy():\n    os.write(1, b'\\xff')\n    print('hello')\n"
        "def refuses():\n    return 'no chip \\udcff here'\n"
        "def leaves():\n    raise SystemExit(0)\n"
        "def vanishes():\n    os._exit(0)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("noisy", "refuses", "leaves", "vanishes")
    with Probes([f"odd_probes:{name}" for name in names]) as probes:
        answers = [probes.answer(f"odd_probes:{name}") for name in names]
    silent = "its probe ended the process and gave no answer"
    assert answers == ["", "no chip \\udcff here", silent, silent]


def test_a_probe_that_leaves_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One answers and leaves a child, which is not waited for; one hangs, and ends with its child. Dies if a pipe is read to its end."""
    (tmp_path / "odd_parents.py").write_text(
        "import pathlib, subprocess, sys, time\n"
        "def start():\n    return subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid\n"
        "def leaves():\n    return f'pid {start()}'\n"
        "def hangs():\n    pathlib.Path(__file__).with_name('pid').write_text(str(start()))\n    time.sleep(600)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with Probes(timeout_s=60.0) as probes:
        left = int(probes.answer("odd_parents:leaves").removeprefix("pid "))
    os.kill(left, 9)  # it lived on, and held what it had inherited
    with Probes(timeout_s=5.0) as probes:
        assert probes.answer("odd_parents:hangs") == "its probe did not answer within 5 s"
    child = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    for _ in range(200):
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the child of a probe that was killed is still there")


def test_an_error_without_words() -> None:
    """An exception of a plugin may fail to say what it is, or say what no terminal prints. Dies if `describe` trusts `str`."""

    class MuteError(Exception):
        def __str__(self) -> str:
            raise ValueError("no words")

    assert describe(MuteError()) == "MuteError: (its text cannot be read: ValueError)"
    assert describe(ValueError("chip \udcff")) == "ValueError: chip \\udcff"


def test_settings_that_are_no_model(make_dist: MakeDist, xllm: Run) -> None:
    """`PluginInfo.config` names something else: said in these words by schema and by a start."""
    package = make_dist(
        "plain", "xllm_plugin = PluginInfo(id='plain', config='xllm_plain.plugin:Settings')\nclass Settings: pass\n"
    )
    assert package.exists()
    done = xllm("plugins", "schema", "plain")
    assert done.returncode == 1 and "and no pydantic model" in done.stderr and "Traceback" not in done.stderr
    record = next(r for r in PluginManager.discover().load().records if r.id == "plain")
    assert record.state == "failed" and "no pydantic model" in record.reason


def test_a_sample_of_settings_is_toml(make_dist: MakeDist, xllm: Run) -> None:
    """Every line that is commented out may be taken in as it is, a table too. Dies if a value is written as TOML has it elsewhere."""
    import tomllib

    model = "from pydantic import BaseModel\nclass S(BaseModel):\n    tags: list[str] = ['a']\n"
    model += "    empty: dict[str, int] = {}\n    sizes: dict[str, int] = {'x': 1}\n"
    make_dist(
        "tables", "xllm_plugin = PluginInfo(id='tables', config='xllm_tables.settings:S')\n", {"settings.py": model}
    )
    lines = xllm("plugins", "schema", "tables").stdout.splitlines()
    taken = [line.removeprefix("# ") for line in lines if " = " in line or line.startswith("[")]
    table = tomllib.loads("\n".join(taken))["plugin"]["tables"]
    assert table == {"tags": ["a"], "empty": {}, "sizes": {"x": 1}, "optional": False}


def test_wrong_names_on_the_command_line(make_dist: MakeDist, xllm: Run, tmp_path: Path) -> None:
    """Each is told what there is, once, and nothing else. Dies if a command goes on with a name that it does not know."""
    make_dist("even", "")
    checked = xllm("plugins", "check", "evn")
    assert (checked.returncode, checked.stdout) == (1, "")
    assert checked.stderr == "Error: no plugin 'evn' is installed; did you mean 'even'?; installed: core, even\n"
    assert "no command 'whi'; did you mean 'why'?" in xllm("plugins", "whi").stderr
    assert "'scheduler.fcfs' cannot narrow down" in xllm("plugins", "why", "scheduler.fcfs").stderr
    families = xllm("plugins", "why", "model.Qwen3ForCausalLM").stdout
    assert "core/qwen3" in families and "core/llama" not in families
    model = str(make_tiny("llama", tmp_path / "m"))
    assert "chosen   core/llama" in xllm("plugins", "why", "model.LlamaForCausalLM", "--model", model).stdout
    assert "nothing is called 'model.Nope' here" in xllm("plugins", "why", "model.Nope", "--model", model).stderr


def test_the_lock_reads_what_is_there(make_dist: MakeDist, xllm: Run, tmp_path: Path) -> None:
    """A file that was edited where it is installed is a change, though RECORD, a list written once, is not. Dies if RECORD alone is read."""
    package = make_dist("even", "")
    config = tmp_path / "my.toml"
    config.write_text("[plugins]\nlocked = true\n")
    (info,) = package.parents[1].glob("site/*.dist-info")
    (info / "RECORD").write_text("xllm_even/plugin.py,sha256=abc,1\n")
    assert xllm("plugins", "lock", "--config", str(config)).returncode == 0
    assert xllm("plugins", "lock", "--check", "--config", str(config)).returncode == 0
    (package / "plugin.py").write_text((package / "plugin.py").read_text() + "# a word more\n")
    changed = xllm("plugins", "why", "scheduler", "--config", str(config))
    assert changed.returncode == 1 and "even: the files of xllm-even 1.0 have changed" in changed.stderr
    (info / "entry_points.txt").write_text("[xllm_core.plugins]\neven = no module at all !\n")
    assert xllm("plugins", "lock", "--config", str(config)).returncode == 0


def test_a_plugin_that_was_disabled_and_uninstalled(xllm: Run, tmp_path: Path) -> None:
    """The line that still names it stops a start, says so with its place, and `enable` takes it out. Dies if enable wants it installed."""
    config = tmp_path / "my.toml"
    config.write_text('[plugins]\ndisable = ["gone"]\n')
    stopped = xllm("plugins", "list", "--config", str(config))
    assert stopped.returncode == 1
    assert "my.toml:2:1: [plugins] disable names gone, not installed" in stopped.stderr
    assert "xllm plugins enable gone" in stopped.stderr
    mended = xllm("plugins", "enable", "gone", "--config", str(config))
    assert mended.returncode == 0 and "note: plugin 'gone' is not installed" in mended.stderr
    assert xllm("plugins", "list", "--config", str(config)).returncode == 0
