"""Fetch one file over HTTPS: with progress, resumed after an interruption, checked, and put in place by one rename."""

from __future__ import annotations

import errno
import hashlib
import http.client
import ipaddress
import json
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from starling.core.errors import DiskFull, StarlingError, UsageError
from starling.core.files.atomic import TEMPORARY_SUFFIX, fsync_directory, write_atomic
from starling.core.files.refusals import disk_write, refusal
from starling.core.files.safe_open import make_folder, open_file, remove, rename
from starling.core.lock import held, try_flock, wait_for
from starling.core.plain_json import read_json
from starling.core.words import printable
from starling.data.fetch.paced import PacedHttp, PacedHttps

logger = logging.getLogger(__name__)

MIRROR = "STARLING_MIRROR"
"""Environment variable with a base URL that holds every file by its bare name, in place of the public hosts."""

ATTEMPTS = 5
"""Maximum number of connections for one file; each continues where the last one broke off."""
TIMEOUT_S = 30.0
"""Longest time in seconds that a server may send nothing."""
_CHUNK = 1 << 18
_NOTES_BYTES = 1 << 16
_AGENT = "starling-trainer"
_TRANSIENT = frozenset((408, 425, 429, 500, 502, 503, 504))

Show = Callable[[Callable[[], str]], None]
"""Takes a function that returns a temporary line of progress, as `Progress.show` does."""


class FetchError(StarlingError):
    """A file could not be fetched, or has unexpected content; the message is the reason, with the URL."""


class _Broken(Exception):
    """A transfer ended early; the next connection continues it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Download:
    """One file to fetch, and its known properties."""

    url: str
    target: Path
    max_bytes: int
    """Maximum size; larger files are refused, whatever the server announces."""
    sha256: str | None = None
    """Expected hex digest of the whole file."""
    size: int | None = None
    """Expected size of the whole file in bytes."""


def mirrored(url: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the URL to fetch: the file's bare name below `$STARLING_MIRROR` if the variable is set, else `url`."""
    base = environment.get(MIRROR)
    return f"{base.rstrip('/')}/{url.rsplit('/', 1)[1]}" if base else url


def record_path(path: Path) -> Path:
    """Return the path of the SHA-256 of a fetched file, beside the file, in the format of `sha256sum`."""
    return path.with_name(f"{path.name}.sha256")


def fetch(
    download: Download,
    *,
    show: Show = lambda line: None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Fetch the file to its target unless the target exists; return its hex SHA-256, recorded beside the file.

    Received bytes stay in `NAME.part`, so that this call or the next one continues an interrupted download. Of several
    processes that want the same file, one fetches it. Raises FetchError if the file cannot be fetched, is too large, or
    has another digest or size than announced; then the target does not appear. UsageError for a URL that is not HTTPS.
    """
    check_url(download.url)
    target = download.target
    with only_one(target):
        if target.is_file():  # another process was faster
            return sha256_of(target)
        part = target.with_name(target.name + TEMPORARY_SUFFIX)
        _receive_all(download, part, show, sleep, clock)
        digest = _checked(download, part)
        write_atomic(record_path(target), f"{digest}  {target.name}\n")
        rename(part, target)
        remove(_notes_path(part))
        fsync_directory(target.parent)
        return digest


def read_text(url: str, *, max_bytes: int = 4 << 20, timeout_s: float = 10.0) -> str:
    """Return a small text file from the web; raises FetchError if it cannot be fetched."""
    check_url(url)
    try:
        with _open(url, {}, timeout_s) as response:
            content: bytes = response.read(max_bytes + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FetchError(f"{url}: {_reason(error)}") from None
    if len(content) > max_bytes:
        raise FetchError(f"{url}: larger than {max_bytes} bytes")
    return content.decode("utf-8", "replace")


def check_url(url: str) -> str:
    """Return `url` if it is HTTPS, or plain HTTP to this machine; raises UsageError otherwise."""
    parts = urllib.parse.urlsplit(url)
    if parts.username or parts.password:
        raise UsageError(
            f"a download URL with a password ({parts.hostname}): leave it out; it would be logged"
        )
    if parts.hostname and (
        parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(parts.hostname))
    ):
        return url
    raise UsageError(f"{url}: only https:// is fetched (http:// from this machine itself); fix the URL")


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def only_one(target: Path) -> Iterator[None]:
    """Hold `target` against other processes that would make it too; wait for them, and say so."""
    make_folder(target.parent)
    path = target.with_name(f".{target.name}.lock")

    def wait(descriptor: int) -> bool:
        line = f"{target}: another process is fetching it; waiting"
        return wait_for(lambda: try_flock(descriptor), tell=lambda: logger.info(line))

    with held(path, lambda: open_file(path, os.O_WRONLY | os.O_CREAT, alone=True), wait):
        yield


def _receive_all(
    download: Download,
    part: Path,
    show: Show,
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> None:
    """Fill the part file, over several connections if necessary."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _receive(download, part, show, clock)
            return
        except (_Broken, OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, OSError) and (refused := refusal(error, part)):
                raise refused from None
            if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES):
                raise FetchError(f"{part}: {error.strerror}; make room or choose another folder") from None
            kept = _size(part)
            permanent = isinstance(error, urllib.error.HTTPError) and error.code not in _TRANSIENT
            # No connection at the first attempt: the machine is offline or the host name wrong; waiting does not help.
            offline = isinstance(error, urllib.error.URLError) and not isinstance(
                error, urllib.error.HTTPError
            )
            if permanent or attempt == ATTEMPTS or (offline and attempt == 1):
                rest = f"; {_megabytes(kept)} are kept, the same command goes on from there" if kept else ""
                raise FetchError(f"{download.url}: {_reason(error)}{rest}") from None
            logger.warning(f"{download.target.name}: {_reason(error)}; going on from {_megabytes(kept)}")
            sleep(2.0 ** (attempt - 1))


