"""What a detector looks at: pictures, videos, URLs, lists, webcams and streams, one frame after the other."""

from __future__ import annotations

import glob
import re
import urllib.parse
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from app.core.budget import BudgetExceeded
from app.core.regular_file import found, is_file, is_folder, read_regular
from app.data.images import IMAGE_SUFFIXES, decode_image
from app.data.remote_source import download
from app.errors import DataError, UsageError, readable

VIDEO_SUFFIXES = frozenset(
    (".asf", ".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")
)
STREAM_SCHEMES = frozenset(("rtsp", "rtsps", "rtmp", "rtmps", "rtp", "srt", "tcp", "udp"))
STREAM_TIMEOUT_MS = 15_000
MAX_LIST_BYTES = 16 << 20
MAX_FRAME_PIXELS = 8192 * 4352
"""Of a video: 8K is smaller. A decoder holds some 20 frames, those that later ones refer to."""

Kind = Literal["picture", "video", "stream"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One thing to look at. Nothing is opened, and nothing fetched, before `frames`."""

    kind: Kind
    address: str | int
    """Path, URL, or a webcam's number; a URL may hold a password, so print `shown`."""
    remote: bool = False
    """A file behind a URL, fetched before it is opened."""

    @property
    def shown(self) -> str:
        """The address without user, password and query."""
        if isinstance(self.address, int):
            return f"webcam {self.address}"
        return hide_secrets(self.address) if "://" in self.address else self.address

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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Frame:
    """One picture, or one frame of a video."""

    image: np.ndarray[Any, Any]
    """Upright RGB, uint8 [H,W,3]."""
    number: int
    """Place in its video, from 0; 0 for a picture."""
    total: int
    """Frames that its video will give; 1 for a picture, 0 where nobody knows."""
    fps: float
    """Frames a second of what is written from this video; 0 for a picture."""


@readable(DataError)
def find_sources(source: str) -> list[Source]:
    """Return what `--source` names, in order.

    Raises DataError where nothing is there, UsageError for several endless streams.
    """
    found = _read_list(Path(source).expanduser()) if _is_list(source) else _find(source, Path())
    endless = [one.shown for one in found if one.kind == "stream"]
    if endless and len(found) > 1:
        raise UsageError(
            f"--source {source}: {endless[0]} never ends; give each stream a detect.py of its own"
        )
    return found


def frames(source: Source, downloads: Path, stride: int = 1) -> Generator[Frame, None, None]:
    """Yield the frames of one source, every `stride`-th of a video; a remote file lands in `downloads`.

    Raises DataError where it cannot be read.
    """
    address = source.address
    if source.remote:
        assert isinstance(address, str)
        address = str(download(address, downloads / source.file_name, source.shown))
    if source.kind == "picture":
        yield Frame(image=decode_image(Path(str(address))), number=0, total=1, fps=0.0)
        return
    with closing(_read_video(address, source, stride)) as video:
        yield from video


def hide_secrets(address: str) -> str:
    """Return a URL without user, password, query and fragment."""
    url = urllib.parse.urlsplit(address)
    return urllib.parse.urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))


def _find(source: str, folder: Path) -> list[Source]:
    """Return what one word names; a relative path is tried from `folder` too."""
    scheme, separator, _ = source.partition("://")
    if separator:
        return [_remote(source, scheme.lower())]
    if source.isdecimal():
        return [Source(kind="stream", address=int(source))]
    given = Path(source).expanduser()
    for path in (folder / given, given):
        if is_folder(path):
            return _of_paths(
                sorted(path.iterdir()), f"{path}: holds no pictures or videos; name a folder that does"
            )
        if found(path):
            return [_local(path)]
    if any(character in source for character in "*?["):
        matches = sorted(glob.glob(str(folder / given), recursive=True))
        return _of_paths(
            [Path(match) for match in matches], f"--source {source}: nothing matches; check the pattern"
        )
    raise DataError(
        f"--source {source}: no such file or folder ({given.absolute()}); "
        "give a path, glob, URL, .txt list, webcam number or stream"
    )


