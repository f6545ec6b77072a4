"""Read the frames of films (video files, streams, animated images), and detect a film that ends early."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import cv2
import numpy as np
from PIL import Image

from starling.core.errors import DataError
from starling.core.files.regular import is_file
from starling.data.dataset.images import MIN_SIDE
from starling.data.sources.edit_list import shown_seconds

VIDEO_SUFFIXES = frozenset(
    (
        ".3gp",
        ".asf",
        ".avi",
        ".flv",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
    )
) | {".vob", ".webm", ".wmv"}
ANIMATED_SUFFIXES = frozenset((".apng", ".gif", ".png", ".webp"))
"""Suffixes of images that may hold several frames; each such file is checked."""
STREAM_TIMEOUT_MS = 15_000
MAX_FRAME_PIXELS = 8192 * 4352
"""Maximum pixels of a frame of a film or an animated image; 8K is smaller. A decoder holds some 20 frames of a film, as
references for later frames, and up to 24 bytes per pixel of an animated image."""
SNIFFED = 1 << 16
"""Number of leading bytes in which an animated PNG or WebP declares the animation."""
ANIMATION_FPS = 10.0
"""Frames per second of an animated image that declares no duration; browsers take the same rate."""
MOST_FRAMES = 1 << 31
"""Limit of a declared number of frames; a larger number is not believed."""

Index = Literal["mp4", "avi"]
"""Containers that list every frame: MP4 and QuickTime; AVI."""

Ended = Callable[[int, int | None], None]
"""Called for a film that ends early: with the number of frames read, and of frames that the file lists, or None."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Frame:
    """One image, or one frame of a video."""

    image: np.ndarray[Any, Any]
    """Upright RGB, uint8 [H,W,3]."""
    number: int
    """Position in the video, from 0; 0 for an image."""
    total: int
    """Expected number of frames of the video; 1 for an image, 0 if unknown."""
    fps: float
    """Frames per second of output written from this video; 0 for an image."""


def is_animated(path: Path) -> bool:
    """Return whether an image file holds several frames; False for an unreadable file: decoding reports the error."""
    suffix = path.suffix.lower()
    if suffix not in ANIMATED_SUFFIXES:
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(SNIFFED)
        if head.startswith(b"\x89PNG"):
            return b"acTL" in head.partition(b"IDAT")[0]
        if head[8:16] == b"WEBPVP8X":
            return len(head) > 20 and bool(head[20] & 0x02)
        if not head.startswith(b"GIF8"):
            return False
        with Image.open(path) as image:
            return bool(getattr(image, "is_animated", False))
    except Exception:  # Pillow raises many types on hostile bytes
        return False


