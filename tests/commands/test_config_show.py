"""`xllm config show`: every value with its origin, as TOML that can be used again, and no secret."""

from __future__ import annotations

import json
import re
import tomllib
import traceback
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from pydantic import BaseModel, SecretStr, ValidationError

from xllm_core.cli import root
from xllm_core.commands import config as config_command
from xllm_core.commands.serve import command as serve
from xllm_core.config import TABLES, ServerTable, Settings, validate_plugin_table
from xllm_core.errors import ConfigError

TOML = """
[kv]
  block_size = 32
num_blocks = 9
[server]
api_keys = ["canary7"]
served_model_name = ["a \\"b\\"", "c\\u007f"]
[use]
op.linear = "core/linear"
[plugin.core]
host_store_bytes = 4096
"""


def show(*arguments: str) -> Result:
    """Run it; the result is as click gives it."""
    return CliRunner().invoke(root(), ["config", "show", *arguments])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A settings file."""
    path = tmp_path / "my.toml"
    path.write_text(TOML)
    return path


def without_none(value: Any) -> Any:
    """TOML has no word for it."""
    if isinstance(value, dict):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return value


def test_every_value_and_its_origin(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dies if a table, a key or an origin is missing, or the effective value is not the one shown."""
    monkeypatch.setenv("XLLM_KV__NUM_BLOCKS", "10")
    monkeypatch.setenv("XLLM_SERVER__DRAIN_DELAY_S", "2")
    result = show("the-model", "--json", "--config", str(path), "--port", "0", "--use", "sampler=core/gumbel")
    assert result.exit_code == 0, result.exception
    shown = json.loads(result.output)
    assert {table: set(shown[table]) for table in TABLES} == {t: set(model.model_fields) for t, model in TABLES.items()}
    origins = {
        ("model", "path"): ("the-model", "argument"),
        ("kv", "block_size"): (32, f"{path}:3:3"),
        ("kv", "num_blocks"): (10, "XLLM_KV__NUM_BLOCKS"),
        ("kv", "memory_bytes"): (None, "default"),
        ("server", "port"): (0, "--port"),
        ("server", "drain_delay_s"): (2.0, "XLLM_SERVER__DRAIN_DELAY_S"),
        ("server", "api_keys"): (["***"], f"{path}:6:1"),
        ("use", "op.linear"): ("core/linear", f"{path}:9:4"),
        ("use", "sampler"): ("core/gumbel", "--use"),
        ("plugin", "core", "host_store_bytes"): (4096, f"{path}:11:1"),
    }
    for keys, (value, origin) in origins.items():
        entry = shown
        for key in keys:
            entry = entry[key]
        assert entry == {"value": value, "from": origin}, keys


def test_the_output_is_a_settings_file(path: Path) -> None:
    """It reads back as the same settings, but for secrets. Dies if a kind of value is not written as TOML writes it."""
    result = show("--config", str(path))
    assert result.exit_code == 0, result.exception
    expected = Settings(config_path=path).tables()
    expected["server"]["api_keys"] = ["***"]
    shown = tomllib.loads(result.output)
    shown["plugin"] = {
        name: table for name, table in shown["plugin"].items() if name in expected["plugin"]
    }  # of the others: defaults
    assert shown == without_none(expected)
    assert re.search(rf"^block_size = 32 +# {re.escape(str(path))}:3:3$", result.output, re.MULTILINE)
    assert re.search(r"^# max_model_len is not set +# default$", result.output, re.MULTILINE)


def test_no_secret_is_shown(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the core's, nor one of a plugin, in either form. Dies if masks are left to the printing of pydantic."""
    monkeypatch.setenv("XLLM_SERVER__API_KEYS", "canary8")
    of_plugins = {"m": {"token": SecretStr("canary9"), "nested": [{"key": SecretStr("canary9")}], "path": Path("/x")}}
    settings = Settings(config_path=path)
    tables = config_command._tables(settings, of_plugins)
    shown = [config_command._as_toml(settings, tables), json.dumps(config_command._as_json(settings, tables))]
    shown += [show("--config", str(path), *more).output for more in ((), ("--json",))]
    assert all("***" in text and "canary" not in text for text in shown)
    assert tomllib.loads(shown[0])["plugin"]["m"] == {"token": "***", "nested": [{"key": "***"}], "path": "/x"}


def test_it_takes_the_flags_of_serve() -> None:
    """So that a command line can be checked by changing one word. Dies if a flag is added to `serve` alone."""
    show_command = config_command.command.commands["show"]

    def flags(command: click.Command) -> set[tuple[str, ...]]:
        return {tuple(p.opts) for p in command.params}

    assert flags(serve) <= flags(show_command)
    assert flags(show_command) - flags(serve) == {("--json",)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[plugin.core]\n host_store_bytes = 0", "my.toml:2:2: [plugin.core] host_store_bytes = 0: input should be"),
        ("[plugin.core]\nhost_store_byte = 1", "my.toml:2:1: [plugin.core] host_store_byte: unknown key; did you mean"),
        ("[plugin.mooncak]\nx = 1", "[plugin.mooncak] names plugin 'mooncak', which is not installed"),
        ("[kv]\nblok = 1", "my.toml:2:1: unknown key [kv] blok"),
    ],
)
def test_wrong_settings_are_errors(tmp_path: Path, text: str, words: str) -> None:
    """Also those that only a plugin can judge. Dies if the command shows what could not be served."""
    (tmp_path / "my.toml").write_text(text)
    result = show("--config", str(tmp_path / "my.toml"))
    assert isinstance(result.exception, Exception) and words in str(result.exception), result.output
    assert isinstance(result.exception, ConfigError) or "core" in text


def test_errors_behind_our_errors_are_silent_too() -> None:
    """What Python prints of a chain of exceptions. Dies if pydantic's own text, which quotes values, is left in it."""

    class Mine(BaseModel):
        token: SecretStr

    with pytest.raises(ConfigError) as raised:
        validate_plugin_table("m", Mine, {"token": ["canary7"]})
    with pytest.raises(ValidationError) as direct:
        ServerTable(api_keys=("canary7 x",))
    shown = [line for one in (raised, direct) for line in traceback.format_exception(one.value)]
    assert "canary7" not in "".join(line for line in shown if "File" not in line)
