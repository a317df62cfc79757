"""One answer, written to the terminal as it comes, and the line of figures after it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from xllm_core.frontend.processor import Processor
from xllm_core.types import RequestOutput, SamplingParams

_SHOWN = ("attention.", "linear", "sampler")


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished request. ttft_s: from submitting to the first token; decode_tokens_per_s: None for a single token."""

    output: RequestOutput
    ttft_s: float
    decode_tokens_per_s: float | None


def stream_answer(processor: Processor, prompt: str | Sequence[int], params: SamplingParams) -> Answer:
    """Run one prompt with n = 1 and write its text to stdout as it becomes certain. An interrupt frees the request and is raised."""
    shown = 0
    output: RequestOutput | None = None
    try:
        processor.submit(prompt, params)
        while output is None or not output.finished:
            for output in processor.step():
                text = output.outputs[0].text
                sys.stdout.write(text[shown:])
                sys.stdout.flush()
                shown = len(text)
    except BaseException:
        processor.abort_all()
        raise
    sys.stdout.write("\n")
    metrics = output.metrics
    assert metrics is not None and metrics.finished_s is not None
    first_s = metrics.first_token_s if metrics.first_token_s is not None else metrics.finished_s
    more = len(output.outputs[0].token_ids) - 1
    speed = more / (metrics.finished_s - first_s) if more > 0 else None
    return Answer(output, first_s - metrics.arrival_s, speed)


def summary(processor: Processor, answer: Answer) -> str:
    """prompt tokens, new tokens, time to first token, tokens per second, device, kernels: one line."""
    info, output = processor.client.info(), answer.output
    speed = f"{answer.decode_tokens_per_s:.1f} tok/s" if answer.decode_tokens_per_s is not None else "- tok/s"
    kernels = ", ".join(f"{use}={name}" for use, name in info.kernels.items() if use.startswith(_SHOWN))
    return (
        f"[{len(output.prompt_token_ids)} prompt tokens ({output.num_cached_tokens} cached), {len(output.outputs[0].token_ids)} new, "
        f"first after {answer.ttft_s * 1e3:.0f} ms, then {speed} | {info.device}, {info.dtype} | {kernels}]"
    )
