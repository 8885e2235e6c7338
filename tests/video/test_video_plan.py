"""The decoding plan: pure arithmetic on packet tables."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.video.orientation import Orientation
from foveate.video.table import Group, Packet, PacketTable, plan, suspects

TICK = Fraction(1, 25)


def table_in_order(num_frames, keys):
    ticks = np.arange(num_frames)
    return PacketTable(ticks, ticks, np.isin(ticks, keys), TICK, num_frames)


def open_gop_table():
    """Decoding order I0 P3 b1 b2 I6 b4 b5 P9 b7 b8: frames 4 and 5 lead keyframe 6."""
    decoding = [0, 3, 1, 2, 6, 4, 5, 9, 7, 8]
    packets = [Packet(i, rank * 10, rank in (0, 6), 10) for i, rank in enumerate(decoding)]
    return PacketTable.from_packets(packets, Fraction(1, 250))


def test_table_sorts_by_presentation():
    table = open_gop_table()
    assert table.pts_F.tolist() == [i * 10 for i in range(10)]
    assert table.position_F.tolist() == [0, 2, 3, 1, 5, 6, 4, 8, 9, 7]
    assert np.flatnonzero(table.key_F).tolist() == [0, 6]
    assert table.duration == pytest.approx(0.4)
    assert table.seconds_F[3] == pytest.approx(0.12)


def test_one_run_while_keyframes_are_behind():
    table = table_in_order(100, [0, 25, 50, 75])
    assert plan(table, []) == []
    assert plan(table, [3, 7]) == [Group((3, 7), 0, 7)]
    # Keyframe 25 is next in line anyway: going on costs nothing.
    assert plan(table, [24, 26]) == [Group((24, 26), 0, 26)]


def test_a_seek_where_it_saves_decoding():
    table = table_in_order(100, [0, 25, 50, 75])
    groups = plan(table, [99, 0, 99])
    assert groups == [Group((0,), 0, 0), Group((99,), 75, 99, seek_pts=75, key_rank=75)]
    assert sum(group.cost for group in groups) == 26
    assert plan(table, [0, 26], min_skip=100) == [Group((0, 26), 0, 26)]
    assert plan(table, [60])[0].seek_pts == 50


def test_zero_skip_starts_a_run_at_every_keyframe_used():
    table = table_in_order(100, [0, 25, 50, 75])
    groups = plan(table, range(100), min_skip=0)
    assert [g.seek_pts for g in groups] == [None, 25, 50, 75]
    assert [g.cost for g in groups] == [25] * 4


def test_leading_frames_need_the_keyframe_before():
    table = open_gop_table()
    (group,) = plan(table, [5], min_skip=1)
    assert (group.seek_pts, group.start, group.stop) == (None, 0, 6)
    (group,) = plan(table, [7], min_skip=1)
    assert (group.seek_pts, group.key_rank, group.start, group.stop) == (60, 6, 4, 8)
    # After frame 5 the decoder has passed keyframe 6 already.
    assert len(plan(table, [5, 7], min_skip=0)) == 1
    # In parallel the second run would decode packets 4 to 6 again.
    assert [g.start for g in plan(table, [5, 7], min_skip=-3)] == [0, 4]
    assert len(plan(table, [5, 7], min_skip=-2)) == 1


def test_streams_without_times_are_read_from_the_head():
    packets = [Packet(i, None, i % 5 == 0, 0) for i in range(20)]
    table = PacketTable.from_packets(packets, Fraction(1, 1000), Fraction(10))
    assert table.by_order and table.duration == pytest.approx(2.0)
    assert plan(table, [17]) == [Group((17,), 0, 19)]


def test_no_keyframes_at_all():
    table = table_in_order(30, [])
    assert plan(table, [20, 29]) == [Group((20, 29), 0, 29)]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_plans_are_complete_and_never_dearer_than_reading_on(data):
    num_frames = data.draw(st.integers(1, 80))
    keys = data.draw(st.sets(st.integers(0, num_frames - 1), max_size=12))
    ranks = data.draw(st.lists(st.integers(0, num_frames - 1), min_size=1, max_size=30))
    min_skip = data.draw(st.integers(0, 20))
    # Swap neighbours here and there: decoding order that differs from presentation order.
    position = np.arange(num_frames)
    for i in range(1, num_frames - 1, 3):
        if data.draw(st.booleans()):
            position[[i, i + 1]] = position[[i + 1, i]]
    is_key = np.isin(np.arange(num_frames), list(keys))
    table = PacketTable(np.arange(num_frames) * 7 + 3, position, is_key, TICK, num_frames * 7 + 3)
    groups = plan(table, ranks, min_skip=min_skip)
    assert [rank for group in groups for rank in group.ranks] == sorted(set(ranks))
    assert sum(group.cost for group in groups) <= position[ranks].max() + 1
    for before, group in zip([None, *groups[:-1]], groups, strict=True):
        assert group.start <= min(position[list(group.ranks)])
        assert group.stop == max(position[list(group.ranks)])
        if group.seek_pts is None:
            assert before is None and group.start == 0
        else:
            assert is_key[group.key_rank] and table.pts_F[group.key_rank] == group.seek_pts
            assert group.key_rank <= group.ranks[0]
            assert position[group.key_rank] == group.start
            assert group.start - (before.stop + 1 if before else 0) >= min_skip


def test_suspects_follow_a_loss_until_the_next_keyframe():
    table = table_in_order(30, [0, 10, 20])
    seen = set(range(30)) - {13}
    ranks = np.arange(30)
    assert suspects(table, ranks, seen, set(), 29) == [14, 15, 16, 17, 18, 19]
    assert suspects(table, ranks, set(range(30)), {25}, 29) == [25, 26, 27, 28, 29]
    assert suspects(table, np.array([5, 12]), seen, set(), 29) == []
    # Frames still inside the decoder are not lost.
    assert suspects(table, np.arange(10, 13), set(range(13)), set(), 12) == []


@pytest.mark.parametrize(
    ("matrix", "degrees", "mirrored"),
    [
        ((1, 0, 0, 1), 0, False),
        ((0, 1, -1, 0), 90, False),
        ((-1, 0, 0, -1), 180, False),
        ((0, -1, 1, 0), 270, False),
        ((-1, 0, 0, 1), 0, True),
        ((1, 0, 0, -1), 180, True),
    ],
)
def test_display_matrices(matrix, degrees, mirrored):
    import struct

    a, b, c, d = matrix
    one = 1 << 16
    orientation = Orientation.from_matrix(
        struct.pack("<9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    )
    assert (orientation.degrees, orientation.mirrored) == (degrees, mirrored)
    picture = np.arange(6).reshape(1, 2, 3)
    turned = orientation.apply(picture)
    height, width = orientation.size(2, 3)
    assert turned.shape == (1, height, width)
    # Every stored point goes where the matrix sends it, shifted back into view.
    for y in range(2):
        for x in range(3):
            to_x, to_y = a * x + c * y, b * x + d * y
            to_x += width - 1 if min(a, c) < 0 else 0
            to_y += height - 1 if min(b, d) < 0 else 0
            assert turned[0, to_y, to_x] == picture[0, y, x]


def test_a_matrix_cut_short_is_ignored():
    assert Orientation.from_matrix(b"\0" * 8) == Orientation()
