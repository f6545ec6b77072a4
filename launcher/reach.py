"""Which machine's engine is meant: `--host`, `DOCKER_HOST` or the Docker context; a box behind ssh by one connection.

The system's ssh client makes that connection, so `~/.ssh/config`, agents and jump hosts work as they do by hand. Over it
go a shell, for questions about files, and the engine's socket: each connection to a local socket becomes one
`docker system dial-stdio` on the box, as Docker's own client does it. `DOCKER_HOST` then names the local socket, so that
whatever talks to Docker in this process, or is started by it, reaches the box.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from launcher.errors import EngineError, UsageError
from launcher.host_files import LOCAL, HostFiles, RemoteFiles

CONNECT_S = 10
"""For the connection itself; whoever is asked for a password has longer."""
PASSWORD_S = 120
ANSWER_S = 20.0
MOST_ANSWER_BYTES = 4 * 1024**2

_PLAIN = ("-T", "-a", "-x", "-o", "RemoteCommand=none", "-o", "ClearAllForwardings=yes")
"""What a user's settings for sessions by hand may ask for, and a conversation between programs must not have."""

_SCHEMES = ("ssh", "tcp", "http", "https", "unix")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

_box: Box | None = None


def choose_host(url: str) -> None:
    """Make `--host` the engine's address for this process; raises UsageError for what is no address."""
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES or not (parts.netloc or parts.path):
        raise UsageError(f"--host {url}: must be ssh://user@machine, tcp://machine:port or unix:///socket")
    if parts.scheme == "ssh":
        _destination(url)
    os.environ["DOCKER_HOST"] = url


