"""A plan that crosses to another process: what builds from it, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.tiny_models import make_tiny
from xllm_core import LLM, SamplingParams
from xllm_core.config import Settings
from xllm_core.errors import PluginError
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.plan import AssemblyPlan
from xllm_core.plugins.resolve import Assembly, assemble
from xllm_core.plugins.worker import assembly_of, load_plan

Install = Callable[..., list[str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of 264 tokens, without a tokenizer."""
    path = tmp_path_factory.mktemp("plan") / "tiny"
    return str(make_tiny("llama", path, vocab_size=264, bos_token_id=0, eos_token_id=1, max_position_embeddings=512))


def planned(model: str, **tables: Any) -> Assembly:
    settings = Settings.from_flags(path=model, **tables)
    return assemble(settings, PluginManager.discover(settings).load())


def over_the_wire(plan: AssemblyPlan) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(plan.to_json()))
    return found


def test_a_plan_survives_the_way(model: str) -> None:
    """Equal, with an equal hash; and what is built from it is what was assembled."""
    made = planned(model, use={"kv_store": "core/host", "observers": ["core/log"]})
    plan = load_plan(over_the_wire(made.plan), made.plan.hash)
    assert plan == made.plan and plan.hash == made.plan.hash
    built = assembly_of(plan)
    assert (built.shape, built.facts, list(built.kv_groups)) == (made.shape, made.facts, list(made.kv_groups))


def test_a_worker_discovers_nothing(model: str) -> None:
    """A spawned process that holds only the plan generates what its maker generates, while discovery and hooks are bombs."""
    plan = planned(model, num_blocks=64).plan
    code = """
import json, sys
import importlib_metadata, pluggy
def bomb(*args, **kwargs): raise AssertionError("a worker looked for plugins")
importlib_metadata.entry_points = bomb
pluggy.PluginManager.__init__ = bomb
from xllm_core.config import Settings
from xllm_core.engine.build import build_engine
from xllm_core.plugins.worker import assembly_of, load_plan
from xllm_core.types import EngineRequest, SamplingParams
given = json.load(sys.stdin)
assembly = assembly_of(load_plan(given["plan"], given["hash"]))
engine = build_engine(assembly, Settings.from_flags(path=given["plan"]["model_path"], num_blocks=64)).engine
engine.submit(EngineRequest("a", (5, 6, 7), SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True), seed=0))
tokens = []
while engine.has_work:
    tokens += [token for output in engine.step() for token in output.new_token_ids]
engine.close()
print(json.dumps(tokens))
"""
    given = json.dumps({"plan": plan.to_json(), "hash": plan.hash})
    done = subprocess.run(
        [sys.executable, "-c", code], input=given, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    with LLM(model, num_blocks=64) as llm:
        (output,) = llm.generate(
            [[5, 6, 7]], SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True), use_tqdm=False
        )
    assert json.loads(done.stdout) == output.outputs[0].token_ids


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"version": "9.9"}, "plugin core: the plan has xllm-core 9.9, installed here is 0.1.0"),
        ({"distribution": "xllm-nowhere"}, "the plan has xllm-nowhere 0.1.0, which is not installed here"),
        ({"distribution": "in-process:m"}, "the plan has in-process:m 0.1.0, which is not installed here"),
    ],
)
def test_another_distribution_or_version_is_refused(model: str, change: dict[str, str], line: str) -> None:
    """With the difference; the hash of such a plan is right. Dies if only hashes are compared."""
    plan = planned(model).plan
    other = replace(plan, sampler=replace(plan.sampler, **change))
    with pytest.raises(PluginError) as raised:
        load_plan(over_the_wire(other), other.hash)
    assert line in str(raised.value)


def test_another_hash_and_another_shape_are_refused(model: str) -> None:
    """A plan that was changed on its way, one that is none, and one that does not fit the model."""
    plan = planned(model).plan
    changed = over_the_wire(plan) | {"block_size": 32}
    with pytest.raises(PluginError, match=f"announced was {plan.hash}"):
        load_plan(changed, plan.hash)
    with pytest.raises(PluginError, match=r"no plan of xllm-core .*: KeyError: 'sampler'"):
        load_plan({key: value for key, value in changed.items() if key != "sampler"}, plan.hash)
    geometry = {name: replace(entry, head_size=7) for name, entry in plan.geometry.items()}
    with pytest.raises(PluginError, match=r"asks for .* here, and the plan has .*head_size=7"):
        assembly_of(replace(plan, geometry=geometry))


