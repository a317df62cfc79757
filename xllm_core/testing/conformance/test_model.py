"""Model families on tiny random checkpoints, against transformers' own class of the same architecture.

Where transformers does not know an architecture, or its configuration cannot be shrunk by the usual fields, an author defines, in a module
given with `-p MODULE`::

    @pytest.fixture(scope="session")
    def xllm_tiny_config():
        return lambda architecture: MyConfig(hidden_size=32, ...)   # of transformers, with an AutoModelForCausalLM; None: as usual
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from xllm_core.testing.plugin import Kit, kit_of, optional_fixture
from xllm_core.testing.subject import Part

if TYPE_CHECKING:
    from xllm_core.testing.model_harness import Machine

LENGTH, PREFILL = 41, 29
MAX_DIFFERENCE = 1e-4


@dataclass(frozen=True, slots=True)
class Case:
    """An architecture of a family. overrides: fields of the tiny configuration, where it has them."""

    part: Part
    architecture: str
    overrides: tuple[tuple[str, Any], ...] = ()

    @property
    def component(self) -> str:
        """Its line in the report."""
        return self.part.component

    def __str__(self) -> str:
        return "-".join(
            [self.part.offer.name, self.architecture, *(f"{name}={value}" for name, value in self.overrides)]
        )

    def family(self) -> Any:
        """The family, built."""
        from xllm_core.plugins.plan import load_target

        target = load_target(self.part.spec.target, owner=self.part.offer.name)
        return target(**self.part.spec.options) if isinstance(target, type) else target


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every architecture; one KV head per query head, one for all, and a window beside the plain shape."""
    cases = []
    variants: list[tuple[tuple[str, Any], ...]] = [(), (("num_key_value_heads", 4),), (("sliding_window", 9),)]
    for part in kit_of(metafunc.config).subject.parts("model"):
        for name in sorted(part.spec.architectures):
            cases += [Case(part, name, overrides) for overrides in variants]
    if metafunc.definition.originalname not in ("test_logits_equal_transformers",):
        cases = [case for case in cases if not case.overrides]
    metafunc.parametrize("case", cases, ids=str)


@pytest.fixture(scope="session")
def checkpoints() -> dict[str, Path]:
    """Written once each."""
    return {}


@pytest.fixture
def checkpoint(
    case: Case, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, xllm_kit: Kit
) -> Path:  # fmt: skip
    """A tiny random checkpoint of the case; skips where nobody says how to make one."""
    from xllm_core.testing.tiny import tiny_config, write_tiny

    xllm_kit.importable(case.part)
    if str(case) not in checkpoints:
        own = optional_fixture(request, "xllm_tiny_config")
        config = own(case.architecture) if own is not None else None
        if config is None:
            config = tiny_config(case.architecture)
            if config is None:
                pytest.skip(f"transformers has no {case.architecture}; define the fixture xllm_tiny_config")
        for name, value in case.overrides:
            if getattr(config, name, None) is None and name not in config.to_dict():
                pytest.skip(f"{case.architecture} has no {name}")
            setattr(config, name, value)
        checkpoints[str(case)] = write_tiny(config, tmp_path_factory.mktemp("tiny") / "model")
    return checkpoints[str(case)]


@pytest.fixture
def machine(case: Case, xllm_kit: Kit) -> Callable[[str], Machine]:
    """What the family runs on in a dtype: the reference, or a device that the spec asks for."""

    def make(dtype: str) -> Machine:
        from xllm_core.testing.model_harness import reference_machine

        if dtype not in case.part.spec.dtypes:
            pytest.skip(f"it does not declare {dtype}")
        devices = case.part.spec.devices
        if not devices or "reference" in devices:
            return reference_machine()
        return xllm_kit.subject.machine(xllm_kit.device(devices), dtype)

    return make


def open_checkpoint(path: Path) -> Any:
    """By the core's own format."""
    from xllm_core.runtime.formats.safetensors_dir import SafetensorsDirectory

    return SafetensorsDirectory().open(path)


