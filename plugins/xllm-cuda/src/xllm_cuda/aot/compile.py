"""Launches recorded instead of run, and compiled for chips that are not here: ptxas says what they need."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xllm_cuda import attention, ops, sampler

_LAUNCHERS = {
    attention: ("attend_tiles", "merge_splits", "attend_in_place", "merge_in_place"),
    ops: ("rms_norm_rows", "add_rms_norm_rows", "rope_heads", "silu_mul_rows", "write_entries", "copy_rows"),
    sampler: ("best_of_chunks", "score_chunks", "part_chunks", "choose_tokens"),
}
_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch, specialised as triton does it at run time: on dtypes, on ones, on multiples of 16.

    signature: parameter -> type. constants: parameter -> value. aligned: indices of parameters that are multiples of 16.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[int, ...]
    options: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The kernel's function."""
        return str(self.kernel.fn.__name__)

    @property
    def key(self) -> str:
        """Equal for launches that compile to the same code."""
        return repr(
            (
                self.name,
                *map(sorted, (self.signature.items(), self.constants.items(), self.options.items())),
                self.aligned,
            )
        )


@dataclass(frozen=True, slots=True)
class Resources:
    """What one program needs: registers of a thread, bytes spilled to local memory, bytes of shared memory, threads. matrix: its MMA instruction."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int
    matrix: str = ""


def specialise(kernel: Any, arguments: tuple[Any, ...], options: Mapping[str, int]) -> Launch:
    """What triton would compile for these arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = []
    for index, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
            if value.storage_offset() * value.element_size() % 16 == 0:  # allocations begin at multiples of 512
                aligned.append(index)
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(index)
        else:
            signature[parameter.name] = "fp32"
    return Launch(kernel, signature, constants, tuple(aligned), dict(options))


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within it, the plugin's launches are noted and nothing runs."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self._kernel = kernel

        def __getitem__(self, grid: object) -> Callable[..., None]:
            def launch(*arguments: Any, **options: int) -> None:
                launches.append(specialise(self._kernel, arguments, options))

            return launch

    with ExitStack() as stack:
        for module, names in _LAUNCHERS.items():
            for name in names:
                stack.enter_context(patch.object(module, name, Recorder(getattr(module, name))))
        yield launches


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compile for a chip, e.g. 90 for Hopper, and ask ptxas what the code needs."""
    source = ASTSource(
        fn=launch.kernel, signature=dict(launch.signature), constexprs=dict(launch.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.aligned},
    )  # fmt: skip
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    text: str = compiled.asm["ptx"]
    matrix = sorted(set(re.findall(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)", text)))
    registers, spilled = _ptxas(text, capability)
    return Resources(
        registers, spilled, int(compiled.metadata.shared), 32 * int(compiled.metadata.num_warps), ", ".join(matrix)
    )


def _ptxas(text: str, capability: int) -> tuple[int, int]:
    """(registers, bytes of spill stores and loads)."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = folder / ("ptxas-blackwell" if capability >= 100 and (folder / "ptxas-blackwell").exists() else "ptxas")
    (arch,) = re.findall(r"^\.target (sm_\w+)", text, re.MULTILINE)
    with tempfile.TemporaryDirectory(prefix="xllm-cuda-aot-") as home:
        path = Path(home) / "kernel.ptx"
        path.write_text(text)
        command = [str(tool), "-v", f"-arch={arch}", "-o", str(path.with_suffix(".cubin")), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    said = done.stderr + done.stdout
    registers = max(int(number) for number in re.findall(r"Used (\d+) registers", said))
    spills = sum(int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))
    return registers, spills
