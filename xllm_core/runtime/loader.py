"""From a checkpoint to a model's parameters, by the family's weight map.

All names and shapes are compared before a byte is read, so a wrong checkpoint is refused whole and at once. Then each tensor is read
(mapped or unpacked) by one thread, and cut to this rank's share, cast and copied into place by a few others.
"""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from xllm_core.errors import IntegrityError, WeightMismatchError
from xllm_core.plugins.contracts.weights import Checkpoint, HoldsPacked, PackedTensor, WeightEntry, WeightMap
from xllm_core.runtime.parts import CoreParts, Parameter

Progress = Callable[[str, int, int], None]
_NUM_NAMED = 10
_ELSEWHERE = -1
_NUM_COPYING = (
    3  # touching new memory waits for the system, so a thread more than cores is no waste; each holds one tensor
)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did. loaded_bytes: of the parameters filled, in the model's dtype. num_ignored: tensors left unread on purpose."""

    num_tensors: int
    num_ignored: int
    loaded_bytes: int
    seconds: float


def load_weights(
    checkpoint: Checkpoint, weight_map: WeightMap, parts: CoreParts, *, progress: Progress | None = None
) -> LoadReport:
    """Fill every parameter of `parts` and finish them.

    progress: called with (tensor name, bytes done, bytes in all) after each tensor, bytes of the model's dtype.
    Raises WeightMismatchError for missing, misshapen, surplus and non-finite tensors, ModelFormatError for unreadable ones.
    """
    started_s = time.monotonic()
    sources = check_weights(checkpoint, weight_map)
    _check_coverage(weight_map.entries, parts.parameters)
    total = sum(torch.Size(entry.shape).numel() for entry in weight_map.entries) * parts.dtype.itemsize
    done = 0
    for entry in _filled(checkpoint, weight_map.entries, sources, parts):
        done += torch.Size(entry.shape).numel() * parts.dtype.itemsize
        if progress is not None:
            progress(entry.name, done, total)
    parts.finish()
    return LoadReport(
        num_tensors=sum(map(bool, sources)),
        num_ignored=len(set(checkpoint.tensors()) - set(sources)),
        loaded_bytes=done // parts.world_size,
        seconds=time.monotonic() - started_s,
    )


def check_weights(checkpoint: Checkpoint, weight_map: WeightMap) -> list[str]:
    """Compare names and shapes; raises WeightMismatchError with all that does not fit. Call it before a model is built, whose sizes may be absurd.

    Returns the checkpoint's name for each entry of the map, "" for an absent optional one that nothing stands in for.
    """
    held = checkpoint.tensors()
    sources: list[str] = []
    missing: list[str] = []
    misshapen: list[str] = []
    for entry in weight_map.entries:
        source = entry.name
        if source not in held and entry.is_optional:
            source = entry.fallback or ""
        sources.append(source)
        if source and source not in held:
            missing.append(source)
        elif source and held[source].shape != entry.shape:
            misshapen.append(f"{source} is {list(held[source].shape)}, the model needs {list(entry.shape)}")
    ignorable = [re.compile(pattern) for pattern in weight_map.ignorable]
    used = set(sources)
    surplus = [name for name in held if name not in used and not any(p.fullmatch(name) for p in ignorable)]
    problems = [
        _listed(missing, "missing"),
        _listed(misshapen, "misshapen"),
        _listed(surplus, "not expected by this model"),
    ]
    if any(problems):
        raise WeightMismatchError(
            f"{checkpoint.path}: the weights do not fit the configuration\n"
            + "\n".join(problem for problem in problems if problem)
            + "\ncheck that configuration and weights belong together and that the download is complete"
        )
    return sources


def packed_parameters(checkpoint: Checkpoint, weight_map: WeightMap, kinds: Collection[str]) -> frozenset[str]:
    """Parameters all of whose tensors the checkpoint packs in one of these kinds. The weight map fits (`check_weights`)."""
    held = checkpoint.packed() if isinstance(checkpoint, HoldsPacked) else {}
    sources = zip(weight_map.entries, check_weights(checkpoint, weight_map), strict=True)
    fits: dict[str, bool] = {}
    for entry, source in sources:
        fits[entry.param] = fits.get(entry.param, True) and held.get(source) in kinds and entry.expert is None
    return frozenset(name for name, is_packed in fits.items() if is_packed)


def _listed(names: Sequence[str], what: str) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return f"  {len(names)} {what}: {'; '.join(names[:_NUM_NAMED])}{more}"


def _check_coverage(entries: Sequence[WeightEntry], parameters: Mapping[str, Parameter]) -> None:
    """A weight map must fill each parameter exactly; a gap would leave zeros in a model that runs."""
    filled: Counter[tuple[str, int | None]] = Counter()  # by parameter, and by expert where a tensor is one expert's
    for entry in entries:
        parameter = parameters.get(entry.param)
        if parameter is None:
            raise IntegrityError(f"the weight map fills {entry.param!r}, which the model did not ask for")
        whole = parameter.shape if entry.expert is None else parameter.shape[1:]
        count = _num_rows(whole) if entry.rows is None else entry.rows[1]
        filled_shape = whole if entry.rows is None else (count, *whole[1:])
        if filled_shape != entry.shape or entry.axis != parameter.axis:
            raise IntegrityError(
                f"the weight map gives {entry.name!r} shape {entry.shape} and axis {entry.axis!r}; it fills {count} rows of"
                f" {entry.param!r}, which has shape {parameter.shape} and axis {parameter.axis!r}"
            )
        filled[entry.param, entry.expert] += count
    for name, parameter in parameters.items():
        by_expert = parameter.axis == "expert" and not filled[name, None]
        for expert in range(parameter.shape[0]) if by_expert else (None,):
            total = _num_rows(parameter.shape[1:] if by_expert else parameter.shape)
            if (count := filled[name, expert]) != total:
                where = "" if expert is None else f", expert {expert}"
                raise IntegrityError(f"the weight map fills {count} of {total} rows of {name!r}{where}")


