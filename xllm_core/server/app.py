"""The HTTP application: routes, and what each error becomes. No inference logic."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from xllm_core import __version__
from xllm_core.config_tables import ServerTable
from xllm_core.errors import HttpRefusal, InvalidRequestError, XllmError
from xllm_core.frontend.processor import Prepared, Processor
from xllm_core.frontend.serving import Answer, Serving
from xllm_core.frontend.tokenizer import Tokenizer
from xllm_core.frontend.validation import shown
from xllm_core.server import openai, schemas
from xllm_core.server.body import BodyLimits, ClientGone, Lease, parse_object, read_body
from xllm_core.server.guard import CLIENT_GONE, ApiKeys, Guard, send_problem
from xllm_core.server.metrics import CONTENT_TYPE, Metrics
from xllm_core.server.openai import Job, Reply
from xllm_core.server.problems import Problem, describe
from xllm_core.server.stream import EventStream, wait_disconnect, wait_whole

_IN_LOOP_BYTES = 8192  # larger bodies are read, checked and tokenized on a thread, so that the loop goes on
_log = logging.getLogger("xllm.serve")


Understand = Callable[[bytes, Processor], tuple[Job, list[Prepared]]]


@dataclass(slots=True)
class ServerState:
    """What routes read. model_names: the first is shown, all are served. is_draining: balancers are told to look elsewhere."""

    serving: Serving
    metrics: Metrics
    settings: ServerTable
    model_names: tuple[str, ...]
    created: int
    is_draining: bool = False
    takes_work: bool = True

    def take_no_more(self) -> None:
        """Refuse what comes from now on."""
        self.takes_work = False

    @property
    def processor(self) -> Processor:
        """The text side. Raises EngineDeadError or HttpRefusal (503) where no work is taken."""
        if not self.takes_work:
            raise HttpRefusal(
                "the server is shutting down; ask another", status=503, code="shutting_down", should_close=True
            )
        return self.serving.processor

    def check_model(self, name: str | None) -> str:
        """The name that answers show. Raises HttpRefusal (404) for a model that is not here."""
        if name is not None and name not in self.model_names:
            raise HttpRefusal(
                f"model {shown(name)} does not exist; served are {', '.join(self.model_names)}",
                status=404, code="model_not_found", param="model",
            )  # fmt: skip
        return name or self.model_names[0]


class JsonResponse(Response):
    """JSON by msgspec."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode."""
        return msgspec.json.encode(content)


def create_app(state: ServerState, keys: ApiKeys, *, checks_host: bool) -> Guard:
    """The application behind its guard. checks_host: serve only names of this machine and those allowed, where there is no key."""
    app = FastAPI(title="xLLM", version=__version__, redirect_slashes=False)
    _add_routes(app, state)
    _add_error_handlers(app, state)
    paths = frozenset(getattr(route, "path", "") for route in app.routes)
    return Guard(
        app, keys=keys, has_open_metrics=state.settings.open_metrics, metrics=state.metrics, routes=lambda: paths,
        allowed_hosts=state.settings.allowed_hosts if checks_host else None, logs_requests=state.settings.log_requests,
        max_header_bytes=state.settings.max_header_bytes,
    )  # fmt: skip


