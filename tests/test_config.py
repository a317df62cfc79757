"""Settings: sources in their order, and errors that say where, what and what else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from pydantic import BaseModel, ConfigDict

from xllm_core.config import (
    Settings,
    click_options,
    settings_from_flags,
    validate_plugin_table,
)
from xllm_core.errors import ConfigError

TOML = """
# a comment
[kv]
block_size = 32

[scheduler]
max_num_seqs = 7

[use]
op.linear = "core/linear"
observers = ["core/log"]

[plugin.mooncake]
master = "10.0.0.1:50051"
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Write a settings file."""

    def do_write(text: str) -> Path:
        path = tmp_path / "my.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return do_write


def fails(words: list[str], **arguments: Any) -> None:
    """Construction fails, and the message holds all the words."""
    with pytest.raises(ConfigError) as raised:
        Settings.from_flags(**arguments)
    for word in words:
        assert word in str(raised.value), str(raised.value)


def test_flags_over_environment_over_file_over_defaults(
    write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each source shows where the ones above it are silent. Dies if two sources change places."""
    path = write(TOML)
    monkeypatch.setenv("XLLM_SCHEDULER__MAX_NUM_SEQS", "8")
    monkeypatch.setenv("XLLM_SCHEDULER__MAX_WAITING", "9")
    settings = Settings.from_flags(path, max_waiting=10)
    assert (settings.kv.block_size, settings.scheduler.max_num_seqs, settings.scheduler.max_waiting) == (32, 8, 10)
    assert settings.scheduler.max_num_batched_tokens == 2048
    assert settings.use == {"op.linear": "core/linear", "observers": ("core/log",)}
    assert settings.plugin == {"mooncake": {"master": "10.0.0.1:50051"}}


def test_the_file_in_the_working_directory_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dies if ./xllm.toml is not looked for. A path that was given must exist, and is read instead."""
    monkeypatch.chdir(tmp_path)
    assert Settings().kv.block_size is None
    (tmp_path / "xllm.toml").write_text("[kv]\nblock_size = 64\n")
    assert Settings().kv.block_size == 64
    (tmp_path / "other.toml").write_text("[kv]\nnum_blocks = 5\n")
    assert Settings(config_path=tmp_path / "other.toml").kv.block_size is None
    with pytest.raises(ConfigError, match="cannot read settings from"):
        Settings(config_path=tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[kv]\nblock_siz = 3", ["my.toml:2: unknown key [kv] block_siz; did you mean 'block_size'?"]),
        ("\n[kvv]\nx = 1", ["my.toml:2: unknown table [kvv]; did you mean 'kv'?"]),
        ("[kv]\nmax_num_seqs = 3", ["my.toml:2", "it belongs in [scheduler]"]),
        ("kv.block_size = 0", ["my.toml:1: [kv] block_size = 0: input should be greater than or equal to 1"]),
        ('[kv]\n\n"block_size" = "x"', ["my.toml:3: [kv] block_size = 'x': input should be a valid integer"]),
        ('[model]\ndtype = "int8"', ["my.toml:2: [model] dtype = 'int8'", "'float32' or 'bfloat16'"]),
        ("[kv]\nblock_size = \nx = 1", ["my.toml: not valid TOML", "line 2"]),
        ('[use]\natention = "x"', ["my.toml", "unknown kind 'atention'; did you mean 'attention'?"]),
        ('[use]\nscheduler = ["a", "b"]', ["scheduler takes one name", "give an order of preference in [prefer]"]),
        ('[use]\nscheduler.fast = "a"', ["unknown kind 'scheduler.fast'"]),
        ("[kv]\nblock_size = 1\n[scheduler]\nmax_num_seqs = 0\nmax_waiting = 0", ["my.toml:4", "my.toml:5"]),
    ],
)
def test_errors_in_the_file_have_a_line(write: Callable[[str], Path], text: str, words: list[str]) -> None:
    """Dies if the line locator, the guess or the description goes."""
    fails(words, config_path=write(text))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("XLLM_KV__BLOCK_SIZ", "3", ["XLLM_KV__BLOCK_SIZ: no such setting; did you mean 'XLLM_KV__BLOCK_SIZE'?"]),
        ("XLLM_KV_BLOCK_SIZE", "3", ["did you mean 'XLLM_KV__BLOCK_SIZE'?"]),
        ("XLLM_KV__BLOCK_SIZE", "x", ["XLLM_KV__BLOCK_SIZE: [kv] block_size = 'x'", "valid integer"]),
        ("XLLM_PLUGIN__MOONCAKE", "3", ["no such setting"]),
        ("XLLM_PLUGINS__REQUIRE", "[1", ["XLLM_PLUGINS__REQUIRE: not valid JSON"]),
        ("XLLM_SERVICE_HOST", "10.0.0.1", ["no such setting"]),
    ],
)
def test_unknown_and_wrong_variables_are_errors(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: list[str]
) -> None:
    """Dies if a misspelt variable is passed over, which is what pydantic-settings does by itself."""
    monkeypatch.setenv(name, value)
    fails(words)


def test_variables_hold_lists_tables_and_plugin_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dies if one of the spellings is not understood."""
    monkeypatch.setenv("XLLM_PLUGINS__REQUIRE", "a, b>=2")
    monkeypatch.setenv("XLLM_PREFER__ATTENTION", '["a/x", "b/y"]')
    monkeypatch.setenv("XLLM_USE__KV_STORE", "core/host")
    monkeypatch.setenv("XLLM_USE__OBSERVERS", "core/log")
    monkeypatch.setenv("XLLM_PLUGIN__MOONCAKE__MASTER", "10.0.0.1:50051")
    monkeypatch.setenv("XLLM_KV__ENABLE_PREFIX_CACHE", "false")
    settings = Settings()
    assert settings.plugins.require == ("a", "b>=2")
    assert settings.prefer == {"attention": ("a/x", "b/y")}
    assert settings.use == {"kv_store": "core/host", "observers": ("core/log",)}
    assert settings.plugin == {"mooncake": {"master": "10.0.0.1:50051"}}
    assert settings.kv.enable_prefix_cache is False


