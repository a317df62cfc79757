"""A fusion stands for several ops: taken by rank, never over a pin, and the answer stays the answer of the ops it replaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from xllm_core.config import Settings
from xllm_core.errors import ResolutionError
from xllm_core.plugins import CORE_FUSIONS, CORE_OPS, OpSpec, PluginInfo, hookimpl
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.plan import Choice
from xllm_core.plugins.resolve import Resolver

Install = Callable[..., list[str]]


def op(op: str, *, name: str | None = None, device: str = "reference", **fields: Any) -> OpSpec:
    return OpSpec(name=name or op, op=op, target="a:b", devices={device}, dtypes={"float32"}, **fields)


def fused(*specs: OpSpec, **tables: Any) -> tuple[Mapping[str, Choice], dict[str, str]]:
    """(fusions taken, name -> why another is not) over a plugin `p` with these ops; the core's own fusion is left out."""
    module = SimpleNamespace(__name__="m", xllm_plugin=PluginInfo(id="p"), xllm_ops=hookimpl(lambda: specs))
    settings = Settings(**tables)
    resolver = Resolver(settings, PluginManager.discover(settings, extra=[module]))
    facts = resolver.device()[1]
    ops = {name: resolver.op(name, facts, "float32") for name in CORE_OPS}
    taken, unused = resolver.fusions(ops, facts, "float32")
    others = {name: choice for name, choice in taken.items() if choice.plugin != "core"}
    return others, {name: why for name, why in unused if not name.startswith("core/")}


ROPE = ("rope", "kv_write")


def test_rank_decides_between_a_fusion_and_the_ops_it_replaces() -> None:
    """Equal ranks: the fusion. Dies if a fusion always wins, or never."""
    taken, _ = fused(op("rope_kv_write", replaces=ROPE))
    assert taken["rope_kv_write"].name == "p/rope_kv_write"
    taken, unused = fused(op("rope_kv_write", replaces=ROPE, rank=3), op("rope", name="fast", rank=4))
    assert not taken
    assert unused == {"p/rope_kv_write": "rank 3; replaces rope, for which p/fast has 4"}


def test_a_pin_of_a_part_holds_against_a_fusion() -> None:
    """And a pinned fusion holds against ranks; two pins against each other: the op's own."""
    specs = (
        op("rope_kv_write", replaces=ROPE, rank=3),
        op("rope", name="slow", rank=-4),
        op("rope", name="fast", rank=9),
    )
    taken, unused = fused(*specs, use={"op.rope": "p/slow"})
    assert not taken and unused["p/rope_kv_write"] == "replaces rope, which [use] op.rope pins to p/slow"
    taken, _ = fused(*specs, use={"op.rope_kv_write": "p/rope_kv_write"})
    assert taken["rope_kv_write"].reason == "pinned by [use] op.rope_kv_write"
    with pytest.raises(ResolutionError, match="a pin never falls back"):
        fused(*specs, use={"op.rope_kv_write": "p/rope_kv_write", "op.kv_write": "core/kv_write"})


def test_what_is_not_declared_or_not_known_is_not_taken() -> None:
    """Device and dtype as for any op; a fusion over something that is no op; all of them switched off."""
    taken, unused = fused(
        op("rope_kv_write", device="cuda", replaces=ROPE), op("everything", replaces=("rope", "dance")),
        op("linear_silu_mul", replaces=("linear", "silu_mul")),
    )  # fmt: skip
    assert list(taken) == ["linear_silu_mul"]
    assert unused["p/rope_kv_write"] == "device reference not in cuda"
    assert unused["p/everything"] == "replaces 'dance', which is no op of the core"
    taken, unused = fused(op("rope_kv_write", replaces=ROPE), engine={"fusions": False})
    assert not taken and unused == {"p/rope_kv_write": "[engine] fusions = false"}


def test_two_fusions_of_one_name_are_ranked() -> None:
    """As ops are."""
    taken, _ = fused(op("rope_kv_write", name="a", replaces=ROPE), op("rope_kv_write", name="b", rank=2, replaces=ROPE))
    assert taken["rope_kv_write"].name == "p/b" and taken["rope_kv_write"].eligible == ("p/a",)


def test_fusions_run_and_change_no_token(install: Install) -> None:
    """Through an engine: called when taken, not called when switched off, the same tokens. Dies if `Parts` passes over the plan's fusions."""
    from xllm_core import LLM, SamplingParams

    install("good")
    from xllm_good.ops import ToyLinearSiluMul, ToyRopeKvWrite

    answers = []
    for fusions in (True, False):
        ToyLinearSiluMul.num_calls = ToyRopeKvWrite.num_calls = 0
        with LLM("toy:1", engine={"fusions": fusions}, num_blocks=64, max_num_seqs=4) as llm:
            params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
            found = llm.generate([{"prompt_token_ids": [3, 1, 4, 1, 5]}], params, use_tqdm=False)
        answers.append(found[0].outputs[0].token_ids)
        assert (ToyLinearSiluMul.num_calls >= 16, ToyRopeKvWrite.num_calls >= 16) == (fusions, fusions)
    assert answers[0] == answers[1]


def test_why_tells_of_fusions(install: Install, xllm: Callable[..., Any]) -> None:
    """Chosen ones like ops; the others with their reason."""
    install("good")
    done = xllm("plugins", "why", "op", "--model", "toy:1")
    assert "op.rope_kv_write" in done.stdout and "chosen   good/rope_kv_write" in done.stdout, done.stderr
    done = xllm("plugins", "why", "op.rope_kv_write", "--device", "core/reference")
    assert "fusion not taken: good/rope_kv_write  device reference not in toy" in done.stdout, done.stderr


def test_the_core_names_its_fusions() -> None:
    """Each replaces ops that every device has."""
    assert CORE_FUSIONS and all(set(replaces) <= set(CORE_OPS) for replaces in CORE_FUSIONS.values())
