"""Settings: sources in their order, and errors that say where, what and what else."""

from __future__ import annotations

import json
import tomllib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from pydantic import BaseModel, ConfigDict, SecretStr

from xllm_core.config import (
    Settings,
    click_options,
    plain,
    settings_from_flags,
    validate_plugin_table,
)
from xllm_core.config_toml import key_positions
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
        ("[kv]\n  block_siz = 3", ["my.toml:2:3: unknown key [kv] block_siz; did you mean 'block_size'?"]),
        ("\n[kvv]\nx = 1", ["my.toml:2:2: unknown table [kvv]; did you mean 'kv'?"]),
        ("[kv]\nmax_num_seqs = 3", ["my.toml:2:1", "it belongs in [scheduler]"]),
        ("kv.block_size = 0", ["my.toml:1:4: [kv] block_size = 0: input should be greater than or equal to 1"]),
        ('[kv]\n\n"block_size" = "x"', ["my.toml:3:1: [kv] block_size = 'x': input should be a valid integer"]),
        (
            "kv = { num_blocks = 1, block_size = true }",
            ["my.toml:1:24: [kv] block_size = True: input should not be a bool"],
        ),
        ("kv = 3", ["my.toml:1:1: [kv] = 3: input should be a valid dictionary"]),
        ('[server]\nallowed_hosts = ["a",\n  5]', ["my.toml:3:3: [server] allowed_hosts = 5"]),
        ('[model]\ndtype = "int8"', ["my.toml:2:1: [model] dtype = 'int8'", "'float32' or 'bfloat16'"]),
        ("[device]\nnum_threads = 1025", ["my.toml:2:1: [device] num_threads = 1025", "or equal to 1024"]),
        ("[server]\nport = nan", ["my.toml:2:1: [server] port = nan"]),
        (
            "[server]\nbody_timeout_s = inf",
            ["my.toml:2:1: [server] body_timeout_s = inf: input should be a finite number"],
        ),
        ("[kv]\r\nblock_size = \nx = 1", ["my.toml:2:14: not valid TOML: invalid value"]),
        ('[kv]\nx = """', ["my.toml:2:8: not valid TOML: unterminated string"]),
        ("[kv]\nblock_size = 1\n[kv]\n", ["my.toml:3:", "not valid TOML"]),
        ('[use]\natention = "x"', ["my.toml:2:1: [use] unknown kind 'atention'; did you mean 'attention'?"]),
        ('[use]\nscheduler = ["a", "b"]', ["scheduler takes one name", "give an order of preference in [prefer]"]),
        ('[use]\nscheduler.fast = "a"', ["unknown kind 'scheduler.fast'"]),
        ("[kv]\nblock_size = 1\n[scheduler]\nmax_num_seqs = 0\nmax_waiting = 0", ["my.toml:4:1", "my.toml:5:1"]),
    ],
)
def test_errors_in_the_file_have_a_line(write: Callable[[str], Path], text: str, words: list[str]) -> None:
    """Dies if the place, the guess or the description goes."""
    fails(words, config_path=write(text))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("XLLM_KV__BLOCK_SIZ", "3", ["XLLM_KV__BLOCK_SIZ: no such setting; did you mean 'XLLM_KV__BLOCK_SIZE'?"]),
        ("XLLM_KV_BLOCK_SIZE", "3", ["did you mean 'XLLM_KV__BLOCK_SIZE'?"]),
        ("XLLM_KV__BLOCK_SIZE", "x", ["XLLM_KV__BLOCK_SIZE: [kv] block_size = 'x'", "valid integer"]),
        ("XLLM_PLUGIN__MOONCAKE", "3", ["no such setting"]),
        ("XLLM_PLUGINS__REQUIRE", "[1", ["XLLM_PLUGINS__REQUIRE: not valid JSON"]),
        (
            "XLLM_SERVICE_HOST",
            "10.0.0.1",
            ["XLLM_SERVICE_HOST: no such setting; Kubernetes", "XLLM_SERVICE_PORT are there"],
        ),
        ("XLLM_PORT", "8000", ["XLLM_PORT: no such setting", "Kubernetes", "XLLM_SERVER__PORT, or --port"]),
        ("XLLM_PORT", "tcp://10.0.0.1:8000", ["XLLM_PORT: no such setting", "Kubernetes", "XLLM_SERVER__PORT"]),
        ("XLLM_HOST", "0.0.0.0", ["did you mean 'XLLM_SERVER__HOST'?"]),
        ("XLLM_USE__ATENTION", "x", ["XLLM_USE__ATENTION: [use] unknown kind 'atention'"]),
        (
            "XLLM_SERVER__OPEN_METRICS",
            "perhaps",
            ["XLLM_SERVER__OPEN_METRICS: [server] open_metrics = 'perhaps'", "boolean"],
        ),
        ("XLLM_SERVER__GENERATION_CONFIG", "", ["XLLM_SERVER__GENERATION_CONFIG", "'auto' or 'none'"]),
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


