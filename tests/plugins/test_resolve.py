"""Choosing: pins, preferences, ranks, capabilities, probes, and the plan that comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from xllm_core.config import Settings
from xllm_core.errors import (
    ConfigError,
    ModelError,
    ModelNotFoundError,
    PluginConflictError,
    PluginError,
    ResolutionError,
)
from xllm_core.plugins import (
    CORE_FUSIONS,
    CORE_OPS,
    AttentionGeometry,
    AttentionSpec,
    DeviceSpec,
    ModelQuery,
    ModelSpec,
)
from xllm_core.plugins import probes as probes_module
from xllm_core.plugins.contracts.queries import AttentionQuery
from xllm_core.plugins.explain import why
from xllm_core.plugins.manager import Offer, PluginManager
from xllm_core.plugins.probes import Probes
from xllm_core.plugins.resolve import Assembly, Resolver, assemble
from xllm_core.plugins.select import choose, unfit_attention, unfit_model

Install = Callable[..., list[str]]


def offer(name: str, plugin: str = "p", **capabilities: Any) -> Offer:
    """An attention kernel that can everything, but for what is given."""
    everything = {"devices": {"cpu"}, "dtypes": {"float32"}, **capabilities}
    return Offer(plugin, f"xllm-{plugin}", "1", AttentionSpec(name=name, target="a:b", **everything))


GEOMETRY = AttentionGeometry(num_heads=4, num_kv_heads=2, head_size=64, scale=0.125, block_size=16, dtype="float32")


def pick(offers: list[Offer], **tables: Any) -> Any:
    """Choose among attention offers for GEOMETRY on the CPU."""
    return choose(
        "attention.full",
        offers,
        Settings(**tables),
        lambda o: unfit_attention(o, AttentionQuery(geometry=GEOMETRY, device_kind="cpu")),
        need="a test",
    )


def assembled(reference: str = "toy:1", **tables: Any) -> Assembly:
    """Assemble for the dummy's made-up model."""
    settings = Settings(model={"path": reference, **tables.pop("model", {})}, **tables)
    return assemble(settings, PluginManager.discover(settings))


@pytest.mark.parametrize(
    ("capabilities", "changes", "reason"),
    [
        ({"devices": {"cuda"}}, {}, "device cpu not in cuda"),
        ({"dtypes": {"bfloat16"}}, {}, "dtype float32 not in bfloat16"),
        ({"head_sizes": {128}}, {}, "head_size 64 not in 128"),
        ({"block_sizes": {128}}, {}, "block_size 16 not in 128"),
        ({"layouts": ("BGSD",)}, {}, "layout BSGD not in BGSD"),
        ({}, {"sliding_window": 8}, "feature 'sliding_window' not declared"),
        ({"features": {"sliding_window"}}, {"sliding_window": 8, "soft_cap": 2.0}, "feature 'soft_cap' not declared"),
        ({"features": {"sliding_window"}}, {"sliding_window": 8}, ""),
        ({}, {}, ""),
    ],
)
def test_what_is_not_declared_is_denied(capabilities: dict[str, Any], changes: dict[str, Any], reason: str) -> None:
    """Each capability by itself. Dies if a comparison is dropped, or an undeclared feature passes."""
    from dataclasses import replace

    geometry = replace(GEOMETRY, **changes)
    assert unfit_attention(offer("k", **capabilities), AttentionQuery(geometry=geometry, device_kind="cpu")) == reason


