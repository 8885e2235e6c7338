"""The thread behind a live source: opens, reads, decodes, and queues what is wanted.

Nothing here imports torch.

Legend: H, W pixels in display orientation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from foveate.errors import (
    DamagedVideoError,
    DecoderFailedError,
    DecodeStalledError,
    EmptyVideoError,
    FrameTooLargeError,
    NoVideoStreamError,
    UnsupportedVideoError,
    VideoError,
    VideoSourceError,
)
from foveate.video import packets
from foveate.video.decode import FrameWriter
from foveate.video.live_address import Address
from foveate.video.live_bytes import ForwardFile
from foveate.video.live_clock import LiveClock, RateGate
from foveate.video.live_feed import Feed, Picture
from foveate.video.source import FORMATS, explain, import_av, too_much_memory

# How far FFmpeg may look into a source before it says what is in it; by itself it waits for five
# seconds of video and twenty pictures.
_PROBE = {"analyzeduration": "1000000", "probesize": "2000000", "fpsprobesize": "2"}
# A source in which nothing decodes for so long is no video.
_HOPELESS_PACKETS = 5_000
_DEMUX_ATTEMPTS = 8


def run(feed: Feed, target: ForwardFile | Address) -> None:
    """Read a source to its end, or until nobody wants it; what a thread does."""
    try:
        for picture in _Reading(feed, target):
            if not feed.put(picture):
                break
        else:
            is_file = isinstance(target, ForwardFile)
            with feed.news:
                feed.ended = feed.ended or (target.source.ended if is_file else "the source ended")
                if not feed.decoded and not feed.is_closed:
                    raise EmptyVideoError(
                        f"no picture came out of it ({feed.ended})", source=feed.settings.name
                    )
    except Exception as error:
        with feed.news:
            if not feed.is_closed:
                feed.error = _named(error, feed.settings.name)
                feed.ended = getattr(feed.error, "reason", str(feed.error))
    finally:
        if isinstance(target, ForwardFile):
            target.release()
        with feed.news:
            feed.is_over = True
            feed.news.notify_all()


def _named(error: Exception, name: str) -> Exception:
    if isinstance(error, ImportError) or getattr(error, "source", None):
        return error
    if isinstance(error, VideoError):
        found: Exception = type(error)(error.reason, source=name)
    else:
        words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        found = DecoderFailedError(f"decoding failed ({words})", source=name)
    found.__cause__ = error
    return found


class _Reading:
    """One pass over a source; an iterator of the pictures that are wanted."""

    def __init__(self, feed: Feed, target: ForwardFile | Address) -> None:
        self.feed = feed
        self.settings = feed.settings
        self.target = target
        self.converter: Any = None
        self._since_picture = 0

    def __iter__(self) -> Iterator[Picture]:
        av = import_av()
        self.converter = av.video.reformatter.VideoReformatter()
        container = self._open(av)
        try:
            stream = self._video(container)
            rate = stream.average_rate or stream.guessed_rate
            clock = LiveClock(float(1 / rate) if rate else None, longest=self.settings.longest)
            with self.feed.news:
                self.feed.clock = clock
            gate = RateGate(self.settings.fps)
            for frame in self._frames(av, container, stream):
                seconds = clock(None if frame.pts is None else frame.time)
                with self.feed.news:
                    rank, self.feed.decoded = self.feed.decoded, self.feed.decoded + 1
                    self.feed.seconds = seconds
                if gate(seconds):
                    yield self._picture(frame, seconds, rank)
        finally:
            container.close()

    # -- opening --------------------------------------------------------------------------------

    def _open(self, av: Any) -> Any:
        target, timeout = self.target, self.settings.timeout
        options: dict[str, Any] = {"mode": "r", "metadata_errors": "replace"}
        if isinstance(target, ForwardFile):
            target.tick = self._tick
            target.check_index()
            lists = {"format_whitelist": f"{FORMATS},mpjpeg,rawvideo", "protocol_whitelist": ""}
            options |= {"options": {**_PROBE, **self.settings.options, **lists}}
            options |= {"format": self.settings.format}
            place: Any = target
        else:
            options |= {"options": {**_PROBE, **target.options}, "format": target.format}
            options |= {"timeout": (timeout, timeout)}
            place = target.target
        try:
            return av.open(place, **options)
        except av.error.FFmpegError as error:
            failure = self._failure(av, error)
        except ValueError as error:
            failure = VideoSourceError(str(error), source=self.settings.name)
        # Errors of FFmpeg quote the address, which may hold a password.
        raise failure from None

    def _failure(self, av: Any, error: Any) -> VideoError:
        name = self.settings.name
        words = str(getattr(error, "strerror", None) or type(error).__name__)
        if isinstance(error, MemoryError):
            return too_much_memory(name)
        if isinstance(error, av.error.ExitError | av.error.TimeoutError):
            return DecodeStalledError(
                f"it gave nothing for {self.settings.timeout:g} s", source=name
            )
        if isinstance(self.target, ForwardFile):
            return explain(words, self.target.first, name)
        if isinstance(error, av.error.InvalidDataError):
            return UnsupportedVideoError(f"it is not a video stream ({words})", source=name)
        if isinstance(error, av.error.ProtocolNotFoundError | av.error.DemuxerNotFoundError):
            return UnsupportedVideoError(f"this FFmpeg cannot read it ({words})", source=name)
        return VideoSourceError(f"it cannot be opened ({words})", source=name)

    def _video(self, container: Any) -> Any:
        name = self.settings.name
        streams = [s for s in container.streams.video if not packets.is_cover(s)]
        if not streams:
            what = "sound alone" if container.streams.audio else "no track that can be read"
            raise NoVideoStreamError(f"there is no video track; it holds {what}", source=name)
        best = container.streams.best("video")
        stream = best if best in streams else streams[0]
        context: Any = stream.codec_context
        if context is None:
            raise UnsupportedVideoError("no decoder for the codec of its video track", source=name)
        self._check_size(context.height, context.width)
        # It counts padding, so it gets some room; every picture is checked again.
        context.options = {"max_pixels": str(2 * self.settings.max_pixels + (1 << 20))}
        # Frame threads would hold back as many pictures; slices hold back none.
        context.thread_type = "NONE" if self.settings.threads == 1 else "SLICE"
        context.thread_count = self.settings.threads
        return stream

    def _check_size(self, height: int, width: int) -> None:
        if height * width > self.settings.max_pixels:
            raise FrameTooLargeError(
                f"frames are {width}x{height} pixels, more than max_pixels="
                f"{self.settings.max_pixels}; raise max_pixels if you trust the source",
                source=self.settings.name,
            )

    def _tick(self) -> None:
        self.feed.beats += 1

    # -- reading --------------------------------------------------------------------------------

    def _frames(self, av: Any, container: Any, stream: Any) -> Iterator[Any]:
        for packet in self._packets(av, container, stream):
            yield from self._decode(av, stream, packet)
        if not self.feed.is_closed:
            yield from self._decode(av, stream, None)

    def _packets(self, av: Any, container: Any, stream: Any) -> Iterator[Any]:
        """Packets as they come; ends where the source does."""
        failures = 0
        while not self.feed.is_closed:
            try:
                for packet in container.demux(stream):
                    self.feed.beats += 1
                    if self.feed.is_closed:
                        return
                    if packet.size:
                        failures = 0
                        self._see_to_sense()
                        yield packet
                return
            except IndexError:
                continue  # A track that turned up late; that packet is gone.
            except av.error.BlockingIOError:
                # A camera that has no picture yet.
                time.sleep(0.005)
            except av.error.InvalidDataError:
                failures += 1
                self._count_damage()
                if failures >= _DEMUX_ATTEMPTS:
                    raise DamagedVideoError(
                        f"reading it failed {failures} times in a row", source=self.settings.name
                    ) from None
            except av.error.FFmpegError as error:
                if isinstance(error, MemoryError):
                    raise
                raise self._broken_off(av, error) from None

    def _broken_off(self, av: Any, error: Any) -> VideoError:
        failure = self._failure(av, error)
        if isinstance(failure, DecodeStalledError):
            return failure
        words = str(getattr(error, "strerror", None) or type(error).__name__)
        return DecoderFailedError(f"the source broke off ({words})", source=self.settings.name)

    def _see_to_sense(self) -> None:
        if isinstance(self.target, ForwardFile):
            self.target.mark()
        self._since_picture += 1
        if self._since_picture > _HOPELESS_PACKETS:
            raise DamagedVideoError(
                f"none of the last {self._since_picture - 1} packets gave a picture",
                source=self.settings.name,
            )

    def _decode(self, av: Any, stream: Any, packet: Any) -> Iterator[Any]:
        if packet is not None and packet.is_corrupt:
            # Parts of it are missing; what comes of it may still be of use.
            self._count_damage()
        try:
            for frame in stream.codec_context.decode(packet):
                self._since_picture = 0
                self.feed.beats += 1
                yield frame
        except av.error.FFmpegError as error:
            # Out of memory is no damage: going on would lose frames without a word.
            if isinstance(error, MemoryError):
                raise
            self._count_damage()

    def _count_damage(self) -> None:
        with self.feed.news:
            # Whoever joins a stream in its middle cannot decode before the first keyframe.
            self.feed.damaged += self.feed.decoded > 0

    def _picture(self, frame: Any, seconds: float, rank: int) -> Picture:
        self._check_size(frame.height, frame.width)
        orientation = packets.orientation(frame)
        size = self.settings.size or orientation.size(frame.height, frame.width)
        pixels_CHW = np.empty((3, *size), np.uint8)
        FrameWriter(frame, self.converter, orientation, "BICUBIC")(pixels_CHW)
        return Picture(pixels_CHW, seconds, rank, bool(frame.is_corrupt))