def _add_routes(app: FastAPI, state: ServerState) -> None:
    routes = _Routes(state)
    definitions: dict[str, Any] = {}

    def post(
        path: str, handler: Callable[[Request], Awaitable[Response]], model: type[schemas.Body], summary: str
    ) -> None:
        body = model.model_json_schema(ref_template="#/components/schemas/{model}")
        definitions.update(body.pop("$defs", {}))
        schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}}
        app.add_api_route(
            path, handler, methods=["POST"], summary=summary, openapi_extra=schema, response_class=JsonResponse
        )

    def get(path: str, handler: Callable[..., Awaitable[Response]], summary: str) -> None:
        app.add_api_route(path, handler, methods=["GET"], summary=summary, response_class=JsonResponse)

    post("/v1/completions", routes.completions, schemas.CompletionBody, "Continue prompts")
    post("/v1/chat/completions", routes.chat, schemas.ChatBody, "Answer a conversation")
    post("/tokenize", routes.tokenize, schemas.TokenizeBody, "Token ids of a text or a conversation")
    post("/detokenize", routes.detokenize, schemas.DetokenizeBody, "Text of token ids")
    get("/v1/models", routes.models, "What is served")
    get("/v1/models/{name:path}", routes.model, "One of the served names")
    get("/health", routes.health, "200 while requests are served")
    get("/ping", routes.health, "As /health")
    get("/health/live", routes.live, "200 while this process and its engine are not stuck")
    get("/health/ready", routes.health, "200 while requests are served")
    get("/health/startup", routes.startup, "200 once the model was loaded")
    get("/version", routes.version, "The server's version")
    get("/metrics", routes.metrics, "For Prometheus")
    get("/load", routes.load, "Requests under way")
    probes = {"/health/live": routes.live, "/health/startup": routes.startup, "/version": routes.version}
    probes |= dict.fromkeys(("/health", "/health/ready", "/ping"), routes.health)
    for path, handler in probes.items():
        methods = ["HEAD", "POST"] if path == "/ping" else ["HEAD"]  # balancers ask so; some platforms post their ping
        app.add_api_route(path, handler, methods=methods, include_in_schema=False, response_class=JsonResponse)
    made = app.openapi

    def openapi() -> dict[str, Any]:
        schema = made()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # FastAPI promises it; what is wrong is a 400 here
                operation["responses"]["default"] = {"description": "An error, as OpenAI's clients expect it"}
        schema["components"] = {"schemas": definitions}
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _add_error_handlers(app: FastAPI, state: ServerState) -> None:
    async def ours(request: Request, error: Exception) -> Response:
        problem = describe(error, retry_after_s=state.serving.retry_after_s())
        state.metrics.refused(problem.code or f"http_{problem.status}")
        return _problem_response(problem)

    async def by_status(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        texts = {
            404: f"no route {request.method} {request.scope['path'][:200]}",
            405: f"{request.method} is not allowed here",
        }
        headers = dict(error.headers or {})
        return _problem_response(
            Problem(error.status_code, texts.get(error.status_code, str(error.detail)), headers=headers)
        )

    async def anything(request: Request, error: Exception) -> Response:
        _log.error("request %s failed", request.scope["state"]["request_id"], exc_info=error)
        return _problem_response(describe(error))

    async def gone(request: Request, error: Exception) -> Response:
        state.metrics.left("disconnect")
        return Response(status_code=CLIENT_GONE)

    app.add_exception_handler(XllmError, ours)
    app.add_exception_handler(HTTPException, by_status)
    app.add_exception_handler(ClientGone, gone)
    app.add_exception_handler(Exception, anything)


def _problem_response(problem: Problem) -> Response:
    return JsonResponse(problem.body(), status_code=problem.status, headers=problem.headers)


class _Routes:
    """One method per route."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        table = state.settings
        self._limits = BodyLimits(
            table.max_body_bytes, table.max_bodies_bytes, table.body_timeout_s, table.body_idle_timeout_s
        )

    # ---- generating ----------------------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        """`/v1/completions`."""
        return await self._generate(request, self._understand_completion)

    async def chat(self, request: Request) -> Response:
        """`/v1/chat/completions`."""
        return await self._generate(request, self._understand_chat)

    def _understand_completion(self, raw: bytes, processor: Processor) -> tuple[Job, list[Prepared]]:
        body = self._parse(raw, schemas.CompletionBody)
        model = self._state.check_model(body.model)
        job = openai.completion_job(body, processor, max_prompts=self._state.settings.max_prompts_per_request)
        return replace(job, model=model), openai.prepare(job, processor)

    def _understand_chat(self, raw: bytes, processor: Processor) -> tuple[Job, list[Prepared]]:
        body = self._parse(raw, schemas.ChatBody)
        model = self._state.check_model(body.model)
        job = openai.chat_job(body, processor)
        return replace(job, model=model), openai.prepare(job, processor)

    async def _generate(self, request: Request, understand: Understand) -> Response:
        scope, processor = request.scope["state"], self._state.processor
        job, prepared = await self._understood(request, understand, processor)
        prepared = [_for_tenant(one, scope["tenant"]) for one in prepared]
        if job.label is not None:
            scope["label"] = _label(job.label)
        answer = self._state.serving.submit(prepared, scope["request_id"])
        reply = Reply(job, scope["request_id"], processor.tokenizer)
        if job.is_stream:
            table, metrics = self._state.settings, self._state.metrics
            return EventStream(
                reply, answer, self._state.serving, write_timeout_s=table.write_timeout_s, comment_interval_s=table.comment_interval_s,
                refuse=send_problem, on_gone=metrics.left,
            )  # fmt: skip
        await self._wait(request, answer)
        whole: JsonResponse = await self._off_loop(
            _num_scores(answer), lambda: JsonResponse(reply.whole(answer.outputs))
        )
        return whole

    async def _wait(self, request: Request, answer: Answer) -> None:
        """Until the answer is whole. A client that goes away meanwhile frees its blocks."""
        waiter = asyncio.ensure_future(wait_whole(answer))
        leaver = asyncio.ensure_future(wait_disconnect(request.receive))
        try:
            await asyncio.wait((waiter, leaver), return_when=asyncio.FIRST_COMPLETED)
            if not waiter.done():
                raise ClientGone
            await waiter
        finally:
            self._state.serving.abort(answer)
            waiter.cancel()
            leaver.cancel()

    async def _understood(self, request: Request, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function makes of the request's body, which it gets first."""
        with Lease(self._limits) as lease:
            raw = await read_body(dict(request.scope["headers"]), request.receive, self._limits, lease)
            return await self._off_loop(len(raw), function, raw, *arguments)

    def _parse(self, raw: bytes, model: type[schemas._Model]) -> schemas._Model:
        return schemas.parse(model, parse_object(raw), self._state.metrics.ignored)

    @staticmethod
    async def _off_loop(num_bytes: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call it here, or on a thread if it has much to read."""
        if num_bytes <= _IN_LOOP_BYTES:
            return function(*arguments)
        return await asyncio.to_thread(function, *arguments)

    # ---- text ----------------------------------------------------------------------------------------------------------------

    async def tokenize(self, request: Request) -> Response:
        """`/tokenize`."""
        return JsonResponse(await self._understood(request, self._tokens_of))

    def _tokens_of(self, raw: bytes) -> dict[str, Any]:
        body = self._parse(raw, schemas.TokenizeBody)
        self._state.check_model(body.model)
        processor = self._state.processor
        tokens = _tokenize(body, processor)
        length = processor.client.info().max_model_len
        answer: dict[str, Any] = {"count": len(tokens), "max_model_len": length, "tokens": tokens}
        if body.return_token_strs:
            assert processor.tokenizer is not None
            answer["token_strs"] = [processor.tokenizer.token_text(token) for token in tokens]
        return answer

    async def detokenize(self, request: Request) -> Response:
        """`/detokenize`."""
        return JsonResponse({"prompt": await self._understood(request, self._text_of)})

    def _text_of(self, raw: bytes) -> str:
        body = self._parse(raw, schemas.DetokenizeBody)
        self._state.check_model(body.model)
        processor = self._state.processor
        vocab_size = processor.client.info().vocab_size
        bad = next((token for token in body.tokens if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise InvalidRequestError(
                f"token id {shown(bad)} in tokens is outside the vocabulary 0..{vocab_size - 1}", param="tokens"
            )
        return _require_tokenizer(processor).decode(body.tokens, skip_special_tokens=False)

    # ---- what is here, and how it is -----------------------------------------------------------------------------------------

    async def models(self) -> Response:
        """`/v1/models`."""
        return JsonResponse({"object": "list", "data": [self._card(name) for name in self._state.model_names]})

    async def model(self, name: str) -> Response:
        """`/v1/models/{id}`."""
        self._state.check_model(name)
        return JsonResponse(self._card(name))

    def _card(self, name: str) -> Mapping[str, Any]:
        serving = self._state.serving
        info = serving.processor.client.info() if serving.is_ready else None
        return {
            "id": name, "object": "model", "created": self._state.created, "owned_by": "xllm", "parent": None,
            "root": self._state.model_names[0], "max_model_len": info.max_model_len if info is not None else None,
        }  # fmt: skip

    async def health(self) -> Response:
        """Whether a request that comes now is served."""
        serving, state = self._state.serving, self._state
        if serving.is_ready and not state.is_draining and serving.is_responsive:
            return Response()
        if serving.failure is not None:
            raise serving.failure
        why = (
            "shutting down"
            if state.is_draining
            else "the engine is starting"
            if not serving.is_ready
            else "the engine says nothing"
        )
        raise HttpRefusal(why, status=503, code="not_ready")

    async def live(self) -> Response:
        """Whether a restart would help: 503 only when an engine has died or is stuck."""
        serving = self._state.serving
        if serving.failure is not None:
            raise serving.failure
        if not serving.is_responsive:
            raise HttpRefusal("an engine has said nothing for too long", status=503, code="engine_stuck")
        return Response()

    async def startup(self) -> Response:
        """Whether the model was loaded."""
        if not self._state.serving.is_ready:
            raise HttpRefusal("the engine is starting", status=503, code="not_ready")
        return Response()

    async def version(self) -> Response:
        """`/version`."""
        return JsonResponse({"version": __version__})

    async def metrics(self) -> Response:
        """`/metrics`."""
        return Response(self._state.metrics.text(), media_type=CONTENT_TYPE)

    async def load(self) -> Response:
        """`/load`."""
        serving = self._state.serving
        stats = [engine.stats for engine in serving.engines]
        return JsonResponse(
            {
                "server_load": serving.num_unfinished,
                "num_requests_waiting": serving.num_waiting,
                "num_sequences_running": sum(one.num_running for one in stats),
                "used_blocks": sum(one.used_blocks for one in stats),
                "total_blocks": sum(one.total_blocks for one in stats),
            }
        )


def _tokenize(body: schemas.TokenizeBody, processor: Processor) -> list[int]:
    tokenizer = _require_tokenizer(processor)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("give either prompt or messages", param="prompt")
    if body.messages is not None:
        return openai.conversation(
            body.messages, processor, add_generation_prompt=body.add_generation_prompt, continue_final_message=body.continue_final_message,
            template_kwargs=body.chat_template_kwargs, add_special_tokens=body.add_special_tokens is True,
        )  # fmt: skip
    text = body.prompt or ""
    processor.check_length(text)
    return tokenizer.encode(text, add_special_tokens=body.add_special_tokens is not False)


def _require_tokenizer(processor: Processor) -> Tokenizer:
    if processor.tokenizer is None:
        raise InvalidRequestError("this model has no tokenizer; give prompts as token ids")
    return processor.tokenizer


def _for_tenant(prepared: Prepared, tenant: str) -> Prepared:
    """With several keys each has a prefix cache of its own, which no salt of another reaches."""
    if not tenant:
        return prepared
    request = prepared.request
    return replace(prepared, request=replace(request, salt=f"{tenant}:{request.salt}"))


def _label(label: str) -> str:
    if not 0 < len(label) <= 128 or not all("!" <= c <= "~" for c in label):
        raise InvalidRequestError(
            "request_id must be 1 to 128 printable ASCII characters without spaces", param="request_id"
        )
    return label


def _num_scores(answer: Answer) -> int:
    """Entries of logprobs in an answer: tens of thousands take a while to write."""
    num = 0
    for output in answer.outputs:
        for scores in (output.prompt_logprobs, *(sequence.logprobs for sequence in output.outputs)):
            if scores:
                num += len(scores) * len(scores[-1] or ())
    return num