def test_logits_equal_transformers(case: Case, checkpoint: Path, machine: Callable[[str], Machine]) -> None:
    """Logits equal transformers' to 1e-4 in float32: whole prompts, chunks, decode steps, and all of them in one batch."""
    import torch

    from xllm_core.testing.model_harness import Harness
    from xllm_core.testing.tiny import load_oracle

    on = machine("float32")
    opened = open_checkpoint(checkpoint)
    prompts = torch.randint(0, opened.config["vocab_size"], (4, LENGTH), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = load_oracle(checkpoint)(prompts).logits.float()
    harness = Harness(case.family(), opened, machine=on, block_size=_block_size(on))
    sizes: list[Callable[[int], int]] = [lambda at: LENGTH, lambda at: 8, lambda at: 1, lambda at: 1 if at else PREFILL]
    names = ("whole", "in chunks of 8", "token by token", "a prompt and decode steps")
    logits: list[list[torch.Tensor]] = [[], [], [], []]
    done, tokens = [0, 0, 0, 0], prompts.tolist()
    while min(done) < LENGTH:
        new = {row: tokens[row][at : at + sizes[row](at)] for row, at in enumerate(done) if at < LENGTH}
        for row, result in harness.step(new).items():
            logits[row].append(result.cpu())
            done[row] += len(result)
    for row, name in enumerate(names):
        ours = torch.cat(logits[row])
        assert ours.dtype == torch.float32, f"head gives {ours.dtype}; logits are float32"
        difference = (ours - expected[row]).abs().amax(-1).nan_to_num(float("inf"))
        assert float(difference.max()) <= MAX_DIFFERENCE, (
            f"{name}: logits differ by {float(difference.max()):.3g} at position {int(difference.argmax())}; at most {MAX_DIFFERENCE} is rounding"
        )


def test_bfloat16_is_no_worse_than_transformers(
    case: Case, checkpoint: Path, machine: Callable[[str], Machine]
) -> None:
    """In bfloat16 logits are as near to the exact ones as transformers' own are."""
    import torch

    from xllm_core.testing.model_harness import Harness
    from xllm_core.testing.tiny import load_oracle

    on = machine("bfloat16")
    if "bfloat16" not in on.device.facts().dtypes:
        pytest.skip(f"{on.device.facts().name} does not compute in bfloat16")
    opened = open_checkpoint(checkpoint)
    prompt = torch.randint(0, opened.config["vocab_size"], (1, 30), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        theirs = load_oracle(checkpoint, "bfloat16")(prompt).logits[0].float()
        exact = load_oracle(checkpoint)(prompt).logits[0].float()
    ours = (
        Harness(case.family(), opened, dtype="bfloat16", machine=on, block_size=_block_size(on))
        .step({0: prompt[0].tolist()})[0]
        .cpu()
    )
    assert (ours - exact).abs().mean() <= 1.3 * (theirs - exact).abs().mean()


def test_two_ranks_equal_one(case: Case, checkpoint: Path, machine: Callable[[str], Machine]) -> None:
    """Every declared parallel axis, cut in two and put together again, gives the same logits."""
    import torch

    from xllm_core.testing.model_harness import Harness, run_ranks

    on = machine("float32")
    opened, family = open_checkpoint(checkpoint), case.family()
    tokens = torch.randint(0, opened.config["vocab_size"], (17,), generator=torch.Generator().manual_seed(11)).tolist()
    options: dict[str, Any] = {"machine": on, "block_size": _block_size(on)}
    whole = Harness(family, opened, **options).step({0: tokens})[0]
    for logits in run_ranks(family, opened, tokens, **options):
        assert logits.shape == whole.shape
        difference = float((logits - whole).abs().max())
        assert difference <= MAX_DIFFERENCE, (
            f"two ranks differ from one by {difference:.3g}; a weight is cut along a wrong axis"
        )


def test_last_layer_may_leave_rows_out(case: Case, checkpoint: Path, machine: Callable[[str], Machine]) -> None:
    """Told which rows are wanted, the last layer returns these or all of them, and stores keys and values of every row all the same."""
    import torch

    from xllm_core.testing.model_harness import Harness

    on = machine("float32")
    opened, family = open_checkpoint(checkpoint), case.family()
    draw = torch.randint(0, opened.config["vocab_size"], (3, 17), generator=torch.Generator().manual_seed(13)).tolist()
    new = {row: tokens[: 17 - 5 * row] for row, tokens in enumerate(draw)}
    asked, told = (Harness(family, opened, machine=on, block_size=_block_size(on)) for _ in range(2))
    for step in (new, {row: [1, 2] for row in new}):
        whole, last = asked.step(step), told.step(step, all_logits=False)
        for row in step:
            difference = float((whole[row][-1:] - last[row]).abs().max())
            assert difference <= MAX_DIFFERENCE, f"logits of a wanted row differ by {difference:.3g}"


def test_it_tells_its_shape(case: Case, checkpoint: Path) -> None:
    """The shape, the KV groups and the attention that the family tells agree with the configuration and with each other."""
    config, family = open_checkpoint(checkpoint).config, case.family()
    shape = family.shape(config)
    assert shape.architecture == case.architecture
    assert (shape.num_layers, shape.vocab_size, shape.hidden_size) == (
        config["num_hidden_layers"], config["vocab_size"], config["hidden_size"],
    )  # fmt: skip
    groups, attention = family.kv_groups(config, "float32"), family.attention(config)
    names = [group.name for group in groups]
    assert len(set(names)) == len(names) and set(attention) <= set(names), f"attention {set(attention)}, groups {names}"
    layers = [layer for group in groups for layer in group.layers]
    assert len(set(layers)) == len(layers) and set(layers) <= set(range(shape.num_layers)), (
        "a layer is in two groups, or is none"
    )


def test_it_plans_without_torch(case: Case, checkpoint: Path) -> None:
    """Everything but `build` works without torch, so that a plan is made in a process that has none."""
    config = {key: value for key, value in open_checkpoint(checkpoint).config.items() if not key.startswith("_")}
    code = (
        "import json, sys; from xllm_core.plugins.plan import load_target\n"
        "target, options, config = json.load(sys.stdin)\n"
        "family = load_target(target, owner='it'); family = family(**options) if isinstance(family, type) else family\n"
        "family.shape(config), family.kv_groups(config, 'float32'), family.attention(config), family.weight_map(config)\n"
        "print('\\n' + json.dumps('torch' in sys.modules))"
    )
    request = json.dumps([case.part.spec.target, dict(case.part.spec.options), config])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], input=request, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
    assert done.stdout.strip().splitlines()[-1] == "false", f"{case.part.spec.target} imports torch before build"


def _block_size(machine: Machine) -> int:
    sizes = machine.device.facts().block_sizes
    return sizes[0] if sizes else 4