def test_a_fallback_comes_after_every_family_that_names_the_architecture() -> None:
    """Whatever its rank, and unasked: its check, which cannot be imported, would be the reason. Dies with ranks that decide, or a check that runs."""

    def pick_model(architecture: str, **tables: Any) -> Any:
        query = ModelQuery(architecture=architecture, device_kind="cpu", config={})
        offers = [
            Offer(
                "a",
                "xllm-a",
                "1",
                ModelSpec(name="any", target="a:b", check="nothing_there:check", is_fallback=True, rank=900),
            ),
            Offer("b", "xllm-b", "1", ModelSpec(name="own", target="a:b", architectures={"Own"}, rank=-5)),
        ]
        unfit = partial(unfit_model, query=query)
        return choose(f"model.{architecture}", offers, Settings(**tables), unfit, need="a test", query=query)

    choice = pick_model("Own")
    assert (choice.name, choice.rejected) == ("b/own", (("a/any", "not asked: b/own comes first and answers"),))
    with pytest.raises(
        ResolutionError,
        match="rejected a/any: its check failed: a/any: its target 'nothing_there:check' cannot be imported",
    ):
        pick_model("Other")
    with pytest.raises(ResolutionError, match="a pin never falls back"):
        pick_model("Own", use={"model": "a/any"})


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "architectures is empty; name some, or set is_fallback"),
        ({"is_fallback": True}, "a fallback needs `check`"),
        ({"is_fallback": True, "check": "a:b", "architectures": {"Own"}}, "a fallback names no architectures"),
    ],
)
def test_a_family_names_architectures_or_is_a_fallback(fields: dict[str, Any], problem: str) -> None:
    """Refused when the spec is made. Dies if either half may be left out."""
    with pytest.raises(ValueError, match=problem):
        ModelSpec(name="m", target="a:b", **fields)


def test_rank_then_others_before_the_core_then_name() -> None:
    """Dies if the order of installation, or the core, decides."""
    offers = [offer("z", "core"), offer("b"), offer("a"), offer("low", rank=-1), offer("high", rank=3)]
    assert pick(offers).name == "p/high"
    assert pick(offers[:3]).name == "p/a"
    assert pick(offers[:1]).name == "core/z"
    assert pick(offers).eligible == ("p/a", "p/b", "core/z", "p/low")
    assert pick(offers).reason == "rank 3, before p/a with 0"


def test_an_accelerator_comes_before_every_cpu() -> None:
    """Whatever their ranks. Dies if rank alone decides among devices, or if a CPU is asked for nothing after one answered."""
    asked: list[str] = []

    def unfit(device: Offer) -> str:
        asked.append(device.name)
        return "is broken" if device.spec.name == "gpu" else ""

    devices = [
        Offer("p", "xllm-p", "1", DeviceSpec(name=name, target="a:b", rank=rank, is_accelerator=is_accelerator))
        for name, rank, is_accelerator in (("cpu", 90, False), ("gpu", 5, True), ("npu", 1, True))
    ]
    choice = choose("device", devices, Settings(), unfit, need="a test", is_lazy=True)
    assert (choice.name, asked) == ("p/npu", ["p/gpu", "p/npu"])
    assert choice.rejected == (("p/gpu", "is broken"), ("p/cpu", "not asked: p/npu comes first and answers"))


def test_preference_beats_rank_and_skips_what_does_not_fit() -> None:
    """Dies if [prefer] is ignored, or forces an unfit kernel."""
    offers = [offer("gpu", devices={"cuda"}), offer("fast", rank=9), offer("slow")]
    choice = pick(offers, prefer={"attention": ["gpu", "slow"]})
    assert (choice.name, choice.reason) == ("p/slow", "first that fits in [prefer] attention")
    assert choice.rejected == (("p/gpu", "device cpu not in cuda"),)


def test_a_pin_never_falls_back() -> None:
    """Dies if a pin that does not fit is replaced by something that does."""
    offers = [offer("gpu", devices={"cuda"}), offer("fits", rank=9)]
    assert pick([*offers, offer("other")], use={"attention": "p/other"}).reason == "pinned by [use] attention"
    assert pick([*offers, offer("other")], use={"attention.full": "other", "attention": "p/gpu"}).name == "p/other"
    with pytest.raises(ResolutionError, match="a pin never falls back") as raised:
        pick(offers, use={"attention": "gpu"})
    assert raised.value.rejections == (("p/gpu", "device cpu not in cuda"),)


