"""A plugin from outside, as its user meets it: on the command line, in a real engine, and really installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.plugins.conftest import DISTS

Install = Callable[..., list[str]]
Run = Callable[..., subprocess.CompletedProcess[str]]


def test_its_commands_stand_under_its_id(install: Install, xllm: Run) -> None:
    """`xllm good hello`. Help of the top names the plugin without importing it, so a broken one cannot break help."""
    install("good", "broken_import", "twin_a")
    top = xllm("--help")
    assert top.returncode == 0, top.stderr
    assert "good    Commands of xllm-good 1.4" in top.stdout
    assert "broken  Commands of xllm-broken-import 0.3" in top.stdout
    assert "hello  Say hello." in xllm("good", "--help").stdout
    assert xllm("good", "hello").stdout == "hello from a plugin\n"
    wrong = xllm("good", "helo")
    assert (wrong.returncode, "did you mean 'hello'?" in wrong.stderr) == (2, True)
    broken = xllm("broken", "hello")
    assert (broken.returncode, "failed, ModuleNotFoundError" in broken.stderr) == (1, True)
    assert "brings no commands" in xllm("twin", "hello").stderr


def test_list_shows_the_broken_beside_the_good(install: Install, xllm: Run) -> None:
    """With states and reasons, and nothing on stderr: the list is where the reasons belong."""
    install("good", "broken_import", "twin_a", "twin_b", "too_new")
    done = xllm("plugins", "list", "--json")
    assert done.returncode == 0, done.stderr
    unseen = {(record["id"], record["distribution"]): record["state"] for record in json.loads(done.stdout)}
    done = xllm("plugins", "list", "--why", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    states = {(record["id"], record["distribution"]): record["state"] for record in json.loads(done.stdout)}
    assert unseen == {key: "found" if state in ("loaded", "failed") else state for key, state in states.items()}
    assert states.pop(("core", "xllm-core")) == "loaded"
    assert states == {
        ("good", "xllm-good"): "loaded",
        ("broken", "xllm-broken-import"): "failed",
        ("twin", "xllm-twin-a"): "conflict",
        ("twin", "xllm-twin-b"): "conflict",
        ("toonew", "xllm-too-new"): "incompatible",
    }


def test_why_attention_on_the_command_line(install: Install, xllm: Run) -> None:
    """The decision of the plan, for a model of the plugin's own format."""
    install("good")
    done = xllm("plugins", "why", "attention", "--model", "toy:1")
    assert "chosen   good/toy" in done.stdout, done.stderr
    assert "rejected core/paged  device toy not in reference" in done.stdout


@pytest.mark.slow
def test_really_installed(tmp_path: Path) -> None:
    """pip builds the wheel and installs it elsewhere; it is found from there. What the other tests imitate is what pip does."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(tmp_path),
    ]
    subprocess.run([*command, str(DISTS / "good")], check=True, timeout=120)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "xllm_core.cli", "good", "hello"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert done.stdout == "hello from a plugin\n", done.stderr


CALLED = {
    "xllm_attention": ("xllm_core.reference.attention:ReferenceAttention", "run"),
    "xllm_devices": ("xllm_good.device:ToyDevice", "facts"),
    "xllm_kv_stores": ("xllm_core.kv.host_store:HostStore", "index"),
    "xllm_logits_processors": ("xllm_good.sampling:Ban", "apply"),
    "xllm_models": ("xllm_good.model:Toy", "build"),
    "xllm_observers": ("xllm_good.observer:CountingObserver", "observe"),
    "xllm_ops": ("xllm_good.ops:ToyLinear", "__call__"),
    "xllm_quantizations": ("xllm_good.ops:Inner", "quantize"),
    "xllm_samplers": ("xllm_good.sampling:GreedySampler", "sample"),
    "xllm_schedulers": ("xllm_good.policy:Lifo", "order"),
    "xllm_weight_formats": ("xllm_good.weights:ToyFormat", "open"),
}
"""What each hook's dummy is asked for while an engine runs. The targets of kernel and store are the core's, offered by the dummy."""


def test_the_dummy_of_every_hook_is_called(
    install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not only installed and resolved. Dies with a part that is chosen and never asked."""
    from xllm_core import LLM, SamplingParams
    from xllm_core.cli import main
    from xllm_core.plugins.hookspecs import HOOKS
    from xllm_core.plugins.plan import load_target

    install("good")
    calls: Counter[str] = Counter()

    def spy(hook: str, owner: type, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: object, **kwargs: object) -> object:
            calls[hook] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for hook, (target, name) in CALLED.items():
        spy(hook, load_target(target, owner=hook), name)
    assert main(["good", "hello"]) == 0 and capsys.readouterr().out == "hello from a plugin\n"
    pins = {"kv_store": "good/host", "observers": ["good/count"], "scheduler": "good/lifo"}
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with LLM("toy:1", use=pins, num_blocks=64, max_num_seqs=1) as llm:
        llm.generate([{"prompt_token_ids": [3, 1, 4]}] * 3, params, use_tqdm=False)
    with LLM("toy:1", quantization="inner", num_blocks=64, max_num_seqs=1) as llm:
        assert llm.info.kernels["linear_int8"] == "good/linear_int8"
    assert main(["doctor"]) == 0 and "the toy is out of its box" in capsys.readouterr().out
    assert {hook for hook, count in calls.items() if count} | {"xllm_cli", "xllm_doctor"} == set(HOOKS)


def test_every_part_of_it_works_in_a_real_engine(install: Install) -> None:
    """A model whose device, op, kernel, weights, family, sampler, processor, policy, store and observer all come from outside.

    Each part shows what it did: tokens equal the reference device's own (device, ops, kernel, weights), token 7 never comes (processor),
    the linear was called, the observer counted. Dies if any of them is resolved and then not built into the engine.
    """
    from xllm_core import LLM, SamplingParams

    install("good")
    from xllm_good.observer import CountingObserver
    from xllm_good.ops import ToyLinear

    CountingObserver.num_tokens = ToyLinear.num_calls = 0
    prompts = [{"prompt_token_ids": [3, 1, 4, 1, 5]}, {"prompt_token_ids": [9, 2, 6]}]
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, allowed_token_ids=None)
    pins = {"kv_store": "good/host", "observers": ["good/count"], "scheduler": "good/lifo"}
    with LLM("toy:1", use=pins, num_blocks=64, max_num_seqs=4) as llm:
        outside = [answer.outputs[0].token_ids for answer in llm.generate(prompts, greedy, use_tqdm=False)]
    with LLM("toy:1", device="core/reference", num_blocks=64, max_num_seqs=4) as llm:
        inside = [answer.outputs[0].token_ids for answer in llm.generate(prompts, greedy, use_tqdm=False)]
    assert outside == inside
    assert [len(tokens) for tokens in outside] == [24, 24]
    assert 7 not in outside[0] + outside[1]
    assert ToyLinear.num_calls > 24
    # All but the last token of each sequence is computed.
    assert CountingObserver.num_tokens == 5 + 3 + 2 * 23


def test_list_why_says_what_a_device_lacks(
    install: Install, xllm: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """A device whose probe says no is listed with that reason. Killed by: a list that reads what is offered and asks no probe."""
    install("absent")
    said = xllm("plugins", "list", "--why").stdout
    assert "device absent cannot be used here: no /dev/absent0 on this machine" in said, said
    records = {record["id"]: record for record in json.loads(xllm("plugins", "list", "--why", "--json").stdout)}
    assert records["core"]["unusable"] == {}
    assert "no /dev/absent0" in records["absent"]["unusable"]["absent"]
