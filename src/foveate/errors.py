"""Exceptions that foveate raises for input it cannot use; every one says what to do."""

from __future__ import annotations


class FoveateError(Exception):
    """Base of every exception that foveate defines."""


class MissingDependencyError(FoveateError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


class VideoError(FoveateError, ValueError):
    """Base of everything that can be wrong with a video or with a request for its frames.

    Args:
        reason: what is wrong, in one sentence.
        source: the file (or kind of source) it is wrong with.

    Example:
        >>> str(VideoError("no frames", source="clip.mp4"))
        'clip.mp4: no frames'
    """

    def __init__(self, reason: str, *, source: str | None = None) -> None:
        self.reason = reason
        self.source = source
        super().__init__(f"{source}: {reason}" if source else reason)


class VideoNotFoundError(VideoError, FileNotFoundError):
    """The path does not exist."""


class VideoSourceError(VideoError):
    """The source is not something that frames can be read from (directory, pipe, wrong shape)."""


class EmptyVideoError(VideoError):
    """The file has no bytes, or its video track has no frames or lasts zero seconds."""


class UnsupportedVideoError(VideoError):
    """The bytes are not a video container or codec that can be read."""


class TruncatedVideoError(VideoError):
    """The file starts as a video but stops before its header or index is complete."""


class NoVideoStreamError(VideoError):
    """The container holds no video track (an audio file, say)."""


class FrameTooLargeError(VideoError):
    """A frame, or all frames asked for together, would take more memory than allowed."""


class FrameRequestError(VideoError):
    """The frames asked for do not exist: bad count, index, second, rate or size."""


class DamagedVideoError(VideoError):
    """Frames that were asked for cannot be decoded, and no stand-in is allowed or at hand."""


class DecoderFailedError(VideoError):
    """The decoder itself broke down: the message says in which file, and near what time."""


class DecodeStalledError(DecoderFailedError):
    """The decoder has given no sign of life for as long as one was ready to wait."""


class DecodeLimitError(DecoderFailedError):
    """A decoder in a process of its own went beyond its limits, or a file asks for endless memory.

    Args:
        reason: what was exceeded, in one sentence.
        limit: name of the limit ("memory", "seconds", "cpu_seconds", "frames").
    """

    def __init__(self, reason: str, *, source: str | None = None, limit: str = "") -> None:
        self.limit = limit
        super().__init__(reason, source=source)


class DamagedVideoWarning(UserWarning):
    """Part of a video was lost; ``frames.damage`` says how much."""


class UnknownMethodError(FoveateError, ValueError):
    """No method of that name is registered; the message lists near names."""


class RecipeError(FoveateError, ValueError):
    """A recipe cannot be read, or its methods and budgets do not fit together."""


class AttachmentError(FoveateError, ValueError):
    """A recipe cannot be put on this model, or this call cannot be reduced; the model is clean."""


class MissingSignalError(AttachmentError):
    """A method needs a signal that this model does not offer.

    Args:
        method: registry name of the method.
        signals: the signals any of which would have done.
        reason: why the model lacks them, if known.
    """

    def __init__(self, method: str, signals: tuple[str, ...], reason: str = "") -> None:
        self.method = method
        self.signals = signals
        needed = " or ".join(signals)
        because = f" ({reason})" if reason else ""
        super().__init__(
            f"{method} needs the signal {needed}, which this model does not offer{because}. "
            "A method that needs no encoder signal works here: divprune, uniform, pool or random."
        )


class UnknownModelError(FoveateError, ValueError):
    """The model belongs to no family that has an adapter; the message lists those that have."""


class UnsupportedModelError(FoveateError, ValueError):
    """The family is known, but this model is configured in a way its adapter cannot handle."""


class TrainingError(FoveateError, ArithmeticError):
    """A training went wrong in a way that going on would not repair."""
