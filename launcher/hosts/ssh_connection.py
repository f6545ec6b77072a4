"""One connection to a machine by the system's ssh client: a shell for commands, and the engine's socket.

`~/.ssh/config`, keys, agents and jump hosts therefore work as in a terminal. The shell is the control master, and all
other sessions share its connection. A local socket leads to the engine's socket. ssh forwards it, which costs each
connection one round trip. If ssh cannot forward it, each connection runs `docker system dial-stdio`, as Docker's own
client does. (docker-py's ssh transport needs paramiko even to call the ssh client, and a new login each time.)
"""

from __future__ import annotations

import atexit
import contextlib
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
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from launcher.errors import ConnectionLost, EngineError
from starling.core.errors import UsageError

CONNECT_S = 10
"""Seconds to connect; PASSWORD_S applies if the user may be asked for a password."""
PASSWORD_S = 120
ANSWER_S = 20.0
MOST_ANSWER_BYTES = 4 * 1024**2

_PLAIN = ("-T", "-a", "-x", "-o", "RemoteCommand=none", "-o", "ClearAllForwardings=yes")
"""Options that override a user's settings for interactive sessions, which would disturb a session between programs."""

_FIND_SOCKET = """
host=$DOCKER_HOST
if [ -z "$host" ]; then
    host=unix:///var/run/docker.sock
    if [ -n "$DOCKER_CONTEXT" ] || grep -q currentContext "${DOCKER_CONFIG:-$HOME/.docker}/config.json"; then
        host=$(docker context inspect --format '{{.Endpoints.docker.Host}}')
    fi
fi
path=${host#unix://}
printf '%s\\n' "$path"
[ -r "$path" ] && [ -w "$path" ] && echo yours || echo closed
stat -L -c %G -- "$path"
[ -S "$path" ]
"""
"""A script that prints the path of the engine's socket on the host, whether the user may use it, and its group."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def destination(url: str) -> list[str]:
    """Return ssh's arguments for `ssh://user@machine:port`; raises UsageError for what ssh could read as an option."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UsageError(f"--host {url}: the port is not a number") from None
    name, user = parts.hostname or "", parts.username
    if parts.password is not None:
        raise UsageError("--host: holds a password; leave it out, and let ssh ask for it or use a key")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise UsageError(
            f"--host {url}: only ssh://user@machine:port; Docker's socket is found automatically"
        )
    if not (_NAME.fullmatch(name) or re.fullmatch(r"[0-9a-fA-F:]+", name)):
        raise UsageError(f"--host {url}: {name!r} is no name of a machine")
    if user is not None and not _NAME.fullmatch(user):
        raise UsageError(f"--host {url}: {user!r} is no name of a user")
    words = ["-p", str(port)] if port else []
    return [*words, *(["-l", user] if user else []), "--", name]


