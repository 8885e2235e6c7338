"""Live sources: a file being written, a pipe, a camera, an address; read forward only.

Legend: T frames, H, W pixels in display orientation.
"""

from __future__ import annotations

import math
import os
import stat
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
import torch

from foveate.errors import FrameRequestError, VideoNotFoundError, VideoSourceError
from foveate.video import sampling
from foveate.video.frames import Damage, Frames
from foveate.video.live_address import (
    PROTOCOLS,
    Address,
    address_of,
    check_format,
    checked_options,
    is_device,
    scheme_of,
    shown,
)
from foveate.video.live_bytes import ForwardFile, GrowingFile, PipeBytes
from foveate.video.live_feed import Feed, LiveReport, Picture, Settings
from foveate.video.live_reading import run

Behind = Literal["wait", "drop_oldest"]
# Pictures wait in a queue, several of them: less is allowed than of a file.
MAX_PIXELS = 16 << 20


class Live(Iterator[Frames]):
    """A source that is read while it is made; an iterator of `Frames`, and a context manager.

    It is read forward, once, on a thread of its own that starts with the first ``next``. There is
    no list of packets and no seeking, so its length is not known. Times count from the first
    picture and always ascend: where a source's own clock goes back or leaps (a camera that starts
    anew), ``report.gaps`` says so. Packets that do not decode are passed over and counted. A
    source that ends or breaks off is not opened again: whoever wants that makes another `Live`.

    Args:
        source: path of a file or named pipe; binary file object; "-" for standard input; an address
            ("rtsp://camera/1", "https://...", "udp://@:5000"); a device, together with ``format``
            ("/dev/video0", format="v4l2").
        fps: pictures to take a second, by their times; None: all.
        size: (height, width) to scale to while converting; None: as they are.
        growing: the file is still being written: at its end more is waited for.
        timeout: longest silence, in seconds. A growing file counts as finished then, anything else
            has failed.
        chunk: most pictures that one ``next`` gives; it waits for one and takes what is there.
        ahead: pictures that may wait for the consumer.
        behind: what happens when they are more: "wait" (the source has to) or "drop_oldest"
            (thrown away and counted); None: drop those of addresses and devices, wait otherwise.
        format: FFmpeg's name of the format, for devices, playlists ("hls") and raw streams.
        options: FFmpeg's options ({"rtsp_transport": "tcp"}, {"framerate": "30"}).
        protocols: kinds of addresses that may be opened.
        max_pixels: largest picture, in pixels, that is decoded.
        threads: codec threads inside a picture; 0: one per core.
        longest_gap: seconds without pictures, by their times, that ``report.gaps`` mentions.

    Raises:
        VideoNotFoundError: there is no such file.
        VideoSourceError: the source is nothing to read from, or may not be opened.
        FrameRequestError: a number is out of range.

    Example:
        >>> from foveate import Live
        >>> with Live("recording.ts", fps=1, growing=True) as live:        # doctest: +SKIP
        ...     for frames in live:
        ...         print(frames.seconds[-1].item(), live.report.summary)
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | BinaryIO,
        fps: float | None = None,
        *,
        size: tuple[int, int] | None = None,
        growing: bool = False,
        timeout: float = 30.0,
        chunk: int = 8,
        ahead: int = 16,
        behind: Behind | None = None,
        format: str | None = None,
        options: Mapping[str, Any] | None = None,
        protocols: Iterable[str] = PROTOCOLS,
        max_pixels: int = MAX_PIXELS,
        threads: int = 1,
        longest_gap: float = 5.0,
    ) -> None:
        if behind not in (None, "wait", "drop_oldest"):
            raise FrameRequestError(f'behind must be "wait" or "drop_oldest", got {behind!r}')
        for name, number in (("fps", fps), ("timeout", timeout), ("longest_gap", longest_gap)):
            if number is not None and not (_is_number(number) and 0 < number < math.inf):
                raise FrameRequestError(f"{name} must be a positive number, got {number!r}")
        for name, number in (("chunk", chunk), ("ahead", ahead), ("max_pixels", max_pixels)):
            if sampling.whole(number, name) < 1:
                raise FrameRequestError(f"{name} must be at least 1, got {number}")
        if sampling.whole(threads, "threads") < 0:
            raise FrameRequestError(f"threads must be 0 (one per core) or more, got {threads}")
        check_format(format)
        given = checked_options(options)
        scaled = _checked_size(size)
        self._chunk = chunk
        self._thread: threading.Thread | None = None
        self._target = _target(source, growing, timeout, format, given, tuple(protocols))
        self.name = _name_of(source)
        is_remote = isinstance(self._target, Address)
        self._feed = Feed(
            Settings(
                name=self.name,
                fps=fps,
                size=scaled,
                ahead=ahead,
                drops=is_remote if behind is None else behind == "drop_oldest",
                timeout=float(timeout),
                max_pixels=max_pixels,
                threads=threads,
                longest=float(longest_gap),
                format=format,
                options=given,
            )
        )

    @property
    def report(self) -> LiveReport:
        """What has become of the source so far."""
        return self._feed.report

    def __iter__(self) -> Live:
        return self

    def __next__(self) -> Frames:
        """The next pictures, at least one.

        Raises:
            StopIteration: the source ended, or this was closed (from any thread).
            VideoError: it cannot be opened, holds no video, broke off or fell silent; raised once,
                after the pictures before it.
        """
        if self._thread is None and not self._feed.is_closed:
            # The thread knows the feed alone, so that a source which nobody holds is let go.
            self._thread = threading.Thread(
                target=run, args=(self._feed, self._target), name="foveate-live", daemon=True
            )
            self._thread.start()
        found = self._feed.get(self._chunk)
        if not found:
            raise StopIteration
        return _frames(found)

    def close(self) -> None:
        """Read no more; a ``next`` that waits in another thread ends its loop.

        The thread lets go of a file or pipe at once, and of an address when its read returns, after
        `timeout` seconds at most.
        """
        self._let_go()
        if self._thread is not None and isinstance(self._target, ForwardFile):
            self._thread.join(1.0)

    def _let_go(self) -> None:
        self._feed.close()
        if isinstance(self._target, ForwardFile):
            self._target.close()
            if self._thread is None:
                self._target.release()

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):
            self._let_go()

    def __repr__(self) -> str:
        return f"Live({self.name!r}, {self.report.summary})"


def _frames(pictures: list[Picture]) -> Frames:
    rank_T = [picture.rank for picture in pictures]
    suspect = tuple(picture.rank for picture in pictures if picture.is_suspect)
    return Frames(
        torch.from_numpy(np.stack([picture.pixels_CHW for picture in pictures])),
        torch.tensor([picture.seconds for picture in pictures], dtype=torch.float64),
        torch.tensor(rank_T),
        Damage(len(pictures), {}, suspect),
    )


def _target(
    source: Any,
    growing: bool,
    timeout: float,
    format: str | None,
    options: dict[str, str],
    protocols: tuple[str, ...],
) -> ForwardFile | Address:
    """What the thread reads."""
    name = _name_of(source)
    if isinstance(source, (str, os.PathLike)):
        text = os.fsdecode(source)
        if text == "-":
            return ForwardFile(PipeBytes(_standard_input(), name, timeout), name)
        is_address = isinstance(source, str) and scheme_of(text) and not _exists(text)
        if is_address or is_device(format):
            if growing:
                raise VideoSourceError("growing=True is for files", source=name)
            return address_of(text, format, options, protocols)
        return ForwardFile(_file(text, name, growing, timeout), name)
    if not hasattr(source, "read"):
        raise VideoSourceError(
            f"cannot watch {type(source).__name__}; give a path, an address, a binary file object "
            'or "-" (frames in memory go to Clip, or straight to Stream.push)'
        )
    if growing:
        raise VideoSourceError("growing=True is for paths of files", source=name)
    return ForwardFile(PipeBytes(source, name, timeout), name)


def _file(text: str, name: str, growing: bool, timeout: float) -> GrowingFile | PipeBytes:
    try:
        mode = Path(text).stat().st_mode
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "no such file" if missing else f"cannot read it: {error}"
        raise VideoNotFoundError(reason, source=name) from error
    if not stat.S_ISREG(mode) and growing:
        raise VideoSourceError("growing=True is for regular files", source=name)
    try:
        if stat.S_ISREG(mode):
            return GrowingFile(text, name, timeout if growing else None)
        if stat.S_ISFIFO(mode) and os.name == "posix":
            return PipeBytes(text, name, timeout)
    except OSError as error:
        raise VideoSourceError(f"cannot read it: {error.strerror}", source=name) from error
    what = "a directory" if stat.S_ISDIR(mode) else "a device; name its format, format='v4l2', say"
    raise VideoSourceError(f"this is {what}", source=name)


def _standard_input() -> Any:
    found = getattr(sys.stdin, "buffer", None)
    if found is None:
        raise VideoSourceError("standard input is closed or cannot give bytes", source="-")
    return found


def _exists(text: str) -> bool:
    with suppress(OSError, ValueError):
        return Path(text).exists()
    return False


def _name_of(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        text = os.fsdecode(source)
        return shown(text) if "://" in text else text
    return str(getattr(source, "name", f"<{type(source).__name__}>"))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _checked_size(size: tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        height, width = (sampling.whole(value, "height and width") for value in size)
    except (TypeError, ValueError) as error:
        raise FrameRequestError(f"size must be (height, width) in pixels, got {size!r}") from error
    if height < 1 or width < 1:
        raise FrameRequestError(f"size must be at least (1, 1) pixels, got {size!r}")
    return height, width
