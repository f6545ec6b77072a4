"""A double of ClearML's API server and file server: the real ones cannot be had where the tests run.

    with ClearmlServerDouble(folder) as server:
        os.environ.update(server.environment)

or, for a look by hand, `python -m tests.doubles.clearml_server FOLDER`, which prints the environment and runs until Ctrl-C.
What it remembers is in `server.records`, what was asked in `server.requests`. Faults are switched on by `server.faults`.
"""

from __future__ import annotations

import base64
import email
import email.policy
import http.server
import json
import re
import sys
import threading
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.doubles.clearml_queries import new_id
from tests.doubles.clearml_records import COMPANY, USER, Records, Refusal

ACCESS_KEY, SECRET_KEY = "ACCESS-KEY-OF-THE-DOUBLE", "secret-key-of-the-double-0123456789"
API_VERSION = "2.31"
TOKEN_S = 20 * 86400


@dataclass(frozen=True, slots=True)
class Answer:
    """What a fault answers in place of the endpoint."""

    status: int
    body: bytes = b"<html>not JSON</html>"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Faults:
    """Switches; all off by default."""

    delay_s: float = 0.0
    """Each answer is this late."""
    answer: Answer | None = None
    """Given to each request that `only` matches, until it is None again."""
    only: str = ""
    """A regular expression for `service.action`, or for `files`; empty: every request."""
    left: int | None = None
    """How many more requests get `answer`; None: all."""

    def next_answer(self, endpoint: str) -> Answer | None:
        """Return what this request gets in place of its endpoint's answer."""
        if self.answer is None or not re.search(self.only, endpoint) or self.left == 0:
            return None
        if self.left is not None:
            self.left -= 1
        return self.answer


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came."""

    endpoint: str
    body: Any
    status: int
    client: str
    """What it says it is: the header X-ClearML-Client, else User-Agent."""


class ClearmlServerDouble:
    """Both servers on ports of this machine, with their records in memory and uploaded files in a folder."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self.folder, self.host = folder, host
        self.records, self.faults = Records(), Faults()
        self.requests: list[Request] = []
        self._tokens: set[str] = set()
        self._lock = threading.RLock()
        self._ports = [0, 0]
        self._running: list[http.server.ThreadingHTTPServer] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen; after `stop`, on the ports it had before."""
        for number, handler in enumerate((_ApiHandler, _FilesHandler)):
            bound = type("Handler", (handler,), {"double": self})
            server = _Server((self.host, self._ports[number]), bound)
            self._ports[number] = server.server_port
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            self._running.append(server)

    def stop(self) -> None:
        """Die: connections are refused until `start`; the records stay."""
        for server in self._running:
            server.shutdown()
            server.server_close()
        self._running.clear()

    @property
    def api_url(self) -> str:
        """Address of the API server."""
        return f"http://{self.host}:{self._ports[0]}"

    @property
    def files_url(self) -> str:
        """Address of the file server."""
        return f"http://{self.host}:{self._ports[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that lead a ClearML client here."""
        return {
            "CLEARML_API_HOST": self.api_url,
            "CLEARML_WEB_HOST": "http://127.0.0.1:8080",
            "CLEARML_FILES_HOST": self.files_url,
            "CLEARML_API_ACCESS_KEY": ACCESS_KEY,
            "CLEARML_API_SECRET_KEY": SECRET_KEY,
        }

    def asked(self, endpoint: str) -> list[Request]:
        """Return the requests to one endpoint, oldest first."""
        return [request for request in self.requests if request.endpoint == endpoint]

    @property
    def unknown(self) -> set[str]:
        """Endpoints that were asked for and that the double does not have: a test on it shows less than it seems to."""
        return {
            request.endpoint for request in self.requests if request.status == 400 and request.client == "?"
        }

    def revoke_tokens(self) -> None:
        """Forget all tokens: the next request with one is answered 401."""
        self._tokens.clear()

    def upload(self, url: str) -> Path:
        """Return where the file of an address of the file server lies."""
        path = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
        return self.folder / "files" / path.strip("/")

    def _login(self, authorization: str) -> dict[str, Any]:
        expected = base64.b64encode(f"{ACCESS_KEY}:{SECRET_KEY}".encode()).decode()
        kind, _, given = authorization.partition(" ")
        if kind == "Bearer" and given in self._tokens:
            return {"token": given}
        if kind != "Basic" or given != expected:
            raise Refusal(
                401, 20, "Unauthorized (invalid credentials) (failed to locate provided credentials)"
            )
        token = _token()
        self._tokens.add(token)
        return {"token": token}

    def answer(self, endpoint: str, body: Any, authorization: str) -> dict[str, Any]:
        """Do one request of the API; raises Refusal."""
        with self._lock:
            if endpoint == "auth.login":
                return self._login(authorization)
            if authorization.removeprefix("Bearer ") not in self._tokens:
                raise Refusal(401, 1, "Unauthorized (missing or invalid token)")
            if endpoint == "events.add_batch":
                return self.records.add_events(body)
            return self.records.answer(endpoint, body)

    def note(self, request: Request) -> None:
        """Remember a request."""
        with self._lock:
            self.requests.append(request)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    """A client's idle connection must not hold up `stop`."""

    def __init__(self, *args: Any) -> None:
        self._open: set[Any] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Close open connections too, as the death of a process does."""
        super().server_close()
        for request in list(self._open):
            self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that went away is what some tests are about."""


