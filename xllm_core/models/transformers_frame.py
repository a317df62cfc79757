"""transformers' own forward, cut at its layers: what stands before the first, each layer, and what follows the last.

The loop over layers is transformers' code and differs between classes (masks and rotary tables per kind of layer, scales). So it is run as
it stands, with stand-ins in the places of the layers that note what each layer is called with. The layers themselves then run one by one,
when the runner asks for them, with just those arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import Module


class Call(NamedTuple):
    """What a layer is given beside the hidden states. keyword: hidden states are given by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: bool


class _StandIn(Module):
    """In the place of one layer. What a loop asks of the layer (its kind) the layer answers."""

    def __init__(self, layer: Module, hand_over: Callable[..., Any]) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # not a submodule: the class must not see the layer
        self._hand_over = hand_over

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note the call, and go on as if the layer had run."""
        return self._hand_over(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "layer"), name)


class Frame:
    """A built class without its layers. One per model; a model is run by one thread at a time, as every model is.

    is_tuple: what this class's layers return is a tuple. on_return: set by the inspection, which lets stand-ins return other tensors.
    """

    layers: Sequence[Module]

    def __init__(self, model: Any, layers: Any, *, is_tuple: bool) -> None:
        self._model, self._body, self.is_tuple = model, model.base_model, is_tuple
        self.layers = list(layers)
        for index, layer in enumerate(self.layers):
            layers[index] = _StandIn(layer, lambda args, kwargs, index=index: self._hand_over(index, args, kwargs))
        self.calls: list[Call] = []
        self._first: torch.Tensor | None = None
        self._last: torch.Tensor | None = None
        self.on_return: Callable[[int, torch.Tensor], torch.Tensor] = lambda index, hidden: hidden

    def enter(self, h: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """h: [T, hidden], positions: [T]. Returns what the first layer is given, [T, hidden], and every layer's call.

        The norm after the layers runs in vain: leaving the loop by an exception would leave its class in the middle of something.
        """
        return self.run(inputs_embeds=h.unsqueeze(0), position_ids=positions.unsqueeze(0))

    def run(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """`enter` for inputs as the class takes them."""
        self.calls, self._last = [], None
        self._body(**inputs, use_cache=False)
        first, calls = self._first, self.calls
        self._first, self.calls = None, []
        assert first is not None
        return first[0], calls

    def leave(self, h: torch.Tensor) -> torch.Tensor:
        """h: [N, hidden] after the last layer. Returns logits [N, vocab]; what stands before the layers runs in vain, at position 0."""
        self._last = h.unsqueeze(0)
        positions = torch.zeros(1, len(h), dtype=torch.int64, device=h.device)
        logits: torch.Tensor = self._model(inputs_embeds=self._last, position_ids=positions, use_cache=False).logits
        self._last, self._first, self.calls = None, None, []
        return logits[0]

    def call(self, index: int, h: torch.Tensor, call: Call) -> torch.Tensor:
        """Run a layer. h: [T, hidden]; returns the same shape."""
        out = self.raw(index, h, call)
        hidden: torch.Tensor = (out[0] if isinstance(out, tuple) else out).squeeze(0)
        return hidden

    def raw(self, index: int, h: torch.Tensor, call: Call) -> Any:
        """Run a layer; returns what it returns."""
        layer, h = self.layers[index], h.unsqueeze(0)
        if call.keyword:
            return layer(*call.args, hidden_states=h, **call.kwargs)
        return layer(h, *call.args, **call.kwargs)

    def _hand_over(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        keyword = not args
        hidden = kwargs.pop("hidden_states") if keyword else args[0]
        self.calls.append(Call(args[1:], kwargs, keyword))
        if index == 0:
            self._first = hidden
        hidden = self.on_return(index, hidden)
        if index == len(self.layers) - 1 and self._last is not None:
            hidden = self._last
        return (hidden,) if self.is_tuple else hidden
