"""Samplers: a row's token depends on that row alone, and is the reference's under the same noise.

A sampler that chooses by another rule on purpose is compared with its author's own oracle, in a module given with `-p MODULE`::

    @pytest.fixture
    def xllm_sampler_oracle():
        return lambda device: MySlowAndObviousSampler(device)   # a Sampler; the kit's default is GumbelSampler
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from xllm_core.testing.plugin import Kit, kit_of, optional_fixture
from xllm_core.testing.subject import Part

if TYPE_CHECKING:
    import torch

    from xllm_core.plugins.contracts.device import DeviceBackend
    from xllm_core.plugins.contracts.sampling import Sampler, SamplingBatch

ROWS, VOCAB = 96, 1500
NEAR_TIE = 1e-3
COLUMNS = ("temperature", "top_k", "top_p", "min_p", "seeds", "indices", "positions")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every sampler."""
    parts = kit_of(metafunc.config).subject.parts("sampler")
    metafunc.parametrize("part", parts, ids=[part.offer.name for part in parts])


@pytest.fixture
def device(part: Part, xllm_kit: Kit) -> DeviceBackend:
    """A device that it declares."""
    return xllm_kit.device(xllm_kit.importable(part).spec.devices)


@pytest.fixture
def sampler(part: Part, device: DeviceBackend) -> Sampler:
    """Built for it."""
    built: Sampler = part.build(device)
    return built


def mixed(device: DeviceBackend, *, without: Sequence[str] = ()) -> tuple[torch.Tensor, SamplingBatch]:
    """Logits [ROWS, VOCAB], and rows of every kind beside each other: greedy, cold, hot, with each filter and with all."""
    import torch

    from xllm_core.plugins.contracts.sampling import SamplingBatch

    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(ROWS, VOCAB, generator=generator) * 3

    def choose(*values: float) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(0, len(values), (ROWS,), generator=generator)]

    columns: dict[str, Any] = {
        "temperature": choose(0.0, 0.3, 0.8, 1.5), "top_k": choose(0, 1, 5, 70, 1400).long(), "top_p": choose(1.0, 0.9, 0.3),
        "min_p": choose(0.0, 0.05, 0.5),
    }  # fmt: skip
    on_device: dict[str, Any] = {
        name: None if name in without else device.to_device(column) for name, column in columns.items()
    }
    noise: dict[str, Any] = {
        name: torch.randint(0, 1 << 40, (ROWS,), generator=generator) for name in ("seeds", "indices", "positions")
    }
    return logits, SamplingBatch(is_all_greedy=False, **on_device, **noise)


def rows_of(batch: SamplingBatch, rows: Sequence[int]) -> SamplingBatch:
    """Some rows of a batch, in this order."""
    return changed(batch, lambda column: column[list(rows)])


def changed(batch: SamplingBatch, change: Callable[[torch.Tensor], torch.Tensor]) -> SamplingBatch:
    """The batch with every column that it has changed."""
    columns: dict[str, Any] = {name: getattr(batch, name) for name in COLUMNS}
    made: dict[str, Any] = {name: None if column is None else change(column) for name, column in columns.items()}
    return replace(batch, **made)


def sample(sampler: Sampler, device: DeviceBackend, logits: torch.Tensor, batch: SamplingBatch) -> list[int]:
    """Token ids; the logits given are copied first, as a sampler may overwrite them."""
    import torch

    with torch.inference_mode():
        tokens = sampler.sample(device.to_device(logits.clone()), batch)
    assert (tokens.dtype, tuple(tokens.shape)) == (torch.int64, (len(logits),)), f"{tokens.dtype} {tuple(tokens.shape)}"
    chosen: list[int] = tokens.tolist()
    return chosen


def test_greedy_rows_take_the_likeliest(part: Part, sampler: Sampler, device: DeviceBackend) -> None:
    """Rows of temperature 0 take the likeliest token, in a batch of their own and among others."""
    import torch

    from xllm_core.plugins.contracts.sampling import SamplingBatch

    logits, batch = mixed(device)
    best = logits.argmax(-1).tolist()
    greedy = SamplingBatch(True, None, None, None, None, batch.seeds, batch.indices, batch.positions)
    assert sample(sampler, device, logits, greedy) == best
    assert batch.temperature is not None
    among = sample(sampler, device, logits, batch)
    rows = torch.nonzero(batch.temperature.cpu() == 0).flatten().tolist()
    assert rows and [among[row] for row in rows] == [best[row] for row in rows]


