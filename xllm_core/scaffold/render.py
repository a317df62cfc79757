"""Fills templates in: one kind and one name to the files of a distribution. Plain text and `string.Template`; nothing is executed.

A kind is a folder of `templates/`; `common/` is shared, and a file of the kind stands in for one of the same path there. What `common/`
asks a kind for (`$about`, `$choose`, ...) are the sections of the kind's `sections.md.tmpl`.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from string import Template

from xllm_core import __version__
from xllm_core.errors import ConfigError
from xllm_core.plugins.records import CORE
from xllm_core.plugins.specs import API_VERSION

KINDS: Mapping[str, str] = {
    "model": "a model family: what config.json and weights of an architecture mean",
    "device": "a device backend: where tensors live, how much memory there is, what it promises",
    "kernel": "an attention kernel over paged KV",
    "kv-store": "a place for KV blocks outside the device: here a directory on disk",
    "scheduler": "a policy: who is admitted first, how prompts are cut, who gives way",
    "sampler": "token choice: from logits and parameters to one token per row",
    "logits-processor": "something that changes logits before a token is chosen",
}
"""Kinds of scaffolds, with the line that help shows."""

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")  # PEP 508
_MAX_ID_CHARS = 40
_HIDDEN = {"ci.yml": ".github/workflows/test.yml", "gitignore": ".gitignore"}
_SECTIONS = "sections.md"


@dataclass(frozen=True, slots=True)
class Names:
    """What one NAME becomes. id: of the plugin, its entry point and its table. package: what is imported. distribution: what is installed."""

    id: str
    package: str
    distribution: str


def names_of(name: str, taken: frozenset[str] = frozenset()) -> Names:
    """ "My.Plugin", "my-plugin" and "xllm-my-plugin" are all the plugin `my-plugin`. taken: ids that commands of the core hide.

    Raises ConfigError with what is allowed.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name of a distribution: use letters, digits, '-', '_' and '.', with a letter or digit at both ends"
        )
    plugin_id = re.sub(r"[-_.]+", "-", name).lower().removeprefix("xllm-")
    if not plugin_id[:1].isalpha():
        raise ConfigError(f"{name!r} gives the plugin id {plugin_id!r}: an id starts with a letter")
    if len(plugin_id) > _MAX_ID_CHARS:
        raise ConfigError(f"{name!r} gives a plugin id of {len(plugin_id)} characters; {_MAX_ID_CHARS} are possible")
    if plugin_id == CORE or plugin_id in taken:
        whose = "the id of the core's own parts" if plugin_id == CORE else f"a command of the core, `xllm {plugin_id}`"
        raise ConfigError(f"{name!r} gives the plugin id {plugin_id!r}, which is {whose}; choose another name")
    package = f"xllm_{plugin_id.replace('-', '_')}"
    if not package.isidentifier() or keyword.iskeyword(package):
        raise ConfigError(f"{name!r} gives the package {package!r}, which Python cannot import; choose another name")
    return Names(plugin_id, package, f"xllm-{plugin_id}")


def render(kind: str, names: Names, *, description: str = "", author: str = "") -> dict[str, str]:
    """Path in the project -> contents, in the order of paths. kind: a key of `KINDS`."""
    if kind not in KINDS:
        raise ConfigError(f"there is no kind {kind!r}; kinds are {', '.join(KINDS)}")
    description = (
        " ".join(description.split()) or f"{KINDS[kind][0].upper()}{KINDS[kind][1:].partition(':')[0]} for xLLM"
    )
    author = " ".join(author.split())
    values = {
        "id": names.id,
        "package": names.package,
        "distribution": names.distribution,
        "description": description,
        "description_toml": _toml_string(description),
        "authors_toml": f"authors = [{{ name = {_toml_string(author)} }}]\n" if author else "",
        "holder": author or f"the authors of {names.distribution}",
        "core_version": __version__,
        "api_version": API_VERSION,
        "kind": kind,
    }
    templates = dict(_templates("common")) | dict(_templates(kind))
    values |= _sections(templates.pop(_SECTIONS), values)
    found = {}
    for path, text in templates.items():
        target = _HIDDEN.get(path, path.replace("src/package/", f"src/{names.package}/"))
        found[target] = _in_order(target, Template(text).substitute(values))
    return dict(sorted(found.items()))


def write(contents: Mapping[str, str], folder: Path) -> None:
    """Write a rendered project. Raises ConfigError, and writes nothing, if there is something in the folder, or a file in its place."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            what = "is not empty" if folder.is_dir() else "is a file"
            raise ConfigError(f"{folder} {what}, and nothing there is overwritten; give another folder with --path")
        for path, text in contents.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error}; give another folder with --path") from error


def _templates(kind: str) -> Iterator[tuple[str, str]]:
    """(path without .tmpl, text) of a folder of templates."""
    yield from _walk(files(__package__) / "templates" / kind, PurePosixPath())


def _walk(folder: Traversable, path: PurePosixPath) -> Iterator[tuple[str, str]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry, path / entry.name)
        elif entry.name.endswith(".tmpl"):
            yield str(path / entry.name.removesuffix(".tmpl")), entry.read_text(encoding="utf-8")


def _sections(text: str, values: Mapping[str, str]) -> dict[str, str]:
    """`== name` begins a section, whose text is what `$name` stands for."""
    parts = re.split(r"^== (\w+)\n", text, flags=re.MULTILINE)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return {name: Template(body.strip("\n")).substitute(values) for name, body in pairs}


def _in_order(path: str, text: str) -> str:
    """Runs of one-line imports of `xllm_*` in the order of their names, which depends on the name of the package."""
    if not path.endswith(".py"):
        return text
    run = re.compile(r"(?:^from xllm_\S+ import [^\n(]+\n)+", re.MULTILINE)
    return run.sub(lambda found: "".join(sorted(found[0].splitlines(keepends=True), key=_module)), text)


def _module(line: str) -> str:
    return line.split()[1]


def _toml_string(text: str) -> str:
    """A TOML basic string: JSON's escapes are among TOML's."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
