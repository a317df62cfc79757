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
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(huggingface_hub.snapshot_download(reference, allow_patterns=_PATTERNS, local_files_only=True))
            if _is_usable(folder):
                return str(folder)
        except LocalEntryNotFoundError:
            pass  # not here yet
        except HFValidationError as error:
            raise ModelNotFoundError(f"{reference}: not a hub id ({error})") from error
        folder = _download(reference)
        if not _is_usable(folder):
            raise ModelNotFoundError(
                f"{reference}: the hub holds no config.json with .safetensors under this name. {_advice(reference)}"
            )
        return str(folder)

    def open(self, path: Path) -> None:
        """Never: a snapshot is a directory, which its own format opens."""
        return


def _download(reference: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(reference, allow_patterns=_PATTERNS))
    except (
        LocalEntryNotFoundError
    ) as error:  # offline mode, no route, no name, refused: the library found nothing to fall back on
        problem = f"not in the local cache, and the hub cannot be reached ({_first_line(error)})"
        raise ModelNotFoundError(f"{reference}: {problem}. {_advice(reference)}") from error
    except HfHubHTTPError as error:
        raise ModelNotFoundError(
            f"{reference}: the hub refuses ({_first_line(error)}). {_advice(reference)}"
        ) from error
    except OSError as error:  # a broken connection, a full disk
        raise ModelNotFoundError(
            f"{reference}: the download failed ({_first_line(error)}). {_advice(reference)}"
        ) from error


def _is_usable(folder: Path) -> bool:
    """A cached snapshot may hold only what others asked for (a tokenizer); weights must be there."""
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors"))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _advice(reference: str) -> str:
    name = reference.rpartition("/")[2]
    return (
        "Check the name, your network and, for gated models, HF_TOKEN; or name a model that is here already: a Hugging Face directory"
        f" (./{name}), a file (./{name}.gguf), or weights shipped in an installed package (pkg:NAME)"
    )