def test_a_row_depends_on_itself_alone(part: Part, sampler: Sampler, device: DeviceBackend) -> None:
    """Rows in another order, fewer of them, or one alone, get the same tokens."""
    import torch

    logits, batch = mixed(device)
    together = sample(sampler, device, logits, batch)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(2)).tolist()
    subsets = [
        order,
        list(reversed(range(ROWS))),
        *[order[:count] for count in (1, 2, 3, 7, 16, 33)],
        *[[row] for row in range(0, ROWS, 3)],
    ]
    for rows in subsets:
        found = sample(sampler, device, logits[rows], rows_of(batch, rows))
        wrong = [row for row, token in zip(rows, found, strict=True) if token != together[row]]
        assert not wrong, f"row {wrong[0]} gets another token among {len(rows)} rows than among {ROWS}"


def test_noise_is_a_function_of_its_arguments(part: Part, sampler: Sampler, device: DeviceBackend) -> None:
    """Asked again it answers the same; another seed, sequence index or position draws again."""
    import torch

    _, batch = mixed(device)
    flat = torch.zeros(ROWS, VOCAB)
    batch = replace(batch, temperature=torch.ones_like(batch.temperature), top_k=None, top_p=None, min_p=None)  # type: ignore[arg-type]
    first = sample(sampler, device, flat, batch)
    assert sample(sampler, device, flat, batch) == first
    for name in ("seeds", "indices", "positions"):
        other = sample(sampler, device, flat, replace(batch, **{name: getattr(batch, name) + 1}))
        same = sum(a == b for a, b in zip(first, other, strict=True))
        assert same <= ROWS // 8, f"{same} of {ROWS} rows draw the same token under other {name}"


def test_equal_scores_stay_together(part: Part, sampler: Sampler, device: DeviceBackend) -> None:
    """A filter keeps all scores that equal the last one it keeps, and -0.0 equals 0.0."""
    import torch

    batch = rows_of(mixed(device)[1], range(8))
    ones = torch.ones_like(batch.temperature)  # type: ignore[arg-type]
    flat, signed = torch.zeros(8, VOCAB), torch.zeros(8, VOCAB)
    signed[:, 1::2] = -0.0
    batch = replace(batch, temperature=ones, top_k=None, top_p=None, min_p=None)
    unfiltered = sample(sampler, device, flat, batch)
    filters: dict[str, dict[str, Any]] = {"top_p": {"top_p": ones * 1e-3}, "min_p": {"min_p": ones}}
    for name, column in filters.items():
        found = sample(sampler, device, signed, replace(batch, **column))
        assert found == unfiltered, f"{name} parts scores that are equal"


@pytest.mark.parametrize(
    "without",
    [(), ("top_k",), ("top_p",), ("min_p",), ("top_k", "top_p"), ("top_k", "top_p", "min_p")],
    ids=lambda names: "no " + ",".join(names) if names else "all",
)
def test_tokens_are_the_reference_s(
    part: Part, sampler: Sampler, device: DeviceBackend, without: Sequence[str], request: pytest.FixtureRequest
) -> None:
    """Token for token the reference's choice under the same noise; only near ties may fall otherwise."""
    import torch

    from xllm_core.reference.device import ReferenceDevice
    from xllm_core.runtime.noise import gumbel, stream_keys
    from xllm_core.runtime.sampler import GumbelSampler

    logits, batch = mixed(device, without=without)
    oracle = (optional_fixture(request, "xllm_sampler_oracle") or GumbelSampler)(ReferenceDevice(0))
    on_host = changed(batch, lambda column: column.cpu())
    wanted = sample(oracle, ReferenceDevice(0), logits, on_host)
    found = sample(sampler, device, logits, batch)
    assert on_host.temperature is not None
    keys = stream_keys(batch.seeds.tolist(), batch.indices.tolist(), batch.positions.tolist())
    for row in [row for row in range(ROWS) if found[row] != wanted[row]]:
        tokens = torch.tensor([wanted[row], found[row]])
        heat = float(on_host.temperature[row])
        noised = (
            logits[row, tokens] / heat + gumbel(keys[row].view(1, 1), tokens.view(1, 2))[0]
            if heat
            else logits[row, tokens]
        )
        margin = float((noised[0] - noised[1]).abs())
        assert margin <= NEAR_TIE, (
            f"row {row} takes {found[row]} where the reference takes {wanted[row]}, {margin:.3g} apart"
        )
