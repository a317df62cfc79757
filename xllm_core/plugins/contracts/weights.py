"""Where a model comes from: its files, configuration, tensors and tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

Axis = Literal["column", "row", "vocab", "expert", "replicated"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as the checkpoint holds it, after unpacking: shape in torch order, dtype name of the unpacked values."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What the front side needs; torch-free.

    tokenizer_json: a file for `tokenizers.Tokenizer.from_file`. convert: makes that file (once, cached) where the model has none; exactly one
    of the two is set. chat_template: jinja2 source or None. Special ids are those of the model's own configuration.
    """

    tokenizer_json: Path | None
    convert: Callable[[], Path] | None
    chat_template: str | None
    eos_token_ids: tuple[int, ...]
    bos_token: str | None = None
    eos_token: str | None = None
    adds_bos: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class Checkpoint(Protocol):
    """One opened model. Opening reads headers only; tensors are read by mmap when asked for."""

    @property
    def path(self) -> Path:
        """The directory or file. Weights kept on disk for the next start are those of its files, by their sizes and times: of every file in the
        directory itself, unless the checkpoint `NamesFiles`.
        """

    @property
    def config(self) -> Mapping[str, Any]:
        """What config.json holds, or would hold: `architectures`, `hidden_size`, ... (transformers' names)."""

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """What generation_config.json holds; empty where there is none."""

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, under the names of transformers' state dict. Shapes are checked against the file's size."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the host; may alias the mapped file, so it is copied before it is written to. Raises ModelFormatError."""

    def tokenizer(self) -> TokenizerFiles:
        """Tokenizer facts, without loading it."""

    def fingerprint(self) -> str:
        """Hex digest over configuration, tensor headers, sizes and sampled bytes."""


@runtime_checkable
class NamesFiles(Protocol):
    """A `Checkpoint` of several files that tells which hold its tensors, so that what else lies or is written beside them is no other model."""

    @property
    def files(self) -> Sequence[Path]:
        """In one order."""


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A weight [out, in] as a file packs it. kind: of its packing, such as "Q4_1". blocks: [out, blocks of a row, bytes of a block] uint8."""

    kind: str
    blocks: torch.Tensor


@runtime_checkable
class HoldsPacked(Protocol):
    """A `Checkpoint` that can also give weights as they are packed. What it names here it gives by `read`, unpacked, too."""

    def packed(self) -> Mapping[str, str]:
        """Kind of every tensor of two dimensions that is packed in blocks along rows, by name. From headers, without torch."""

    def read_packed(self, name: str) -> PackedTensor:
        """One of them, on the host; rows in the order of `read`. May alias the mapped file, so it is only read."""


class WeightFormat(Protocol):
    """One way to find or open a model. The first format, in rank order, that does not answer None wins."""

    def resolve(self, reference: str) -> str | None:
        """Turn what the user typed into a path that some format opens, or None if this is not for us.

        Raises ModelNotFoundError when it is for us and there is nothing.
        """

    def open(self, path: Path) -> Checkpoint | None:
        """Open a path of this format, or None if it is of another. Torch is imported no earlier than the first `read`."""


@dataclass(frozen=True, slots=True)
class WeightEntry:
    """One tensor of the checkpoint and where it goes: an entry of a model's weight map.

    name: in the checkpoint. param: of the model (`parameters()` of the contract). shape: full, unsliced.
    axis: how it divides over ranks. rows: (first, count) of the parameter's rows this tensor fills, unsliced; None for all of them.
    stacked: the tensor is so many maps of equal height, one above the other (gate and up); each is shared out over ranks by itself.
    row_order: the parameter's rows are the tensor's in this order, in groups of so many: (0, 2, 1, 3) for heads of four whose rotary pairs
        (0, 1), (2, 3) become the half-split pairs that the op `rope` turns.
    expert: which of the experts stacked in the parameter this tensor belongs to; shape and rows are then those of one expert.
    is_optional: may be absent (then `fallback` names the entry that stands in, e.g. tied embeddings).
    """

    name: str
    param: str
    shape: tuple[int, ...]
    axis: Axis
    rows: tuple[int, int] | None = None
    stacked: int = 1
    row_order: tuple[int, ...] | None = None
    expert: int | None = None
    is_optional: bool = False
    fallback: str | None = None


@dataclass(frozen=True, slots=True)
class WeightMap:
    """All of them. ignorable: regular expressions of checkpoint names that may be there and are not read."""

    entries: Sequence[WeightEntry]
    ignorable: Sequence[str] = ()
