"""Where the bytes of a video come from, and what is wrong with them when they do not open."""

from __future__ import annotations

import io
import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from foveate.errors import (
    DecodeLimitError,
    EmptyVideoError,
    MissingDependencyError,
    TruncatedVideoError,
    UnsupportedVideoError,
    VideoError,
    VideoNotFoundError,
    VideoSourceError,
)
from foveate.video.idle import IDLE

if TYPE_CHECKING:
    from av.container import InputContainer

# Only self-contained files: playlists (hls, concat, dash) would make FFmpeg open whatever files
# or addresses they name, and image or text demuxers accept nearly anything. Audio formats are
# let in so that an audio file can be called one.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,gif,apng,"
    "h264,hevc,vvc,av1,obu,ivf,m4v,mjpeg,mxf,nut,rm,dv,wtv,yuv4mpegpipe,swf,h261,h263,dnxhd,vc1,"
    "wav,mp3,flac,aac,ac3,eac3,aiff,au,caf,amr,w64,wv,ape,dts"
)
# For reads that block inside FFmpeg (network drives); local files never come near it.
TIMEOUT_SECONDS = 60.0
#: Earlier releases of PyAV crash the process on some damaged and rare files.
_OLDEST_AV = (17, 1)

_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftyp", "an MP4/MOV"),
    (4, b"moov", "an MP4/MOV"),
    (4, b"mdat", "an MP4/MOV"),
    (0, b"\x1aE\xdf\xa3", "a Matroska/WebM"),
    (0, b"RIFF", "an AVI/RIFF"),
    (0, b"FLV\x01", "an FLV"),
    (0, b"OggS", "an Ogg"),
    (0, b"GIF8", "a GIF"),
    (0, b"\x30\x26\xb2\x75", "an ASF/WMV"),
)
_IMAGE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")