def _num_rows(shape: Sequence[int]) -> int:
    """A single number is one row."""
    return shape[0] if shape else 1


def _filled(
    checkpoint: Checkpoint, entries: Sequence[WeightEntry], sources: Sequence[str], parts: CoreParts
) -> Iterator[WeightEntry]:
    """Fill entry after entry, and yield each when it is done. One thread reads, a few convert and copy what was read."""
    with ThreadPoolExecutor(_NUM_COPYING, thread_name_prefix="xllm-weights") as pool:
        under_way: deque[tuple[WeightEntry, Future[None] | None]] = deque()
        try:
            for entry, source in zip(entries, sources, strict=True):
                if len(under_way) > _NUM_COPYING:
                    yield _waited(*under_way.popleft())
                copying = None  # what has no source stays zero, as a bias that is not there
                if source and _place_of_expert(entry, parts) != _ELSEWHERE:
                    copying = pool.submit(
                        _fill, checkpoint.path, *_read(checkpoint, entry, source, parts), entry, source, parts
                    )
                under_way.append((entry, copying))
            while under_way:
                yield _waited(*under_way.popleft())
        finally:
            for _, copying in under_way:
                if copying is not None:
                    copying.cancel()


def _place_of_expert(entry: WeightEntry, parts: CoreParts) -> int | None:
    """Where one expert's tensor lies among those of this rank, `_ELSEWHERE` for another's; None for a tensor that is no expert's."""
    if entry.expert is None:
        return None
    parameter = parts.parameters[entry.param]
    assert parameter.physical_of is not None and parameter.tensor is not None, f"{parameter.name} holds no experts"
    place = int(parameter.physical_of[entry.expert]) - parts.rank * len(parameter.tensor)
    return place if 0 <= place < len(parameter.tensor) else _ELSEWHERE


def _waited(entry: WeightEntry, copying: Future[None] | None) -> WeightEntry:
    if copying is not None:
        copying.result()
    return entry


def _read(
    checkpoint: Checkpoint, entry: WeightEntry, source: str, parts: CoreParts
) -> tuple[torch.Tensor | None, PackedTensor | None]:
    """A tensor unpacked, packed, or both, as its parameter wants it."""
    parameter = parts.parameters[entry.param]
    packed = None
    if parameter.packed is not None:
        assert isinstance(checkpoint, HoldsPacked)
        packed = checkpoint.read_packed(source)
        if parameter.tensor is None:
            return None, packed
    return checkpoint.read(source), packed


def _fill(
    path: Path,
    tensor: torch.Tensor | None,
    packed: PackedTensor | None,
    entry: WeightEntry,
    source: str,
    parts: CoreParts,
) -> None:
    """Take this rank's share of one tensor into the parameter: copied, where it is unpacked."""
    parameter = parts.parameters[entry.param]
    if packed is not None:
        assert parameter.packed is not None
        share = _share(packed.blocks, entry, parts, parameter.divided_dim)
        parameter.packed.append((entry.rows[0] if entry.rows is not None else 0, PackedTensor(packed.kind, share)))
    if tensor is not None:
        _copy(path, tensor, entry, source, parts)


def _copy(path: Path, tensor: torch.Tensor, entry: WeightEntry, source: str, parts: CoreParts) -> None:
    parameter = parts.parameters[entry.param]
    assert parameter.tensor is not None, f"{parameter.name} was filled and finished before"
    target, dim = parameter.tensor, parameter.divided_dim
    if (place := _place_of_expert(entry, parts)) is not None:
        target, dim = target[place], None
    if entry.rows is not None:
        # Each tensor of a fused parameter is shared out by itself, so a rank holds its queries, then its keys, then its values.
        first, count = entry.rows
        divisor = parts.world_size if dim == 0 else 1
        target = target[first // divisor : (first + count) // divisor]
    target.copy_(_share(tensor, entry, parts, dim))
    # One pass over what was just written. A sum is finite exactly when all terms are: overflow needs 1e38, which no weight is near.
    if not torch.isfinite(target.sum(dtype=torch.float32)):
        raise WeightMismatchError(
            f"{path}: tensor {source!r} holds values that are not finite in {target.dtype}; the file is damaged, or its"
            " weights need a wider dtype"
        )


def _share(tensor: torch.Tensor, entry: WeightEntry, parts: CoreParts, dim: int | None) -> torch.Tensor:
    """This rank's part, its rows in the parameter's order. tensor: [rows, ...]; of a packed one the second dimension is blocks."""
    if entry.row_order is not None:
        size = len(entry.row_order)
        tensor = tensor.view(-1, size, *tensor.shape[1:])[:, list(entry.row_order)].flatten(0, 1)
    if dim is None:
        return tensor
    share = parts.share(tensor.shape[dim] // (stacked := entry.stacked if dim == 0 else 1))
    pieces = tensor.chunk(stacked) if stacked > 1 else (tensor,)
    shares = [piece.narrow(dim, parts.rank * share, share) for piece in pieces]
    return shares[0] if stacked == 1 else torch.cat(shares)
