"""The table: what every kernel needs on every chip, the least time that its work can take, and whether it is still about this code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parent.parent
SOURCES = (
    "kernels/*.py", "tiling.py", "attention.py", "ops.py", "sampler.py", "aot/workloads.py", "aot/compile.py", "aot/table.py",
)  # fmt: skip
"""What the table depends on."""


@dataclass(frozen=True, slots=True)
class Chip:
    """A data sheet. bytes_per_s of device memory, dense operations_per_s of 16-bit matrix units and of float32 lanes; of one SM, registers and
    bytes of shared memory that its programs share.
    """

    name: str
    capability: int
    bytes_per_s: float
    matrix_per_s: float
    float32_per_s: float
    registers: int = 65536
    shared_bytes: int = 233472
    max_threads: int = 2048


CHIPS = (
    Chip("A100 SXM 80 GB", 80, 2.039e12, 312e12, 19.5e12, shared_bytes=167936),
    Chip("H100 SXM", 90, 3.35e12, 989e12, 67e12),
    Chip("B200", 100, 8.0e12, 2250e12, 80e12),
)
"""One card of each generation; figures are the maker's."""


@dataclass(frozen=True, slots=True)
class KernelRow:
    """A kernel at the shapes of a model on a chip. key: of the launch, equal where the code is the same. is_hot: spills are an error."""

    model: str
    dtype: str
    workload: str
    kernel: str
    capability: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int
    matrix: str
    is_hot: bool


@dataclass(frozen=True, slots=True)
class RooflineRow:
    """The least time of a workload: bytes over bandwidth, or operations over the rate of the units, whichever is longer."""

    model: str
    dtype: str
    workload: str
    data_bytes: tuple[tuple[int, ...], ...]
    operations: tuple[tuple[int, ...], ...]

    def total(self, terms: tuple[tuple[int, ...], ...]) -> int:
        """A sum of products."""
        return sum(_product(term) for term in terms)

    def least_s(self, chip: Chip) -> tuple[float, str]:
        """(seconds, what bounds them)."""
        rate = chip.float32_per_s if self.dtype == "float32" else chip.matrix_per_s
        memory_s = self.total(self.data_bytes) / chip.bytes_per_s
        compute_s = self.total(self.operations) / rate
        return (compute_s, "operations") if compute_s > memory_s else (memory_s, "bytes")


@dataclass(slots=True)
class Table:
    """Everything, with the fingerprint of the code that it is about."""

    sources: str
    triton: str
    kernels: list[KernelRow]
    rooflines: list[RooflineRow]

    def to_json(self) -> str:
        """As checked in: a row to a line, so that a change is a short difference."""
        head = {"sources": self.sources, "triton": self.triton}
        kernels, rooflines = (
            ",\n".join(json.dumps(asdict(row)) for row in rows) for rows in (self.kernels, self.rooflines)
        )
        return f'{json.dumps(head)[:-1]}, "kernels": [\n{kernels}\n], "rooflines": [\n{rooflines}\n]}}\n'

    @classmethod
    def from_json(cls, text: str) -> Table:
        """What `to_json` wrote."""
        data: dict[str, Any] = json.loads(text)
        rooflines = [
            RooflineRow(**{**row, **{name: tuple(map(tuple, row[name])) for name in ("data_bytes", "operations")}})
            for row in data["rooflines"]
        ]
        return cls(data["sources"], data["triton"], [KernelRow(**row) for row in data["kernels"]], rooflines)

    def spills(self) -> list[str]:
        """Hot kernels that spill, in words."""
        return [
            f"{row.kernel} ({row.workload}, {row.model}, {row.dtype}) spills {row.spill_bytes} bytes on sm_{row.capability}"
            for row in self.kernels
            if row.is_hot and row.spill_bytes
        ]


