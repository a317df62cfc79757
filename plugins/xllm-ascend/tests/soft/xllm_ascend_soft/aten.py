"""torch's own operators on the soft device: each runs the CPU's kernel over the same bytes, under the name and device that torch_npu registered."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library, get_kernel
from torch.utils._pytree import tree_leaves, tree_map

from xllm_ascend_soft.build import RUNTIME

# What only moves or names memory is torch_npu's own and works on the stub runtime as it is.
_KEPT = frozenset({
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "record_stream", "is_pinned", "_pin_memory",
    "_local_scalar_dense", "_copy_from_and_resize", "_copy_from", "_to_copy", "lift_fresh", "_has_compatible_shallow_copy_type", "is_set_to",
})  # fmt: skip
_libraries: list[Library] = []
_runtime = ctypes.CDLL(RUNTIME)


def host_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes as a tensor of the CPU, once the copies before are done. The caller keeps `tensor` alive."""
    _runtime.soft_flush()
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    own = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(own, tensor.storage_offset(), tensor.size(), tensor.stride())


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy in the device's memory, with the same strides."""
    made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    host_view(made).copy_(tensor)
    return made


def install() -> int:
    """Give every operator of aten that torch_npu has a kernel for the CPU's numbers; returns how many."""
    library = Library("aten", "IMPL")
    _libraries.append(library)
    count = 0
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
        namespace, _, full = name.partition("::")
        packet_name, _, overload_name = full.partition(".")
        if namespace != "aten" or packet_name in _KEPT:
            continue
        packet = getattr(torch.ops.aten, packet_name, None)  # some have a kernel and no schema: nobody can call them
        overload = getattr(packet, overload_name or "default", None)
        if overload is None or _is_view(overload):
            continue
        kernel = _copy(overload) if packet_name == "copy_" else _computed(overload)
        library.impl(full, kernel, "PrivateUse1", allow_override=True)
        count += 1
    return count


def _is_view(overload: Any) -> bool:
    infos = [returned.alias_info for returned in overload._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def _computed(overload: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        found = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        given = [tensor for tensor in found if tensor.device.type == "npu"]
        asked = kwargs.get("device")
        device = given[0].device if given else torch.device(asked or "npu")
        for tensor in found:
            if tensor.dim() and tensor.device != device:
                raise RuntimeError(f"{overload}: a tensor of {tensor.device} among those of {device}")
        originals: dict[int, torch.Tensor] = {}

        def lower(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or leaf.device.type != "npu":
                return leaf
            host = host_view(leaf)
            originals[id(host)] = leaf
            keep.append(host)
            return host

        def lift(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return originals[id(leaf)] if id(leaf) in originals else on_device(leaf, device)

        keep: list[torch.Tensor] = []
        args, kwargs = tree_map(lower, args), tree_map(lower, kwargs)
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        return tree_map(lift, overload(*args, **kwargs))

    return kernel


def _copy(overload: Any) -> Callable[..., Any]:
    original = get_kernel(overload, "PrivateUse1")

    def kernel(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        """Between host and device torch_npu's own way, where it is a plain copy of bytes; else the device would compute."""
        crosses = target.device.type != source.device.type
        if (
            crosses
            and target.dtype == source.dtype
            and target.is_contiguous()
            and source.is_contiguous()
            and target.shape == source.shape
        ):
            original.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1), target, source, non_blocking)
        else:
            mine, its = (host_view(t) if t.device.type == "npu" else t for t in (target, source))
            mine.copy_(its)
        return target

    return kernel
