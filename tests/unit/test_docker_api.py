"""Asking an engine without docker-py: answers that break off, hang, refuse, or are nonsense."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import docker.errors
import pytest

from launcher.engines.docker.api import (
    Answer,
    Refused,
    SocketApi,
    is_transport,
    refusal_in,
    request_target,
    socket_path,
)
from tests.doubles.docker_engine import EngineDouble, served

ROOT = Path(__file__).resolve().parents[2]


class Troubled(EngineDouble):
    """A double of an engine without containers."""

    def content(self) -> tuple[int, bytes]:
        if "hang" in self.path:
            time.sleep(5)
        if "missing" in self.path:
            return 404, b'{"message": "No such container: missing"}'
        if "page" in self.path:
            return 502, b"<html>Bad Gateway</html>"
        return 200, b"<html>" if "nonsense" in self.path else b"[]"


@pytest.fixture
def place() -> Iterator[str]:
    with served(Troubled) as path:
        yield path


def test_an_answer_has_its_headers_whatever_their_spelling(place: str) -> None:
    answer = SocketApi(place).ask("GET", "/_ping", 3)
    assert answer.headers["api-version"] == "1.41"
    assert answer.document() == []


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\n[]", "the answer broke off"),
        (b"HTTP/1.0 200 OK\r\nContent-Le", "the answer broke off"),
        (b"220 mail.example ESMTP\r\n", "no HTTP came back"),
        (b"", "no HTTP came back"),
    ],
)
def test_what_is_no_whole_answer_is_an_error_of_the_transport(
    place: str, sent: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(double: Troubled) -> None:
        double.request.recv(65536)
        double.request.sendall(sent)

    monkeypatch.setattr(Troubled, "handle", answer)
    with pytest.raises(ConnectionError, match=words) as broken:
        SocketApi(place).ask("GET", "/_ping", 3)
    assert is_transport(broken.value)


def test_a_hung_engine_ends_the_question_in_time(place: str) -> None:
    api = SocketApi(place)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        api.ask("GET", "/hang", 0.2)
    assert time.monotonic() - began < 3
    assert api.ask("GET", "/_ping", 3).document() == []


def test_no_socket_and_nobody_behind_it_are_errors_of_the_transport(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        SocketApi(str(tmp_path / "none.sock")).ask("GET", "/_ping", 3)
    assert is_transport(missing.value)
    assert refusal_in(missing.value) is None


@pytest.mark.parametrize(
    ("path", "status", "words", "vanished"),
    [
        ("/missing", 404, "No such container: missing", True),
        ("/page", 502, "<html>Bad Gateway</html>", False),
    ],
)
def test_a_refusal_carries_the_engines_words(
    place: str, path: str, status: int, words: str, vanished: bool
) -> None:
    with pytest.raises(Refused, match=words) as refused:
        SocketApi(place).ask("GET", path, 3).document()
    assert (refused.value.status, refused.value.vanished) == (status, vanished)


def test_an_answer_that_is_no_json_is_an_error_of_the_transport(place: str) -> None:
    with pytest.raises(ConnectionError, match="no JSON") as nonsense:
        SocketApi(place).ask("GET", "/nonsense", 3).document()
    assert is_transport(nonsense.value)


def test_an_empty_answer_is_none() -> None:
    assert Answer(204, {}, b"").document() is None


def test_a_refusal_to_docker_py_reads_the_same() -> None:
    class Response:
        """A double of the response that docker-py was given."""

        status_code = 409

    refused = refusal_in(docker.errors.APIError("409 Client Error", Response(), "name taken"))
    assert refused is not None
    assert (refused.status, str(refused)) == (409, "name taken")


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("unix:///var/run/docker.sock", "/var/run/docker.sock"),
        ("unix://var/run/docker.sock", "/var/run/docker.sock"),
        ("tcp://box:2376", None),
        ("ssh://ann@box", None),
    ],
)
def test_only_a_unix_socket_is_asked_without_docker_py(address: str, path: str | None) -> None:
    assert socket_path(address) == path


def test_filters_are_json_and_flags_are_ones() -> None:
    assert request_target("1.41", "/containers/json", {"all": True, "filters": {"label": ["a=b"]}}) == (
        "/v1.41/containers/json?all=1&filters=%7B%22label%22%3A+%5B%22a%3Db%22%5D%7D"
    )
    assert request_target("1.41", "/containers/a b/kill", {}) == "/v1.41/containers/a%20b/kill"


@pytest.mark.parametrize("words", [["status"], ["kill-all", "--yes"], ["stop"]])
def test_a_command_on_this_machine_does_without_docker_py(
    words: list[str], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{place}")
    code = (
        "import atexit, sys; from launcher.cli.main import main;"
        "atexit.register(lambda: print(sorted({'docker', 'requests', 'urllib3'} & set(sys.modules))));"
        f"main({words!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "[]"