def test_a_bare_name_must_be_unique_only_where_it_is_used() -> None:
    """Dies if two equal names are an error by themselves, or if one of them wins in silence."""
    offers = [offer("flash", "a"), offer("flash", "b")]
    assert pick(offers).name == "a/flash"
    assert pick(offers, use={"attention": "b/flash"}).name == "b/flash"
    with pytest.raises(
        PluginConflictError, match=r"'flash' is offered by a/flash and b/flash; write \[use\] attention = 'a/flash'"
    ):
        pick(offers, use={"attention": "flash"})


def test_nothing_fits_lists_every_reason() -> None:
    """Dies if a rejection is lost."""
    with pytest.raises(ResolutionError) as raised:
        pick([offer("one", devices={"cuda"}), offer("two", dtypes={"float16"}, requires=("no_such_module.at_all",))])
    assert [name for name, _ in raised.value.rejections] == ["p/one", "p/two"]
    assert "rejected p/two: needs module no_such_module.at_all, not installed" in str(raised.value)


def test_names_are_checked_before_anything_is_chosen() -> None:
    """A typing error in a table nobody reads today is an error today. Dies if `check_names` is not called."""
    for tables in (
        {"use": {"scheduler": "fcsf"}},
        {"prefer": {"op": ["core/liner"]}},
        {"use": {"op.linear": "core/rope"}},
    ):
        with pytest.raises(ResolutionError, match="nothing is offered under that name"):
            Resolver(Settings(**tables), PluginManager.discover())


def test_the_whole_plan_of_an_outside_plugin(install: Install) -> None:
    """Device by its probe, model, weights, kernels and block size fit together, in plain data with one hash.

    Dies if any kind is resolved without its specs: the toy's parts fit only a toy, and it reads only blocks of 8.
    """
    install("good")
    found = assembled(use={"kv_store": "good/host", "observers": ["count", "log"], "scheduler": "lifo"})
    plan = found.plan
    assert plan.device.name == "good/toy"
    assert plan.model.name == "good/toy"
    assert plan.weight_format.name == "good/toy"
    assert {name: choice.name for name, choice in plan.ops.items()} == {name: f"good/{name}" for name in plan.ops}
    assert set(plan.ops) == {*CORE_OPS, *CORE_FUSIONS}
    assert [name for name, _ in plan.unused_fusions] == ["core/lm_head"]  # the reference offers its own
    assert [choice.name for choice in plan.attention.values()] == ["good/toy"]
    assert (plan.block_size, plan.dtype, plan.max_model_len) == (8, "float32", 128)
    assert plan.sampler.name == "good/greedy"
    assert [c.name for c in plan.logits_processors] == [
        "good/ban", "core/penalties", "core/logit_bias", "core/min_tokens", "core/allowed_tokens",
    ]  # fmt: skip
    assert (plan.scheduler.name, plan.kv_store and plan.kv_store.name) == ("good/lifo", "good/host")
    assert [choice.name for choice in plan.observers] == ["good/count", "core/log"]
    assert plan.plugin_settings["good"]["host_store_bytes"] == 1 << 20
    assert plan.attention["full"].rejected == (("core/paged", "device toy not in reference"),)
    again = json.loads(json.dumps(plan.to_json()))
    assert again["device"]["name"] == "good/toy"
    assert len(plan.hash) == 64
    assert found.shape.architecture == "ToyForCausalLM"


def test_the_hash_tells_two_plans_apart(install: Install) -> None:
    """Dies if the hash leaves decisions out, or depends on the run. `toy:N` makes a new file per run, so the file itself is given."""
    install("good")
    path = assembled("toy:1").plan.model_path
    assert assembled(path).plan.hash == assembled(path).plan.hash
    assert assembled(path).plan.hash != assembled(path, model={"max_model_len": 64}).plan.hash


