"""The sources of detection: images, videos, URLs, lists, webcams and streams, read frame by frame."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import urllib.parse
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from starling.core.budget import BudgetExceeded
from starling.core.errors import DataError, UsageError
from starling.core.files.kinds import (
    IMAGE_SUFFIXES,
    UNREAD_IMAGE_SUFFIXES,
    is_hidden,
    is_hidden_copy,
    suffix_of,
)
from starling.core.files.refusals import readable
from starling.core.files.regular import found, is_file, is_folder, read_regular
from starling.core.paths import at_home
from starling.core.utf8 import NotUtf8, text_of
from starling.data.dataset.images import decode_image
from starling.data.dataset.left_out import LeftOut
from starling.data.sources.films import (
    ANIMATED_SUFFIXES,
    VIDEO_SUFFIXES,
    Ended,
    Frame,
    is_animated,
    read_animation,
    read_video,
)
from starling.data.sources.remote_source import download
from starling.outputs.names import Subject

STREAM_SCHEMES = frozenset(("rtsp", "rtsps", "rtmp", "rtmps", "rtp", "srt", "tcp", "udp"))
MAX_LIST_BYTES = 16 << 20
HIDDEN = "hidden files, which may be copies"
KNOWN_SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES | {".apng"}

Kind = Literal["image", "video", "stream"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One source of images. Nothing is opened or fetched before `frames`."""

    kind: Kind
    address: str | int
    """Path, URL, or number of a webcam; a URL may hold a password: print `shown` instead."""
    remote: bool = False
    """Whether the source is a file behind a URL, fetched before it is opened."""

    @property
    def shown(self) -> str:
        """The address without user, password and query."""
        if isinstance(self.address, int):
            return f"webcam {self.address}"
        return hide_secrets(self.address) if "://" in self.address else self.address

    @property
    def subject(self) -> Subject:
        """The basis of the names of this source's output files, without any secret of the address."""
        identity = self.shown
        if isinstance(self.address, str):
            identity = os.path.abspath(self.address)
            if "://" in self.address:
                url = urllib.parse.urlsplit(self.address)
                query = hashlib.sha256(f"{url.query}#{url.fragment}".encode()).hexdigest()
                identity = self.shown + (f"?sha256={query}" if url.query or url.fragment else "")
        return Subject(identity=identity, file_name=self.file_name, film=self.kind != "image")

    @property
    def file_name(self) -> str:
        """A plain file name that outputs are named after."""
        if isinstance(self.address, int):
            return f"webcam{self.address}"
        if "://" not in self.address:
            return Path(self.address).name
        url = urllib.parse.urlsplit(self.address)
        name = urllib.parse.unquote(url.path).rsplit("/", 1)[-1] or url.hostname or "stream"
        return re.sub(r"[^\w.-]+", "_", name).lstrip(".")[-100:] or "stream"


@readable(DataError)
def find_sources(source: str, left_out: LeftOut | None = None) -> list[Source]:
    """Return the sources that `--source` names, in order; `left_out` counts images and films that are left out.

    Raises DataError if there is no source, UsageError for several endless streams.
    """
    left_out = LeftOut() if left_out is None else left_out
    found = _read_list(at_home(source), left_out) if _is_list(source) else _find(source, Path(), left_out)
    endless = [one.shown for one in found if one.kind == "stream"]
    if endless and len(found) > 1:
        raise UsageError(
            f"--source {source}: {endless[0]} never ends; give each stream a detect.py of its own"
        )
    return found


def frames(
    source: Source, fetched: Path, stride: int = 1, ended: Ended = lambda frames, listed: None
) -> Generator[Frame, None, None]:
    """Yield the frames of one source, every `stride`-th of a film; a remote file is fetched to `fetched`.

    `ended` is called for a film that ends early. Raises DataError if the source cannot be read.
    """
    address = source.address
    if source.remote:
        assert isinstance(address, str)
        address = str(download(address, fetched, source.shown))
    if source.kind == "image":
        yield Frame(image=decode_image(Path(str(address))), number=0, total=1, fps=0.0)
        return
    path = Path(str(address))
    if source.kind == "video" and path.suffix.lower() in ANIMATED_SUFFIXES:
        film = read_animation(path, source.shown, stride, ended)
    else:
        film = read_video(address, source.shown, stride, ended, stream=source.kind == "stream")
    with closing(film):
        yield from film


def hide_secrets(address: str) -> str:
    """Return a URL without user, password, query and fragment."""
    url = urllib.parse.urlsplit(address)
    return urllib.parse.urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))


def _find(source: str, folder: Path, left_out: LeftOut) -> list[Source]:
    """Return the sources that one word names; a relative path is tried from `folder` too."""
    scheme, separator, _ = source.partition("://")
    if separator:
        return [_remote(source, scheme.lower())]
    if source.isdecimal():
        return [Source(kind="stream", address=int(source))]
    given = at_home(source)
    for path in (folder / given, given):
        if is_folder(path):
            return _of_paths(
                sorted(path.iterdir()), f"{path}: holds no images or films; name a folder that does", left_out
            )
        if found(path):
            return [_local(path)]
    if any(character in source for character in "*?["):
        matches = _glob(str(folder / given)) or _glob(_literal_folders(folder / given))
        nothing = f"--source {source}: nothing matches; check the pattern"
        return _of_paths(matches, nothing, left_out, given.parts)
    raise DataError(
        f"--source {source}: no such file or folder ({given.absolute()}); "
        "give a path, glob, URL, .txt list, webcam number or stream"
    )


