"""Asking an engine through docker-py: answers that break off, hang, refuse or are nonsense, and many questions at once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from docker.errors import APIError, NotFound

from launcher.engines.docker.connection import Connection, Manner
from launcher.engines.docker.troubles import is_gone, refusal
from launcher.errors import EngineError
from launcher.hosts.this_machine import ThisMachine
from launcher.parallel import in_parallel
from tests.doubles.docker_engine import EngineDouble, served

MANNER = Manner(title="Docker", remedy="start it", patience_s=0.4)


class Troubled(EngineDouble):
    """A double of an engine that keeps connections open, without containers but those that `missing` and the like name."""

    protocol_version = "HTTP/1.1"
    clients: set[object] = set()  # noqa: RUF012

    def content(self) -> tuple[int, bytes]:
        self.clients.add(self.request)
        if "slow" in self.path:
            time.sleep(1)
        if "missing" in self.path:
            return 404, b'{"message": "No such container: missing"}'
        if "page" in self.path:
            return 502, b"<html>Bad Gateway</html>"
        if "cause" in self.path:
            return 500, b'{"cause": "no message"}'
        if "nonsense" in self.path:
            return 200, b"<html>"
        return 200, json.dumps({"path": self.path}).encode()

    do_POST = EngineDouble.do_GET  # noqa: N815


@pytest.fixture
def place() -> Iterator[str]:
    Troubled.clients = set()
    with served(Troubled) as path:
        yield path


def connect(path: str) -> Connection:
    return Connection(MANNER, ThisMachine({"DOCKER_HOST": f"unix://{path}"}))


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\n[]", "the answer broke off"),
        (b"HTTP/1.0 200 OK\r\nContent-Le", "no JSON came back: ''"),
        (b"220 mail.example ESMTP\r\n", "no HTTP came back"),
        (b"", "the connection was closed without an answer"),
    ],
)
def test_what_is_no_whole_answer_is_no_answer(
    place: str, sent: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(double: Troubled) -> None:
        double.request.recv(65536)
        double.request.sendall(sent)

    monkeypatch.setattr(Troubled, "handle", answer)
    with pytest.raises(EngineError) as broken:
        connect(place)
    assert str(broken.value) == f"Docker does not answer ({words}); start it"


def test_a_hung_engine_ends_a_question_in_time_and_an_action_is_waited_for(place: str) -> None:
    connection = connect(place)
    began = time.monotonic()
    with (
        pytest.raises(EngineError, match=r"Docker does not answer \(no answer within"),
        connection.translated(),
    ):
        connection.client.inspect_container("slow")
    assert time.monotonic() - began < 0.9
    connection.client.start("slow")
    assert time.monotonic() - began > 1.2


@pytest.mark.parametrize("slashes", ["///", "//"])
def test_the_socket_that_is_not_there_is_named(tmp_path: Path, slashes: str) -> None:
    path = tmp_path / "none.sock"
    with pytest.raises(EngineError) as missing:
        Connection(MANNER, ThisMachine({"DOCKER_HOST": f"unix:{slashes}{str(path)[1:]}"}))
    assert str(missing.value) == f"Docker does not answer (no socket at {path}); start it"


@pytest.mark.parametrize(
    ("name", "status", "words", "gone"),
    [
        ("missing", 404, "No such container: missing", True),
        ("page", 502, "<html>Bad Gateway</html>", False),
        ("cause", 500, '{"cause": "no message"}', False),
    ],
)
def test_a_refusal_carries_the_engines_words(
    place: str, name: str, status: int, words: str, gone: bool
) -> None:
    connection = connect(place)
    with pytest.raises(APIError) as refused:
        connection.client.inspect_container(name)
    assert (refused.value.status_code, refusal(refused.value), is_gone(refused.value)) == (
        status,
        words,
        gone,
    )
    assert isinstance(refused.value, NotFound) == (status == 404)
    with pytest.raises(EngineError) as told, connection.translated("a"):
        connection.client.kill(name)
    assert str(told.value) == f"a: Docker refuses: {words}"


def test_an_answer_that_is_no_json_is_shown(place: str) -> None:
    connection = connect(place)
    with pytest.raises(EngineError) as told, connection.translated():
        connection.client.inspect_container("nonsense")
    assert str(told.value) == "Docker does not answer (no JSON came back: '<html>'); start it"


def test_many_threads_share_a_client_and_each_gets_its_own_answer(place: str) -> None:
    connection = connect(place)
    names = [f"c{number}" for number in range(200)]
    for _ in range(2):
        answers = [done.value for done in in_parallel(connection.client.inspect_container, names)]
        assert [answer["path"] for answer in answers] == [f"/v1.41/containers/{name}/json" for name in names]
    assert len(Troubled.clients) <= 17, "connections are used again"


def test_a_connection_that_the_engine_has_closed_is_made_anew(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = threading.Event()

    def answer_once(double: Troubled) -> None:
        double.handle_one_request()

    def finish(double: Troubled) -> None:
        EngineDouble.finish(double)
        closed.set()

    connection = connect(place)
    monkeypatch.setattr(Troubled, "handle", answer_once)
    monkeypatch.setattr(Troubled, "finish", finish)
    connection.client.close()
    for _ in range(3):
        closed.clear()
        assert connection.client.inspect_container("a")["path"].endswith("/a/json")
        assert closed.wait(5)
        time.sleep(0.05)  # for the socket to be shut down after it
