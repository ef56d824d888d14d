"""Frames of video files, decoded by PyAV: the middle ones of as many intervals as frames are wanted, as published.

A file comes from anyone: its format and codecs are those of a list, it opens no other file and no address, and what it
may decode is bounded. The reader of transformers has no such bounds, and takes the number of frames from the header,
which WebM files lack.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from ..extras import extra
from .bad_rows import UnusableRowError
from .image_files import NAME_LENGTH
from .row_tables import Rows


FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"
CODECS = (
    "h264,hevc,av1,libdav1d,vp8,libvpx,vp9,libvpx-vp9,mpeg1video,mpeg2video,mpeg4,msmpeg4,msmpeg4v1,msmpeg4v2,"
    "h263,flv,theora,mjpeg,wmv1,wmv2,wmv3,vc1,gif"
)
MAX_FILE_BYTES = 2**32
MAX_FRAME_PIXELS = 2**25  # 8K
MAX_KEPT_PIXELS = 2**28  # of all frames that are wanted: 800 MB
MAX_DECODED_PIXELS = 2**36  # of all frames of a file: 40 minutes of 720p


def middle_frames(total: int, count: int) -> list[int]:
    """The numbers of the middle frames of `count` intervals, of all frames where there are fewer."""
    borders = np.linspace(0, total, min(count, total) + 1).astype(int).tolist()
    return [(start + end - 1) // 2 for start, end in pairwise(borders)]


def read_frames(source: str | bytes, name: str, count: int) -> list[Image.Image]:
    """Decodes frames of a video.

    Args:
        source: Path of a file, or its content.
        name: Of it, for messages.
        count: Frames that are wanted.

    Returns:
        The frames, upright, or all of them where the video has fewer.

    Raises:
        MissingLibraryError: If PyAV is not installed.
        ValueError: If the file cannot be read, or is too large.
    """
    with _naming(name):
        return _decoded(source, count)


def check_video(source: str | bytes, name: str) -> None:
    """Check that a file is a video, as far as that is seen without decoding it; raises as `read_frames` does."""
    with _naming(name), _opened(source):
        pass


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Says of errors which video they are about."""
    with extra("video"):
        import av

    try:
        yield
    except (av.FFmpegError, ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name} cannot be read as a video: {error}.") from error


@contextmanager
def _opened(source: str | bytes) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream."""
    import av

    limits = {"format_whitelist": FORMATS, "codec_whitelist": CODECS, "protocol_whitelist": "file"}
    with BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        size = file.seek(0, 2)
        if size > MAX_FILE_BYTES:
            raise ValueError(f"it has {size} bytes, at most {MAX_FILE_BYTES} are read")
        file.seek(0)
        try:
            container = av.open(file, options=limits, metadata_errors="replace")
        except av.error.ArgumentError as error:
            raise ValueError(f"it has none of the formats {FORMATS}") from error
        with container:
            if not container.streams.video:
                raise ValueError("it holds no video")
            stream = container.streams.video[0]
            codec = stream.codec_context  # None for one that FFmpeg does not know
            if codec is None or codec.name not in CODECS.split(","):
                raise ValueError(f"its codec is {getattr(codec, 'name', 'unknown')}, which is not read")
            if codec.width * codec.height > MAX_FRAME_PIXELS:
                raise ValueError(f"its frames have more than {MAX_FRAME_PIXELS} pixels")
            codec.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
            yield container, stream


def _num_frames(source: str | bytes) -> int:
    """The number of frames by the header, or else by counting packets."""
    with _opened(source) as (container, stream):
        pixels = max(stream.codec_context.width * stream.codec_context.height, 1)
        total = stream.frames
        for packet in container.demux(stream) if not total else ():
            total += packet.size > 0
            if total * pixels > MAX_DECODED_PIXELS:
                break
        if total * pixels > MAX_DECODED_PIXELS:
            raise ValueError(f"it has more than {MAX_DECODED_PIXELS} pixels in all frames")
    if not total:
        raise ValueError("it has no frame")
    return total


def _decoded(source: str | bytes, count: int) -> list[Image.Image]:
    total = _num_frames(source)
    wanted = middle_frames(total, count)
    frames: list[Image.Image] = []
    kept_pixels = 0
    with _opened(source) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if number == wanted[len(frames)]:
                kept_pixels += frame.width * frame.height
                if kept_pixels > MAX_KEPT_PIXELS:
                    raise ValueError(f"{count} of its frames have more than {MAX_KEPT_PIXELS} pixels")
                image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                frames.append(image.rotate(frame.rotation, expand=True) if frame.rotation else image)
            if len(frames) == len(wanted):
                return frames
    raise ValueError(f"it ends before frame {wanted[len(frames)] + 1} of {total}")


def check_library_of(rows: Rows) -> None:
    """Refuses data whose first row has a video where none can be read, before any worker begins.

    Raises:
        MissingLibraryError: If PyAV is not installed.
    """
    try:
        row = rows.read(0) if len(rows) else {}
    except UnusableRowError:
        return
    if row.get("video") or row.get("videos"):
        with extra("video"):
            import av  # noqa: F401


def frames_of_video(source: Any, frames: tuple[int, int]) -> Any:
    """Frames of a video of a row.

    Args:
        source: Path of a file, its content, or a list of frames, which stays as it is.
        frames: Fewest and most frames. A number between them belongs to the video, whatever row or epoch it is in.

    Raises:
        MissingLibraryError: If PyAV is not installed.
        ValueError: If the file cannot be read, or is too large.
    """
    if not isinstance(source, (str, bytes)):
        return source
    name = f"The video `{source[:NAME_LENGTH]}`" if isinstance(source, str) else "A video"
    number = Path(source).name if isinstance(source, str) else str(len(source))
    return read_frames(source, name, Random(f"frames/{number}").randint(*frames))
