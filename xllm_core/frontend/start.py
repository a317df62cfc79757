"""Starting an engine for this process: settings, plugins, plan, weights, tokenizer."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from xllm_core.config import Settings
from xllm_core.engine.build import build_engine
from xllm_core.engine.info import engine_info
from xllm_core.frontend.client import InProcessClient
from xllm_core.frontend.processor import Processor
from xllm_core.frontend.template import ChatTemplate
from xllm_core.frontend.tokenizer import Tokenizer
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.resolve import assemble

if TYPE_CHECKING:
    from xllm_core.plugins.contracts.weights import TokenizerFiles

_log = logging.getLogger("xllm.start")
_SHOW_ABOVE_BYTES = 1 << 30  # loading less is over before a bar is read


def start_in_process(
    model: str, *, config: str | None = None, settings: Settings | None = None, **flat: Any
) -> Processor:
    """Start an engine in this process. flat: settings by their flat names; raises ConfigError, PluginError, ModelError."""
    if settings is None:
        settings = Settings.from_flags(config_path=config, path=model, **flat)
    assembly = assemble(settings, PluginManager.discover(settings).load())
    files = assembly.checkpoint.tokenizer()
    for warning in files.extra.get("warnings", ()):
        _log.warning("%s", warning)
    with ThreadPoolExecutor(1, thread_name_prefix="xllm-tokenizer") as pool:
        opening = pool.submit(_open_tokenizer, files)  # a first conversion takes seconds, as loading weights does
        built = build_engine(assembly, settings, progress=_progress())
        tokenizer = opening.result()
    template = None
    if files.chat_template is not None and tokenizer is not None:
        special = {"bos_token": files.bos_token or "", "eos_token": files.eos_token or ""}
        template = ChatTemplate(files.chat_template, special)
    client = InProcessClient(built.engine, engine_info(assembly, built))
    return Processor(client, tokenizer, template, assembly.checkpoint.generation_config)


def _open_tokenizer(files: TokenizerFiles) -> Tokenizer | None:
    has_one = files.tokenizer_json is not None or files.convert is not None
    return Tokenizer(files) if has_one else None


def _progress() -> Any:
    """A bar for weights of a size that makes people wait."""
    bars: list[tqdm[Any]] = []

    def update(name: str, done: int, total: int) -> None:
        if total < _SHOW_ABOVE_BYTES:
            return
        if not bars:
            bars.append(
                tqdm(total=total, desc="loading weights", unit="B", unit_scale=True, disable=None, dynamic_ncols=True)
            )
        bars[0].update(done - bars[0].n)
        if done >= total:
            bars[0].close()

    return update