def read_animation(path: Path, shown: str, stride: int, ended: Ended) -> Generator[Frame, None, None]:
    """Yield every `stride`-th frame of an animated image, transparency dropped.

    Raises DataError if not even the first frame can be read.
    """
    number = total = 0
    try:
        with Image.open(path) as image:
            _check_frame(*image.size, shown)
            if min(image.size) < MIN_SIDE:
                width, height = image.size
                raise DataError(
                    f"{shown}: frames of {width} x {height} pixels; scale them, each side {MIN_SIDE} or more"
                )
            total = int(getattr(image, "n_frames", 1))
            image.load()  # before it, Pillow does not know the frame duration of a WebP
            milliseconds = image.info.get("duration") or 0
            fps = 1000 / milliseconds if milliseconds else ANIMATION_FPS
            while number < total:
                image.seek(number)
                _check_frame(*image.size, shown)  # a frame of a GIF may be larger than earlier frames
                if number % stride == 0:
                    pixels = np.array(image.convert("RGB"))
                    yield Frame(image=pixels, number=number, total=-(-total // stride), fps=fps / stride)
                number += 1
    except (DataError, MemoryError, GeneratorExit):
        raise
    except Exception as error:  # Pillow raises many types on hostile bytes
        if number == 0:
            raise DataError(f"{shown}: cannot be decoded ({error}); replace the file") from None
        ended(number, total if path.suffix.lower() != ".gif" else None)  # a GIF has no list of its frames
        return
    if path.suffix.lower() == ".gif" and not _is_whole_gif(path):
        ended(number, None)


def _is_whole_gif(path: Path) -> bool:
    """Return whether the blocks of a GIF continue without a gap up to its end mark, or to the end of the file."""
    with open(path, "rb") as file:
        _skip_colours(file, file.read(13)[10:11])
        while kind := file.read(1):
            if kind == b";":
                return True
            if kind == b"!":  # an extension: its label, then blocks
                file.read(1)
            elif kind == b",":  # an image: place and size, colours, code size, then blocks
                _skip_colours(file, file.read(9)[8:])
                file.read(1)
            else:
                return not (kind + file.read(SNIFFED)).strip(b"\0")  # some encoders fill up with zeros
            while size := file.read(1)[:1]:
                if size == b"\0":
                    break
                file.seek(size[0], os.SEEK_CUR)
    return True


def _skip_colours(file: IO[bytes], flags: bytes) -> None:
    """Skip the colour table that these flags of a GIF announce."""
    if flags and flags[0] & 0x80:
        file.seek(3 << ((flags[0] & 7) + 1), os.SEEK_CUR)


def read_video(
    address: str | int, shown: str, stride: int, ended: Ended, *, stream: bool
) -> Generator[Frame, None, None]:
    """Yield every `stride`-th frame of a video file or a stream; raises DataError if there is no frame."""
    capture = _open(address, shown, stream)
    try:
        rate = capture.get(cv2.CAP_PROP_FPS)
        fps = rate / stride if 0 < rate < 1000 else 25.0  # cameras and broken files report 0, or nonsense
        listed = 0 if stream else _listed_frames(capture)
        number = -1
        at_ms = 0.0
        while capture.grab():
            number += 1
            at_ms = capture.get(cv2.CAP_PROP_POS_MSEC)
            if number % stride:
                continue
            whole, image = capture.retrieve()
            if not whole:
                number -= 1
                break
            _check_frame(image.shape[1], image.shape[0], shown)
            yield Frame(
                image=cv2.cvtColor(image, cv2.COLOR_BGR2RGB),
                number=number,
                total=-(-listed // stride),
                fps=fps,
            )
        if number < 0:
            raise DataError(f"{shown}: gave no frame; check the file, or the camera")
        index = _index_of(address) if listed else None
        listed = _shown_frames(listed, address, rate) if index == "mp4" else listed
        if ends_early(number + 1, listed, index=index, last_s=at_ms / 1000, fps=rate):
            ended(number + 1, listed)
    finally:
        capture.release()


def ends_early(frames: int, listed: int, *, index: Index | None, last_s: float, fps: float) -> bool:
    """Return whether a film that gave `frames` frames, the last one `last_s` seconds after the first, is damaged.

    `listed` is the number of frames that the file declares, 0 if none. An MP4 lists every frame, and a few may not be
    shown. An AVI also lists frames without new content, which are skipped; therefore the time of its last frame must be
    too early as well. In other files the number is an estimate from length and `fps`, wrong for a varying rate.
    """
    few = max(2, listed // 50) if index else 2 + listed // 10
    if frames >= listed - few:
        return False
    if index == "mp4":
        return True
    timed = (last_s > 0 or frames == 1) and fps > 0
    return not timed or last_s < (0.98 if index else 0.9) * listed / fps - 0.5


def _shown_frames(listed: int, address: str | int, fps: float) -> int:
    """Return how many of the listed frames the film's edit list shows; all of them without an edit list."""
    seconds = shown_seconds(Path(str(address)))
    if seconds is None or not 0 < fps < 10_000:
        return listed
    return min(listed, math.ceil(seconds * fps))


def _check_frame(width: float, height: float, shown: str) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise DataError(
            f"{shown}: frames of {width:.0f} x {height:.0f} pixels, over {MAX_FRAME_PIXELS:,}; scale them down"
        )


def _listed_frames(capture: cv2.VideoCapture) -> int:
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return int(count) if 0 < count < MOST_FRAMES else 0


def _index_of(address: str | int) -> Index | None:
    """Return the container type by content, if the container lists its frames; None for others."""
    try:
        with open(str(address), "rb") as file:
            head = file.read(16)
    except OSError:
        return None
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free"):
        return "mp4"
    return "avi" if head[8:12] == b"AVI " else None


def _open(address: str | int, shown: str, stream: bool) -> cv2.VideoCapture:
    """Return an opened capture; raises DataError with a remedy."""
    if isinstance(address, str) and not stream and not is_file(address):
        # OpenCV would wait for the writer of a FIFO
        raise DataError(f"{shown}: is not a regular file; check the path")
    if stream and not isinstance(address, int):
        timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, STREAM_TIMEOUT_MS]
        timeouts += [cv2.CAP_PROP_READ_TIMEOUT_MSEC, STREAM_TIMEOUT_MS]
        capture = cv2.VideoCapture(address, cv2.CAP_FFMPEG, timeouts)
    else:
        capture = cv2.VideoCapture(address)
    if capture.isOpened():
        _check_frame(capture.get(cv2.CAP_PROP_FRAME_WIDTH), capture.get(cv2.CAP_PROP_FRAME_HEIGHT), shown)
        return capture
    remedy = (
        "check that it is on, and may be read from here"
        if stream
        else "the file is damaged or of an unknown kind; convert it to mp4"
    )
    raise DataError(f"{shown}: cannot be opened; {remedy}")