def test_no_plan_carries_a_secret(model: str) -> None:
    """One that stood in the settings themselves is masked, and whoever gets the plan says what to write instead."""
    from pydantic import SecretStr

    plan = replace(planned(model).plan, plugin_settings={"bucket": {"key": SecretStr("s3cr3t"), "name": "a"}})
    plain = over_the_wire(plan)
    assert plain["plugin_settings"] == {"bucket": {"key": "***", "name": "a"}}
    with pytest.raises(
        PluginError, match=r'\[plugin\.bucket\.key\] is a secret, which no plan carries; write it as \{ env = "NAME" \}'
    ):
        load_plan(plain, plan.hash)
    kept = replace(plan, plugin_settings={"bucket": {"key": {"env": "KEY"}}})
    assert load_plan(over_the_wire(kept), kept.hash) == kept


def test_after_assembly_the_manager_is_never_asked(model: str) -> None:
    """Manager, settings and hook callers are bombs while twenty tokens are made. Dies if a step looks anything up."""
    code = """
import sys
import pluggy
from xllm_core import LLM, SamplingParams
from xllm_core.config import Settings
from xllm_core.plugins.manager import PluginManager
def bomb(*args, **kwargs): raise AssertionError("asked between two tokens")
with LLM(sys.argv[1], num_blocks=64) as llm:
    for name in ("offers", "load", "commands", "records", "tables", "check_wanted"):
        setattr(PluginManager, name, bomb)
    pluggy.HookCaller.__call__ = pluggy.PluginManager._hookexec = Settings.__getattribute__ = bomb
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    (output,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
    print(len(output.outputs[0].token_ids))
    try:
        LLM(sys.argv[1], num_blocks=64)
    except AssertionError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, model], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "20\nasked between two tokens\n", done.stderr


def test_plan_on_the_command_line(install: Install, xllm: Callable[..., Any], model: str, tmp_path: Path) -> None:
    """Every value with its origin: default, plugin, file and line, variable, flag; a key alone with what was rejected."""
    install("good")
    config = tmp_path / "xllm.toml"
    config.write_text('[scheduler]\nmax_num_seqs = 7\n[plugin.good]\ngreeting = "hi"\n')
    flags = ("--config", str(config), "--block-size", "32", "--device", "core/reference")
    done = xllm("plan", model, *flags)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert f"7  # {config}:2:1" in lines["scheduler.max_num_seqs"]
    assert (
        "# default" in lines["kv.enable_prefix_cache"]
        and "# default of plugin good" in lines["plugin.good.host_store_bytes"]
    )
    assert f"hi  # {config}:4:1" in lines["plugin.good.greeting"]
    assert "32  # --block-size" in lines["block_size"] and "core/gumbel" in lines["sampler"]
    found = json.loads(xllm("plan", model, *flags, "--json").stdout)
    assert found["hash"] in lines["plan"] and found["values"]["block_size"] == {"value": 32, "from": "--block-size"}
    narrow = xllm("plan", model, *flags, "--why", "attention").stdout
    assert narrow.startswith("attention.full  core/paged") and "rejected good/toy" in narrow, narrow
    assert "did you mean 'block_size'?" in xllm("plan", model, *flags, "--why", "block_siz").stderr


def test_a_pin_is_told_with_its_place(
    xllm: Callable[..., Any], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pin, a preference and a dtype came from a line, a variable or a flag, and this is said. Dies if only the table is named."""
    config = tmp_path / "my.toml"
    config.write_text('[prefer]\nscheduler = ["core/priority"]\n[device]\nname = "core/reference"\n')
    monkeypatch.setenv("XLLM_USE__SAMPLER", "core/gumbel")
    flags = ("--config", str(config), "--use", "op.linear=core/linear", "--dtype", "float32")
    lines = {line.split()[0]: line for line in xllm("plan", model, *flags).stdout.splitlines()}
    assert "first that fits in [prefer] scheduler, " in lines["scheduler"] and "my.toml:2:1" in lines["scheduler"]
    assert "my.toml:4:1" in lines["device"] and "# --dtype" in lines["dtype"]
    assert "pinned by [use] sampler, XLLM_USE__SAMPLER" in lines["sampler"]
    assert "pinned by [use] op.linear, --use" in lines["op.linear"]