def _receive(download: Download, part: Path, show: Show, clock: Callable[[], float]) -> None:
    """Append the bytes of one connection to the part file. Raises _Broken if they are too few."""
    validator = _validator_of(download, part)
    have = _size(part) if validator is not None else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and validator:
        headers["If-Range"] = validator  # a file that has changed on the server is sent whole
    try:
        response = _open(download.url, headers, TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            if have == download.size or (download.sha256 and sha256_of(part) == download.sha256):
                return  # the part file is complete
            remove(part)
            raise _Broken("the server's file is shorter than what had arrived") from None
        raise
    with response:
        start, total = _range_of(response, have)
        if start not in (0, have):
            remove(part)
            raise _Broken("the server sent another part than asked for")
        _check_answer(download, response, start, total)
        with disk_write(part), _its_writer(part, anew=start == 0) as file:
            if start == 0:
                _note(download, part, response)
            got = _copy(download, response, file, start, total, show, clock)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and got != total:
        raise _Broken(f"the connection ended at {_megabytes(got)} of {_megabytes(total)}")


@contextmanager
def _its_writer(part: Path, *, anew: bool) -> Iterator[IO[bytes]]:
    """Open the part file for appending, and empty it if the download begins `anew`.

    The part file itself is locked too: if the lock file was removed, another process may be writing the part file.
    """
    with open(open_file(part, os.O_WRONLY | os.O_CREAT | os.O_APPEND, alone=True), "ab") as file:
        if not try_flock(file.fileno()):
            raise FetchError(f"{part}: another process is writing it; wait for that process, and start again")
        if anew:
            file.truncate(0)
        yield file


def _copy(
    download: Download,
    response: http.client.HTTPResponse,
    file: IO[bytes],
    start: int,
    total: int | None,
    show: Show,
    clock: Callable[[], float],
) -> int:
    """Write the body to `file`, and return the size of the part file, earlier bytes included."""
    got, began = start, clock()

    def line() -> str:
        rate = (got - start) / max(clock() - began, 1e-6)
        text = f"{download.target.name}: {_megabytes(got)}"
        if total is None:
            return f"{text}, {_megabytes(rate)}/s"
        left = (total - got) / max(rate, 1)
        return f"{text} of {_megabytes(total)}, {_megabytes(rate)}/s, {left:.0f} s left"

    while chunk := response.read1(_CHUNK):
        got += len(chunk)
        if got > download.max_bytes or (total is not None and got > total):
            raise FetchError(
                f"{download.url}: sends more than {min(download.max_bytes, total or got)} bytes; refused"
            )
        file.write(chunk)
        show(line)
    return got


def _check_answer(
    download: Download, response: http.client.HTTPResponse, start: int, total: int | None
) -> None:
    """Refuse an answer that cannot be the file, before a byte is written. Raises FetchError."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise FetchError(
            f"{download.url}: sent packed ({printable(encoding[:40])}), which was not asked for; refused"
        )
    if response.headers.get_content_type() == "text/html":
        raise FetchError(
            f"{download.url}: answered with a web page, not a file; is there a login or a proxy?"
        )
    if total is None:
        return
    if total > download.max_bytes:
        raise FetchError(
            f"{download.url}: {_megabytes(total)}, over the limit of {_megabytes(download.max_bytes)}; refused"
        )
    if download.size is not None and total != download.size:
        raise FetchError(f"{download.url}: {total} bytes, published are {download.size}; refused")
    free = shutil.disk_usage(download.target.parent).free
    if total - start > free:
        raise DiskFull(
            f"{download.target.parent}: {_megabytes(total - start)} to come, {_megabytes(free)} free; make room"
        )


def _checked(download: Download, part: Path) -> str:
    """Return the digest of the whole file; raises FetchError, and removes the file, if digest or size are wrong."""
    size, digest = _size(part), sha256_of(part)
    if download.size is not None and size != download.size:
        problem = f"has {size} bytes, published are {download.size}"
    elif download.sha256 is not None and digest != download.sha256.lower():
        problem = f"has SHA-256 {digest}, published is {download.sha256.lower()}"
    else:
        return digest
    remove(part)
    remove(_notes_path(part))
    raise FetchError(f"{download.url}: what arrived {problem}; it was thrown away")


def _notes_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _note(download: Download, part: Path, response: http.client.HTTPResponse) -> None:
    """Save the URL and the validator by which the next connection recognises whether the server's file is the same."""
    tag = response.headers.get("ETag", "")
    # A weak tag does not promise the same bytes (RFC 9110, 13.1.5).
    validator = tag if tag.startswith('"') else response.headers.get("Last-Modified", "")
    write_atomic(_notes_path(part), json.dumps({"url": download.url, "validator": validator}) + "\n")


def _validator_of(download: Download, part: Path) -> str | None:
    """Return the validator to resume with; None if the part is of another file, or a change could go unnoticed."""
    try:
        notes = read_json(_notes_path(part), _NOTES_BYTES)
    except (OSError, ValueError):
        return None
    if not isinstance(notes, dict) or notes.get("url") != download.url:
        return None
    validator = str(notes.get("validator") or "")
    return validator if validator or download.sha256 else None


def _range_of(response: http.client.HTTPResponse, have: int) -> tuple[int, int | None]:
    """Return the position of the body in the file, and the size of the whole file if the server announces it."""
    if response.status == http.client.PARTIAL_CONTENT:
        match = re.fullmatch(
            r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})", response.headers.get("Content-Range", ""), re.ASCII
        )
        return (int(match[1]), int(match[2])) if match else (-1, None)
    length = response.headers.get("Content-Length", "")
    return 0, _whole(length)


def _whole(length: str) -> int | None:
    """Return the number of bytes in a header; None if the header is no such number."""
    return int(length) if re.fullmatch(r"\d{1,18}", length, re.ASCII) else None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, but never from HTTPS to plain HTTP."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Return the next request; raises UsageError for a target that must not be fetched."""
        check_url(newurl)
        if req.type == "https" and not newurl.lower().startswith("https:"):
            raise UsageError(f"{req.full_url}: redirects to plain HTTP; refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, headers: Mapping[str, str], timeout_s: float) -> http.client.HTTPResponse:
    request = urllib.request.Request(
        url, headers={"User-Agent": _AGENT, "Accept-Encoding": "identity", **headers}
    )
    response: http.client.HTTPResponse = urllib.request.build_opener(_Redirects, PacedHttp, PacedHttps).open(
        request, timeout=timeout_s
    )
    return response


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {printable(str(error.reason)[:100])}"
    if isinstance(error, urllib.error.URLError):
        return str(getattr(error.reason, "strerror", None) or error.reason)
    return printable(str(getattr(error, "strerror", None) or error)[:200]) or type(error).__name__


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"
