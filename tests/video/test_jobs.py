"""Pieces for decoders side by side, and the packet bytes that say what can be left out."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.video.jobs import _makespan, packets_to_decode, schedule
from foveate.video.nal import UNKNOWN, PacketParser
from foveate.video.table import PacketTable, needed, plan

TICK = Fraction(1, 25)


def table_of(num_frames, keys, disposable=None, is_regular=True):
    ticks = np.arange(num_frames)
    is_disposable = None if disposable is None else np.isin(ticks, disposable)
    is_key = np.isin(ticks, keys)
    return PacketTable(ticks, ticks, is_key, TICK, num_frames, False, is_disposable, is_regular)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_schedules_hold_every_frame_once_and_count_what_is_decoded(data):
    num_frames = data.draw(st.integers(1, 300))
    keys = {0, *data.draw(st.sets(st.integers(0, num_frames - 1), max_size=20))}
    spare = data.draw(st.sets(st.integers(0, num_frames - 1), max_size=60)) - keys
    table = table_of(num_frames, list(keys), list(spare) or None)
    ranks = data.draw(st.lists(st.integers(0, num_frames - 1), min_size=1, max_size=60))
    threads = data.draw(st.integers(1, 9))
    found = schedule(table, ranks, threads)
    assert [rank for group in found.groups for rank in group.ranks] == sorted(set(ranks))
    assert found.costs == packets_to_decode(table, found.groups)
    for group, cost in zip(found.groups, found.costs, strict=True):
        expected, skip = needed(table, group)
        assert len(expected) == cost == group.cost - len(skip)
        assert set(group.ranks) <= set(expected) and not set(group.ranks) & skip
        assert skip <= spare and set(expected) | skip == set(range(group.start, group.stop + 1))
    assert 1 <= found.workers <= min(threads, len(found.groups))
    assert found.workers * found.codec_threads <= threads
    assert [found.costs[i] for i in found.longest_first] == sorted(found.costs, reverse=True)
    # Cutting never makes much more to decode than one decoder would have.
    alone = packets_to_decode(table, plan(table, ranks))
    assert sum(found.costs) <= sum(alone) + 8 * len(found.groups)


def test_side_by_side_only_where_it_pays():
    long = table_of(5000, range(0, 5000, 100))
    assert schedule(long, range(5000), 1).workers == 1
    both = schedule(long, range(5000), 2)
    assert (both.workers, both.codec_threads) == (2, 1)
    assert 8 <= len(both.groups) <= 50
    assert schedule(table_of(5000, [0]), range(5000), 4)[2:] == (1, 4)
    assert schedule(table_of(60, range(0, 60, 12)), range(60), 2)[2:] == (1, 2)
    assert schedule(table_of(5000, [0, 2500]), range(5000), 8)[2:] == (1, 8)
    assert schedule(table_of(5000, [0, 2500]), range(5000), 2)[2:] == (2, 1)
    # Frames that cannot be told apart are read in a row.
    odd = table_of(5000, range(0, 5000, 100), is_regular=False)
    assert schedule(odd, range(5000), 4)[2:] == (1, 4)


def test_all_keyframes_do_not_mean_a_seek_each():
    found = schedule(table_of(2000, range(2000)), range(2000), 2)
    assert len(found.groups) <= 40


def test_makespan_is_that_of_longest_first():
    assert _makespan([5, 4, 3, 3], 2) == 8
    assert _makespan([7], 3) == 7


def unit(*parts):
    body = bytes(parts)
    return len(body).to_bytes(4, "big") + body


AVCC = bytes([1, 100, 0, 31, 0xFF])
HVCC = bytes([1] + [0] * 20 + [0xFF])


def test_h264_units():
    parse = PacketParser("h264", AVCC)
    assert parse(unit(0x65, 0x88, 0x84)) == (False, True, 0)  # IDR
    assert parse(unit(0x01, 0x9A, 0x10)) == (True, False, 0)  # B or P, nobody's reference
    assert parse(unit(0x41, 0x9A, 0x10)) == (False, False, 0)  # a reference
    assert parse(unit(0x41, 0x88, 0x10)) == (False, True, 0)  # intra, not IDR
    assert parse(unit(0x01, 0x9A, 1) + unit(0x41, 0x9A, 1)).is_disposable is False  # two fields
    assert parse(unit(0x06, 5, 1) + unit(0x01, 0x9A, 1)).is_disposable
    assert not parse(unit(0x67, 1, 1) + unit(0x01, 0x9A, 1)).is_disposable  # new parameters
    assert parse(unit(0x06, 5, 1)) == UNKNOWN
    assert PacketParser("h264", None)(b"\0\0\0\1\x09\x10\0\0\1\x01\x9a\x10").is_disposable


def test_hevc_units():
    parse = PacketParser("hevc", HVCC)
    assert parse(unit(0x26, 1, 0xAF)) == (False, True, 0)  # IDR
    assert parse(unit(0x2A, 1, 0xAF)) == (False, True, 0)  # CRA
    assert parse(unit(0x02, 1, 0xD0)) == (False, False, 0)  # TRAIL_R
    assert parse(unit(0x00, 1, 0xE0)) == (True, False, 0)  # TRAIL_N
    assert parse(unit(0x10, 3, 0xE0)) == (True, False, 2)  # RASL_N of the third layer


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9"])
@pytest.mark.parametrize("extradata", [None, b"", b"\x01", AVCC, HVCC, b"\0\0\0\1\x67"])
@settings(max_examples=25, deadline=None)
@given(data=st.binary(max_size=80))
def test_bytes_that_mean_nothing(codec, extradata, data):
    parse = PacketParser(codec, extradata)
    for packet in (data, unit(*data), b"\0\0\1" + data, bytes(len(data))):
        facts = parse(memoryview(packet))
        assert facts == parse(packet)
        if codec == "vp9":
            assert facts == UNKNOWN
    assert parse(bytes(40)) == UNKNOWN