class _Handler(http.server.BaseHTTPRequestHandler):
    double: ClearmlServerDouble
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def read_body(self) -> bytes:
        """Return the body, whether it came in one piece or in chunks."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """Send one answer."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def faulty(self, endpoint: str) -> bool:
        """Wait, or answer with the fault that is switched on; return whether that was the answer."""
        time.sleep(self.double.faults.delay_s)
        answer = self.double.faults.next_answer(endpoint)
        if answer is None:
            return False
        self.double.note(Request(endpoint, None, answer.status, "fault"))
        self.send(answer.status, answer.body, answer.headers)
        return True


class _ApiHandler(_Handler):
    def _handle(self) -> None:
        raw = self.read_body()
        path = urllib.parse.urlsplit(self.path).path.strip("/")
        endpoint = re.sub(r"^v\d+(\.\d+)*/", "", path)
        if self.faulty(endpoint):
            return
        client = self.headers.get("X-ClearML-Client") or self.headers.get("User-Agent", "")
        status, subcode, message, data, body = 200, 0, "OK", {}, None
        try:
            body = _read_lines(raw) if endpoint == "events.add_batch" else json.loads(raw or b"{}")
            data = self.double.answer(endpoint, body, self.headers.get("Authorization", ""))
        except Refusal as refusal:
            status, subcode, message = refusal.status, refusal.subcode, refusal.message
            client = "?" if "does not know" in message else client
        except (KeyError, TypeError, ValueError) as error:
            status, subcode, message = 400, 12, f"Validation error ({error!r})"
        self.double.note(Request(endpoint, body, status, client))
        meta = {
            "id": new_id(), "trx": new_id(), "result_code": status, "result_subcode": subcode, "result_msg": message,
            "endpoint": {"name": endpoint, "requested_version": API_VERSION, "actual_version": API_VERSION},
            "error_stack": "", "error_data": {},
        }  # fmt: skip
        answer = json.dumps({"meta": meta, "data": data}).encode()
        self.send(status, answer, {"Content-Type": "application/json"})

    do_GET = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815


class _FilesHandler(_Handler):
    def do_POST(self) -> None:
        raw = self.read_body()
        if self.faulty("files"):
            return
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        stored = []
        for part in email.message_from_bytes(head + raw, policy=email.policy.HTTP).iter_parts():
            name = urllib.parse.unquote(str(part.get_param("name", header="content-disposition")))
            target = (self.double.folder / "files" / name.strip("/")).resolve()
            if not target.is_relative_to((self.double.folder / "files").resolve()):
                self.send(400, b"{}", {})
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(part.get_payload(decode=True))
            stored.append(str(target))
        self.double.note(Request("files", stored, 200, self.headers.get("User-Agent", "")))
        self.send(200, json.dumps(stored).encode(), {"Content-Type": "application/json"})

    do_PUT = do_POST  # noqa: N815

    def do_GET(self) -> None:
        if self.faulty("files"):
            return
        path = self.double.upload(self.path)
        if path.is_file():
            self.send(200, path.read_bytes(), {"Content-Type": "application/octet-stream"})
        else:
            self.send(405 if self.path == "/" else 404, b"{}", {})

    do_HEAD = do_GET  # noqa: N815


def _read_lines(raw: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in raw.splitlines() if line.strip()]


def _token() -> str:
    """Return a token as the server makes them: unsigned here, and read by the SDK for its version and its end."""
    now = int(time.time())
    claims = {
        "exp": now + TOKEN_S, "iat": now, "api_version": API_VERSION, "server_version": "2.0.0", "server_build": "double",
        "feature_set": "basic", "identity": {"user": USER, "company": COMPANY}, "nonce": new_id(),
    }  # fmt: skip
    parts = (json.dumps({"alg": "none", "typ": "JWT"}), json.dumps(claims), "no signature")
    return ".".join(base64.urlsafe_b64encode(part.encode()).rstrip(b"=").decode() for part in parts)


if __name__ == "__main__":
    with ClearmlServerDouble(Path(sys.argv[1])) as running:
        for name, value in running.environment.items():
            print(f"export {name}={value}", flush=True)
        threading.Event().wait()
