"""Checkpoints: what is missing or surplus is named, drafting layers are passed by, and a wrongly declared axis does not go unseen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from xllm_models_glm.families import Glm4, Glm4Moe

from xllm_core import LLM
from xllm_core.errors import WeightMismatchError, XllmError
from xllm_core.plugins import Axis, Model, Parts, WeightMap
from xllm_core.runtime.formats.safetensors_dir import SafetensorsDirectory
from xllm_core.testing.model_harness import Harness, run_ranks

Change = Callable[[dict[str, torch.Tensor]], None]
TOKENS = torch.randint(0, 128, (17,), generator=torch.Generator().manual_seed(11)).tolist()
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


def damaged(source: Path, target: Path, change: Change) -> Path:
    """A copy with other tensors."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def stack(tensors: dict[str, torch.Tensor]) -> None:
    """As transformers holds experts in memory."""
    for layer in (1, 2):
        names = [name for name in tensors if f"layers.{layer}.mlp.experts." in name]
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(
            [tensors[n] for n in sorted(names) if "down" in n]
        )
        for name in names:
            del tensors[name]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(EXPERT), f"1 missing: {EXPERT}"),
        (lambda t: t.pop("model.layers.2.mlp.gate.e_score_correction_bias"), "1 missing: model.layers.2.mlp.gate.e_score_correction_bias"),
        (lambda t: t.update({EXPERT: torch.zeros(23, 32)}), r"up_proj.weight is \[23, 32\], the model needs \[24, 32\]"),
        (lambda t: t.update({"model.layers.1.mlp.experts.8.up_proj.weight": torch.zeros(24, 32)}), "not expected by this model: .*experts.8.up"),
        (lambda t: t[EXPERT].fill_(float("nan")), f"tensor '{EXPERT}' holds values that are not finite"),
        (stack, "48 missing: .*not expected by this model: model.layers.1.mlp.experts.down_proj"),
    ],
    ids=["an expert", "a correction", "a misshapen expert", "one expert too many", "not finite", "stacked"],
)  # fmt: skip
def test_damaged_checkpoints_are_refused_by_tensor(
    tiny: Callable[..., Path], tmp_path: Path, change: Change, says: str
) -> None:
    """Through the engine's own start. Killed by: zeros in the place of what is missing."""
    path = damaged(tiny("moe"), tmp_path, change)
    with pytest.raises(WeightMismatchError, match=f"(?s){says}"):
        LLM(str(path), dtype="float32", num_blocks=16, use={"device": "core/reference"})


def test_drafting_layers_are_passed_by(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A checkpoint with one serves as without. Killed by: refusing it as surplus, or reading it in a layer's place."""

    def add_layer(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.2.")]:
            tensors[name.replace("layers.2.", "layers.3.")] = torch.full_like(tensors[name], 9.0)
        tensors["model.layers.3.eh_proj.weight"] = torch.zeros(32, 64)

    plain, more = (
        SafetensorsDirectory().open(tiny("moe")),
        SafetensorsDirectory().open(damaged(tiny("moe"), tmp_path, add_layer)),
    )
    assert plain is not None and more is not None
    harness = Harness(Glm4Moe(), more)
    assert torch.equal(harness.step({0: TOKENS})[0], Harness(Glm4Moe(), plain).step({0: TOKENS})[0])
    assert harness.report.num_ignored > 30


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
        declare = parts._new_parameter
        parts._new_parameter = lambda name, shape, axis, **rest: declare(
            name, shape, self._axis if name == self._param else axis, **rest
        )
        model: Model = self._family.build(config, parts)
        return model


PLANTED: list[tuple[str, type, str, Axis]] = [
    ("glm4", Glm4, "layers.0.qkv.weight", "row"), ("glm4", Glm4, "layers.0.o.weight", "column"),
    ("glm4", Glm4, "layers.0.mlp.gate_up.weight", "replicated"), ("glm4", Glm4, "layers.0.attention_post_norm", "column"),
    ("moe", Glm4Moe, "layers.1.experts.gate_up", "replicated"), ("moe", Glm4Moe, "layers.1.experts.down", "row"),
    ("moe", Glm4Moe, "layers.1.router.weight", "column"), ("moe", Glm4Moe, "layers.1.router.correction", "column"),
    ("moe", Glm4Moe, "layers.1.shared.down.weight", "replicated"), ("moe", Glm4Moe, "layers.1.q_norm", "column"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "family", "param", "axis"), PLANTED, ids=lambda value: str(value)[-40:])
def test_a_wrong_axis_is_seen(tiny: Callable[..., Path], kind: str, family: type, param: str, axis: Axis) -> None:
    """Either a shape does not fit or the logits differ. Killed by: ignoring declared axes."""
    opened = SafetensorsDirectory().open(tiny(kind))
    assert opened is not None
    whole = Harness(family(), opened).step({0: TOKENS})[0]
    try:
        outputs = run_ranks(Planted(family(), param, axis), opened, TOKENS)
    except (XllmError, RuntimeError, IndexError, ValueError):
        return
    assert any(logits.shape != whole.shape or not torch.allclose(logits, whole, atol=1e-2) for logits in outputs)
