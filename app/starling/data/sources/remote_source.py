"""Fetch one image or video by HTTP, within limits, and follow redirects to HTTP only."""

from __future__ import annotations

import base64
import http.client
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO, Any

from starling.core.errors import DataError
from starling.core.files.atomic import write_atomic
from starling.core.words import printable
from starling.data.fetch.paced import PacedHttp, PacedHttps

MAX_BYTES = 4 << 30
TIMEOUT_S = 30.0
CHUNK = 1 << 20


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects from HTTP to HTTP or HTTPS, and from HTTPS to HTTPS only."""

    max_redirections = 5

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        allowed = ("https://",) if req.full_url.startswith("https://") else ("http://", "https://")
        if not newurl.lower().startswith(allowed):
            raise urllib.error.HTTPError(
                req.full_url, code, f"redirects to {newurl.partition(':')[0]}", headers, fp
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str, path: Path, shown: str, *, limit: int = MAX_BYTES) -> Path:
    """Fetch `url` to `path` and return `path`; errors name the address as `shown`.

    Raises DataError if the server does not answer, refuses, redirects away from http(s), or sends over `limit` bytes.
    """

    def receive(file: IO[bytes]) -> None:
        with _opener().open(_request(url), timeout=TIMEOUT_S) as answer:
            promised = answer.headers.get("Content-Length", "")
            expected = int(promised) if re.fullmatch(r"\d{1,18}", promised, re.ASCII) else None
            packed = answer.headers.get("Content-Encoding", "identity").strip().lower()
            if packed not in ("", "identity"):
                raise DataError(f"{shown}: sent packed ({printable(packed[:40])}), which was not asked for")
            free = shutil.disk_usage(path.parent).free
            if (expected or 0) > free:
                raise DataError(f"{shown}: {expected:,} bytes to come, {free:,} are free; make room")
            received = 0
            while chunk := answer.read(CHUNK):
                received += len(chunk)
                if received > limit or (expected or 0) > limit:
                    raise DataError(
                        f"{shown}: larger than {limit:,} bytes; download it yourself and give the path"
                    )
                file.write(chunk)
            if expected is not None and received != expected:
                raise DataError(f"{shown}: ended after {received:,} of {expected:,} bytes; try again")

    try:
        write_atomic(path, receive)
    except urllib.error.HTTPError as error:
        raise DataError(
            f"{shown}: the server answers {error.code} ({printable(str(error.reason)[:100])}); check the URL"
        ) from None
    except urllib.error.URLError as error:
        raise DataError(
            f"{shown}: cannot be reached ({printable(str(error.reason)[:200])}); check the URL and the network"
        ) from None
    except (TimeoutError, ConnectionError, http.client.HTTPException, ValueError) as error:
        raise DataError(f"{shown}: could not be fetched ({printable(str(error)[:200])}); try again") from None
    return path


def _request(url: str) -> urllib.request.Request:
    """Return the request; user and password of the URL go into a header that redirects do not pass on."""
    parts = urllib.parse.urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers={"User-Agent": "starling"})
    if user:
        token = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener for HTTP and HTTPS only; urllib's default opener also opens files, FTP and data URLs."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        PacedHttp(),
        PacedHttps(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener
