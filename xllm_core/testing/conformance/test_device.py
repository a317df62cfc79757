"""Device backends: facts, memory, copies; a model finds all that it asks for; an engine says the same whatever is switched on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from xllm_core.plugins.contracts.device import DeviceBackend, DeviceFacts
from xllm_core.plugins.contracts.ops import CORE_OPS
from xllm_core.testing.plugin import Kit, kit_of
from xllm_core.testing.subject import Part

if TYPE_CHECKING:
    import torch


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every device."""
    parts = kit_of(metafunc.config).subject.parts("device")
    metafunc.parametrize("part", parts, ids=[part.offer.name for part in parts])


@pytest.fixture
def device(part: Part, xllm_kit: Kit) -> DeviceBackend:
    """The device under test; skips with the reason of its probe."""
    found = xllm_kit.subject.device_of(xllm_kit.importable(part).offer)
    backend: DeviceBackend = xllm_kit.no_device(f"{part.offer.name}: {found}") if isinstance(found, str) else found
    return backend


def test_facts(part: Part, device: DeviceBackend) -> None:
    """Facts are complete, known to torch, and do not change."""
    import torch

    from xllm_core.runtime.dtypes import torch_dtype

    facts = device.facts()
    assert isinstance(facts, DeviceFacts)
    assert facts == device.facts(), "facts() answers differently the second time"
    assert facts.kind and facts.name and facts.dtypes and facts.kv_layouts
    for listed in (facts.dtypes, facts.block_sizes, facts.kv_layouts):
        assert len(set(listed)) == len(listed), f"{listed} names something twice"
    assert all(isinstance(size, int) and size > 0 for size in facts.block_sizes)
    for dtype in facts.dtypes:
        torch_dtype(dtype)
    torch.device(facts.torch_device)
    assert device.num_threads() >= 1


def test_memory(part: Part, device: DeviceBackend) -> None:
    """Memory is counted in bytes: free is part of all, and the peak is real."""
    memory = device.memory()
    assert 0 < memory.free_bytes <= memory.total_bytes
    assert memory.total_bytes >= 1 << 20, f"{memory.total_bytes} bytes in all; is the unit bytes?"
    tensor = device.allocate((1 << 20,), _dtype(device))
    tensor.fill_(1)
    device.synchronize()
    assert 0 < device.peak_memory_bytes()


def test_allocation(part: Part, device: DeviceBackend) -> None:
    """Tensors are zeroed, on the device, contiguous and of the dtype asked for; the impossible is a MemoryError with its size."""
    import torch

    from xllm_core.runtime.dtypes import torch_dtype

    for dtype in [*map(torch_dtype, device.facts().dtypes), torch.int32, torch.int64]:
        tensor = device.allocate((3, 5, 2), dtype)
        assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == ((3, 5, 2), dtype, True)
        assert tensor.device.type == torch.device(device.facts().torch_device).type
        assert not tensor.cpu().any(), "a new tensor is not zeroed"
    first, second = device.allocate((64,), torch.int32), device.allocate((64,), torch.int32)
    first.fill_(7)
    assert not second.cpu().any(), "two tensors share memory"
    with pytest.raises(MemoryError, match=str(4 << 60)):
        device.allocate((1 << 60,), torch.float32)


def test_copies(part: Part, device: DeviceBackend) -> None:
    """What is written to a host buffer arrives on the device, step after step."""
    import torch

    host = device.host_buffer((257,), torch.int64)
    assert not host.any() and host.device.type == "cpu"
    view = host.numpy()
    for step in range(4):
        view[:] = range(step, step + 257)
        on_device = device.to_device(host)
        assert on_device.device.type == torch.device(device.facts().torch_device).type
        result = on_device + 1
        device.synchronize()
        assert result.cpu().tolist() == list(range(step + 1, step + 258))