KUBERNETES = {
    "SERVICE_HOST": "10.0.0.1",
    "SERVICE_PORT": "8000",
    "SERVICE_PORT_HTTP": "8000",
    "PORT": "tcp://10.0.0.1:8000",
    "PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "PORT_8000_TCP_PROTO": "tcp",
    "PORT_8000_TCP_PORT": "8000",
    "PORT_8000_TCP_ADDR": "10.0.0.1",
    "PORT_53_UDP": "udp://10.0.0.1:53",
}


def test_what_kubernetes_injects_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service called xllm, or xllm-decode-2, puts these into every pod. Dies if they are errors, or set a port.

    XLLM_PORT=9000 beside them was written by a person, and alone it always is: then it must be explained, not passed over.
    """
    for prefix in ("XLLM", "XLLM_DECODE_2", "XLLM_SERVER"):
        for tail, value in KUBERNETES.items():
            monkeypatch.setenv(f"{prefix}_{tail}", value)
    assert Settings() == Settings(reads_sources=False)
    monkeypatch.setenv("XLLM_PORT", "9000")
    fails(["XLLM_PORT: no such setting", "XLLM_SERVER__PORT, or --port"])
    monkeypatch.setenv("XLLM_PORT", KUBERNETES["PORT"])
    monkeypatch.delenv("XLLM_DECODE_2_SERVICE_HOST")
    fails(["XLLM_DECODE_2_PORT: no such setting; Kubernetes"])


@pytest.mark.parametrize("first", ["XLLM_PLUGIN__M__T", "XLLM_plugin__m__t"])
def test_two_variables_for_one_thing(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """Dies if one of them wins in silence, or the reader falls over."""
    monkeypatch.setenv(first, "5")
    monkeypatch.setenv("XLLM_PLUGIN__M__T__A", "1")
    fails([first, "XLLM_PLUGIN__M__T__A", "set the same thing"])


HARD_TOML = r"""# a comment with [brackets] and = signs
kv.block_size = 1  # another
"kv".'num_blocks' = 2
top = { a = [1, { b = "]}" , "c d" = 3 }], "e.f".g = 1979-05-27 07:32:00 }

