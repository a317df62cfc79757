"""Who may ask: every route but a few needs a key, however its path is written, and keys neither leak nor share a cache."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import FLAGS
from tests.server.hostile import check_refusal, exchange
from tests.server.rig import Server, serving
from xllm_core.config_tables import ServerTable
from xllm_core.server.app import ServerState, create_app
from xllm_core.server.guard import OPEN_PATHS, ApiKeys, Guard
from xllm_core.server.metrics import Metrics

ALICE, BOB, CAROL = "key-of-alice-7f3a", "key-of-bob-91bc", "key-of-carol-55de"
WRONG = "wrong-key-of-mallory"
COMPLETIONS = "/v1/completions"
pytestmark = pytest.mark.slow

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def locked(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two keys from a variable, one from a file; requests are logged."""
    path: Path = tmp_path_factory.mktemp("locked")
    (path / "keys").write_text(f"# carol's\n\n{CAROL}\n")
    flags = (*FLAGS, "--api-key-file", str(path / "keys"), "--log-requests", "--log-level", "info")
    with serving(
        tiny_model, path / "log.txt", *flags, env={"XLLM_SERVER__API_KEYS": f'["{ALICE}", "{BOB}"]'}
    ) as running:
        running.headers = bearer(ALICE)
        yield running


def bare(server: Server, line: str, headers: str = "Host: localhost\r\n") -> int:
    """Status of a request without a key, its line as it is written here."""
    return exchange(
        server, f"{line} HTTP/1.1\r\n{headers}Connection: close\r\n\r\n".encode("latin-1"), line.partition(" ")[0]
    ).status


def all_routes() -> list[str]:
    """Every path of the application, those that FastAPI adds included."""
    state = ServerState(None, Metrics("m"), ServerTable(), ("m",), 0)  # type: ignore[arg-type]
    routes = create_app(state, ApiKeys(()), checks_host=False)._app.routes  # type: ignore[attr-defined]
    return sorted({route.path.replace("{name:path}", "tiny") for route in routes})


def test_every_route_needs_a_key(locked: Server) -> None:
    """Routes times methods, without a key: 401 but for the list of open paths, which is this and no more."""
    assert OPEN_PATHS == {"/health", "/health/live", "/health/ready", "/health/startup", "/ping", "/version"}
    routes = all_routes()
    assert {COMPLETIONS, "/v1/models/tiny", "/metrics", "/load", "/docs", "/openapi.json", "/health"} <= set(routes)
    for path in (*routes, "/", "/nothing"):
        for method in METHODS:
            status = bare(locked, f"{method} {path}")
            expected = (200, 405) if path in OPEN_PATHS else (401,)
            assert status in expected, f"{method} {path}: {status}"
            answers = ("GET", "HEAD", "POST") if path == "/ping" else ("GET", "HEAD")
            assert (status == 200) == (path in OPEN_PATHS and method in answers), f"{method} {path}: {status}"


@pytest.mark.parametrize(
    "target",
    [
        "/health/../v1/models", "/health/%2e%2e/v1/models", "/health%2f..%2fv1/models", "/health/..;/v1/models", "/health/", "/health//",
        "/health%00/v1/models", "/health%3f/v1/models", "/health;x=/v1/models", "/health%23", "/HEALTH", "/ping/", "/version/../metrics",
        "//v1/models", "/v1//models", "/./v1/models", "/%2e/v1/models", "/v1/models/", "/v1/models%2f", "/V1/models", "/v1%2fmodels",
        "/%76%31/models",
        "/v1/models?x=/health", "/v1/models#/health", "/v1/models;/health", "http://localhost/health", "http://localhost/v1/models",
        "http://localhost/health/../v1/models", "//localhost/health", "*", "/metrics", "/metrics/", "/health/live/../../v1/models", "/health/livex",
    ],
)  # fmt: skip
def test_paths_in_disguise(locked: Server, target: str) -> None:
    """Compared whole, after decoding: nothing that merely begins like an open path is open, nothing that reaches another route is."""
    assert bare(locked, f"GET {target}") == 401


def test_open_paths_stay_open(locked: Server) -> None:
    """Also with a query, encoded, or with a key that is wrong."""
    for target in (*OPEN_PATHS, "/health?x=1", "/%68ealth"):
        assert bare(locked, f"GET {target}") == 200
    assert locked.get("/health", headers=bearer(WRONG)).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "localhost/health?",
        "localhost/health#",
        "x/../health",
        "/health",
        "health",
        "a@localhost",
        "",
        "[::1]",
        "evil.example",
    ],
)
def test_odd_hosts_open_nothing(locked: Server, host: str) -> None:
    """The path is what stands in the request's line, whatever Host says; with a key every Host is served."""
    assert bare(locked, "GET /v1/models", f"Host: {host}\r\n") == 401
    assert bare(locked, "GET /v1/models", f"Host: {host}\r\nAuthorization: Bearer {BOB}\r\n") == 200