class SshConnection:
    """One connection to a machine: a shell for commands, and the engine's socket. Ends with this process."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.name = urlsplit(url).hostname or url
        self._destination = destination(url)
        if shutil.which("ssh") is None:
            raise EngineError(f"{url}: needs the ssh client, which is not installed here (openssh-client)")
        self._folder = Path(tempfile.mkdtemp(prefix="starling-ssh-"))
        atexit.register(self.close)
        self._control = self._folder / "control"
        self._errors = (self._folder / "errors").open("w+b")
        self._lock = threading.Lock()
        # The shell is the control master: when this process dies, the shell's input ends, and with it the connection.
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
        """uid and gid of the user on the host."""
        self.docker_socket = self._folder / "docker.sock"
        if not self._forward_socket():
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(self.docker_socket))
            self._listener.listen(16)
            threading.Thread(target=self._dial_for_each, daemon=True).start()

    def ask(
        self, script: str, limit_s: float = ANSWER_S, heard: Callable[[str], None] | None = None
    ) -> tuple[int, str]:
        """Run lines in the host's shell and return their exit code and output; the shell keeps its state (open files).

        With `heard`, which receives each line of output at once, the limit applies to the time without output. Raises
        EngineError if the connection is lost, or if there is no answer in time.
        """
        mark = f"answer-{secrets.token_hex(8)}"
        with self._lock:
            try:
                assert self._shell.stdin is not None
                self._shell.stdin.write(
                    f"{{ {script}\n}} </dev/null 2>/dev/null\nprintf '%s %s\\n' {mark} $?\n".encode()
                )
                return self._answer(mark.encode(), limit_s, heard)
            except BrokenPipeError:
                raise self.lost() from None

    def _answer(self, mark: bytes, limit_s: float, heard: Callable[[str], None] | None) -> tuple[int, str]:
        assert self._shell.stdout is not None
        answer, told = b"", 0
        deadline = time.monotonic() + limit_s
        while True:
            ready, _, _ = select.select([self._shell.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise EngineError(
                    f"{self.name}: no answer over ssh in time; check the machine and the network"
                )
            chunk = os.read(self._shell.stdout.fileno(), 65536)
            answer += chunk
            if not chunk:
                raise self.lost()
            head, found, tail = answer.rpartition(mark + b" ")
            ended = bool(found) and tail.endswith(b"\n")
            if heard is not None:
                deadline = time.monotonic() + limit_s
                complete = len(head) if ended else answer.rfind(b"\n") + 1
                for line in answer[told:complete].splitlines():
                    heard(line.decode(errors="surrogateescape"))
                told = max(told, complete)
            if ended:
                return int(tail), head.decode(errors="surrogateescape")
            if len(answer) > MOST_ANSWER_BYTES:
                raise EngineError(f"{self.name}: an endless answer over ssh; try it by hand: ssh {self.name}")

    @property
    def ended(self) -> bool:
        """Whether the connection has ended or is ending: its sockets close a moment before its process ends."""
        try:
            self._shell.wait(0.5)
        except subprocess.TimeoutExpired:
            return False
        return True

    def lost(self) -> ConnectionLost:
        """Return the error for a lost connection, with ssh's own message."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._shell.wait(2)
        self._errors.seek(0)
        said = self._errors.read(8192).decode(errors="replace").strip().splitlines()
        why = said[-1].strip() if said else "the connection ended"
        by_hand = " ".join(["ssh", *(word for word in self._destination if word != "--")])
        return ConnectionLost(
            f"{self.name} cannot be reached by ssh ({why}); this must work first: {by_hand}"
        )

    def _forward_socket(self) -> bool:
        """Let ssh forward the local socket to the engine's socket; return whether the engine answers through it.

        The engine does not answer if it has no socket, or if sshd does not forward sockets. Raises EngineError if the
        user on the host may not use the socket.
        """
        code, text = self.ask(_FIND_SOCKET)
        words = text.split("\n")
        if code or len(words) < 3 or not words[0].startswith("/"):
            return False
        if words[1] != "yours":
            raise EngineError(
                f"{self.name}: Docker's socket {words[0]} there is not yours to use; it is for group {words[2]}: "
                f"sudo usermod -aG {words[2]} {self._user()}, there, and log in again"
            )
        done = subprocess.run(
            # Without the user's settings, because ssh would also request their forwards.
            ["ssh", "-F", "/dev/null", "-S", str(self._control), "-O", "forward", "-L",
             f"{self.docker_socket}:{words[0]}", *self._destination],
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            check=False,
        )  # fmt: skip
        if done.returncode == 0 and _answers(self.docker_socket):
            return True
        self.docker_socket.unlink(missing_ok=True)
        return False

    def _user(self) -> str:
        return urlsplit(self.url).username or "$USER"

    def _dial_for_each(self) -> None:
        """Connect each connection to the local socket with the host's engine."""
        ends: list[subprocess.Popen[bytes]] = []
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            ends = [end for end in ends if end.poll() is None]  # reaps ended processes
            with connection:
                # In its own session: Ctrl-C ends a wait here, but not the connection to the engine.
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
        """End the connection and all sessions over it."""
        with contextlib.suppress(AttributeError, OSError):
            self._listener.close()
        with contextlib.suppress(AttributeError, OSError):
            assert self._shell.stdin is not None
            self._shell.stdin.close()
            self._shell.terminate()
            self._shell.wait(5)
        shutil.rmtree(self._folder, ignore_errors=True)


def _ignore_interrupt() -> None:
    """Ignore Ctrl-C in ssh: the launcher handles it, and may still have to undo changes on the host."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _answers(path: Path) -> bool:
    """Return whether an engine answers at a local socket."""
    with socket.socket(socket.AF_UNIX) as end:
        end.settimeout(ANSWER_S)
        try:
            end.connect(str(path))
            end.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            return end.recv(16).startswith(b"HTTP/1")
        except OSError:
            return False