def _glob(pattern: str) -> list[Path]:
    return [Path(match) for match in sorted(glob.glob(pattern, recursive=True, include_hidden=True))]


def _literal_folders(pattern: Path) -> str:
    """Return a pattern in which existing leading folders are taken literally: `set [1]/*.jpg`."""
    there = next((parent for parent in pattern.parents if is_folder(parent)), Path())
    return str(Path(glob.escape(str(there))) / pattern.relative_to(there))


def _of_paths(
    paths: list[Path], nothing: str, left_out: LeftOut, written: tuple[str, ...] = ()
) -> list[Source]:
    """Return sources for the paths that are images or films; raises DataError if no path is.

    `written` are the parts of the pattern as the user wrote them: a hidden folder that the user named is included.
    """
    passed_over = LeftOut()
    sources = []
    for path in paths:
        suffix = path.suffix.lower()
        if suffix not in KNOWN_SUFFIXES | UNREAD_IMAGE_SUFFIXES or not is_file(path):
            continue
        if any(is_hidden(part) for part in (path.parts if written else (path.name,)) if part not in written):
            passed_over.add(HIDDEN, path, "name them one by one if they are meant", kind=suffix)
        elif suffix in KNOWN_SUFFIXES:
            sources.append(_local(path))
        else:
            passed_over.add_unread_image(path)
    if not sources:
        known = ", ".join(sorted(suffix[1:] for suffix in KNOWN_SUFFIXES))
        raise DataError("\n  ".join([f"{nothing} (known: {known})", *passed_over.lines()]))
    left_out.update([passed_over])
    return sources


def _local(path: Path) -> Source:
    kind = _kind(path.suffix)
    if kind is None and path.suffix.lower() in UNREAD_IMAGE_SUFFIXES:
        raise DataError(f"{path}: {path.suffix} images are not read; convert it to JPEG or PNG")
    if kind is None:
        raise DataError(f"{path}: neither an image nor a film by its name; convert it, or rename it")
    return Source(kind="video" if kind == "image" and is_animated(path) else kind, address=str(path))


def _kind(suffix: str) -> Kind | None:
    if suffix.lower() in IMAGE_SUFFIXES:
        return "image"
    return "video" if suffix.lower() in VIDEO_SUFFIXES | {".apng"} else None


def _remote(address: str, scheme: str) -> Source:
    if scheme in STREAM_SCHEMES:
        return Source(kind="stream", address=address)
    if scheme not in ("http", "https"):
        raise DataError(
            f"--source {hide_secrets(address)}: {scheme}:// is not read; "
            "give a path, an http(s) URL, or a stream such as rtsp://"
        )
    kind = _kind(Path(urllib.parse.urlsplit(address).path).suffix)
    if kind is None:
        return Source(kind="stream", address=address)  # a camera's page of moving images, or a playlist
    return Source(kind=kind, address=address, remote=True)


def _is_list(source: str) -> bool:
    return "://" not in source and Path(source).suffix.lower() in (".txt", ".streams")


def _read_list(path: Path, left_out: LeftOut) -> list[Source]:
    """Return the sources that the lines of a list name; relative paths start at its folder or the current folder."""
    try:
        content = read_regular(path, MAX_LIST_BYTES)
    except OSError as error:
        raise DataError(f"--source {path}: cannot be read: {error.strerror}; check the path") from None
    except BudgetExceeded as error:
        raise DataError(f"{path}: {error}, so not a list; check the path") from None
    try:
        lines = text_of(content, path).splitlines()
    except NotUtf8 as error:
        raise DataError(f"{path}: {error}; a list has one path or URL a line") from None
    sources: list[Source] = []
    for number, line in enumerate(lines, 1):
        word = line.strip()
        if not word or word.startswith("#"):
            continue
        try:
            sources += _listed(word, path.parent, left_out)
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
    if not sources:
        nothing = f"{path}: names no image or film; give one path or URL a line"
        raise DataError("\n  ".join([nothing, *left_out.lines()]))
    return sources


def _listed(word: str, folder: Path, left_out: LeftOut) -> list[Source]:
    """Return the sources of one line of a list; unread image formats and hidden copies are only counted."""
    if "://" not in word:
        unread = Path(word).suffix.lower() in UNREAD_IMAGE_SUFFIXES - {".apng"}
        if (unread or is_hidden_copy(word)) and any(is_file(place / word) for place in (folder, Path())):
            if unread:
                left_out.add_unread_image(word)
            else:
                left_out.add(HIDDEN, word, "take them out of the list", kind=suffix_of(word))
            return []
    return _find(word, folder, left_out)
