"""Opening transformers' own classes: which one serves a configuration, how it is built without weights, how `Parts` get into it.

Nothing of transformers is changed: our attention is registered under a name of its own, and modules of one built model are exchanged.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import torch
from torch.nn import Embedding, Linear, Module, Parameter
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from xllm_core.errors import ModelFormatError
from xllm_core.models.config import SOURCE_KEY, Fields, shown
from xllm_core.plugins.contracts.model import Parts
from xllm_core.plugins.contracts.weights import Axis

PAGED = "xllm_paged"
"""Our name in transformers' attention interface: attention by the module's `xllm_attention`, and no mask at all."""
PROBED = "xllm_probed"
"""The same, with masks that describe themselves (`transformers_inspection`)."""

ATTRIBUTE = "xllm_attention"
"""Where an attention module of a built model holds what attends for it: nothing is shared between two models."""

_AXES: Mapping[str, Axis] = {"colwise": "column", "rowwise": "row"}


def _attend(
    module: Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface. query: [1, H, T, D], key and value: [1, G, T, D]. Returns [1, T, H, D]."""
    return getattr(module, ATTRIBUTE)(query, key, value, attention_mask, kwargs), None


class Mask:
    """What a layer may see, as its mask function says; passed through a model instead of a tensor of T x T."""

    def __init__(self, sees: Callable[..., torch.Tensor]) -> None:
        self.sees = sees

    def __getattr__(self, name: str) -> Any:
        """A layer that computes with its mask knows more of it than a kernel can."""
        raise AttributeError(f"it computes with its attention mask ({name})")


def _describe_mask(*args: Any, mask_function: Callable[..., torch.Tensor], **kwargs: Any) -> Mask:
    return Mask(mask_function)


AttentionInterface.register(PAGED, _attend)
AttentionInterface.register(PROBED, _attend)
AttentionMaskInterface.register(PROBED, _describe_mask)


def refused(config: Mapping[str, Any], reason: str) -> ModelFormatError:
    """The error for what transformers' class cannot be served as."""
    return ModelFormatError(f"{Fields(config).source}: {reason}")


def find_class(config: Mapping[str, Any]) -> tuple[Any, type[Any]]:
    """(transformers' configuration object, its causal language model class). Raises ModelFormatError with the reason for what is no decoder."""
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "no architecture"
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING.keys()), 1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        own = "; code that comes with a model is never run" if config.get("auto_map") else ""
        raise refused(config, f"transformers has no model_type {shown(kind)}{guess}{own}")
    if (method := config.get("quantization_config")) is not None:
        method = method.get("quant_method") if isinstance(method, Mapping) else method
        raise refused(config, f"quantised weights ({shown(method)}); take them in float32 or bfloat16")
    plain = {name: value for name, value in config.items() if name != SOURCE_KEY}
    try:
        read = CONFIG_MAPPING[kind].from_dict(plain)
    except Exception as error:
        raise refused(config, f"transformers refuses this configuration: {type(error).__name__}: {error}") from error
    if getattr(read, "is_encoder_decoder", False):
        raise refused(config, f"{architecture} is an encoder with a decoder; only decoders are served")
    if read.get_text_config() is not read or read.sub_configs:
        raise refused(
            config,
            f"{architecture} reads more than text (it is made of {', '.join(read.sub_configs)}); only text decoders are served",
        )
    if type(read) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise refused(
            config, f"transformers has no causal language model of model_type {kind!r}; only decoders are served"
        )
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(read)]
    classes = found if isinstance(found, tuple) else (found,)
    for candidate in classes:
        if candidate.__name__ == architecture:
            return read, candidate
    names = ", ".join(candidate.__name__ for candidate in classes)
    raise refused(config, f"{architecture} is not the causal language model of model_type {kind!r}, which is {names}")


def build_class(config: Mapping[str, Any], implementation: str, dtype: torch.dtype) -> Any:
    """transformers' model on the meta device: structure and no memory. Raises ModelFormatError with the reason if it cannot be served."""
    read, found = find_class(config)
    if not getattr(found, "_supports_attention_backend", False):
        raise refused(config, f"{found.__name__} does not go through transformers' attention interface")
    try:
        with torch.device("meta"):
            model = found._from_config(read, dtype=dtype, attn_implementation=implementation).eval()
    except Exception as error:
        raise refused(config, f"transformers cannot build it: {type(error).__name__}: {error}") from error
    return model


class Source(NamedTuple):
    """A tensor of a checkpoint, and the rows of a parameter (its first dimensions as one) that it fills; None for all of it."""

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None