def import_av() -> Any:
    """PyAV, or an error that says how to get it.

    Raises:
        MissingDependencyError: PyAV is not installed, or older than 17.1.
    """
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError(
            'decoding video files needs PyAV: pip install "foveate[video]"'
        ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", av.__version__)[:2])
    if version < _OLDEST_AV:
        raise MissingDependencyError(
            f"PyAV {av.__version__} crashes on some files; decoding needs 17.1 or newer: "
            'pip install --upgrade "av>=17.1"'
        )
    return av


class MediaSource:
    """A place that a video can be read from, any number of times.

    Args:
        source: path, bytes-like object, or binary file object. A file object is read from its
            beginning whatever its position, which is put back afterwards; one that cannot seek
            is read into memory.

    Raises:
        VideoError: see the subclasses; every check here is done without opening a decoder.
    """

    def __init__(self, source: str | os.PathLike[str] | bytes | BinaryIO) -> None:
        self._path: str | None = None
        self._data: bytes | None = None
        self._file: Any = None
        self._lock = threading.Lock()
        self._kept: dict[int, Any] = {}
        self._states: dict[int, Any] = {}
        if isinstance(source, (str, os.PathLike)):
            self.name = str(source)
            self._path = _checked_path(source)
        elif isinstance(source, (bytes, bytearray, memoryview)):
            self.name = f"{len(source)} bytes"
            self._data = bytes(source)
        elif hasattr(source, "read"):
            self.name = str(getattr(source, "name", f"<{type(source).__name__}>"))
            self._take_file(source)
        else:
            raise VideoSourceError(
                f"cannot read a video from {type(source).__name__}; give a path, bytes, a binary "
                "file, a uint8 tensor [T,3,H,W], a numpy array [T,H,W,3] or a list of PIL images"
            )
        if self._data is not None and not self._data:
            raise EmptyVideoError("there are no bytes to read", source=self.name)

    def _take_file(self, file: Any) -> None:
        try:
            probe = file.read(0)
            seekable = bool(getattr(file, "seekable", lambda: False)())
            if not isinstance(probe, bytes):
                raise VideoSourceError(
                    "the file object is open in text mode; open it with mode 'rb'", source=self.name
                )
            if not seekable:
                self._data = file.read()
                return
            here = file.tell()
            size = file.seek(0, io.SEEK_END)
            file.seek(here)
        except (OSError, ValueError) as error:
            if isinstance(error, VideoError):
                raise
            raise VideoSourceError(f"cannot read it: {error}", source=self.name) from error
        if size == 0:
            raise EmptyVideoError("there are no bytes to read", source=self.name)
        self._file = file

    @contextmanager
    def _stream(self) -> Iterator[Any]:
        """What `av.open` takes: a URL of a local file, or a file object at its beginning."""
        if self._path is not None:
            # With the scheme spelt out, a name like "concat:a|b" stays a name.
            yield f"file:{self._path}"
        elif self._data is not None:
            yield io.BytesIO(self._data)
        else:
            # Waiting would be for ever if the reader in progress is an iterator of this thread.
            if not self._lock.acquire(blocking=False):
                raise VideoSourceError(
                    "the file object is in use by another read of this clip; finish that first, or "
                    "make the clip from a path or bytes",
                    source=self.name,
                )
            here = 0
            try:
                here = self._file.tell()
                self._file.seek(0)
                yield self._file
            finally:
                # Its owner may have closed it meanwhile.
                with suppress(OSError, ValueError):
                    self._file.seek(here)
                self._lock.release()

    @property
    def path(self) -> str | None:
        """The file's path, if it is one."""
        return self._path

    def read(self) -> bytes:
        """All bytes."""
        with self._stream() as stream:
            if isinstance(stream, str):
                return Path(stream.removeprefix("file:")).read_bytes()
            return stream.read()

    @property
    def is_shared(self) -> bool:
        """Whether there is one place to read from (a file object), so one reader at a time."""
        return self._file is not None

    def keep(self, container: InputContainer, state: Any = None) -> None:
        """Leave a container that is being read open, for a later ``open(reuse=True)``.

        Args:
            container: as `open` gave it.
            state: what `state_of` will tell whoever opens it then.
        """
        if not self.is_shared:
            self._kept[id(container)] = state

    def state_of(self, container: InputContainer) -> Any:
        """What was known about a container when it was kept; told once."""
        return self._states.pop(id(container), None)

    @contextmanager
    def open(self, *, reuse: bool = False) -> Iterator[InputContainer]:
        """An open container, closed on leaving unless it is kept.

        Args:
            reuse: one that was kept will do, wherever it has been read to.

        Raises:
            VideoError: it is not a video that can be read.
        """
        idle = IDLE.take(self) if reuse else None
        container = None
        if idle is not None:
            container = idle.container
            self._states[id(container)] = idle.state
        with nullcontext() if container is not None else self._stream() as stream:
            container = container or self._open(stream)
            try:
                yield container
            finally:
                self._states.pop(id(container), None)
                if id(container) in self._kept:
                    IDLE.put(self, _Idle(container, self._kept.pop(id(container))))
                else:
                    container.close()

    def _open(self, stream: Any) -> InputContainer:
        av = import_av()
        options = {"format_whitelist": FORMATS}
        if _begins_as_mp4(stream):
            # An MP4's header says all there is to know; without this FFmpeg decodes the first
            # keyframe to see for itself, which takes as long as opening and reading some ten more.
            options["skip_frame"] = "all"
        try:
            return av.open(
                stream,
                mode="r",
                options=options,
                timeout=TIMEOUT_SECONDS,
                metadata_errors="replace",
            )
        except av.error.FFmpegError as error:
            failure = error
        if isinstance(failure, MemoryError):
            raise too_much_memory(self.name) from failure
        raise explain(_words(failure), _head(stream), self.name) from failure


def too_much_memory(name: str) -> DecodeLimitError:
    """What a header asks for that no memory holds (a table of two billion entries, say)."""
    return DecodeLimitError(
        "opening it asks for more memory than there is; its header is damaged or hostile",
        source=name,
        limit="memory",
    )


def looks_like_picture(head: bytes) -> bool:
    """Whether a file with these first bytes (12 or more) is a still picture."""
    return head.startswith(_IMAGE_MAGIC) or head[8:12] == b"WEBP"


def explain(words: str, head: bytes, name: str) -> VideoError:
    """Why something did not open, from its first bytes.

    Args:
        words: what FFmpeg says.
        head: some 64 bytes.
        name: of the source.
    """
    if looks_like_picture(head):
        return UnsupportedVideoError(
            "this is a picture, not a video; give a list of PIL images", source=name
        )
    for offset, magic, kind in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return TruncatedVideoError(
                f"it begins as {kind} file, but its header or index is cut off or broken "
                f"({words}); get a complete copy",
                source=name,
            )
    return UnsupportedVideoError(f"it is not a video in a known container ({words})", source=name)


class _Idle(NamedTuple):
    container: Any
    state: Any

    def close(self) -> None:
        self.container.close()


def _head(stream: Any, count: int = 64) -> bytes:
    """The first bytes."""
    if isinstance(stream, str):
        with Path(stream.removeprefix("file:")).open("rb") as file:
            return file.read(count)
    stream.seek(0)
    head = stream.read(count)
    stream.seek(0)
    return head


def _begins_as_mp4(stream: Any) -> bool:
    try:
        return _head(stream, 8)[4:] == b"ftyp"
    except (OSError, ValueError):  # opening it says what is wrong
        return False


def _words(failure: Exception) -> str:
    return str(getattr(failure, "strerror", None) or failure)


def _checked_path(source: str | os.PathLike[str]) -> str:
    text = os.fsdecode(source)
    path = Path(text)
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = "no such file"
        if "://" in text:
            reason = "this is an address, not a file; download it first"
        elif not isinstance(error, FileNotFoundError):
            reason = f"cannot read it: {error}"
        raise VideoNotFoundError(reason, source=text) from error
    if stat.S_ISDIR(status.st_mode):
        raise VideoSourceError("this is a directory, not a video file", source=text)
    if not stat.S_ISREG(status.st_mode):
        # Opening a pipe or device would wait for a writer, perhaps for ever.
        raise VideoSourceError("this is not a regular file", source=text)
    if status.st_size == 0:
        raise EmptyVideoError("the file is empty (0 bytes)", source=text)
    with suppress(OSError):
        path = path.resolve()
    if not os.access(path, os.R_OK):
        raise VideoSourceError("no permission to read the file", source=text)
    return str(path)
