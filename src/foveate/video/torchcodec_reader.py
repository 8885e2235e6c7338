"""Frames through torchcodec in place of PyAV (`pip install "foveate[torchcodec]"`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.errors import DecoderFailedError, MissingDependencyError, UnsupportedVideoError
from foveate.video.decode import Decoded, PyAVReader, Scan
from foveate.video.resize import resize
from foveate.video.source import MediaSource
from foveate.video.table import Group

# Seconds by which two libraries may round a timestamp apart.
_ROUNDING = 2e-3


class TorchCodecReader:
    """Reads files through torchcodec: ``Clip(path, reader=TorchCodecReader(path))``.

    PyAV still lists the packets, so that frames have the numbers and times they have elsewhere;
    torchcodec makes the pixels, in one thread of ours with its own codec threads. Its colour
    conversion may differ from PyAV's by rounding, and it does not tell which frames follow a
    damaged one (`Damage.suspect` stays empty).

    Args:
        source: path or bytes.
        size: (height, width) to scale to inside torchcodec, bilinearly; frames asked for in another
            size are scaled as Pillow does.
        threads: codec threads, 0 for FFmpeg's choice.
        max_pixels: largest picture (pixels) that is decoded.

    Raises:
        MissingDependencyError: torchcodec is not installed, or finds no FFmpeg libraries.
        UnsupportedVideoError: torchcodec numbers the frames of this file in another way (edit
            lists, streams without timestamps).
    """

    gives_every_frame = False

    def __init__(
        self,
        source: Any,
        *,
        size: tuple[int, int] | None = None,
        threads: int = 0,
        max_pixels: int = 64 << 20,
    ) -> None:
        media = MediaSource(source)
        if media.is_shared:
            media = MediaSource(media.read())
        self.name = media.name
        self.size = size
        self._place = media.path or media.read()
        self._threads = threads
        self._inner = PyAVReader(media, max_pixels=max_pixels, threads=1)
        self._decoder_class, self._resize_class = _import_torchcodec()

    def scan(self) -> Scan:
        """List the packets; see `foveate.video.decode.Reader.scan`."""
        return self._inner.scan()

    def decode(self, groups: Iterable[Group]) -> Iterator[Decoded]:
        """Decode the wanted frames of a plan; see `foveate.video.decode.Reader.decode`.

        Raises:
            DecoderFailedError: a frame comes with the time of another.
        """
        table = self.scan().table
        decoder = self._open()
        for group in groups:
            for rank in group.ranks:
                try:
                    frame = decoder.get_frame_at(rank)
                except RuntimeError:
                    continue  # does not decode
                seconds = float(int(table.pts_F[rank]) * table.time_base)
                if abs(float(frame.pts_seconds) - seconds) > _ROUNDING:
                    raise DecoderFailedError(
                        f"torchcodec shows frame {rank} at {float(frame.pts_seconds):.3f} s, its "
                        f"packet says {seconds:.3f} s",
                        source=self.name,
                    )
                yield Decoded(rank, _Writer(frame.data))

    def _open(self) -> Any:
        transforms = [] if self.size is None else [self._resize_class(self.size)]
        try:
            decoder = self._decoder_class(
                self._place, num_ffmpeg_threads=self._threads, transforms=transforms
            )
        except (RuntimeError, ValueError) as error:
            raise UnsupportedVideoError(
                f"torchcodec cannot read it ({error})", source=self.name
            ) from error
        table = self.scan().table
        found = decoder.metadata.num_frames
        if table.by_order or found != len(table):
            raise UnsupportedVideoError(
                f"torchcodec counts {found} frames, its packets are {len(table)}; read it without "
                "this reader",
                source=self.name,
            )
        return decoder


class _Writer:
    def __init__(self, pixels_CHW: Tensor) -> None:
        self.pixels_CHW = pixels_CHW

    def __call__(self, out_CHW: Any) -> None:
        out_CHW = torch.from_numpy(np.asarray(out_CHW))
        size = (out_CHW.shape[-2], out_CHW.shape[-1])
        pixels_CHW = self.pixels_CHW
        out_CHW.copy_(pixels_CHW if pixels_CHW.shape[-2:] == size else resize(pixels_CHW, size))


def _import_torchcodec() -> tuple[Any, Any]:
    try:
        from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]
        from torchcodec.transforms import Resize  # type: ignore[import-not-found]
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingDependencyError(
            "this reader needs torchcodec and the FFmpeg libraries that it links: "
            f'pip install "foveate[torchcodec]" ({str(error).splitlines()[0]})'
        ) from error
    return VideoDecoder, Resize
