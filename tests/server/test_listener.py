"""The socket that the server listens on."""

from __future__ import annotations

import asyncio
import socket

import pytest

from xllm_core.config_tables import ServerTable
from xllm_core.server.run import _listener


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_answers_do_not_wait_for_acknowledgements(host: str) -> None:
    """Connections send at once. Killed by: a socket whose protocol asyncio does not know; bodies then come 40 ms after heads."""

    async def is_at_once(listening: socket.socket) -> bool:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def note(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(note, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname()[:2])
            writer.close()
            return bool(await asyncio.wait_for(accepted, 10))

    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        pytest.skip(f"this machine has no {host}: {error}")
    with _listener(ServerTable(host=host, port=0)) as (listening, _):
        assert asyncio.run(is_at_once(listening))
