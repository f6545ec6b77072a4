"""Bounded calls of ClearML's API: every call ends within seconds, with an answer or with one of two errors.

ClearML's SDK retries a refused connection 240 times, waits for ever after a 503, follows redirects. Here a call has a
deadline, an answer has a size limit, a redirect is an error, and an expired token is renewed once.
"""

from __future__ import annotations

import json
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from starling.core.plain_json import parse_json
from starling.errors import ServerError
from starling.tracking.clearml.client.credentials import Credentials

CONNECT_S, READ_S = 3.0, 10.0
UPLOAD_S, UPLOAD_BYTES_PER_S = 60.0, 50_000
"""Maximum seconds of an upload: its size at this rate, but at least UPLOAD_S."""
MAX_ANSWER_BYTES = 32 << 20
_BUSY = {408, 429, 502, 503, 504}
"""Status codes of a server that is busy."""
_CHUNK_BYTES = 1 << 16

Answer = dict[str, Any]


class ClearmlUnavailableError(ServerError):
    """The server does not answer, is busy, or sends an answer that is not ClearML's."""


class ClearmlRefusedError(ServerError):
    """The server refused the request; another attempt would get the same answer."""

    def __init__(self, message: str, *, status: int = 400, subcode: int = 0) -> None:
        super().__init__(message)
        self.status, self.subcode = status, subcode


