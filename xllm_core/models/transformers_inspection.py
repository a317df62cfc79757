"""What a class of transformers asks for, learned by running it without weights: KV groups, weight map, and why it cannot be served.

The frame (all but the layers) runs on a few tokens with made-up tables; each layer runs on the meta device, and its attention tells
what it was called with. So geometry, windows and scales are what the class's code does, not what a field of the configuration may mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from xllm_core.errors import ModelError
from xllm_core.models.config import Fields, read_dtype
from xllm_core.models.transformers_classes import (
    ATTRIBUTE,
    PAGED,
    PROBED,
    Installer,
    Mask,
    build_class,
    fill_buffers,
    layers_of,
    own_modules,
    refused,
    sources_of,
)
from xllm_core.models.transformers_frame import Call, Frame
from xllm_core.plugins.contracts.model import ModelShape
from xllm_core.plugins.contracts.weights import Axis, WeightEntry, WeightMap

_NUM_TOKENS = 3
# Arguments that say nothing to a kernel, or what the mask and the shapes say already.
_KNOWN = frozenset({
    "cache_position", "dropout", "is_causal", "max_length_k", "max_length_q", "position_embeddings", "position_ids", "scaling",
    "sliding_window", "softcap", "use_cache",
})  # fmt: skip
_MEANING = {"s_aux": "attention sinks", "sinks": "attention sinks", "position_bias": "a bias by position"}
_MIXERS = (torch.nn.modules.conv._ConvNd, torch.nn.RNNBase, torch.nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """One layer's attention as a kernel sees it. Full head counts."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    sliding_window: int | None
    soft_cap: float | None


@dataclass(frozen=True, slots=True)
class Facts:
    """What serving a class takes.

    attention: per layer. modules: the name of each layer's attention module. is_tuple: what layers return.
    divides: weights can be divided over ranks. flat: as `Installer` takes it.
    """

    shape: ModelShape
    attention: tuple[LayerAttention, ...]
    modules: tuple[str, ...]
    weights: WeightMap
    is_tuple: bool
    divides: bool
    flat: frozenset[str]


def inspect_config(config: Mapping[str, Any]) -> Facts:
    """Inspect the class that serves a configuration; remembered for the next to ask. Raises ModelError with the reason."""
    return _inspect(json.dumps(dict(config), sort_keys=True))


@lru_cache(maxsize=4)
def _inspect(text: str) -> Facts:
    config = json.loads(text)
    try:
        return _Inspection(config, is_tuple=False).facts()
    except ModelError as first:
        try:
            return _Inspection(
                config, is_tuple=True
            ).facts()  # older classes: a layer returns its hidden states in a tuple
        except ModelError:
            raise first from None


class _DryParts:
    """`Parts` that remember what they were asked for. Maps give zeros, tables made-up rows that differ from token to token."""

    world_size, rank = 1, 0
    dtype = torch.float32

    def __init__(self, torch_device: str, asked: list[tuple[str, tuple[int, ...], Axis]]) -> None:
        self.torch_device, self._asked = torch_device, asked

    def share(self, size: int) -> int:
        return size

    def op(self, name: str, *, unfused: Callable[..., Any] | None = None) -> Callable[..., Any]:
        raise AssertionError(f"the op {name!r} is not asked for by transformers' code")

    def parameter(
        self, name: str, shape: Sequence[int], axis: Axis = "replicated", *, is_float32: bool = False
    ) -> torch.Tensor:
        self._asked.append((name, tuple(shape), axis))
        return torch.zeros(tuple(shape), dtype=self.dtype, device=self.torch_device)

    def linear(self, name: str, in_features: int, out_features: int, *, axis: Axis, has_bias: bool = False) -> Any:
        self._asked.append((f"{name}.weight", (out_features, in_features), axis))
        if has_bias:
            self._asked.append((f"{name}.bias", (out_features,), "replicated" if axis == "row" else axis))
        return lambda x: x.new_zeros(len(x), out_features)

    def linear_silu_mul(self, name: str, in_features: int, inner: int, *, has_bias: bool = False) -> Any:
        raise AssertionError(f"{name}: transformers' code multiplies and activates apart")

    def router(self, name: str, hidden: int, num_experts: int) -> Any:
        raise AssertionError(f"{name}: transformers' code routes itself")

    def experts(self, name: str, num_experts: int, hidden: int, inner: int) -> Any:
        raise AssertionError(f"{name}: transformers' code calls its experts itself")

    def embedding(self, name: str, num_embeddings: int, size: int) -> Any:
        self._asked.append((f"{name}.weight", (num_embeddings, size), "vocab"))
        return lambda ids: torch.sin((ids.unsqueeze(-1) + 1).float() * torch.arange(1, size + 1, device=ids.device))

    def lm_head(self, name: str, size: int, vocab_size: int, *, tied_to: str | None = None) -> Any:
        if tied_to is None:
            self._asked.append((f"{name}.weight", (vocab_size, size), "vocab"))
        return lambda x: x.new_zeros(len(x), vocab_size)

    def attention(self, group: str, layer: int, **geometry: Any) -> Any:
        raise AssertionError("attention is noted by the inspection itself")


