"""What is made from the code and kept in the tree: docs/hooks.md, and the snapshot of the public surface.

python -m tests.meta.pages        writes both; a change of them belongs in the commit that made it necessary
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Iterable
from typing import Any

from tests.meta.source import ROOT
from xllm_core import plugins
from xllm_core.plugins import hookspecs

_HEADINGS = {"Args": "`ctx`", "Returns": "Returns", "Errors": "Errors"}
HOOKS_PAGE = ROOT / "docs" / "hooks.md"
SURFACE = ROOT / "tests" / "meta" / "surface.json"


def hooks_page() -> str:
    """Every hook with its documentation, and every spec with its fields. Made from `xllm_core/plugins/hookspecs.py` and `specs.py`."""
    head = inspect.cleandoc(hookspecs.__doc__ or "")
    blocks = [
        "# Hooks",
        "Made from `xllm_core/plugins/hookspecs.py` by `python -m tests.meta.pages`; do not edit.",
        head,
    ]
    for name in sorted(hookspecs.HOOKS):
        kind = hookspecs.HOOKS[name]
        text = inspect.cleandoc(getattr(hookspecs, name).__doc__ or "")
        prose, _, example = text.partition("Example::")
        prose = "\n\n".join(_one_line(part) for part in re.split(r"\n(?=\n|[A-Z]\w+:)", prose) if part.strip())
        code = f"```python\n{inspect.cleandoc(example)}\n```"
        blocks += [f"## {name}", prose, code, f"`{kind.__name__}`: {_first_paragraph(kind)}", _fields_table(kind)]
    return "\n\n".join(blocks) + "\n"


def _one_line(text: str) -> str:
    """A paragraph of a docstring, with its heading in bold."""
    line = " ".join(text.split())
    return re.sub(r"^(Args|Returns|Errors): (ctx: )?", lambda found: f"**{_HEADINGS[found[1]]}** ", line)


def surface() -> dict[str, Any]:
    """Each public name, and each hook, with what can break whoever uses it: fields with types and defaults, attributes, signatures, values."""
    names = {name: _described(getattr(plugins, name)) for name in sorted(plugins.__all__)}
    return names | {name: str(inspect.signature(getattr(hookspecs, name))) for name in sorted(hookspecs.HOOKS)}


def _described(value: Any) -> Any:
    if typing.get_origin(value) is typing.Literal:
        return f"Literal{sorted(typing.get_args(value))}"
    if inspect.isfunction(value):
        return str(inspect.signature(value))
    if not inspect.isclass(value):
        return repr(value) if isinstance(value, str | tuple | frozenset | dict) else str(type(value).__name__)
    found: dict[str, Any] = {"bases": [base.__name__ for base in value.__bases__ if base is not object]}
    if dataclasses.is_dataclass(value):
        is_keyword_only = all(entry.kw_only for entry in dataclasses.fields(value))
        is_frozen = value.__dataclass_params__.frozen
        found["is"] = [word for word, is_so in (("frozen", is_frozen), ("kw_only", is_keyword_only)) if is_so]
        found["fields"] = {
            entry.name: f"{entry.type}" + ("" if (default := _default(entry)) is None else f" = {default}")
            for entry in dataclasses.fields(value)
        }
    elif annotations := inspect.get_annotations(value):
        found["attributes"] = {name: str(kind) for name, kind in annotations.items() if not name.startswith("_")}
    methods = {name: _signature(member) for name, member in vars(value).items() if _is_public_method(name, member)}
    found["methods"] = methods
    return {key: content for key, content in found.items() if content}


def _is_public_method(name: str, member: Any) -> bool:
    return (name == "__call__" or not name.startswith("_")) and (
        inspect.isfunction(member) or isinstance(member, property)
    )


def _signature(member: Any) -> str:
    if isinstance(member, property):
        return f"property {inspect.signature(member.fget) if member.fget else ''}"
    return str(inspect.signature(member))


def _default(entry: dataclasses.Field[Any]) -> str | None:
    if entry.default is not dataclasses.MISSING:
        return repr(sorted(entry.default)) if isinstance(entry.default, frozenset) else repr(entry.default)
    return "(made)" if entry.default_factory is not dataclasses.MISSING else None


def _first_paragraph(kind: type) -> str:
    return " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split())


def _fields_table(kind: type) -> str:
    rows = ["| field | type | default |", "|---|---|---|"]
    rows += [f"| `{e.name}` | `{e.type}` | {_shown(_default(e))} |" for e in _own_first(kind)]
    return "\n".join(row.replace(" | None", " \\| None") for row in rows)


def _own_first(kind: type) -> Iterable[dataclasses.Field[Any]]:
    """The spec's own fields, then those that all have."""
    common = {entry.name for entry in dataclasses.fields(plugins.Spec)}
    return sorted(dataclasses.fields(kind), key=lambda entry: entry.name in common)


def _shown(default: str | None) -> str:
    return "must be given" if default is None else f"`{default}`"


def main() -> None:
    """Write both."""
    HOOKS_PAGE.write_text(hooks_page(), encoding="utf-8")
    SURFACE.write_text(json.dumps(surface(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