class ClearmlApi:
    """A ClearML server; call it as `api.call("tasks.create", name=…)`.

    `patience_s`: seconds during which a call to an unreachable server is retried; with 0, the caller retries.
    """

    def __init__(
        self,
        credentials: Credentials,
        *,
        read_s: float = READ_S,
        patience_s: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        import requests

        self.credentials = credentials
        self._read_s, self._patience_s, self._sleep = read_s, patience_s, sleep
        self._session = requests.Session()
        self._session.trust_env = True  # proxies
        self._session.verify = credentials.verify
        self._token = ""

    def call(self, endpoint: str, /, **body: Any) -> Answer:
        """Return the `data` of the answer to `service.action`.

        Raises ClearmlUnavailableError, or ClearmlRefusedError with the server's message.
        """
        return self._patiently(lambda: self._call(endpoint, json.dumps(body).encode(), "application/json"))

    def send_events(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Send scalars, plots, images and console lines; raises the errors of `call`."""
        lines = "\n".join(json.dumps(event, allow_nan=False) for event in events)
        if lines:
            self._patiently(lambda: self._call("events.add_batch", lines.encode(), "application/json-lines"))

    def upload(self, path: Path, name: str) -> str:
        """Store a file on the file server under `name` (`project/task/file`), and return its address."""
        return self._patiently(lambda: self._authorised(lambda token: self._upload(token, path, name)))

    def page(self, path: str) -> str:
        """Return the address of a page in the web interface."""
        return f"{self.credentials.web_host}/{path}"

    def close(self) -> None:
        """Close connections."""
        self._session.close()

    def _patiently(self, action: Callable[[], Any]) -> Any:
        deadline, pause = time.monotonic() + self._patience_s, 0.5
        while True:
            try:
                return action()
            except ClearmlUnavailableError:
                if time.monotonic() + pause > deadline:
                    raise
                self._sleep(pause)
                pause = min(2 * pause, 10.0)

    def _call(self, endpoint: str, body: bytes, kind: str) -> Answer:
        return self._authorised(lambda token: self._post(endpoint, body, {"Content-Type": kind, **token}))

    def _authorised(self, action: Callable[[Mapping[str, str]], Any]) -> Any:
        """Call `action` with the header that authenticates, and again after a new login if the token was refused."""
        if self._token:
            try:
                return action({"Authorization": f"Bearer {self._token}"})
            except ClearmlRefusedError as error:
                if error.status != 401:
                    raise
        # The token has expired, or the server has been reinstalled.
        self._log_in()
        return action({"Authorization": f"Bearer {self._token}"})

    def _log_in(self) -> None:
        import requests.auth

        auth = requests.auth.HTTPBasicAuth(self.credentials.access_key, self.credentials.secret_key)
        try:
            answer = self._post("auth.login", b"{}", {"Content-Type": "application/json"}, auth=auth)
        except ClearmlRefusedError as error:
            if error.status not in {401, 403}:
                raise
            raise ClearmlRefusedError(
                f"ClearML at {self.credentials.api_host} refuses the credentials; make new ones "
                "(Settings, Workspace, Create new credentials)",
                status=401,
            ) from None
        token = answer.get("token")
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise ClearmlUnavailableError(f"{self.credentials.api_host}: auth.login gave no token")
        self._token = token

    def _post(self, endpoint: str, body: bytes, headers: Mapping[str, str], auth: Any = None) -> Answer:
        url = f"{self.credentials.api_host}/{endpoint}"
        with self._answered(url, timeout=self._read_s, data=body, headers=headers, auth=auth) as (
            status,
            raw,
        ):
            return _data(url, status, raw)

    def _upload(self, token: Mapping[str, str], path: Path, name: str) -> str:
        host = f"{self.credentials.files_host}/"
        with open(path, "rb") as file:
            body = _Multipart(file, path.stat().st_size, name)
            headers = {"Content-Type": body.content_type, **token}
            timeout = max(UPLOAD_S, len(body) / UPLOAD_BYTES_PER_S)
            with self._answered(host, timeout=timeout, data=body, headers=headers) as (status, raw):
                if status != 200:
                    text = raw[:200].decode("utf-8", "replace")
                    raise ClearmlRefusedError(
                        f"{host}: upload of {path.name}: {status} {text}", status=status
                    )
        return host + urllib.parse.quote(name)

    @contextmanager
    def _answered(self, url: str, *, timeout: float, **request: Any) -> Iterator[tuple[int, bytes]]:
        """Send a request, yield status and body; a redirect, a huge answer or a timeout is an unavailable server."""
        import requests

        deadline = time.monotonic() + timeout + CONNECT_S
        try:
            with self._session.post(
                url, timeout=(CONNECT_S, timeout), allow_redirects=False, stream=True, **request
            ) as response:
                raw = bytearray()
                for chunk in response.iter_content(_CHUNK_BYTES):
                    raw += chunk
                    if len(raw) > MAX_ANSWER_BYTES:
                        raise ClearmlUnavailableError(
                            f"{url}: an answer of over {MAX_ANSWER_BYTES >> 20} MiB"
                        )
                    if time.monotonic() > deadline:
                        raise ClearmlUnavailableError(f"{url}: no whole answer in {timeout:g} s")
                status = response.status_code
        except (requests.RequestException, OSError, ValueError) as error:
            raise ClearmlUnavailableError(f"{url}: {_cause(error)}") from None
        if 300 <= status < 400:
            raise ClearmlUnavailableError(f"{url}: redirects, which is not followed; name the server itself")
        if status in _BUSY or (status >= 500 and not _is_clearml(bytes(raw))):
            raise ClearmlUnavailableError(f"{url}: {status}")
        yield status, bytes(raw)


class _Multipart:
    """A form with one file, read while it is sent: weights may be larger than the free memory."""

    def __init__(self, file: IO[bytes], size: int, name: str) -> None:
        boundary = uuid.uuid4().hex
        # Quotes and line ends would end the header early; the server unquotes names.
        safe = urllib.parse.quote(name, safe="/ ")
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{safe}"; filename="{safe}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        self.content_type = f"multipart/form-data; boundary={boundary}"
        self._parts = [head.encode(), f"\r\n--{boundary}--\r\n".encode()]
        self._file, self._left = file, size
        self._size = size + sum(map(len, self._parts))

    def __len__(self) -> int:
        return self._size

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes of the form; empty at its end."""
        if len(self._parts) == 2:
            return self._parts.pop(0)
        if self._left > 0:
            # A file that has grown is sent in its old length; a file that has shrunk raises the error below.
            chunk = self._file.read(min(self._left, size if size > 0 else _CHUNK_BYTES))
            if not chunk:
                raise OSError("the file became shorter while it was sent")
            self._left -= len(chunk)
            return chunk
        return self._parts.pop(0) if self._parts else b""


def _is_clearml(raw: bytes) -> bool:
    try:
        return "result_code" in parse_json(raw)["meta"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _data(url: str, status: int, raw: bytes) -> Answer:
    """Return the data of the answer; raises an error for an invalid answer and for a refusal."""
    try:
        answer = parse_json(raw)
        meta, data = answer["meta"], answer.get("data") or {}
        code, subcode, message = (
            int(meta["result_code"]),
            int(meta.get("result_subcode") or 0),
            meta["result_msg"],
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ClearmlUnavailableError(f"{url}: {status}, and not an answer of a ClearML server") from None
    if status == 200 and code == 200 and isinstance(data, dict):
        return data
    text = f"{url.rpartition('/')[2]}: {str(message)[:300]}"
    if status >= 500 or status == 200:
        raise ClearmlUnavailableError(text)
    raise ClearmlRefusedError(text, status=status, subcode=subcode)


def _cause(error: BaseException) -> str:
    """Return the innermost reason in one line; requests wraps exceptions several times."""
    reason: Any = error
    while (
        isinstance(getattr(reason, "args", None), tuple)
        and reason.args
        and isinstance(reason.args[0], Exception)
    ):
        reason = reason.args[0]
    reason = getattr(reason, "reason", None) or reason
    text = (str(reason).strip().splitlines() or [type(error).__name__])[0]
    return text.rpartition(": ")[2][:200] if "object at 0x" in text else text[:200]