def _of_paths(paths: list[Path], nothing: str) -> list[Source]:
    """Return sources for those paths that are pictures or videos; raises DataError if none is."""
    known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    found = [_local(path) for path in paths if path.suffix.lower() in known and is_file(path)]
    if not found:
        raise DataError(f"{nothing} (known: {', '.join(sorted(suffix[1:] for suffix in known))})")
    return found


def _local(path: Path) -> Source:
    kind = _kind(path.suffix)
    if kind is None:
        raise DataError(f"{path}: neither a picture nor a video by its name; convert it, or rename it")
    return Source(kind=kind, address=str(path))


def _kind(suffix: str) -> Kind | None:
    if suffix.lower() in IMAGE_SUFFIXES:
        return "picture"
    return "video" if suffix.lower() in VIDEO_SUFFIXES else None


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
        return Source(kind="stream", address=address)  # a camera's page of moving pictures, or a playlist
    return Source(kind=kind, address=address, remote=True)


def _is_list(source: str) -> bool:
    return "://" not in source and Path(source).suffix.lower() in (".txt", ".streams")


def _read_list(path: Path) -> list[Source]:
    """Return what the lines of a list name; relative paths go from the list's folder, or from here."""
    try:
        content = read_regular(path, MAX_LIST_BYTES)
    except OSError as error:
        raise DataError(f"--source {path}: cannot be read: {error.strerror}; check the path") from None
    except BudgetExceeded as error:
        raise DataError(f"{path}: {error}, so not a list; check the path") from None
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text; a list has one path or URL a line") from None
    sources: list[Source] = []
    for number, line in enumerate(lines, 1):
        word = line.strip()
        if not word or word.startswith("#"):
            continue
        try:
            sources += _find(word, path.parent)
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
    if not sources:
        raise DataError(f"{path}: an empty list; give one path or URL a line")
    return sources


def _read_video(address: str | int, source: Source, stride: int) -> Generator[Frame, None, None]:
    capture = _open(address, source)
    try:
        fps = capture.get(cv2.CAP_PROP_FPS)
        fps = fps / stride if 0 < fps < 1000 else 25.0  # cameras and broken files give 0, or nonsense
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if source.kind == "video" else 0
        number = -1
        while capture.grab():
            number += 1
            if number % stride:
                continue
            whole, image = capture.retrieve()
            if not whole:
                break
            _check_frame(image.shape[1], image.shape[0], source)
            yield Frame(
                image=cv2.cvtColor(image, cv2.COLOR_BGR2RGB),
                number=number,
                total=max(-(-total // stride), 0),
                fps=fps,
            )
        if number < 0:
            raise DataError(f"{source.shown}: gave no frame; check the file, or the camera")
    finally:
        capture.release()


def _check_frame(width: float, height: float, source: Source) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise DataError(
            f"{source.shown}: frames of {width:.0f} x {height:.0f} pixels, over {MAX_FRAME_PIXELS:,}; scale it down"
        )


def _open(address: str | int, source: Source) -> cv2.VideoCapture:
    """Return an opened capture; raises DataError with what to check."""
    if source.kind == "video" and not is_file(str(address)):  # OpenCV would wait for the writer of a FIFO
        raise DataError(f"{source.shown}: is not a regular file; check the path")
    if source.kind == "stream" and not isinstance(address, int):
        timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, STREAM_TIMEOUT_MS]
        timeouts += [cv2.CAP_PROP_READ_TIMEOUT_MSEC, STREAM_TIMEOUT_MS]
        capture = cv2.VideoCapture(address, cv2.CAP_FFMPEG, timeouts)
    else:
        capture = cv2.VideoCapture(address)
    if capture.isOpened():
        _check_frame(capture.get(cv2.CAP_PROP_FRAME_WIDTH), capture.get(cv2.CAP_PROP_FRAME_HEIGHT), source)
        return capture
    remedy = {
        "video": "the file is damaged or of an unknown kind; convert it to mp4",
        "stream": "check that it is on, and may be read from here",
    }
    raise DataError(f"{source.shown}: cannot be opened; {remedy[source.kind]}")