def test_assembly_locks_the_hooks(install: Install) -> None:
    """Dies without the lock."""
    install("good")
    settings = Settings(model={"path": "toy:1"})
    manager = PluginManager.discover(settings)
    assemble(settings, manager)
    with pytest.raises(PluginError, match="locked"):
        manager.load()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("no toys on this bus", "no toys on this bus"),
        ("crash", "its probe was killed by signal 11"),
        ("hang", "its probe did not answer"),
    ],
)
def test_a_probe_that_says_no_leaves_the_cpu_in_charge(
    install: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answer: str, reason: str
) -> None:
    """A reason, a crash and a hang, each in the log; it is an error only when pinned. Dies if probes run in this process."""
    install("good")
    monkeypatch.setenv("TOY_PROBE", answer)
    monkeypatch.setattr(probes_module, "TIMEOUT_S", 2.0)
    choice, facts = Resolver(Settings(), PluginManager.discover()).device()
    assert (choice.name, facts.kind) == ("core/reference", "reference")
    assert f"device good/toy is not used: {reason}" in caplog.text
    if answer == "crash":
        with pytest.raises(ResolutionError, match="a pin never falls back"):
            Resolver(Settings(device={"name": "good/toy"}), PluginManager.discover()).device()


def test_a_probe_may_chatter_and_must_be_importable(install: Install) -> None:
    """Its answer is its last line; a probe that cannot be imported is a reason."""
    install("good")
    with Probes(["xllm_good.probe:probe"]) as probes:
        assert probes.answer("xllm_good.probe:probe") == ""
        assert "No module named 'nowhere'" in probes.answer("nowhere.at_all:probe")


def test_probes_run_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits until the other has begun. Dies if the second is started when the first has ended, as then neither says yes."""
    (tmp_path / "meeting.py").write_text(
        "import pathlib, sys, time\n"
        "def wait(mine, other):\n"
        "    here = pathlib.Path(__file__).parent\n"
        "    (here / mine).touch()\n"
        "    until = time.monotonic() + 20\n"
        "    while not (here / other).exists():\n"
        "        if time.monotonic() > until: return f'{other} never came'\n"
        "        time.sleep(0.01)\n"
        "def a(): return wait('a', 'b')\n"
        "def b(): return wait('b', 'a')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with Probes(["meeting:a", "meeting:b"]) as probes:
        assert (probes.answer("meeting:a"), probes.answer("meeting:b")) == ("", "")


def test_device_errors_carry_the_name_of_the_device(install: Install) -> None:
    """Dies if what a plugin raises while it is built escapes without its name."""
    install("good")
    with pytest.raises(PluginError, match="good/toy could not build device 2: ValueError: there is no toy 2"):
        Resolver(Settings(device={"name": "toy", "index": 2}), PluginManager.discover()).device()
    with pytest.raises(ConfigError, match="disagree"):
        Resolver(Settings(device={"name": "good/toy"}, use={"device": "core/reference"}), PluginManager.discover())


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("no such model", ["no weight format takes 'no such model'", "good/toy (toy:SEED"]),
        ("toy:x", ["a toy is named by a number"]),
    ],
)
def test_a_reference_that_nobody_takes(install: Install, reference: str, words: list[str]) -> None:
    """Says who was asked."""
    install("good")
    with pytest.raises(ModelNotFoundError) as raised:
        assembled(reference)
    for word in words:
        assert word in str(raised.value)


def test_a_pinned_format_opens_or_nobody_does(install: Install, tmp_path: Path) -> None:
    """Another format may find the model; only the pinned one opens it. Dies if the pin is ignored."""
    install("good")
    with pytest.raises(ModelNotFoundError):
        assembled("toy:1", use={"weight_format": "core/gguf"})
    assert assembled("toy:1", use={"weight_format": "good/toy"}).plan.weight_format.reason.startswith("pinned by")


def test_refusals_name_the_number_and_the_key(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Context, block size, dtype and architecture, each refused and never adjusted."""
    install("good")
    with pytest.raises(ConfigError, match=r"max_model_len = 129: ToyForCausalLM here is made for at most 128"):
        assembled(model={"max_model_len": 129})
    with pytest.raises(ConfigError, match=r"\[kv\] block_size = 16: toy takes 4, 8"):
        assembled(kv={"block_size": 16})
    with pytest.raises(ResolutionError, match=r"block_size 4 not in 8"):
        assembled(kv={"block_size": 4})
    with pytest.raises(ResolutionError, match=r"\[model\] dtype = 'bfloat16'"):
        assembled(model={"dtype": "bfloat16"})
    from xllm_good.weights import CONFIG

    monkeypatch.setitem(CONFIG, "architectures", ["TohForCausalLM"])
    with pytest.raises(ModelError, match=r"'TohForCausalLM' is not known; did you mean 'ToyForCausalLM'"):
        assembled()


