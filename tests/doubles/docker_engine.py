"""A double of an engine behind a unix socket, for answers that a real one gives only in trouble, or no longer."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingUnixStreamServer


class EngineDouble(BaseHTTPRequestHandler):
    """Answers GET with what `content` returns for the path: a status and a body."""

    api_version = "1.41"

    def content(self) -> tuple[int, bytes]:
        """Return status and body."""
        raise NotImplementedError

    def do_GET(self) -> None:
        """Answer."""
        status, body = self.content()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Api-Version", self.api_version)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Say nothing."""

    def address_string(self) -> str:
        """Name a client that has no address."""
        return "a unix socket"


class _Server(ThreadingUnixStreamServer):
    """A server on whose socket as many may knock at once as on an engine's: it refuses whom its queue has no place for."""

    request_queue_size = 128


@contextmanager
def served(double: type[EngineDouble]) -> Iterator[str]:
    """Run an engine like `double`, and give the path of its socket."""
    # A socket's path is at most 107 characters long, so not below pytest's own folders.
    with tempfile.TemporaryDirectory(prefix="starling-", dir="/tmp") as folder:
        path = f"{folder}/docker.sock"
        with _Server(path, double) as server:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            yield path
            server.shutdown()
