"""Reading config.json: every field checked, every variant we do not know refused by name. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xllm_core.errors import ModelFormatError

# Where a configuration was read from, put there by the weight formats, so that errors can name the file.
SOURCE_KEY = "_source"


class Fields:
    """Typed access to a configuration; each miss is a ModelFormatError that names file, field and value."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.source = str(config.get(SOURCE_KEY, "config.json"))

    def error(self, name: str, problem: str) -> ModelFormatError:
        """The error to raise for a field."""
        return ModelFormatError(f"{self.source}: {name!r} {problem}")

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int = 2**40) -> int:
        """A whole number; absent or null gives `default`, or is refused where there is none."""
        value = self._config.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(
                name, f"is {shown(value)}, a whole number is needed; take the file that came with the weights"
            )
        if not minimum <= value <= maximum:
            raise self.error(
                name, f"is {value}, from {minimum} to {maximum} is possible; take the file that came with the weights"
            )
        return value

    def number(self, name: str, default: float) -> float:
        """A positive finite number."""
        return _positive(self._config.get(name, default), lambda problem: self.error(name, problem))

    def flag(self, name: str, default: bool) -> bool:
        """True or false; absent or null gives `default`."""
        value = self._config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"is {shown(value)}, true or false is needed")
        return value

    def only(self, name: str, allowed: Sequence[Any]) -> None:
        """Refuse a variant: the field must be absent or one of `allowed`."""
        value = self._config.get(name)
        if value is not None and value not in allowed:
            raise self.error(name, f"is {shown(value)}; served is {' or '.join(map(repr, allowed))}")

    def __contains__(self, name: str) -> bool:
        return name in self._config

    def num_layers(self) -> int:
        """Bounded, because a weight map of that length is made before it is compared with the checkpoint."""
        return self.integer("num_hidden_layers", maximum=10_000)

    def get(self, name: str) -> Any:
        """The raw value, None if absent."""
        return self._config.get(name)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: what `models.rope.inverse_frequencies` is computed from. `parameters`: the kind's own numbers, checked.

    kind: "default", "linear", "dynamic", "llama3", "yarn" as transformers defines them, or "factors": the default
    frequencies divided by one explicit number each, as GGUF files carry them. max_positions: of the model's context; 0 for unknown.
    """

    kind: str
    theta: float
    size: int
    parameters: Mapping[str, Any]
    max_positions: int = 0


def read_dtype(fields: Fields) -> str:
    """What the weights were saved in; float16 checkpoints are served in another dtype, which the engine chooses."""
    value = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    if value not in ("float32", "float16", "bfloat16"):
        raise fields.error("dtype", f"is {shown(value)}; known are float32, float16 and bfloat16")
    return str(value)


_ROPE_NUMBERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "factors": (),
}
_YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def read_rope(fields: Fields, head_size: int, max_model_len: int, *, rotated_share: float | None = None) -> RopeConfig:
    """Both spellings: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling` (before).

    rotated_share: for a family that rotates a part of each head, the part where `partial_rotary_factor` is missing; None: it rotates all, or refuses.
    """
    name = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    given = fields.get(name) or {}
    if not isinstance(given, Mapping):
        raise fields.error(name, f"is {shown(given)}, an object is needed")
    if any(isinstance(value, Mapping) for value in given.values()):
        raise fields.error(name, "differs between layers, which these families cannot serve")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _ROPE_NUMBERS:
        raise fields.error(name, f"is of type {shown(kind)}; served are {', '.join(_ROPE_NUMBERS)}")
    size = _rotated(fields, given, head_size, rotated_share)
    values = dict(given)
    if kind in ("llama3", "yarn"):
        outside = fields.get("original_max_position_embeddings")
        values.setdefault("original_max_position_embeddings", max_model_len)
        values["original_max_position_embeddings"] = outside or values["original_max_position_embeddings"]
    if kind == "yarn" and values.get("factor") is None:
        original = _positive(values["original_max_position_embeddings"], lambda problem: fields.error(name, problem))
        values["factor"] = max_model_len / original
    wanted = [*_ROPE_NUMBERS[kind]]
    if kind == "yarn":
        wanted += [option for option in _YARN_OPTIONS if values.get(option) is not None]
    parameters: dict[str, Any] = {
        number: _positive(values.get(number), lambda problem, number=number: fields.error(f"{name}.{number}", problem))
        for number in wanted
    }
    if kind == "yarn":
        parameters["truncate"] = bool(values.get("truncate", True))
    if kind == "factors":
        parameters["factors"] = _read_factors(fields, values.get("factors"), size // 2)
    if (theta := values.get("rope_theta")) is None:
        theta = fields.get("rope_theta")
    theta = _positive(10000.0 if theta is None else theta, lambda problem: fields.error("rope_theta", problem))
    return RopeConfig(kind=kind, theta=theta, size=size, parameters=parameters, max_positions=max_model_len)


def _rotated(fields: Fields, given: Mapping[str, Any], head_size: int, rotated_share: float | None) -> int:
    """Elements of each head that are rotated."""
    share = given.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if rotated_share is None:
        if share not in (None, 1, 1.0):
            raise fields.error(
                "partial_rotary_factor", "rotates a part of each head, which these families cannot serve"
            )
        return head_size
    share = _positive(
        rotated_share if share is None else share, lambda problem: fields.error("partial_rotary_factor", problem)
    )
    size = int(head_size * share)
    if share > 1 or size < 2 or size % 2:
        raise fields.error(
            "partial_rotary_factor",
            f"is {share}: of {head_size} elements a head {size} would turn, an even number up to all of them is needed",
        )
    return size


def _read_factors(fields: Fields, value: Any, count: int) -> tuple[float, ...]:
    if not isinstance(value, Sequence) or len(value) != count:
        raise fields.error("rope factors", f"must be {count} numbers, one per rotated pair")
    return tuple(_positive(factor, lambda problem: fields.error("rope factors", problem)) for factor in value)


def _positive(value: Any, error: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise error(f"is {shown(value)}, a positive number is needed; take the file that came with the weights")
    return float(value)


def shown(value: Any) -> str:
    """A value in an error, at a bearable length."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
