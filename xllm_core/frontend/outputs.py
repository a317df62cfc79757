"""From tokens to what users get: text, stop strings, logprobs by token, and one `RequestOutput` per request."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xllm_core.frontend.detokenizer import Detokenizer
from xllm_core.frontend.stops import Stopped, StopStrings
from xllm_core.frontend.tokenizer import Tokenizer
from xllm_core.frontend.validation import stop_strings
from xllm_core.types import (
    CompletionOutput,
    EngineRequest,
    FinishReason,
    Logprob,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
    TokenOutput,
)

Abort = Callable[[str, int], object]


@dataclass(slots=True)
class _SequenceText:
    """Text side of one sequence."""

    output: CompletionOutput
    detokenizer: Detokenizer | None
    stops: StopStrings
    num_stop_free: int  # tokens before which stop strings do not count (min_tokens)


class RequestState:
    """One request on the front side. Owns the `RequestOutput` it fills; one thread feeds it.

    A request with emitted tokens starts with their text already said: it counts in `text`, as those tokens count in `token_ids`, and
    a stop string may begin in it. One that ends in it has finished its sequence before anything is fed; the engine is not told here.
    """

    def __init__(self, request: EngineRequest, prompt: str | None, tokenizer: Tokenizer | None) -> None:
        params = request.params
        self._tokenizer = tokenizer
        self._request_id = request.request_id
        self._num_left = params.n
        self.output = RequestOutput(
            request_id=request.request_id, prompt=prompt, prompt_token_ids=list(request.prompt_token_ids),
            outputs=[CompletionOutput(i) for i in range(params.n)], metrics=RequestMetrics(request.arrival_s),
            prompt_logprobs=[None] if params.prompt_logprobs is not None else None,
        )  # fmt: skip
        skip = params.skip_special_tokens

        def decode(ids: Sequence[int]) -> str:
            assert tokenizer is not None
            return tokenizer.decode(ids, skip_special_tokens=skip)

        self._texts = [
            _SequenceText(
                output,
                Detokenizer(decode) if tokenizer is not None else None,
                StopStrings(stop_strings(params), is_included=params.include_stop_str_in_output),
                params.min_tokens,
            )
            for output in self.output.outputs
        ]
        for output in self.output.outputs:
            output.logprobs = [] if params.logprobs is not None else None
            output.cumulative_logprob = 0.0 if params.logprobs is not None else None
        for text, emitted in zip(self._texts, request.emitted, strict=False):
            self._take_emitted(text, emitted)

    def feed(self, new: TokenOutput, abort: Abort) -> RequestOutput:
        """Take what the engine gave one sequence. abort(request_id, index) is called when a stop string ended it here."""
        output, metrics = self.output, self.output.metrics
        assert metrics is not None
        now_s = time.monotonic()
        if new.new_token_ids and metrics.first_token_s is None:
            metrics.first_token_s = now_s
        output.num_cached_tokens = new.num_cached_tokens
        if new.error is not None:
            output.error = new.error
        if new.prompt_logprobs is not None and output.prompt_logprobs is not None:
            output.prompt_logprobs.extend(self._by_token(scores) for scores in new.prompt_logprobs)
        text = self._texts[new.index]
        if text.output.finish_reason is None and (new.new_token_ids or new.finish_reason is not None):
            self._feed_sequence(text, new, abort)
            self._num_left -= text.output.finish_reason is not None
        if self._num_left == 0 and not output.finished:
            output.finished = True
            metrics.finished_s = now_s
        return output

    def end(self, reason: FinishReason) -> RequestOutput:
        """Finish the request now: `reason` for every sequence that has none yet."""
        for output in self.output.outputs:
            output.finish_reason = output.finish_reason or reason
        self._num_left = 0
        self.output.finished = True
        return self.output

    def _take_emitted(self, text: _SequenceText, emitted: Sequence[int]) -> None:
        """What an earlier engine said, as if it came again; nobody knows its logprobs any more."""
        for token in emitted:
            if text.output.logprobs is not None:
                text.output.logprobs.append(None)
            if self._add_token(text, token):
                self._num_left -= 1
                return

    def _feed_sequence(self, text: _SequenceText, new: TokenOutput, abort: Abort) -> None:
        """Token by token, so that a stop string ends the sequence at the very token that completed it."""
        output = text.output
        for i, token in enumerate(new.new_token_ids):
            if new.logprobs is not None and output.logprobs is not None:
                output.logprobs.append(self._by_token(new.logprobs[i]))
                output.cumulative_logprob = (output.cumulative_logprob or 0.0) + new.logprobs[i].chosen
            if self._add_token(text, token):
                abort(self._request_id, output.index)
                return
        if new.finish_reason is not None:
            if text.detokenizer is not None and self._add_text(text, text.detokenizer.finish()):
                return
            output.text += text.stops.finish()
            output.finish_reason, output.stop_reason = new.finish_reason, new.stop_reason

    def _add_token(self, text: _SequenceText, token: int) -> bool:
        """Append a token and the text that is certain now; True if a stop string ended the sequence."""
        text.output.token_ids.append(token)
        return text.detokenizer is not None and self._add_text(text, text.detokenizer.feed((token,)))

    def _add_text(self, text: _SequenceText, piece: str) -> bool:
        """Append what may go out; True if a stop string ended the sequence."""
        output = text.output
        if len(output.token_ids) <= text.num_stop_free:
            output.text += piece
            return False
        fed = text.stops.feed(piece)
        if isinstance(fed, Stopped):
            output.text += fed.text
            output.finish_reason, output.stop_reason = "stop", fed.stop
            return True
        output.text += fed
        return False

    def _by_token(self, scores: TokenLogprobs) -> dict[int, Logprob]:
        """Likeliest tokens and the one that stands there, by id."""
        found = {
            token: Logprob(value, rank, self._text_of(token)) for rank, (token, value) in enumerate(scores.top, start=1)
        }
        if scores.token_id not in found:
            found[scores.token_id] = Logprob(scores.chosen, scores.rank, self._text_of(scores.token_id))
        return found

    def _text_of(self, token: int) -> str:
        return self._tokenizer.token_text(token) if self._tokenizer is not None else ""
