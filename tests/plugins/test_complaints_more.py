"""What authors of plugins complain of elsewhere, continued: the ninth to the fifteenth."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import importlib_metadata
import pytest
from packaging.requirements import Requirement

from tests.fixtures.tiny_models import make_tiny
from tests.meta.source import python_files, relative, tree
from tests.plugins.conftest import Install, MakeDist
from xllm_core import LLM, SamplingParams
from xllm_core.config import Settings
from xllm_core.errors import PluginError
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.resolve import assemble
from xllm_core.testing import check_plugin

Run = Callable[..., subprocess.CompletedProcess[str]]

LADDER = re.compile(r"(kind|device\w*|\.type) (==|!=|in|not in) [\[('\"]*(cuda|npu|cpu|mps|xpu|reference)\b")


@pytest.mark.parametrize("overlap", [True, False])
def test_09_feature_combinations_drop_the_plugin(install: Install, overlap: bool) -> None:
    """A processor stays active with several sequences per prompt, chunks, prefix hits, penalties and overlap: token 7 never comes."""
    install("good")
    params = SamplingParams(
        n=3, temperature=1.5, seed=3, max_tokens=20, ignore_eos=True, repetition_penalty=1.1, logit_bias={7: 50.0}
    )
    prompts = [{"prompt_token_ids": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]}] * 2
    pins = {"device": "core/reference"}
    with LLM("toy:1", use=pins, num_blocks=64, max_num_seqs=4, max_num_batched_tokens=8, overlap=overlap) as llm:
        answers = [out.token_ids for answer in llm.generate(prompts, params, use_tqdm=False) for out in answer.outputs]
    assert len(answers) == 6 and not any(7 in tokens for tokens in answers)
    with LLM("toy:1", use={**pins, "logits_processors": ["core/logit_bias"]}, num_blocks=64) as llm:
        answers = [out.token_ids for answer in llm.generate(prompts, params, use_tqdm=False) for out in answer.outputs]
    assert any(7 in tokens for tokens in answers), "token 7 is never likely, so this proves nothing"


@pytest.mark.skip(reason="there is no speculation yet, so nothing that a processor could be incompatible with")
def test_09_an_incompatible_pair_stops_assembly() -> None:
    """A processor that does not declare `works_with={"speculation"}` beside a proposer: an error that names both."""
    raise AssertionError("pin a proposer and a processor that does not work with it")


def test_10_undefined_order(make_dist: MakeDist, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed in either order, the same choices for the same reasons; a hook that asks for a place in the order is refused."""
    paths = install("good", "twin_a")
    plans = []
    for order in (paths, paths[::-1]):
        monkeypatch.setattr(sys, "path", [*order, *(path for path in sys.path if path not in paths)])
        settings = Settings.from_flags(path="toy:1")
        manager = PluginManager.discover(settings).load()
        offers = [offer.name for offer in manager.offers("xllm_schedulers") if offer.plugin in ("core", "good", "twin")]
        plan = assemble(settings, manager).plan
        plans.append((offers, plan.scheduler, plan.logits_processors, plan.ops))
    assert plans[0] == plans[1]
    assert plans[0][0] == ["core/fcfs", "core/priority", "good/lifo", "twin/from_a"]
    make_dist("pushy", "@hookimpl(tryfirst=True)\ndef xllm_schedulers():\n    return []\n")
    record = next(r for r in PluginManager.discover().load().records if r.id == "pushy")
    assert record.state == "failed" and "uses tryfirst" in record.reason