def sources_of(config: Mapping[str, Any], model: Any) -> dict[str, list[Source]]:
    """Where each weight of a built class stands in a checkpoint: transformers renames some, and stacks those of experts.

    Its own way back, as it goes when it saves, is run on row numbers instead of weights. Raises ModelFormatError where rows are torn apart.
    """
    found: dict[str, list[Source]] = {}
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False) or None
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        head = shape[:-1] if len(shape) > 1 else shape
        # A column of numbers for a table, so that what mixes columns is seen as well.
        numbers = torch.arange(torch.Size(head).numel(), dtype=torch.float64).view(
            (*head, 1) if len(shape) > 1 else head
        )
        try:
            parts = revert_weight_conversion(model, {name: numbers})
        except Exception as error:
            raise refused(config, f"{name} is not saved by itself: {type(error).__name__}: {error}") from error
        found[name] = []
        for source, rows in parts.items():
            flat = rows.reshape(-1)
            first, count = int(flat[0]) if len(flat) else 0, len(flat)
            if not torch.equal(flat, torch.arange(first, first + count, dtype=flat.dtype)) or (
                len(shape) > 1 and rows.shape[-1] != 1
            ):
                raise refused(config, f"{source} holds {name} in another order than its class computes with")
            own = (*rows.shape[:-1], shape[-1]) if len(shape) > 1 else tuple(rows.shape)
            found[name].append(Source(source, own, None if own == shape else (first, count)))
    return found


def layers_of(config: Mapping[str, Any], model: Any) -> tuple[str, Module]:
    """(name, list) of the decoder layers: the one list of modules as long as the model is deep."""
    depth = model.config.num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth
    ]
    lists = [(name, module) for name, module in lists if not any(name.startswith(f"{outer}.") for outer, _ in lists)]
    if len(lists) != 1:
        raise refused(
            config,
            f"its {depth} layers are not one list of modules (found: {', '.join(name for name, _ in lists) or 'none'})",
        )
    return lists[0]


class _PartsLinear(Linear):
    """A linear map whose weight `Parts` holds. `weight` only tells dtype and device: arithmetic with it fails."""

    xllm_linear: Callable[[torch.Tensor], torch.Tensor]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: [..., in]. Returns [..., out]."""
        flat = input.reshape(-1, input.shape[-1])
        return self.xllm_linear(flat).view(*input.shape[:-1], -1)


class _PartsEmbedding(Embedding):
    """A table that `Parts` holds; subclasses of transformers that scale it find it through `super().forward`."""

    xllm_embedding: Callable[[torch.Tensor], torch.Tensor]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: [...] int64. Returns [..., size]."""
        return self.xllm_embedding(input.reshape(-1)).view(*input.shape, -1)