def test_what_comes_back_is_of_its_time(part: Part, device: DeviceBackend) -> None:
    """A copy to the host that is waited for later, and on another thread, holds what was there when it was asked for; so does one to the device."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from xllm_core.plugins.contracts.device import AsyncDevice

    if not isinstance(device, AsyncDevice):
        pytest.skip(f"{device.facts().name} computes while the host waits")
    tensor = device.allocate((257,), torch.int64)
    host = torch.zeros(257, dtype=torch.int64)
    sent = []
    for step in range(8):
        host.fill_(step)
        sent.append(device.to_device(host) + 1)
    assert [int(copy[256]) for copy in sent] == list(range(1, 9)), (
        "what the host writes next is seen by the step before"
    )
    arrived = []
    for step in range(8):
        tensor += step
        arrived.append(device.to_host(tensor))
    tensor.zero_()
    with ThreadPoolExecutor(1) as other:
        copies = list(other.map(lambda wait: wait(), arrived))
    for step, copy in enumerate(copies):
        assert copy.device.type == "cpu" and copy.tolist() == [step * (step + 1) // 2] * 257


def test_a_model_finds_what_it_asks_for(part: Part, device: DeviceBackend, xllm_kit: Kit) -> None:
    """Every op of the core, attention and a sampler are offered for this device, in every dtype that it names."""
    subject = xllm_kit.subject
    for dtype in device.facts().dtypes:
        assert set(subject.choose_ops(device, dtype)) == set(CORE_OPS)
        subject.choose_attention(device, subject.common_geometry(device, dtype))
    subject.choose_sampler(device)


def test_tokens_are_the_reference_s(part: Part, device: DeviceBackend, xllm_kit: Kit, tmp_path: Path) -> None:
    """A tiny model says on this device what it says on the reference, up to near ties."""
    from xllm_core.testing.across import compare_with_reference

    subject = xllm_kit.subject
    use = {**subject.pins(), "device": part.offer.name}
    dtype = device.facts().dtypes[0]
    model = _tiny_model(tmp_path, spread=0.5 if dtype == "float32" else 0.2)
    row = compare_with_reference(model, use, dtype=dtype, plugin=subject.settings.plugin)
    assert row.has_passed, "; ".join(row.differences) or f"only {row.num_compared} of {row.num_tokens} tokens compared"


def test_features_change_no_token(part: Part, device: DeviceBackend, xllm_kit: Kit, tmp_path: Path) -> None:
    """`xllm verify` passes: batch mates, chunks, prefix cache, preemption, forks, overlap and the rest change nothing."""
    from xllm_core.testing.verify import QUICK, Verifier

    subject = xllm_kit.subject
    settings = {"memory_bytes": 1 << 24, "plugin": subject.settings.plugin}
    use = {**subject.pins(), "device": part.offer.name}
    for dtype in device.facts().dtypes:
        report = Verifier(_tiny_model(tmp_path), dtype=dtype, scale=QUICK, use=use, **settings).run()
        wrong = [
            f"{row.feature}: {row.differences or f'activity {row.activity}'}"
            for row in report.rows
            if not row.has_passed
        ]
        assert report.has_passed, f"{dtype}: " + "; ".join(wrong)


def test_capture_equals_eager(part: Part, device: DeviceBackend, xllm_kit: Kit, tmp_path: Path) -> None:
    """Decode steps replayed from recorded graphs say what eager ones say, for every number of rows."""
    from xllm_core.plugins.contracts.graphs import GraphDevice
    from xllm_core.testing.verify import QUICK, Verifier

    if not isinstance(device, GraphDevice):
        pytest.skip(f"{device.facts().name} records no graphs")
    subject = xllm_kit.subject
    settings = {"memory_bytes": 1 << 24, "plugin": subject.settings.plugin}
    use = {**subject.pins(), "device": part.offer.name}
    for dtype in device.facts().dtypes:
        verifier = Verifier(_tiny_model(tmp_path), dtype=dtype, scale=QUICK, use=use, **settings)
        (row,) = verifier.run(only=["graph replay"]).rows
        assert not row.not_applicable, f"{dtype}: the core's own Llama is not replayed: {row.not_applicable}"
        assert row.has_passed, f"{dtype}: {row.differences or f'{row.activity} steps were replayed'}"


def test_populated_memory_keeps_what_it_holds(part: Part, device: DeviceBackend) -> None:
    """Pages that are asked for early are those of the part, and neither it nor what lies around it changes."""
    import torch

    from xllm_core.plugins.contracts.device import LazyMemoryDevice

    if not isinstance(device, LazyMemoryDevice):
        pytest.skip(f"{device.facts().name} gives memory its pages at once")
    tensor = device.allocate((5000, 7), _dtype(device))
    tensor[1000:3000] = 3
    device.populate(tensor[2000:4000])
    device.populate(tensor[:0])
    device.synchronize()
    expected = torch.zeros_like(tensor)
    expected[1000:3000] = 3
    assert torch.equal(tensor, expected)


def _dtype(device: DeviceBackend) -> torch.dtype:
    from xllm_core.runtime.dtypes import torch_dtype

    return torch_dtype(device.facts().dtypes[0])


def _tiny_model(folder: Path, *, spread: float = 0.5) -> str:
    """A random Llama; with a spread of 0.5 near ties are rare, but what is rounded to bfloat16 drifts far from what is not."""
    from xllm_core.testing.tiny import tiny_config, write_tiny

    path = folder / "tiny"
    if not path.exists():
        write_tiny(tiny_config("LlamaForCausalLM", max_position_embeddings=1024, initializer_range=spread), path)
    return str(path)