def test_11_dependency_wars(make_dist: MakeDist, xllm: Run, tmp_path: Path) -> None:
    """The core has floors and no triton; what a plugin pins and is not there is a line of doctor; a module that is missing is a reason."""
    needs = [Requirement(text) for text in importlib_metadata.requires("xllm-core") or () if "extra ==" not in text]
    assert {str(need.specifier)[:2] for need in needs if need.name == "torch"} == {">="}
    assert "triton" not in {need.name for need in needs}
    plugin = (
        "from xllm_core.plugins import REFERENCE_ATTENTION, AttentionSpec\n@hookimpl\ndef xllm_attention():\n"
        "    yield AttentionSpec(name='fast', target=REFERENCE_ATTENTION, rank=9, devices={'reference'},\n"
        "        dtypes={'float32'}, requires=('vendor_kernels',))\n"
    )
    make_dist("pinned", plugin, requires=("xllm-core>=0.1", "torch==1.0", "vendor-kernels>=3"))
    done = xllm("plugins", "doctor")
    assert done.returncode == 1
    assert "it requires torch==1.0, installed is" in done.stdout
    assert "it requires vendor-kernels>=3, which is not installed" in done.stdout
    model = str(make_tiny("llama", tmp_path / "m"))
    assert (
        "rejected pinned/fast  needs module vendor_kernels, not installed"
        in xllm("plan", model, "--why", "attention").stdout
    )


NOSY = """
import dataclasses

class Nosy:
    is_static = False
    uses_priority = False

    def look(self, views):
        for view in views:
            assert type(view).__name__ == "SequenceView" and dataclasses.is_dataclass(view), type(view)
            for field in dataclasses.fields(view):
                assert type(getattr(view, field.name)) in (str, int, float, bool, type(None)), field.name
            try:
                view.priority = 0
            except AttributeError:
                continue
            raise AssertionError("a snapshot could be changed")

    def order(self, waiting, now_s):
        self.look(waiting)
        return range(len(waiting))

    def chunk(self, view, budget_tokens):
        self.look([view])
        return min(view.todo_tokens, budget_tokens)

    def victims(self, running, now_s):
        self.look(running)
        return range(len(running))


class Greedy(Nosy):
    def chunk(self, view, budget_tokens):
        return view.todo_tokens + 1
"""


def test_12_kv_and_scheduler_interfaces_are_too_wide(make_dist: MakeDist, tmp_path: Path) -> None:
    """A policy sees frozen snapshots of plain values and no object of the engine; what it answers is checked, and the policy is named."""
    plugin = (
        "from xllm_core.plugins import SchedulerSpec\n@hookimpl\ndef xllm_schedulers():\n"
        "    yield SchedulerSpec(name='nosy', target='xllm_nosy.policy:Nosy', rank=-1)\n"
        "    yield SchedulerSpec(name='greedy', target='xllm_nosy.policy:Greedy', rank=-1)\n"
    )
    make_dist("nosy", plugin, {"policy.py": NOSY})
    model = str(make_tiny("llama", tmp_path / "m"))
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompts = [{"prompt_token_ids": [i + 3, *range(20)]} for i in range(6)]
    answers = []
    for policy in ("core/fcfs", "nosy/nosy"):
        # Too few blocks for all: the policy is asked for victims as well.
        with LLM(model, dtype="float32", use={"scheduler": policy}, num_blocks=10, block_size=8, max_num_seqs=4) as llm:
            answers.append([out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)])
    assert answers[0] == answers[1]
    with LLM(model, dtype="float32", use={"scheduler": "nosy/greedy"}, num_blocks=64) as llm:
        with pytest.raises(Exception, match="scheduling policy Greedy wants 22 tokens of a sequence that has 21 to go"):
            llm.generate(prompts[:1], params, use_tqdm=False)