class _Watch(TorchFunctionMode):
    """Notes whether anything computes with what layers return before the next layer gets it."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self._num_layers, self._given = num_layers, torch.empty(0)
        self.is_touched = False

    def hand_on(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """What a stand-in returns: another tensor each time, which the next layer must get as it is."""
        self.is_touched |= index > 0 and hidden is not self._given
        self._given = torch.ones(hidden.shape)
        given = self._given
        if index == self._num_layers - 1:
            self._given = torch.empty(0)
        return given

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.is_touched |= (
            isinstance(out, torch.Tensor) and out is not self._given and any(a is self._given for a in args)
        )
        return out


class _Inspection:
    """One dry run."""

    def __init__(self, config: Mapping[str, Any], *, is_tuple: bool) -> None:
        self._config, self._is_tuple = config, is_tuple
        self._model = build_class(config, PROBED, torch.float32)
        fields = self._model.config
        for name in ("hidden_size", "vocab_size", "max_position_embeddings", "num_hidden_layers"):
            if not isinstance(getattr(fields, name, None), int):
                raise refused(config, f"transformers' configuration has no {name}")
        if getattr(fields, "num_kv_shared_layers", 0):
            raise refused(config, "some layers attend with the keys and values of others (num_kv_shared_layers)")
        self._check_rope(fields)
        self._name, self._list = layers_of(config, self._model)
        self._sources = sources_of(config, self._model)
        self._flat = frozenset(
            name
            for name, tensor in self._model.state_dict().items()
            if tensor.dim() > 2 and any(source.rows is not None for source in self._sources[name])
        )
        self._installer = Installer(config, self._model, self._name, self._flat)
        self._names = {module: name for name, module in self._model.named_modules()}
        self._asked: list[tuple[str, tuple[int, ...], Axis]] = []
        fill_buffers(config, self._model, "cpu", list(own_modules(self._model, self._name, in_layers=False)))
        self._installer.install(_DryParts("cpu", self._asked), _DryParts("meta", self._asked))
        self._frame = Frame(self._model, self._list, is_tuple=is_tuple)

    @torch.no_grad()
    def facts(self) -> Facts:
        """Run everything once."""
        calls = self._enter()
        self._leave()
        attention, modules = zip(*[self._layer(i, call) for i, call in enumerate(calls)], strict=True)
        fields = self._model.config
        shape = ModelShape(
            str(self._config["architectures"][0]), fields.num_hidden_layers, fields.hidden_size, fields.vocab_size,
            fields.max_position_embeddings, read_dtype(Fields(self._config)),
        )  # fmt: skip
        return Facts(shape, attention, modules, self._weights(), self._is_tuple, self._installer.divides, self._flat)

    def _check_rope(self, fields: Any) -> None:
        """Frequencies that follow the length of the moment would turn keys that are cached, and depend on who shares a batch."""
        given = getattr(fields, "rope_parameters", None) or {}
        for rope in [given, *given.values()]:
            if not isinstance(rope, dict) or rope.get("rope_type") != "longrope":
                continue
            outside = getattr(fields, "original_max_position_embeddings", None)
            original = rope.get("original_max_position_embeddings") or outside or 0
            if fields.max_position_embeddings > original:
                raise refused(
                    self._config,
                    f"its longrope changes frequencies beyond {original} tokens, which turns keys that are cached; set"
                    f" max_position_embeddings in its config.json to {original} to serve it up to there",
                )

    def _enter(self) -> list[Call]:
        """What precedes the layers, by embeddings and by token ids, which must be one."""
        ids, watch = torch.arange(_NUM_TOKENS), _Watch(len(self._frame.layers))
        self._frame.on_return = watch.hand_on
        try:
            embedded = self._model.get_input_embeddings()(ids)
            with watch:
                first, calls = self._frame.enter(embedded, ids)
            self._frame.on_return = lambda index, hidden: hidden
            by_ids, calls_by_ids = self._frame.run(input_ids=ids.unsqueeze(0), position_ids=ids.unsqueeze(0))
        except Exception as error:
            raise refused(
                self._config, f"its forward does not run over flat batches: {type(error).__name__}: {error}"
            ) from error
        if watch.is_touched or len(calls) != len(self._frame.layers):
            raise refused(self._config, "it computes between its layers, or runs them otherwise than once in order")
        if first.shape != (_NUM_TOKENS, self._model.config.hidden_size):
            raise refused(
                self._config, f"its layers take hidden states of shape {list(first.shape)}, not one row per token"
            )
        if not torch.equal(first, by_ids) or any(not _same(a, b) for a, b in zip(calls, calls_by_ids, strict=True)):
            raise refused(self._config, "its layers are given more of the token ids than their embeddings")
        return calls

    def _leave(self) -> None:
        """What follows the layers must not ask for positions or the number of tokens."""
        self._set_implementation(PAGED)
        fields = self._model.config
        try:
            logits = self._frame.leave(torch.ones(2, fields.hidden_size))
        except Exception as error:
            raise refused(
                self._config, f"what follows its layers does not run by itself: {type(error).__name__}: {error}"
            ) from error
        if logits.shape != (2, fields.vocab_size):
            raise refused(
                self._config,
                f"its head gives logits of shape {list(logits.shape)} for two rows, not one per token of the vocabulary",
            )

    def _set_implementation(self, name: str) -> None:
        self._model.config._attn_implementation = name

    def _layer(self, index: int, call: Call) -> tuple[LayerAttention, str]:
        """Run one layer without memory, and hear its attention."""
        layer, recorder = (
            self._frame.layers[index],
            _Recorder(self._config, index, self._model.config.max_position_embeddings),
        )
        for module in layer.modules():
            if isinstance(module, _MIXERS):
                raise refused(
                    self._config, f"layer {index} mixes tokens outside of attention ({type(module).__name__})"
                )
            object.__setattr__(module, ATTRIBUTE, recorder.of(module))
        moved = Call(_to_meta(call.args), _to_meta(call.kwargs), call.keyword)
        h = torch.empty(_NUM_TOKENS, self._model.config.hidden_size, device="meta")
        try:
            out = self._frame.raw(index, h, moved)
        except ModelError:
            raise
        except Exception as error:
            if not recorder.found:  # after attention it may ask for values, as experts do; by then all is known
                raise refused(
                    self._config, f"layer {index} does not run by itself: {type(error).__name__}: {error}"
                ) from error
            out = None
        if out is not None and isinstance(out, tuple) is not self._is_tuple:
            raise refused(
                self._config, f"layer {index} returns a {type(out).__name__}, which its class takes apart otherwise"
            )
        if len(recorder.found) != 1:
            kind = type(layer).__name__
            raise refused(
                self._config,
                f"layer {index} ({kind}) goes {len(recorder.found)} times through transformers' attention interface; once is served,"
                " so no recurrent or linear layers, no cross attention, and no attention of a class's own",
            )
        attention, module = recorder.found[0]
        return attention, self._names[module]

    def _weights(self) -> WeightMap:
        entries = [
            WeightEntry(source.name, name, source.shape, axis, source.rows)
            for name, _, axis in self._asked
            for source in self._sources[name]
        ]
        ignorable = [r".*rotary_emb\.inv_freq"]
        if self._installer.is_tied:
            ignorable += [re.escape(source.name) for source in self._sources[f"{self._installer.head}.weight"]]
        ignorable += [f".*(?:{pattern}).*" for pattern in sorted(self._model._keys_to_ignore_on_load_unexpected or ())]
        return WeightMap(entries, ignorable)


class _Recorder:
    """Hears the attention of one layer."""

    def __init__(self, config: Mapping[str, Any], index: int, max_len: int) -> None:
        self._config, self._index, self._max_len = config, index, max_len
        self.found: list[tuple[LayerAttention, Module]] = []

    def of(self, module: Module) -> Callable[..., torch.Tensor]:
        """What attends in a module."""

        def attend(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, kwargs: dict[str, Any]
        ) -> torch.Tensor:
            self.found.append((self._read(query, key, value, mask, kwargs), module))
            return query.transpose(1, 2).contiguous()

        return attend

    def _read(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> LayerAttention:
        for name, given in kwargs.items():
            if name not in _KNOWN and given is not None and given is not False:
                raise self._refused(f"hands {_MEANING.get(name, name)!r} to attention, which our kernels do not know")
        if key.shape != value.shape:
            raise self._refused(
                f"has keys of size {key.shape[-1]} and values of size {value.shape[-1]}; one size is served"
            )
        if query.shape[:1] + query.shape[2:] != key.shape[:1] + key.shape[2:] or query.shape[2] != _NUM_TOKENS:
            raise self._refused(f"attends with queries of shape {list(query.shape)} to keys of shape {list(key.shape)}")
        if not isinstance(mask, Mask):
            raise self._refused(
                f"attends {'without a mask' if mask is None else 'with a mask of its own'}; causal and sliding ones are served"
            )
        scale, soft_cap = kwargs.get("scaling"), kwargs.get("softcap")
        if not all(number is None or isinstance(number, int | float) for number in (scale, soft_cap)):
            raise self._refused("scales its scores by a weight")
        return LayerAttention(
            query.shape[1], key.shape[1], key.shape[3], float(scale if scale is not None else key.shape[3] ** -0.5),
            self._window(mask), None if soft_cap is None else float(soft_cap),
        )  # fmt: skip

    def _window(self, mask: Mask) -> int | None:
        """The sliding window that the mask is, None if everything before is seen; compared with what it says at many places."""
        length = self._max_len
        keys, zero = torch.arange(length), torch.tensor(0)

        def seen(query: int) -> torch.Tensor:
            return mask.sees(zero, zero, torch.tensor(query), keys).expand(length)

        window = int(seen(length - 1).sum())
        places = {
            0,
            1,
            2,
            window - 2,
            window - 1,
            window,
            window + 1,
            length // 3,
            length // 2,
            length // 2 + 1,
            length - 2,
            length - 1,
        }
        for query in sorted(place for place in places if 0 <= place < length):
            if not torch.equal(seen(query), (keys <= query) & (keys > query - window)):
                raise self._refused(
                    "sees neither everything before a token nor a sliding window of it (chunks, both directions, or a prefix)"
                )
        return None if window >= length else window

    def _refused(self, reason: str) -> ModelError:
        return refused(self._config, f"layer {self._index} {reason}")


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, tuple | list):
        return type(value)(_to_meta(part) for part in value)
    return {name: _to_meta(part) for name, part in value.items()} if isinstance(value, dict) else value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    return isinstance(a, Mask) or bool(a == b)