[ plugin . one ]
multi = QQQ
[not.a.table]
key = 1 \QQQ quoted ""
QQQ""
literal = '''
x = 'y' \'''
"q\u0061" = [
  "#", # [comment]
  [ ],
  1_000, ]
[[plugin.one.rows]]
name = "first"
[plugin.one.rows.inner]
deep = true
[[plugin.one.rows]]
name = "second"
  [[plugin.one.rows.inner]]
  z=+1.0e3
[plugin.one.after]
[server]
host = "a#b"
""".replace("QQQ", '"' * 3)


def test_every_key_has_its_position() -> None:
    """Against tomllib: the same keys, indices of arrays among them, and at each position stands that key or element."""
    text = HARD_TOML
    tables = tomllib.loads(text)

    def paths(value: Any, above: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        found = {above} if above else set()
        return found.union(*(paths(below, (*above, str(key))) for key, below in inner))

    positions = key_positions(text)
    assert set(positions) == paths(tables)
    lines = text.split("\n")
    for keys, (line, column) in positions.items():
        rest = lines[line - 1][column - 1 :]
        if not keys[-1].isdigit():
            assert rest.lstrip("\"'").startswith((keys[-1], "q\\u0061")), (keys, line, column)
    assert positions["plugin", "one", "qa", "2"] == (lines.index("  1_000, ]") + 1, 3)
    assert positions["plugin", "one", "rows", "1", "inner", "0", "z"][1] == 3
    assert key_positions(text.replace("\n", "\r\n")) == positions


KINDS_OF_VALUES = [
    # table, key, and what default, file (as TOML), environment (as text) and flag give; each read as what stands after it
    ("scheduler", "max_num_seqs", 64, ("7", 7), ("8", 8), ("9", 9)),
    ("server", "write_timeout_s", 30.0, ("1.5", 1.5), ("2.5", 2.5), ("3", 3.0)),
    ("server", "log_requests", False, ("true", True), ("false", False), (True, True)),
    ("server", "uds", None, ('"f"', "f"), ("e", "e"), ("a", "a")),
    ("server", "generation_config", "auto", ('"none"', "none"), ("auto", "auto"), ("none", "none")),
    ("server", "allowed_hosts", (), ('["f", "g"]', ("f", "g")), ("e,h", ("e", "h")), (("a",), ("a",))),
    ("server", "api_keys", (), ('["f"]', ("f",)), ('["e"]', ("e",)), (("a",), ("a",))),
    ("kv", "num_blocks", None, ("7", 7), ("8", 8), ("9", 9)),
    ("use", "sampler", "", ('"f"', "f"), ("e", "e"), ("a", "a")),
    ("use", "op.linear", "", ('"f"', "f"), ("e", "e"), ("a", "a")),
    ("use", "observers", (), ('["f"]', ("f",)), ("e,g", ("e", "g")), (["a"], ("a",))),
    ("prefer", "attention", (), ('["f", "g"]', ("f", "g")), ("e", ("e",)), (["a"], ("a",))),
    ("plugin", "m", {}, ('{ x = "f" }', {"x": "f"}), ("e", {"x": "e"}), ({"x": "a"}, {"x": "a"})),
]


@pytest.mark.parametrize("case", KINDS_OF_VALUES, ids=lambda case: f"{case[0]}.{case[1]}")
@pytest.mark.parametrize("sources", ["", "f", "e", "a", "fe", "fa", "ea", "fea"])
def test_precedence_for_each_kind_of_value(
    write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, case: tuple[Any, ...], sources: str
) -> None:
    """Flag over variable over file over default, with the origin that `place` tells. Dies if two sources change places, for any kind."""
    table, key, expected, in_file, in_environment, as_flag = case
    place = "default"
    path = write(f"[{table}]\n{key} = {in_file[0]}" if "f" in sources else "")
    variable = f"XLLM_{table}__{key}".upper().replace(".", "__") + ("__X" if table == "plugin" else "")
    if "f" in sources:
        expected, place = in_file[1], f"{path}:2:{4 if '.' in key else 7 if table == 'plugin' else 1}"
    if "e" in sources:
        monkeypatch.setenv(variable, in_environment[0])
        expected, place = in_environment[1], variable
    given = {}
    if "a" in sources:
        given = {table: {key: as_flag[0]}}
        is_plain = table in ("plugin", "prefer") or key == "api_keys"
        flag = "--use" if table == "use" else "argument" if is_plain else f"--{key.replace('_', '-')}"
        expected, place = as_flag[1], flag
    settings = Settings(config_path=path, **given)
    got = getattr(settings, table)
    value = got.get(key, expected if not sources else None) if isinstance(got, dict) else getattr(got, key)
    if key == "api_keys":
        value = tuple(secret.get_secret_value() for secret in value)
    assert value == expected
    if table == "plugin":
        assert settings.place(table, key, "x") == place
    else:
        assert settings.place(table, key) == place


def test_an_origin_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal values are equal settings, wherever they were written."""
    given = Settings(kv={"num_blocks": 3})
    monkeypatch.setenv("XLLM_KV__NUM_BLOCKS", "3")
    assert Settings() == given
    assert Settings().place("kv", "num_blocks") != given.place("kv", "num_blocks")


def test_settings_of_another_process(
    write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Plain JSON there and back; what lies about in the new process is not read. Dies if a source is, or a kind of value is lost."""
    monkeypatch.setenv("SECRET", "two")
    path = write(
        TOML
        + '[server]\napi_keys = ["one", { env = "SECRET" }]\nuds = "/x"\n[plugin.n]\nday = 2020-01-02\nlist = [1.5, { a = true }]'
    )
    settings = Settings(config_path=path, prefer={"attention": ["a", "b"]})
    text = json.dumps(settings.tables())
    assert settings.tables()["server"]["api_keys"] == ["one", "two"]
    monkeypatch.delenv("SECRET")
    monkeypatch.setenv("XLLM_KV__BLOCK_SIZE", "99")
    monkeypatch.setenv("XLLM_NONSENSE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "xllm.toml").write_text("[kv]\nnum_blocks = 5\nnonsense = 3\n")
    again = Settings.from_tables(json.loads(text))
    assert again.tables() == settings.tables()
    assert (again.kv, again.server, again.use, again.prefer) == (
        settings.kv,
        settings.server,
        settings.use,
        settings.prefer,
    )
    with pytest.raises(ConfigError, match="unknown table"):
        Settings.from_tables({"kvv": {}})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["canary7 x"], "key 1 is empty or holds a character"),
        (["canary7", ""], "key 2 is empty"),
        ("canary7", "valid tuple"),
        (["canary7", 5], "valid string"),
        ([{"env": "NOT_THERE_CANARY7"}], "the variable NOT_THERE_CANARY7 is not set"),
        ([{"enw": "canary7"}], 'or { env = "NAME" }'),
    ],
)
def test_a_wrong_secret_is_not_repeated(keys: Any, words: str) -> None:
    """Neither in our message nor in what Python prints of the error behind it. Dies if a key is quoted like other values."""
    with pytest.raises(ConfigError) as raised:
        Settings(server={"api_keys": keys})
    assert words in str(raised.value)
    shown = "".join(traceback.format_exception(raised.value)).split("\n")
    assert not [line for line in shown if "canary7" in line]


def test_secrets_stay_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """repr, dumps, what plugins get, and a variable that is not JSON. Dies if one of them shows a key."""
    monkeypatch.setenv("XLLM_SERVER__API_KEYS", "canary7,canary8")
    settings = Settings()
    assert [key.get_secret_value() for key in settings.server.api_keys] == ["canary7", "canary8"]
    shown = [repr(settings), str(settings.server), str(settings.model_dump()), settings.model_dump_json()]
    assert "canary" not in "".join([*shown, str(settings.core_tables()), str(plain(settings.model_dump()))])
    monkeypatch.setenv("XLLM_SERVER__API_KEYS", '["canary7')
    with pytest.raises(ConfigError, match="XLLM_SERVER__API_KEYS: not valid JSON") as raised:
        Settings()
    assert "canary" not in str(raised.value) and raised.value.__suppress_context__


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


def test_a_plugins_table(write: Callable[[str], Path]) -> None:
    """Unknown key with a guess, wrong value with what is allowed, and the line where there is one; a secret is not shown."""

    class Table(BaseModel):
        model_config = ConfigDict(extra="forbid")
        segment_gb: int = 1
        secret: SecretStr | None = None

    assert validate_plugin_table("m", Table, {"segment_gb": "4"}) == {"segment_gb": 4, "secret": None}
    with pytest.raises(ConfigError, match=r"\[plugin.m\] segment_gbb: unknown key; did you mean 'segment_gb'"):
        validate_plugin_table("m", Table, {"segment_gbb": 4})
    with pytest.raises(ConfigError, match=r"\[plugin.m\] segment_gb = 'x'.*valid integer"):
        validate_plugin_table("m", Table, {"segment_gb": "x"})
    settings = Settings(config_path=write("[plugin.m]\n secret = 'x'\n segment_gbb = 1\n"))
    with pytest.raises(ConfigError, match=r"my.toml:3:2: \[plugin.m\] segment_gbb: unknown key"):
        validate_plugin_table("m", Table, settings.plugin["m"], settings)
    settings = Settings(config_path=write("[plugin.m]\n secret = ['canary7']\n"))
    with pytest.raises(ConfigError, match=r"my.toml:2:2: \[plugin.m\] secret = \*\*\*: input should be a valid string"):
        validate_plugin_table("m", Table, settings.plugin["m"], settings)


@click.command()
@click.option("--own")
@click_options("model", "device", "kv", "server", "log")
def command(own: str, **flags: Any) -> None:
    """A command with settings of its own."""
    settings = settings_from_flags(flags, path="the-model")
    assert not flags
    click.echo(f"{own} {settings.model.path} {settings.model.dtype} {settings.kv} {settings.use} {settings.server}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["None the-model auto block_size=None", "enable_prefix_cache=True {}", "served_model_name=()"]),
        (["--own", "x", "--block-size", "8", "--dtype", "float32"], ["x the-model float32 block_size=8"]),
        (["--port", "0", "--write-timeout-s", "0.5"], ["port=0", "write_timeout_s=0.5"]),
        (["--served-model-name", "a", "--served-model-name", "b,c"], ["served_model_name=('a', 'b,c')"]),
        (["--open-metrics", "--no-log-requests"], ["open_metrics=True", "log_requests=False"]),
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
        (["--num-threads", "100000"], "num_threads = '100000': input should be less than or equal to 1024"),
        (["--use", "attention"], "--use attention: write KIND=NAME"),
    ],
)
def test_wrong_flags_name_the_flag(arguments: list[str], message: str) -> None:
    """The same words as for a variable or a line of the file."""
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


@pytest.mark.parametrize("arguments", [["--api-key", "canary7"], ["--api-keys=canary7"], ["--api-key"]])
def test_a_key_is_not_taken_from_the_command_line(arguments: list[str]) -> None:
    """It would show in `ps`. Dies if the flag comes back, or its answer repeats the key."""
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2
    assert "use --api-key-file FILE or the variable XLLM_SERVER__API_KEYS" in " ".join(result.output.split())
    assert "canary7" not in result.output
