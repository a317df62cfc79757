"""python -m xllm_far.peer SOCKET: a dictionary of bytes behind a unix socket. One request, one answer: a JSON line, then the bytes it counts."""

from __future__ import annotations

import json
import socketserver
import sys
from pathlib import Path

HELD: dict[str, bytes] = {}


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while line := self.rfile.readline():
            request = json.loads(line)
            if request["do"] == "put":
                HELD[request["key"]] = self.rfile.read(request["size"])
                self._answer(b"")
            elif request["do"] == "get":
                self._answer(HELD.get(request["key"]))
            else:
                found = [key in HELD for key in request["keys"]]
                self._answer(json.dumps(found).encode())

    def _answer(self, body: bytes | None) -> None:
        self.wfile.write(json.dumps({"size": -1 if body is None else len(body)}).encode() + b"\n" + (body or b""))


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


def main() -> None:
    """Serve until killed."""
    Path(sys.argv[1]).unlink(missing_ok=True)
    with _Server(sys.argv[1], _Handler) as server:
        print("ready", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
