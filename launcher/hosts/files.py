"""The files of the machine that replicas run on: this one's, or those of a box that is reached by ssh."""

from __future__ import annotations

import base64
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from starling.core.dataset import Files, OwnFiles
from starling.core.regular_file import is_file, open_regular

if TYPE_CHECKING:
    from launcher.hosts.ssh_connection import SshConnection


class HostFiles(Files, Protocol):
    """Questions about paths, asked before a replica is given them."""

    @property
    def home(self) -> Path:
        """The user's home folder there."""

    @property
    def start(self) -> Path:
        """Where relative paths start."""

    def is_file(self, path: Path) -> bool:
        """Return whether a file is there that the user may read; links are followed."""

    def real(self, path: Path) -> Path:
        """Return the path with every link followed."""

    def read(self, path: Path, most_bytes: int) -> bytes:
        """Return the head of a file; raises OSError."""


class LocalFiles(OwnFiles):
    """Files of this machine."""

    @property
    def home(self) -> Path:
        """The user's home folder."""
        return Path.home()

    @property
    def start(self) -> Path:
        """The working directory."""
        return Path.cwd()

    def is_file(self, path: Path) -> bool:
        """Return whether a file is there."""
        return is_file(path)

    def exists(self, path: Path) -> bool:
        """Return whether a folder or a file is there."""
        return self.is_dir(path) or is_file(path)

    def real(self, path: Path) -> Path:
        """Return the path with every link followed."""
        return Path(os.path.realpath(path))

    def read(self, path: Path, most_bytes: int) -> bytes:
        """Return the head of a file; raises OSError."""
        with open_regular(path) as file:
            return file.read(most_bytes)


LOCAL = LocalFiles()


class RemoteFiles:
    """Files of a box, asked through the one shell that is open there; as with scp, relative paths start at home."""

    def __init__(self, box: SshConnection) -> None:
        self._box = box
        self.home = box.home
        self.start = box.home

    def is_file(self, path: Path) -> bool:
        """Return whether a file is there that the user may read."""
        return self._holds(f"[ -f {_quote(path)} ] && [ -r {_quote(path)} ]")

    def is_dir(self, path: Path) -> bool:
        """Return whether a folder is there."""
        return self._holds(f"[ -d {_quote(path)} ]")

    def exists(self, path: Path) -> bool:
        """Return whether a folder is there, or a file that the user may read."""
        return self.is_dir(path) or self.is_file(path)

    def expand(self, base: Path, given: str) -> Path:
        """Return `given` below `base`, or by itself where it is absolute, its `~` replaced and its links kept."""
        path = Path(given)
        if path.parts and path.parts[0] == "~":
            path = self.home.joinpath(*path.parts[1:])
        return Path(os.path.normpath(base / path))

    def real(self, path: Path) -> Path:
        """Return the path with every link followed; as it is where the box cannot say."""
        code, text = self._box.ask(f"readlink -f -- {_quote(path)}")
        return Path(text.removesuffix("\n")) if code == 0 and text.startswith("/") else path

    def read(self, path: Path, most_bytes: int) -> bytes:
        """Return the head of a file; raises OSError."""
        code, text = self._box.ask(
            f"[ -f {_quote(path)} ] && [ -r {_quote(path)} ] && head -c {most_bytes:d} -- {_quote(path)} | base64"
        )
        if code:
            raise OSError(0, f"no readable file on {self._box.name}", str(path))
        return base64.b64decode(text)

    def _holds(self, test: str) -> bool:
        return self._box.ask(test)[0] == 0


def _quote(path: Path) -> str:
    return shlex.quote(str(path))