def fingerprint() -> str:
    """SHA-256 over the sources that decide what is compiled, and over the tilings in them."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(_PACKAGE.glob(pattern)):
            digest.update(f"{path.relative_to(_PACKAGE).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def build(capabilities: Iterable[int], *, models: Iterable[str] = (), workload_names: Iterable[str] = ()) -> Table:
    """Compile. models, workload_names: only these; empty for all. bfloat16 at every shape, float32 at the first."""
    import torch

    from xllm_cuda.aot.compile import Resources, compile_launch, recording
    from xllm_cuda.aot.workloads import SHAPES, workloads

    table = Table(fingerprint(), version("triton"), [], [])
    known: dict[tuple[str, int], Resources] = {}
    wanted = [(shape, torch.bfloat16) for shape in SHAPES] + [(SHAPES[0], torch.float32)]
    for shape, dtype in wanted:
        if models and shape.name not in models:
            continue
        for workload in workloads(shape, dtype):
            if workload_names and workload.name not in workload_names:
                continue
            about = (shape.name, str(dtype).removeprefix("torch."), workload.name)
            table.rooflines.append(RooflineRow(*about, workload.data_bytes, workload.operations))
            with recording() as launches:
                workload.launch()
            for launch in {launch.key: launch for launch in launches}.values():
                for capability in capabilities:
                    if (launch.key, capability) not in known:
                        known[launch.key, capability] = compile_launch(launch, capability)
                    needs = known[launch.key, capability]
                    table.kernels.append(
                        KernelRow(
                            *about,
                            launch.name,
                            capability,
                            needs.registers,
                            needs.spill_bytes,
                            needs.shared_bytes,
                            needs.threads,
                            needs.matrix,
                            workload.is_hot,
                        )
                    )
    return table


def render(table: Table) -> str:
    """The table for people."""
    return "\n".join([*_head(table), *_kernel_lines(table), *_roofline_lines(table)]) + "\n"


def _head(table: Table) -> list[str]:
    cards = ", ".join(
        f"sm_{c.capability} {c.name}: {c.bytes_per_s / 1e12:g} TB/s, {c.matrix_per_s / 1e12:g} TFLOP/s dense bfloat16, "
        f"{c.float32_per_s / 1e12:g} float32"
        for c in CHIPS
    )
    return [
        "# What the kernels need",
        "",
        f"Compiled by triton {table.triton}, without a GPU; what ran on one is in README.md. Written by `python -m xllm_cuda.aot --write`;",
        "`make nightly` does it again and fails if anything differs, the ordinary tests fail if the sources do.",
        "",
        "A cell: registers of a thread (r), bytes spilled (sp), bytes of shared memory (B) and threads (t) of a program, how many programs an SM",
        "holds at once by these, and the matrix instruction where there is one. float16 compiles to the same as bfloat16.",
        "",
        f"The roofline takes the makers' figures ({cards}). It is a bound; README.md tells how near some kernels come on one card.",
    ]


def _programs(row: KernelRow, chip: Chip) -> int:
    """How many programs an SM holds: registers go out to warps in units of 256, a program takes 1 KiB of shared memory beside its own."""
    per_warp = -(-row.registers * 32 // 256) * 256
    by_registers = chip.registers // (per_warp * (row.threads // 32))
    return min(by_registers, chip.shared_bytes // (row.shared_bytes + 1024), chip.max_threads // row.threads, 32)


def _kernel_lines(table: Table) -> Iterator[str]:
    chips = {chip.capability: chip for chip in CHIPS}
    cells: dict[tuple[str, str, str, str], dict[int, str]] = {}
    for row in table.kernels:
        text = f"{row.registers} r, {row.spill_bytes} sp, {row.shared_bytes} B, {row.threads} t, {_programs(row, chips[row.capability])}/SM"
        text += f", {row.matrix}" if row.matrix else ""
        place = cells.setdefault((row.model, row.dtype, row.workload, row.kernel), {})
        place[row.capability] = (
            f"{place[row.capability]}; {text}" if row.capability in place and place[row.capability] != text else text
        )
    last = ("", "")
    for (model, dtype, workload, kernel), by_chip in cells.items():
        if (model, dtype) != last:
            yield from (
                "",
                f"## {model}, {dtype}",
                "",
                "| work | kernel | sm_80 | sm_90 | sm_100 |",
                "|---|---|---|---|---|",
            )
            last = (model, dtype)
        yield f"| {workload} | `{kernel}` | {' | '.join(by_chip.get(c.capability, '') for c in CHIPS)} |"


def _roofline_lines(table: Table) -> Iterator[str]:
    yield from ("", "## Roofline", "", "Least microseconds = max(bytes / bandwidth, operations / rate).", "")
    yield "| model | work | bytes | operations | sm_80 | sm_90 | sm_100 |"
    yield "|---|---|---|---|---|---|---|"
    for row in table.rooflines:
        bounds = [row.least_s(chip) for chip in CHIPS]
        times = " | ".join(f"{seconds * 1e6:.4g} by {what}" for seconds, what in bounds)
        yield f"| {row.model}, {row.dtype} | {row.workload} | {_sum(row.data_bytes)} | {_sum(row.operations)} | {times} |"


def _sum(terms: tuple[tuple[int, ...], ...]) -> str:
    if not terms:
        return ""
    return f"{' + '.join('·'.join(map(str, term)) for term in terms)} = {sum(map(_product, terms)):.4g}"


def _product(term: tuple[int, ...]) -> int:
    product = 1
    for factor in term:
        product *= factor
    return product
