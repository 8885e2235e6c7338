"""Keyframe-aligned intervals."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.video.intervals import keyframe_intervals


@given(
    start=st.integers(-50, 5000),
    gaps=st.lists(st.integers(1, 90), min_size=1, max_size=40),
    tail=st.integers(0, 200),
    num_frames=st.integers(1, 400),
    num_intervals=st.integers(1, 70),
)
def test_intervals_cover_every_wanted_frame_once(
    start: int, gaps: list[int], tail: int, num_frames: int, num_intervals: int
) -> None:
    keyframes = [start]
    for gap in gaps:
        keyframes.append(keyframes[-1] + gap)
    end = keyframes[-1] + tail
    wanted = list(range(0, num_frames, 3))
    found = keyframe_intervals(keyframes, end, num_frames, wanted, num_intervals, start)
    assert 1 <= len(found) <= num_intervals
    assert found[0].start == start and found[-1].end == end
    assert all(a.end == b.start for a, b in pairwise(found))
    assert all(interval.start in keyframes for interval in found)
    assert sum(interval.num_wanted for interval in found) == len(wanted)


def test_ties_go_to_the_later_keyframe() -> None:
    found = keyframe_intervals([0, 40, 60, 100], 100, 101, [], 2)
    assert [interval[:2] for interval in found] == [(0, 60), (60, 100)]


def test_cuts_outside_the_keyframes_add_no_border() -> None:
    found = keyframe_intervals([0], 100, 101, [3, 99], 4)
    assert found == [(0, 100, 2)]


def test_a_stream_of_one_frame() -> None:
    assert keyframe_intervals([7], 7, 1, [0], 8, 7) == [(7, 7, 1)]


@pytest.mark.parametrize(("keyframes", "end", "count"), [([], 100, 4), ([0], -1, 4), ([0], 100, 0)])
def test_bad_input(keyframes: list[int], end: int, count: int) -> None:
    with pytest.raises(ValueError, match="need keyframes"):
        keyframe_intervals(keyframes, end, 10, [], count)