@pytest.mark.parametrize(
    "headers",
    [
        {}, bearer(WRONG), bearer(""), bearer(ALICE[:-1]), bearer(ALICE + "x"), bearer(ALICE.upper()), bearer(f"{ALICE} {BOB}"),
        bearer(f"{ALICE},{BOB}"), bearer(f'"{ALICE}"'), bearer(hashlib.sha256(ALICE.encode()).hexdigest()), bearer("x" * 50_000), bearer("\xe9"),
        {"Authorization": ALICE}, {"Authorization": f"Basic {ALICE}"}, {"Authorization": f"Token {ALICE}"}, {"Authorization": f"Bearer:{ALICE}"},
        {"Authorization": f"Bearer{ALICE}"}, {"x-api-key": WRONG}, {"x-api-key": ""}, {"x-api-key": f"Bearer {ALICE}"}, {"api-key": ALICE},
        {"Cookie": f"key={ALICE}"}, {"Proxy-Authorization": f"Bearer {ALICE}"}, {"X-Forwarded-For": "127.0.0.1"},
        {**bearer(WRONG), "x-api-key": ALICE},
        {"Connection": "upgrade", "Upgrade": "websocket", "Sec-WebSocket-Protocol": ALICE}, {"Origin": "http://localhost"},
    ],
)  # fmt: skip
def test_keys_that_are_none(locked: Server, headers: dict[str, str]) -> None:
    """401 in our shape, before the body is looked at, and the header that says what is wanted."""
    locked.headers = {}
    try:
        for path, body in (
            ("/v1/models", None),
            (COMPLETIONS + f"?api_key={ALICE}", {"prompt": "a", "api_key": ALICE}),
        ):
            encoded = {name: value.encode("latin-1") for name, value in headers.items()}
            answer = locked.request("POST" if body else "GET", path, body, headers=encoded)  # type: ignore[arg-type]
            check_refusal(answer, 401, "Authorization: Bearer KEY")
            assert answer.headers["www-authenticate"] == "Bearer" and answer.error["code"] == "invalid_api_key"
    finally:
        locked.headers = bearer(ALICE)


@pytest.mark.parametrize(
    "headers",
    [
        bearer(ALICE), bearer(BOB), bearer(CAROL), {"Authorization": f"bearer {ALICE}"}, {"Authorization": f"BEARER  {ALICE} "}, {"x-api-key": BOB},
        {"X-API-KEY": CAROL}, {"Authorization": "Basic abc", "x-api-key": ALICE},
    ],
)  # fmt: skip
def test_keys_that_open(locked: Server, headers: dict[str, str]) -> None:
    """Each of several keys, from the variable and from the file, as OpenAI's clients send it and as Anthropic's do."""
    locked.headers = {}
    try:
        assert locked.get("/v1/models", headers=headers).status == 200
        assert locked.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}, headers=headers).status == 200
    finally:
        locked.headers = bearer(ALICE)


def test_keys_are_nowhere_to_be_seen(locked: Server) -> None:
    """Not in the log, though requests are logged, nor in metrics, errors, documents, or what `ps` shows; prompts are not logged either."""
    answers = [
        locked.get(path, headers=bearer(key)).body
        for key in (ALICE, BOB, CAROL, WRONG)
        for path in ("/metrics", "/v1/models", "/openapi.json", "/nothing", "/load")
    ]
    answers.append(locked.post(COMPLETIONS, {"prompt": "a canary prompt", "max_tokens": 1, "user": "canary user"}).body)
    answers.append(locked.post(COMPLETIONS, {"prompt": "a", "n": 1000}).body)
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (locked.process.pid, *locked.engine_pids)]
    digests = [hashlib.sha256(key.encode()).hexdigest()[:16] for key in (ALICE, BOB, CAROL)]
    assert f"POST {COMPLETIONS} 200" in locked.log
    for secret in (ALICE, BOB, CAROL, WRONG, *digests, "canary"):
        assert secret not in locked.log
        assert not any(secret.encode() in text for text in (*answers, *lines))


