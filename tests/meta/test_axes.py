"""Every declared parallel axis, cut in two and put together again, gives the same logits; a wrong declaration never goes unseen.

Two threads are two ranks (`xllm_core.testing.model_harness`). Nothing else of a distributed engine is needed for this proof.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.tiny_models import make_tiny
from tests.meta.source import ROOT
from xllm_core.errors import ConfigError, XllmError
from xllm_core.models.llama import Llama, Mistral
from xllm_core.models.qwen import Qwen2, Qwen3
from xllm_core.models.transformers_fallback import TransformersFallback
from xllm_core.plugins.contracts.model import Model, Parts
from xllm_core.plugins.contracts.weights import Axis, WeightMap
from xllm_core.runtime.formats.safetensors_dir import SafetensorsDirectory
from xllm_core.testing.model_harness import Harness, run_ranks
from xllm_core.testing.tiny import tiny_config, write_tiny

TOKENS = torch.randint(0, 128, (17,), generator=torch.Generator().manual_seed(11)).tolist()
CASES: dict[str, tuple[type, str, dict[str, Any]]] = {
    "llama": (Llama, "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": (Llama, "llama", {"tie_word_embeddings": True}),
    "mistral": (Mistral, "mistral", {"sliding_window": 5}),
    "qwen2": (Qwen2, "qwen2", {}),
    "qwen3": (Qwen3, "qwen3", {"attention_bias": True}),
    "the fallback, as transformers' plan says": (TransformersFallback, "granite", {"attention_bias": True}),
    "the fallback, tied": (TransformersFallback, "gemma3", {}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    made: dict[str, Path] = {}

    def open_case(name: str) -> Any:
        if name not in made:
            made[name] = make_tiny(CASES[name][1], tmp_path_factory.mktemp("axes"), **CASES[name][2])
        return SafetensorsDirectory().open(made[name])

    return open_case


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(checkpoint: Callable[[str], Any], name: str) -> None:
    """Killed by: cutting a fused tensor whole instead of part by part, adding a row bias on every rank, forgetting a sum or a gather,
    an embedding that answers for the other rank's tokens.
    """
    family = CASES[name][0]()
    whole = Harness(family, checkpoint(name)).step({0: TOKENS})[0]
    for logits in run_ranks(family, checkpoint(name), TOKENS):
        assert logits.shape == whole.shape
        assert (logits - whole).abs().max() <= 1e-4


def test_the_example_family_divides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OLMo-2 norms queries over all heads, which a rank has only if it computes all of them. Killed by: declaring them divided."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "plugins" / "xllm-example-olmo2" / "src"))
    from xllm_example_olmo2.olmo2 import Olmo2

    opened = SafetensorsDirectory().open(make_tiny("olmo2", tmp_path))
    assert opened is not None
    whole = Harness(Olmo2(), opened).step({0: TOKENS})[0]
    for logits in run_ranks(Olmo2(), opened, TOKENS):
        assert (logits - whole).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["Glm", "Glm4", "Glm4Moe"])
def test_the_glm_families_divide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Experts too, beside heads, MLPs and the vocabulary. Killed by: a sum over ranks left out, gate and up cut as one tensor."""
    monkeypatch.syspath_prepend(str(ROOT / "plugins" / "xllm-models-glm" / "src"))
    family = getattr(import_module("xllm_models_glm.families"), name)()
    options = {"n_group": 4, "topk_group": 2, "use_qk_norm": True} if name == "Glm4Moe" else {}
    opened = SafetensorsDirectory().open(write_tiny(tiny_config(f"{name}ForCausalLM", **options), tmp_path / "model"))
    assert opened is not None
    if name == "Glm4Moe":
        assert {entry.axis for entry in family.weight_map(opened.config).entries} == {
            "column",
            "row",
            "vocab",
            "expert",
            "replicated",
        }
    whole = Harness(family, opened).step({0: TOKENS})[0]
    for logits in run_ranks(family, opened, TOKENS):
        assert (logits - whole).abs().max() <= 1e-4


def test_what_the_fallback_cannot_divide_is_refused(tmp_path: Path) -> None:
    """transformers' plan for OLMo-2 gathers in the middle of attention. Killed by: dividing the cache of heads that are computed whole."""
    opened = SafetensorsDirectory().open(make_tiny("olmo2", tmp_path))
    assert opened is not None
    with pytest.raises(ConfigError, match="does not divide over 2 ranks"):
        run_ranks(TransformersFallback(), opened, TOKENS)


class Planted:
    """A family that declares one parameter's axis wrongly, in its weight map and to its parts alike."""

    def __init__(self, family: Any, param: str, axis: Axis) -> None:
        self._family, self._param, self._axis = family, param, axis

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def weight_map(self, config: Mapping[str, Any]) -> WeightMap:
        honest = self._family.weight_map(config)
        return replace(
            honest, entries=[replace(e, axis=self._axis) if e.param == self._param else e for e in honest.entries]
        )

    def build(self, config: Mapping[str, Any], parts: Parts) -> Model:
        declare = parts._new_parameter  # type: ignore[attr-defined]
        parts._new_parameter = lambda name, shape, axis, **rest: declare(  # type: ignore[attr-defined]
            name, shape, self._axis if name == self._param else axis, **rest
        )
        model: Model = self._family.build(config, parts)
        return model


def _wrong_axes(name: str) -> list[tuple[str, Axis]]:
    """Every parameter of one layer and of the frame, with every axis that cuts it otherwise."""
    family, _, overrides = CASES[name]
    config = {
        "architectures": [f"{family.__name__}ForCausalLM"], "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16, **overrides,
    }  # fmt: skip
    planted: list[tuple[str, Axis]] = []
    for entry in family().weight_map(config).entries:
        cut = {"column": "column", "vocab": "column"}.get(entry.axis, entry.axis)  # the same cut by two names
        candidates: list[Axis] = ["column", "replicated", *(["row"] if len(entry.shape) == 2 else [])]  # type: ignore[list-item]
        if entry.param == "embed.weight":
            candidates.remove("replicated")  # the first rank would answer for all tokens: wasteful, not wrong
        planted += [(entry.param, axis) for axis in candidates if axis != cut and (entry.param, axis) not in planted]
    return planted


@pytest.mark.parametrize(
    ("name", "param", "axis"), [(name, *wrong) for name in ("llama", "qwen3") for wrong in _wrong_axes(name)]
)
def test_a_wrong_axis_is_seen(checkpoint: Callable[[str], Any], name: str, param: str, axis: Axis) -> None:
    """Either a shape does not fit or the logits differ: the test above would turn red for each. Killed by: ignoring declared axes."""
    family = CASES[name][0]()
    whole = Harness(family, checkpoint(name)).step({0: TOKENS})[0]
    try:
        outputs = run_ranks(Planted(family, param, axis), checkpoint(name), TOKENS)
    except (XllmError, RuntimeError, IndexError):
        return
    assert any(logits.shape != whole.shape or not torch.allclose(logits, whole, atol=1e-2) for logits in outputs)


def test_a_dimension_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    """One KV head over two ranks. Killed by: rounding down."""
    checkpoint = SafetensorsDirectory().open(make_tiny("llama", tmp_path, num_key_value_heads=1))
    assert checkpoint is not None
    with pytest.raises(ConfigError, match="does not divide over 2 ranks"):
        run_ranks(Llama(), checkpoint, TOKENS)
