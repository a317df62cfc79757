"""JSON files of a model directory: read whole, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xllm_core.errors import ModelFormatError

_MAX_BYTES = 64 * 2**20


def read_object(path: Path, *, is_optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file; {} for an absent optional one. Raises ModelFormatError for whatever else is there."""
    try:
        if is_optional and not path.exists():
            return {}
        if path.stat().st_size > _MAX_BYTES:
            raise ModelFormatError(
                f"{path}: has {path.stat().st_size} bytes, more than the {_MAX_BYTES} that such a file may have"
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFormatError(
            f"{path}: cannot be read ({error.strerror}); check that the download is complete"
        ) from error
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise ModelFormatError(f"{path}: is not JSON ({error}); download the file again") from error
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path}: holds a {type(value).__name__}, an object is needed; download the file again")
    return value