def cached(server: Server, key: str, salt: str | None = None, prompt: int = 100) -> int:
    """Ask for a prompt of 40 tokens; how many of them were found."""
    body: dict[str, Any] = {"prompt": [prompt] * 40, "max_tokens": 1, "cache_salt": salt}
    return server.post(COMPLETIONS, body, headers=bearer(key)).json["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_tenants_share_no_cache(locked: Server) -> None:
    """What one key has computed another neither finds nor learns of; salts divide further, and none reaches over."""
    assert [cached(locked, ALICE), cached(locked, ALICE)] == [0, 32]
    assert [cached(locked, BOB), cached(locked, CAROL), cached(locked, BOB)] == [0, 0, 32]
    assert [
        cached(locked, ALICE, "s"),
        cached(locked, ALICE, "s"),
        cached(locked, ALICE, "t"),
        cached(locked, ALICE),
    ] == [0, 32, 0, 32]
    assert cached(locked, BOB, "s") == 0
    name = hashlib.sha256(ALICE.encode()).hexdigest()[:16]
    for forged in (f"{name}:", f"{name}:s", f":{name}:s", name):
        assert cached(locked, BOB, forged) == 0, "a salt that names another tenant"


# ---- without a key ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "LocalHost:1", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000"])
def test_own_hosts(server: Server, host: str) -> None:
    """This machine's own names."""
    assert bare(server, "GET /v1/models", f"Host: {host}\r\n") == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "localhost/x",
        "a@localhost",
        "0.0.0.0",
        "169.254.169.254",
    ],
)
def test_foreign_hosts(server: Server, host: str) -> None:
    """A name that somebody else's DNS points here: 403 on every route, /health included."""
    for path in ("/v1/models", "/health", "/nothing"):
        assert bare(server, f"GET {path}", f"Host: {host}\r\n") == 403


def test_web_pages_cannot_post(server: Server) -> None:
    """What a browser sends without asking is 415, and its question (a preflight) gets no yes."""
    body = b'{"prompt": "a", "max_tokens": 1}'
    origin = {"Origin": "http://evil.example"}
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        check_refusal(
            server.request("POST", COMPLETIONS, body, headers={"Content-Type": kind, **origin}), 415, "application/json"
        )
    asked = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    answers = [server.request("OPTIONS", COMPLETIONS, headers=asked), server.get("/v1/models", headers=origin)]
    assert answers[0].status == 405
    assert not [name for answer in answers for name in answer.headers if name.startswith("access-control")]


# ---- the guard itself --------------------------------------------------------------------------------------------------------------


def ask(guard: Guard, path: str, **headers: str) -> int:
    """Status of a GET, without any socket. The application behind the guard answers 200 to all."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": raw,
    }
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"]


async def always_200(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def make_guard(keys: tuple[str, ...], **options: Any) -> Guard:
    defaults: dict[str, Any] = {
        "has_open_metrics": False,
        "allowed_hosts": None,
        "logs_requests": False,
        "max_header_bytes": 65536,
    }
    return Guard(
        always_200, keys=ApiKeys(keys), metrics=Metrics("m"), routes=lambda: frozenset(), **{**defaults, **options}
    )


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """`hmac.compare_digest` over digests of one length, with every key, also after the one that fits."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    guard = make_guard((ALICE, BOB, CAROL))
    for key, status in ((ALICE, 200), (BOB, 200), (WRONG, 401), ("", 401), ("x" * 10_000, 401)):
        compared.clear()
        assert ask(guard, "/v1/models", authorization=f"Bearer {key}") == status
        assert len(compared) == 3 and {len(side) for pair in compared for side in pair} == {32}


def test_settings_of_the_guard() -> None:
    """`open_metrics` opens that one path; `allowed_hosts` adds names; a single key is one tenant, several are several."""
    assert ask(make_guard((ALICE,)), "/metrics") == 401
    assert ask(make_guard((ALICE,), has_open_metrics=True), "/metrics") == 200
    assert ask(make_guard((ALICE,), has_open_metrics=True), "/metrics/") == 401
    guard = make_guard((), allowed_hosts=("llm.lan",))
    hosts = {"llm.lan": 200, "LLM.lan:8000": 200, "localhost": 200, "x.llm.lan": 403, "llm.lan.evil.example": 403}
    assert {host: ask(guard, "/v1/models", host=host) for host in hosts} == hosts
    assert ApiKeys((ALICE,)).tenant(ALICE.encode()) == ""
    several = ApiKeys((ALICE, BOB))
    assert len({several.tenant(ALICE.encode()), several.tenant(BOB.encode()), ""}) == 3
    assert several.tenant(b"") is None and len(ApiKeys((ALICE, ALICE))) == 1