def test_a_float16_checkpoint_says_what_it_is_served_in(
    install: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Dies if the dtype changes in silence."""
    install("good")
    from xllm_good.weights import CONFIG

    monkeypatch.setitem(CONFIG, "torch_dtype", "float16")
    plan = assembled().plan
    assert plan.dtype == "float32"
    assert "the checkpoint is float16" in plan.dtype_reason
    assert "serving in float32: the checkpoint is float16" in caplog.text


def test_a_target_that_cannot_be_imported_names_everything(install: Install) -> None:
    """Plugin, target and cause. Dies if the ImportError escapes bare."""
    install("good")
    found = assembled()
    from dataclasses import replace

    with pytest.raises(
        PluginError, match=r"good/lifo: its target 'xllm_good.nowhere:X' cannot be imported: ModuleNotFoundError"
    ):
        replace(found.plan.scheduler, name="good/lifo", target="xllm_good.nowhere:X").load()


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("op.linear", ["chosen   good/linear", "rejected core/linear  device toy not in reference"]),
        ("device", ["chosen   good/toy", "rejected core/reference  not asked: good/toy comes first"]),
        ("scheduler", ["chosen   core/fcfs", "eligible core/priority", "eligible good/lifo"]),
        ("observers", ["rejected core/log  active only when listed"]),
        ("kv_store", ["kv_store: none is used", "offered  good/host", "offered  core/host"]),
        ("model", ["offered  good/toy  ToyForCausalLM"]),
        ("logits_processors", ["active   good/ban", "active   core/penalties"]),
        ("weight_format", ["offered  core/hub"]),
        ("sampler", ["chosen   good/greedy", "eligible core/gumbel"]),
    ],
)
def test_why_without_a_model(install: Install, kind: str, lines: list[str]) -> None:
    """Every kind has an answer, by the machinery that assembles. Dies if a kind of `[use]` is forgotten."""
    install("good")
    text = why(kind, Settings(), PluginManager.discover())
    for line in lines:
        assert line in text, text


def test_why_attention(install: Install) -> None:
    """For a model, the plan's choice with the shape asked for; for a common shape that nothing serves, all reasons."""
    install("good")
    settings = Settings(model={"path": "toy:1"})
    lines = why("attention", settings, PluginManager.discover(settings)).splitlines()
    assert lines == [
        "attention.full for toy, float32, 2 query and 1 KV heads of 16, blocks of 8, layout BSGD",
        "  chosen   good/toy  the only one that fits  (xllm-good 1.4)",
        "  rejected core/paged  device toy not in reference",
    ]
    with pytest.raises(ResolutionError, match="rejected good/toy: head_size 128 not in 16; block_size 4 not in 8"):
        why("attention", Settings(), PluginManager.discover())


def test_why_refuses_what_is_no_kind() -> None:
    """With the nearest one."""
    with pytest.raises(ConfigError, match="unknown kind 'atention'; did you mean 'attention'"):
        why("atention", Settings(), PluginManager.discover())
