"""`OWNER/NAME` on the Hugging Face hub: from the local cache if it is there, else downloaded once."""

from __future__ import annotations

import re
from pathlib import Path

from xllm_core.errors import ModelNotFoundError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# All that we read; weights in other formats would only cost time.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]


class Hub:
    """`contracts.weights.WeightFormat` that only resolves; what it brings is a Hugging Face directory."""

    def resolve(self, reference: str) -> str | None:
        """The local folder of a snapshot. A progress bar shows while it downloads."""
        if not _HUB_ID.fullmatch(reference):
            return None
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return _usable(huggingface_hub.snapshot_download(reference, allow_patterns=_PATTERNS, local_files_only=True))
        except (LocalEntryNotFoundError, FileNotFoundError):
            pass  # not here yet, or only in part
        except HFValidationError as error:
            raise ModelNotFoundError(f"{reference}: not a hub id ({error})") from error
        try:
            return _usable(huggingface_hub.snapshot_download(reference, allow_patterns=_PATTERNS))
        except HfHubHTTPError as error:
            status = error.response.status_code
            raise ModelNotFoundError(f"{reference}: the hub answers {status} ({_first_line(error)}). {_advice(reference)}") from error
        except (LocalEntryNotFoundError, OSError) as error:  # offline mode, no route, no name, refused, out of disk
            raise ModelNotFoundError(
                f"{reference}: not in the local cache, and the hub cannot be reached ({_first_line(error)}). {_advice(reference)}"
            ) from error

    def open(self, path: Path) -> None:
        """Never: a snapshot is a directory, which its own format opens."""
        return


def _usable(folder: str) -> str:
    """A cached snapshot may hold only what others asked for (a tokenizer); weights must be there."""
    if not (any(Path(folder).glob("*.safetensors")) and (Path(folder) / "config.json").exists()):
        raise FileNotFoundError(f"{folder} holds no config.json with .safetensors")
    return folder


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _advice(reference: str) -> str:
    name = reference.rpartition("/")[2]
    return (
        "Check the name, your network and, for gated models, HF_TOKEN; or name a model that is here already: a Hugging Face directory"
        f" (./{name}), a file (./{name}.gguf), or weights shipped in an installed package (pkg:NAME)"
    )