def test_what_kubernetes_injects_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service called xllm, or xllm-decode, puts these into every pod. Dies if they are errors; XLLM_PORT alone still is one."""
    for prefix in ("XLLM", "XLLM_DECODE"):
        for tail in (
            "SERVICE_HOST",
            "SERVICE_PORT",
            "SERVICE_PORT_HTTP",
            "PORT",
            "PORT_8000_TCP",
            "PORT_8000_TCP_PROTO",
            "PORT_8000_TCP_ADDR",
        ):
            monkeypatch.setenv(f"{prefix}_{tail}", "x")
    Settings()
    for name in ("XLLM_SERVICE_HOST", "XLLM_SERVICE_PORT"):
        monkeypatch.delenv(name)
    fails(["no such setting"])


def test_flat_keys_find_their_table() -> None:
    """By the field's own name and by its flag's; a mapping gives a whole table."""
    settings = Settings.from_flags(
        path="m", device="cpu/x", log_level="debug", kv={"num_blocks": 3}, block_size=8, use={"kv_store": "core/host"}
    )
    assert (settings.model.path, settings.device.name, settings.log.level) == ("m", "cpu/x", "debug")
    assert (settings.kv.num_blocks, settings.kv.block_size) == (3, 8)
    assert Settings.from_flags(model="m").model.path == "m"
    fails(["unknown setting 'max_num_seq'; did you mean 'max_num_seqs'?"], max_num_seq=3)
    fails(["--max-num-seqs: [scheduler] max_num_seqs = 0"], max_num_seqs=0)
    fails(["unknown key [kv] blocksize; did you mean 'block_size'?"], kv={"blocksize": 3})


def test_settings_are_frozen() -> None:
    """Dies if somebody can change a setting after the plan is made."""
    settings = Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.kv.block_size = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        settings.kv = settings.kv  # type: ignore[misc]


def test_every_setting_has_a_description() -> None:
    """Help is made from them."""
    from xllm_core.config_tables import TABLES

    bare = [f"[{t}] {n}" for t, m in TABLES.items() for n, field in m.model_fields.items() if not field.description]
    assert not bare


def test_a_plugins_table() -> None:
    """Unknown key with a guess, wrong value with what is allowed."""

    class Table(BaseModel):
        model_config = ConfigDict(extra="forbid")
        segment_gb: int = 1

    assert validate_plugin_table("m", Table, {"segment_gb": "4"}) == {"segment_gb": 4}
    with pytest.raises(ConfigError, match=r"\[plugin.m\] segment_gbb: unknown key; did you mean 'segment_gb'"):
        validate_plugin_table("m", Table, {"segment_gbb": 4})
    with pytest.raises(ConfigError, match=r"\[plugin.m\] segment_gb = 'x'.*valid integer"):
        validate_plugin_table("m", Table, {"segment_gb": "x"})


@click.command()
@click.option("--own")
@click_options("model", "kv", "log")
def command(own: str, **flags: Any) -> None:
    """A command with settings of its own."""
    settings = settings_from_flags(flags, path="the-model")
    assert not flags
    click.echo(f"{own} {settings.model.path} {settings.model.dtype} {settings.kv} {settings.use}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["None the-model auto block_size=None", "enable_prefix_cache=True {}"]),
        (["--own", "x", "--block-size", "8", "--dtype", "float32"], ["x the-model float32 block_size=8"]),
        (["--disable-prefix-cache"], ["enable_prefix_cache=False"]),
        (
            ["--use", "kv_store=core/host", "--use", "observers=a,b"],
            ["{'kv_store': 'core/host', 'observers': ('a', 'b')}"],
        ),
    ],
)
def test_flags_of_commands(arguments: list[str], words: list[str]) -> None:
    """Dies if a flag is not generated, or a default is taken for a flag that was given."""
    result = CliRunner().invoke(command, arguments)
    assert result.exception is None, result.exception
    for word in words:
        assert word in result.output, result.output


def test_a_flag_not_given_leaves_the_file_alone(write: Callable[[str], Path]) -> None:
    """Dies if flags carry their defaults, which would hide the file."""
    result = CliRunner().invoke(
        command, ["--config", str(write("[kv]\nblock_size = 48\nenable_prefix_cache = false\n"))]
    )
    assert "block_size=48" in result.output
    assert "enable_prefix_cache=False" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block-size", "x"], "--block-size: [kv] block_size = 'x'"),
        (["--use", "attention"], "--use attention: write KIND=NAME"),
    ],
)
def test_wrong_flags_name_the_flag(arguments: list[str], message: str) -> None:
    """The same words as for a variable or a line of the file."""
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
