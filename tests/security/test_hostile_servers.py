"""Whatever a server sends, and however slowly, a download ends in one message and puts nothing in place."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from starling.core.errors import DataError
from starling.data.fetch import paced
from starling.data.fetch.download import Download, FetchError, fetch
from starling.data.sources import remote_source

Serve = Callable[[bytes, float], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return what starts a server of raw bytes, and gives its URL; each byte of the last 200 comes after a pause."""
    listeners: list[socket.socket] = []

    def start(answer: bytes, pause: float = 0.0) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def run() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    try:
                        if pause:
                            for byte in answer:
                                connection.sendall(bytes([byte]))
                                time.sleep(pause)
                        else:
                            connection.sendall(answer)
                    except OSError:
                        pass

        threading.Thread(target=run, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/a.jpg"

    yield start
    for listener in listeners:
        listener.close()


def answer(*headers: str, body: bytes = b"abc", first: str = "HTTP/1.1 200 OK") -> bytes:
    return "\r\n".join((first, *headers, "", "")).encode("latin-1") + body


HOSTILE = {
    "packed": answer("Content-Encoding: gzip", "Content-Length: 3"),
    "claims more": answer("Content-Length: 5000"),
    "claims a petabyte": answer("Content-Length: 1000000000000000"),
    "claims digits": answer(f"Content-Length: {'9' * 5000}", body=b"x" * 3000),
    "claims exotic digits": answer("Content-Length: \xb2", "Transfer-Encoding: chunked", body=b"zz\r\n"),
    "too much": answer(body=b"x" * 5000),
    "no HTTP": b"\x00\xff" * 100,
    "endless header": answer(*(f"X-{n}: y" for n in range(500))),
    "endless line": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000,
    "redirect to a file": answer("Location: file:///etc/passwd", first="HTTP/1.1 302 Found"),
    "redirect to nonsense": answer("Location: http://[::1", first="HTTP/1.1 302 Found"),
    "redirect to a port": answer("Location: http://127.0.0.1:99999999/", first="HTTP/1.1 302 Found"),
    "terminal": answer(first="HTTP/1.1 500 \x1b[2J\x07"),
    "chunks": answer("Transfer-Encoding: chunked", body=b"-5\r\nabc\r\n"),
    "huge chunk": answer("Transfer-Encoding: chunked", body=b"ffffffffffffffff\r\nabc"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_answer_is_one_message_and_no_file(serve: Serve, tmp_path: Path, kind: str) -> None:
    url = serve(HOSTILE[kind], 0.0)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the class is what is tested
        fetch(Download(url=url, target=tmp_path / "a.jpg", max_bytes=2000), sleep=lambda s: None)
    assert type(caught.value).__name__ in ("FetchError", "UsageError")
    assert str(caught.value).isprintable()
    with pytest.raises(DataError) as seen:
        remote_source.download(url, tmp_path / "a.jpg", "http://there/a.jpg", limit=2000)
    assert str(seen.value).isprintable()
    assert not (tmp_path / "a.jpg").exists()


@pytest.mark.parametrize("part", ["header", "body"])
def test_a_server_that_sends_less_than_a_byte_a_second_is_left(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    # A clock on which each byte takes two seconds: 60 seconds pass in no time.
    now = iter(range(0, 1_000_000, 2))
    monkeypatch.setattr(paced, "CLOCK", lambda: float(next(now)))
    slow = answer("Content-Length: 2000", *("X: y",) * (90 if part == "header" else 0), body=b"x" * 2000)
    url = serve(slow, 0.001)
    with pytest.raises(FetchError, match=r"stands still: only .* bytes in 6. s, under 1 byte a second"):
        fetch(Download(url=url, target=tmp_path / "a.jpg", max_bytes=1 << 20), sleep=lambda s: None)
    with pytest.raises(DataError, match="stands still"):
        remote_source.download(url, tmp_path / "b.jpg", "http://there/a.jpg")
    assert not (tmp_path / "b.jpg").exists()