class Installer:
    """Puts `Parts` in the place of a built class's weights: maps and tables by their own calls, everything else as parameters.

    flat: parameters of more than two dimensions that are filled by rows, so that their first dimensions are asked for as one.
    """

    def __init__(self, config: Mapping[str, Any], model: Any, layers: str, flat: AbstractSet[str]) -> None:
        self._config, self._model, self._layers, self._flat = config, model, f"{layers}.", flat
        self._input, self._output = model.get_input_embeddings(), model.get_output_embeddings()
        if not isinstance(self._input, Embedding) or type(self._output) is not Linear:
            raise refused(config, "its embedding is no table, or its head no linear map")
        self._names = {module: name for name, module in model.named_modules()}
        tied = getattr(model, "all_tied_weights_keys", {}).get(f"{self.head}.weight")
        self.is_tied = self._output.weight is self._input.weight or tied == f"{self._names[self._input]}.weight"
        self.axes = self._read_plan()

    @property
    def divides(self) -> bool:
        """True if transformers' own plan divides the layers over ranks in the ways that `Parts` knows."""
        return bool(self.axes)

    @property
    def head(self) -> str:
        """The name of the head."""
        name: str = self._names[self._output]
        return name

    def install(self, parts: Parts, parts_of_layers: Parts) -> None:
        """Exchange every parameter. parts_of_layers: for what lies in the layers. Raises ModelFormatError for weights shared in other ways."""
        seen: dict[int, str] = {}
        for module, name in self._names.items():
            for own, tensor in list(module._parameters.items()):
                if tensor is None or (module is self._output and own == "weight" and self.is_tied):
                    continue
                if id(tensor) in seen:
                    raise refused(
                        self._config,
                        f"{name}.{own} is the same weight as {seen[id(tensor)]}; only the head may share one",
                    )
                seen[id(tensor)] = f"{name}.{own}"
        for module, name in self._names.items():
            self._exchange(module, name, parts_of_layers if name.startswith(self._layers) else parts)

    def _exchange(self, module: Module, name: str, parts: Parts) -> None:
        if module is self._output:
            _route(module, _PartsLinear, "xllm_linear", self._head(name, parts), parts)
        elif isinstance(module, Linear):
            axis = self.axes.get(name, "replicated")
            bound: Any = parts.linear(
                name, module.in_features, module.out_features, axis=axis, has_bias=module.bias is not None
            )
            _route(module, _PartsLinear, "xllm_linear", bound, parts)
        elif isinstance(module, Embedding):
            bound = parts.embedding(name, module.num_embeddings, module.embedding_dim)
            _route(module, _PartsEmbedding, "xllm_embedding", bound, parts)
        else:
            prefix = f"{name}." if name else ""
            for own, tensor in list(module._parameters.items()):
                if tensor is not None:
                    shape = tuple(tensor.shape)
                    asked = (torch.Size(shape[:-1]).numel(), shape[-1]) if f"{prefix}{own}" in self._flat else shape
                    setattr(
                        module,
                        own,
                        Parameter(parts.parameter(f"{prefix}{own}", asked).view(shape), requires_grad=False),
                    )
            for own, buffer in list(module._buffers.items()):
                if buffer is not None and own not in module._non_persistent_buffers_set:
                    if not buffer.is_floating_point():
                        raise refused(
                            self._config, f"{prefix}{own} is a saved table of {buffer.dtype}, which is not served"
                        )
                    setattr(module, own, parts.parameter(f"{prefix}{own}", tuple(buffer.shape)))

    def _head(self, name: str, parts: Parts) -> Callable[[torch.Tensor], torch.Tensor]:
        """The output projection. `Parts` has none with a bias: it is added here where the table is shared, else the head is a plain map."""
        head, table = self._output, self._names[self._input] if self.is_tied else None
        if head.bias is None or self.is_tied:
            project = parts.lm_head(name, head.in_features, head.out_features, tied_to=table)
            if head.bias is None:
                return project
            bias = parts.parameter(f"{name}.bias", (head.out_features,))
            return lambda x: project(x) + bias
        return parts.linear(name, head.in_features, head.out_features, axis="replicated", has_bias=True)

    def _read_plan(self) -> dict[str, Axis]:
        """The axis of each map in the layers, empty where the plan is not made of plain columns and rows: then every rank would hold all."""
        plan = getattr(self._model, "_tp_plan", None) or {}
        axes: dict[str, Axis] = {}
        for module, name in self._names.items():
            if isinstance(module, Linear) and name.startswith(self._layers):
                axis = next((_AXES.get(style) for pattern, style in plan.items() if _matches(pattern, name)), None)
                if axis is None:
                    return {}
                axes[name] = axis
        return axes


def fill_buffers(config: Mapping[str, Any], model: Any, device: str, modules: Sequence[Module]) -> None:
    """Compute what is not saved (rotary frequencies, scales) on `device`, by the class's own initialisation; what that leaves out is refused."""
    for module in modules:
        own: dict[str, torch.Tensor] = {}
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers.get(name)) is not None:
                own[name] = module._buffers[name] = torch.empty_like(buffer, device=device)
                if buffer.is_floating_point():
                    own[name].fill_(float("nan"))
        if own:
            with torch.no_grad():
                model._init_weights(module)
        for name, buffer in own.items():
            if buffer.is_floating_point() and buffer.isnan().any():
                raise refused(config, f"{type(module).__name__} does not compute its table {name!r} anew")


def own_modules(model: Any, layers: str, *, in_layers: bool) -> Iterator[Module]:
    """The modules inside, or outside, of the layers."""
    for name, module in model.named_modules():
        if name.startswith(f"{layers}.") is in_layers:
            yield module


def _route(module: Any, base: type[Module], attribute: str, bound: Callable[..., Any], parts: Parts) -> None:
    """Let a module compute through `bound`. Subclasses keep their own forward, and reach ours through `super()`."""
    kind = type(module)
    for own in list(module._parameters):
        del module._parameters[own]
    plain = kind.__mro__[1] is Module
    module.__class__ = base if plain else type(kind.__name__, (kind, base), {})
    object.__setattr__(module, attribute, bound)
    object.__setattr__(module, "weight", torch.empty(0, dtype=parts.dtype, device=parts.torch_device))
    object.__setattr__(module, "bias", None)


def _matches(pattern: str, name: str) -> bool:
    ours, theirs = name.split("."), pattern.split(".")
    return len(ours) == len(theirs) and all(b in ("*", a) for a, b in zip(ours, theirs, strict=True))
