"""What the first bytes of H.264 and HEVC packets tell: who is a reference, where decoding starts.

A container's own flags are hints that some writers get wrong; these bytes are what a decoder goes
by. Nothing here decodes a picture: a few microseconds a packet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

Buffer = bytes | memoryview

# H.264, table 7-1: slice of a non-IDR picture, slice of an IDR picture.
_SLICE, _IDR = 1, 5
# Supplemental information, access unit delimiter, filler: nothing that a later packet needs.
_H264_PADDING = {6, 9, 12}
# slice_type modulo 5 of slices that predict from nothing (I, SI).
_INTRA = {2, 4}
# HEVC, table 7-1: below 32 are slices, of which even numbers below 16 are no references in their
# own sub-layer and 16 to 23 are random access points; then delimiter, filler and two kinds of SEI.
_HEVC_SLICES, _HEVC_NON_REFERENCE, _HEVC_PADDING = 32, 16, {35, 38, 39, 40}
_HEVC_ENTRY = range(16, 24)
# Most units of one packet to look at: more are no picture of a real encoder.
_MOST_UNITS = 4096


class PacketFacts(NamedTuple):
    """What a packet's own bytes say.

    Attributes:
        is_disposable: no other picture refers to this one, so leaving it out changes no other.
        is_entry: decoding can start here; None where the bytes do not tell.
        layer: temporal sub-layer (HEVC); a disposable picture serves those above its own.
    """

    is_disposable: bool = False
    is_entry: bool | None = None
    layer: int = 0


UNKNOWN = PacketFacts()


class PacketParser:
    """Reads `PacketFacts` off the packets of one track; other codecs give `UNKNOWN`.

    Args:
        codec: decoder name ("h264", "hevc").
        extradata: the track's header; it says how packets are cut into units.

    Example:
        >>> parser = PacketParser("h264", None)
        >>> parser(bytes([0, 0, 1, 0x01, 0x9A])).is_disposable  # nal_ref_idc 0
        True
        >>> parser(bytes([0, 0, 1, 0x65, 0x88])).is_entry       # an IDR slice
        True
    """

    def __init__(self, codec: str, extradata: bytes | None) -> None:
        self._read = {"h264": _h264, "hevc": _hevc}.get(codec)
        self._length_size = 0
        # The configuration records of MP4 and Matroska begin with their version, 1; a start code
        # with 0.
        if extradata and extradata[0] == 1:
            place = 4 if codec == "h264" else 21
            if len(extradata) > place:
                self._length_size = (extradata[place] & 3) + 1

    def __call__(self, data: Buffer) -> PacketFacts:
        if self._read is None:
            return UNKNOWN
        units = list(_units(data, self._length_size))
        return self._read(data, units) if units else UNKNOWN


def _units(data: Buffer, length_size: int) -> Iterator[int]:
    """Where each unit begins; nothing at all if the packet does not add up."""
    places = []
    at = 0
    if length_size:
        while at + length_size < len(data) and len(places) < _MOST_UNITS:
            size = int.from_bytes(data[at : at + length_size], "big")
            places.append(at + length_size)
            at += length_size + size
            if size < 2 or at > len(data):
                return
    else:
        # Escaping keeps this code out of the payload, so a search for it is a parse.
        data = bytes(data)
        at = data.find(b"\0\0\1")
        while 0 <= at < len(data) - 4 and len(places) < _MOST_UNITS:
            places.append(at + 3)
            at = data.find(b"\0\0\1", at + 3)
    yield from places


def _h264(data: Buffer, units: list[int]) -> PacketFacts:
    is_disposable, is_entry, has_slice = True, True, False
    for at in units:
        kind, importance = data[at] & 31, data[at] >> 5 & 3
        if kind in (_SLICE, _IDR):
            has_slice = True
            is_disposable = is_disposable and kind == _SLICE and not importance
            # Frames that refresh themselves bit by bit are called keyframes, too, and are none.
            is_entry = is_entry and (kind == _IDR or _slice_type(data, at + 1) in _INTRA)
        elif kind not in _H264_PADDING:
            is_disposable = False
    return PacketFacts(is_disposable, is_entry) if has_slice else UNKNOWN


def _slice_type(data: Buffer, at: int) -> int:
    """The second number of a slice header (unsigned Exp-Golomb), modulo 5; -1 if cut off."""
    head = data[at : at + 12]
    bits, left = int.from_bytes(head, "big"), 8 * len(head)
    value = -1
    for _ in range(2):
        zeros = left - (bits & ((1 << left) - 1)).bit_length()
        if 2 * zeros + 1 > left:
            return -1
        left -= 2 * zeros + 1
        value = (bits >> left & ((1 << (zeros + 1)) - 1)) - 1
    return value % 5


def _hevc(data: Buffer, units: list[int]) -> PacketFacts:
    is_disposable, is_entry, has_slice, layer = True, True, False, 0
    for at in units:
        kind = data[at] >> 1 & 63
        if kind < _HEVC_SLICES:
            has_slice = True
            is_extension = (data[at] & 1) << 5 | data[at + 1] >> 3
            layer = max(layer, (data[at + 1] & 7) - 1)
            is_disposable = is_disposable and not is_extension
            is_disposable = is_disposable and kind < _HEVC_NON_REFERENCE and kind % 2 == 0
            is_entry = is_entry and kind in _HEVC_ENTRY
        elif kind not in _HEVC_PADDING:
            is_disposable = False
    return PacketFacts(is_disposable, is_entry, layer) if has_slice else UNKNOWN