def remote_files(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the engine's machine is reached by ssh, so that its files can be asked about there."""
    return _box is not None or _ssh_url(environment) is not None


def host_files() -> HostFiles:
    """Return the files of the machine that the engine runs on; a machine behind tcp is taken to share ours."""
    return RemoteFiles(_box) if _box is not None else LOCAL


def box() -> Box | None:
    """Return the machine that `open_box` has connected to."""
    return _box


def open_box() -> Box | None:
    """Connect to the machine that an ssh address names, once a process; None for any other address.

    Raises EngineError with ssh's own words when that fails.
    """
    global _box
    url = None if _box is not None else _ssh_url(os.environ)
    if url is not None:
        _box = Box(url)
        os.environ["DOCKER_HOST"] = f"unix://{_box.docker_socket}"
        for name in ("DOCKER_CONTEXT", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"):
            os.environ.pop(name, None)
    return _box


def _ssh_url(environment: Mapping[str, str]) -> str | None:
    url = environment.get("DOCKER_HOST")
    if not url:
        url = _context_host(environment)
    return url if url and url.startswith("ssh://") else None


def _context_host(environment: Mapping[str, str]) -> str | None:
    """Return the address in the current Docker context; None for the default one.

    Read here, since docker-py takes a context that it does not find for the default one, which is another machine.
    Raises EngineError for a context that is not there.
    """
    folder = Path(environment.get("DOCKER_CONFIG") or Path("~/.docker").expanduser())
    name = environment.get("DOCKER_CONTEXT")
    if not name:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            name = json.loads((folder / "config.json").read_text()).get("currentContext")
    if not isinstance(name, str) or name in ("", "default"):
        return None
    meta = folder / "contexts" / "meta" / hashlib.sha256(name.encode()).hexdigest() / "meta.json"
    try:
        return str(json.loads(meta.read_text())["Endpoints"]["docker"]["Host"])
    except (OSError, ValueError, KeyError, TypeError):
        raise EngineError(
            f"Docker context {name}: is not there, or names no engine; `docker context ls` lists those that are"
        ) from None


def _destination(url: str) -> list[str]:
    """Return ssh's words for `ssh://user@machine:port`; raises UsageError for what could be read as an option."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UsageError(f"--host {url}: the port is not a number") from None
    name, user = parts.hostname or "", parts.username
    if parts.password is not None:
        raise UsageError("--host: holds a password; leave it out, and let ssh ask for it or use a key")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise UsageError(f"--host {url}: only ssh://user@machine:port; Docker's socket is found by itself")
    if not (_NAME.fullmatch(name) or re.fullmatch(r"[0-9a-fA-F:]+", name)):
        raise UsageError(f"--host {url}: {name!r} is no name of a machine")
    if user is not None and not _NAME.fullmatch(user):
        raise UsageError(f"--host {url}: {user!r} is no name of a user")
    words = ["-p", str(port)] if port else []
    return [*words, *(["-l", user] if user else []), "--", name]


class Box:
    """One connection to a machine: a shell for questions, and the engine's socket. Ends with this process."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.name = urlsplit(url).hostname or url
        self._destination = _destination(url)
        if shutil.which("ssh") is None:
            raise EngineError(f"{url}: needs the ssh client, which is not installed here (openssh-client)")
        self._folder = Path(tempfile.mkdtemp(prefix="starling-ssh-"))
        atexit.register(self.close)
        self._control = self._folder / "control"
        self._errors = (self._folder / "errors").open("w+b")
        self._lock = threading.Lock()
        # The control master is the shell itself: when this process dies its input ends, and so does all of it.
        self._shell = subprocess.Popen(
            ["ssh", *_PLAIN, "-M", "-S", str(self._control), "-o", f"ConnectTimeout={CONNECT_S}", "-o",
             "ControlPersist=no", "-o", "ServerAliveInterval=15", *self._destination, "exec sh"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            preexec_fn=_ignore_interrupt,
        )  # fmt: skip
        limit = PASSWORD_S if sys.stdin is not None and sys.stdin.isatty() else CONNECT_S + 5
        code, text = self.ask('printf "%s\\n" "$HOME" "$(id -u)" "$(id -g)"', limit_s=limit)
        lines = text.splitlines()[-3:]
        if code or len(lines) != 3 or not (lines[1].isdigit() and lines[2].isdigit()):
            raise EngineError(f"{self.name}: has no POSIX shell behind ssh; use a login that has")
        self.home = Path(lines[0])
        self.ids = (int(lines[1]), int(lines[2]))
        """uid and gid of the user there."""
        self.docker_socket = self._folder / "docker.sock"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.docker_socket))
        self._listener.listen(16)
        threading.Thread(target=self._forward, daemon=True).start()

    def ask(self, script: str, limit_s: float = ANSWER_S) -> tuple[int, str]:
        """Run lines in the shell there and return their exit code and output; its state (open files) stays.

        Raises EngineError when the connection is lost, or there is no answer in time.
        """
        mark = f"answer-{secrets.token_hex(8)}"
        with self._lock:
            try:
                assert self._shell.stdin is not None
                self._shell.stdin.write(
                    f"{{ {script}\n}} 2>/dev/null\nprintf '%s %s\\n' {mark} $?\n".encode()
                )
                return self._answer(mark.encode(), time.monotonic() + limit_s)
            except BrokenPipeError:
                raise self._lost() from None

    def _answer(self, mark: bytes, deadline: float) -> tuple[int, str]:
        assert self._shell.stdout is not None
        answer = b""
        while True:
            ready, _, _ = select.select([self._shell.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise EngineError(
                    f"{self.name}: no answer over ssh in time; check the machine and the network"
                )
            chunk = os.read(self._shell.stdout.fileno(), 65536)
            answer += chunk
            if not chunk:
                raise self._lost()
            head, found, tail = answer.rpartition(mark + b" ")
            if found and tail.endswith(b"\n"):
                return int(tail), head.decode(errors="surrogateescape")
            if len(answer) > MOST_ANSWER_BYTES:
                raise EngineError(f"{self.name}: an endless answer over ssh; try it by hand: ssh {self.name}")

    def _lost(self) -> EngineError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._shell.wait(2)
        self._errors.seek(0)
        said = self._errors.read(8192).decode(errors="replace").strip().splitlines()
        why = said[-1].strip() if said else "the connection ended"
        by_hand = " ".join(["ssh", *(word for word in self._destination if word != "--")])
        return EngineError(f"{self.name} cannot be reached by ssh ({why}); this must work first: {by_hand}")

    def _forward(self) -> None:
        """Give each connection to the local socket an engine's end on the box."""
        ends: list[subprocess.Popen[bytes]] = []
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            ends = [end for end in ends if end.poll() is None]  # reaps those that are over
            with connection:
                # In a session of its own: Ctrl-C ends a wait here, and not the conversation with the engine.
                end = subprocess.Popen(
                    [
                        "ssh",
                        *_PLAIN,
                        "-S",
                        str(self._control),
                        *self._destination,
                        "docker system dial-stdio",
                    ],
                    stdin=connection.fileno(),
                    stdout=connection.fileno(),
                    stderr=self._errors,
                    start_new_session=True,
                )
            ends.append(end)

    def close(self) -> None:
        """End the connection and everything that went over it."""
        with contextlib.suppress(AttributeError, OSError):
            self._listener.close()
        with contextlib.suppress(AttributeError, OSError):
            assert self._shell.stdin is not None
            self._shell.stdin.close()
            self._shell.terminate()
            self._shell.wait(5)
        shutil.rmtree(self._folder, ignore_errors=True)


def _ignore_interrupt() -> None:
    """Leave Ctrl-C to the launcher, which still has things to undo on the box."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