def test_13_closed_enums_and_ladders(install: Install) -> None:
    """A kind of device that the core has never heard of serves, with torch.cuda out of reach; the core compares no kind with a name."""
    install("good")
    code = """
import torch
def bomb(*args, **kwargs): raise AssertionError("asked for cuda")
for name in ("is_available", "current_device", "device_count", "synchronize", "memory_allocated", "get_device_properties"):
    setattr(torch.cuda, name, bomb)
from xllm_core import LLM, SamplingParams
with LLM("toy:1", num_blocks=64) as llm:
    (answer,) = llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)
    print(llm.info.device, len(answer.outputs[0].token_ids))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "toy 5\n", done.stderr
    ladders = []
    for path in python_files("xllm_core"):
        if "testing" in path.parts:
            continue  # what proves a device looks at where its tensors are
        for node in ast.walk(tree(path)):
            text = ast.unparse(node) if isinstance(node, ast.Compare | ast.Attribute) else ""
            is_ladder = isinstance(node, ast.Compare) and LADDER.search(text)
            if is_ladder or re.match(r"torch\.(cuda|npu|mps|xpu)\b|\w+\.is_cuda\b", text):
                ladders.append(f"{relative(path)}:{node.lineno}: {text}")  # type: ignore[attr-defined]
    assert not ladders, ladders


def test_14_plugin_config_is_a_shared_bag(
    install: Install, xllm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is the plugin's: the core adds nothing to it; a misspelt key, variable or id is an error with its place and a guess."""
    install("good")
    settings = Settings.from_flags(path="toy:1", plugin={"good": {"greeting": "hi"}})
    plan = assemble(settings, PluginManager.discover(settings).load()).plan
    assert dict(plan.plugin_settings["good"]) == {"host_store_bytes": 1 << 20, "greeting": "hi"}
    config = tmp_path / "my.toml"
    for text, words in (
        (
            "# mine\n[plugin.good]\ngreting = 'x'\n",
            "my.toml:3:1: [plugin.good] greting: unknown key; did you mean 'greeting'",
        ),
        ("[plugin.goood]\ngreeting = 'x'\n", "plugin 'goood', which is not installed"),
    ):
        config.write_text(text)
        done = xllm("plan", "toy:1", "--config", str(config))
        assert done.returncode == 1 and words in done.stderr, done.stderr
    monkeypatch.setenv("XLLM_PLUGIN__GOOD__GREETIN", "x")
    done = xllm("plan", "toy:1")
    assert done.returncode == 1 and "did you mean" in done.stderr and "greeting" in done.stderr.lower(), done.stderr


@pytest.mark.slow
def test_15_no_way_to_prove_a_plugin(make_dist: MakeDist) -> None:
    """Conformance finds a kernel that forgets causality, by name; a plugin that offers nothing is not green for having failed nothing."""
    plugin = (
        "from xllm_core.plugins import AttentionSpec\n@hookimpl\ndef xllm_attention():\n"
        "    yield AttentionSpec(name='wrong', target='xllm_liar.kernel:Wrong', devices={'reference'},\n"
        "        dtypes={'float32'}, head_sizes={16}, block_sizes={16})\n"
    )
    kernel = """
class Wrong:
    def __init__(self, device, geometry):
        self.device = device
    def plan(self, batch):
        return None
    def run(self, q, kv, plan, out):
        out.copy_(q)
"""
    make_dist("liar", plugin, {"kernel.py": kernel})
    report = check_plugin("liar", arguments=("-k", "attention"))
    assert not report.ok and "liar/wrong" in report.text, report.text
    make_dist("empty", "")
    assert not check_plugin("empty", arguments=("-k", "attention")).ok


def test_15_installing_is_not_activating(
    install: Install, xllm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the policy `listed` nothing that was installed runs until it is named, with its distribution; a lock refuses what came later."""
    install("twin_b")
    config = tmp_path / "xllm.toml"
    config.write_text('[plugins]\npolicy = "listed"\n')
    found = json.loads(xllm("plugins", "list", "--why", "--json", "--config", str(config)).stdout)
    states = {record["id"]: record["state"] for record in found}
    assert states.pop("core") == "loaded" and set(states.values()) == {"not-allowed"} and "twin" in states
    config.write_text('[plugins]\npolicy = "listed"\nenable = ["twin@xllm-twin-a"]\n')
    impostor = xllm("plugins", "why", "scheduler", "--config", str(config))
    assert impostor.returncode == 1 and "asks for twin@xllm-twin-a; installed from xllm-twin-b" in impostor.stderr
    config.write_text("[plugins]\nlocked = true\n")
    assert xllm("plugins", "lock", "--config", str(config)).returncode == 0
    before = os.environ["PYTHONPATH"]
    install("good")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([before, os.environ["PYTHONPATH"]]))
    with pytest.raises(PluginError, match=r"good: xllm-good 1.4 is installed and not in the lock"):
        PluginManager.discover(Settings(config_path=config)).load()
