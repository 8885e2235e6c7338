"""Addresses of live sources: which are allowed, and what FFmpeg may open on their behalf."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from foveate.errors import VideoSourceError
from foveate.video.source import FORMATS

# What FFmpeg opens below each kind of address. Redirects and playlists stay inside of the set.
_BELOW = {
    "http": ("http", "tcp"),
    "https": ("https", "tls", "tcp"),
    "rtmp": ("rtmp", "tcp"),
    "rtmps": ("rtmps", "tls", "tcp"),
    "rtp": ("rtp", "udp"),
    "rtsp": ("rtsp", "rtp", "srtp", "udp", "tcp"),
    "rtsps": ("rtsps", "rtp", "srtp", "udp", "tcp", "tls"),
    "srt": ("srt",),
    "tcp": ("tcp",),
    "tls": ("tls", "tcp"),
    "udp": ("udp",),
}
PROTOCOLS = tuple(_BELOW)
"""Kinds of addresses that a live source may have unless a caller names fewer."""
# Playlists, that name further addresses, are read only when they are asked for by name.
_PLAYLISTS = ("hls", "dash")
_DEVICES = ("v4l2", "video4linux2", "avfoundation", "dshow", "gdigrab", "x11grab", "fbdev")
_FORMATS = (*FORMATS.split(","), "rtsp", "rtp", "mpjpeg", "rawvideo")
_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]*):", re.IGNORECASE)


class Address(NamedTuple):
    """What `av.open` is told.

    Attributes:
        target: address or device.
        format: of FFmpeg; None: it finds out.
        options: for FFmpeg, those of the caller among them.
    """

    target: str
    format: str | None
    options: dict[str, str]


def scheme_of(text: str) -> str | None:
    """The scheme of an address ("rtsp", also "concat"), None for a path.

    Example:
        >>> scheme_of("rtsp://camera/1"), scheme_of("street.ts"), scheme_of("C:/street.ts")
        ('rtsp', None, None)
    """
    found = _SCHEME.match(text)
    # One letter is a drive of Windows.
    return found[1].lower() if found and len(found[1]) > 1 else None


def is_device(format: str | None) -> bool:
    """Whether a format of FFmpeg reads a camera or screen instead of bytes."""
    return format in _DEVICES


def shown(text: str) -> str:
    """An address without the user's name and password.

    Example:
        >>> shown("rtsp://me:secret@camera:554/1?channel=2")
        'rtsp://camera:554/1'
    """
    parts = urlsplit(text)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def check_format(format: str | None) -> None:
    """See to it that a format is one that reads a single source.

    Raises:
        VideoSourceError: it is not.
    """
    if format is not None and format not in (*_FORMATS, *_PLAYLISTS, *_DEVICES):
        raise VideoSourceError(
            f"format {format!r} is not allowed for live sources; take one of "
            f"{', '.join((*_DEVICES, *_PLAYLISTS, *_FORMATS))}"
        )


def address_of(
    text: str, format: str | None, options: dict[str, str], protocols: Collection[str]
) -> Address:
    """An address that may be opened, with FFmpeg's lists of what it may open itself.

    Args:
        text: the address, or a device's name if the format is one of devices.
        format: of FFmpeg, or None.
        options: of the caller.
        protocols: allowed kinds of addresses.

    Raises:
        VideoSourceError: it may not be opened.
    """
    unknown = sorted({*protocols} - {*PROTOCOLS})
    if unknown:
        raise VideoSourceError(
            f"protocols are some of {', '.join(PROTOCOLS)}; got {', '.join(map(str, unknown))}"
        )
    if is_device(format):
        return Address(text, format, {**options})
    scheme = scheme_of(text)
    if scheme not in protocols:
        raise VideoSourceError(
            f"addresses of the kind {scheme!r} are not allowed; allowed are "
            f"{', '.join(protocols) or 'none'} (give a file as a path)",
            source=shown(text) if "://" in text else text,
        )
    allowed = {*_BELOW[str(scheme)]}
    for other in ("http", "https"):
        # Servers send callers from one to the other, and keys of playlists come encrypted.
        if str(scheme).startswith("http") and other in protocols:
            allowed |= {*_BELOW[other], "crypto"}
    formats = ",".join((*_FORMATS, format) if format in _PLAYLISTS else _FORMATS)
    lists = {"protocol_whitelist": ",".join(sorted(allowed)), "format_whitelist": formats}
    return Address(text, format, {**options, **lists})


def checked_options(options: Any) -> dict[str, str]:
    """FFmpeg's options as it takes them.

    Raises:
        VideoSourceError: one of them would widen what may be opened.
    """
    found = {str(name): str(value) for name, value in dict(options or {}).items()}
    for name in ("protocol_whitelist", "format_whitelist", "protocol_blacklist"):
        if name in found:
            raise VideoSourceError(f"options may not set {name}; name protocols= instead")
    return found
