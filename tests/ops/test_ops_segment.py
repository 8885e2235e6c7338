"""Optimal partitions and change points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.ops import change_points, optimal_partition, scene_segments, segment_by_gain


def partitions(frames: int):
    """Every way to cut 0 .. frames - 1 into contiguous segments."""
    for cuts in range(2 ** (frames - 1)):
        ends = [t for t in range(frames - 1) if cuts >> t & 1] + [frames - 1]
        starts = [0, *[e + 1 for e in ends[:-1]]]
        yield list(zip(starts, ends, strict=True))


def gain_by_hand(links, s, e):
    return (e - s) * int(links[s:e].all(0).sum()) if e > s else 0


def dp_by_hand(gain, frames, window):
    """The card's recursion: singleton first, then longer, replaced only if strictly larger."""
    best, length = [0], []
    for e in range(frames):
        value, chosen = best[e] + gain(e, e), 1
        for w in range(2, min(e + 1, window) + 1):
            candidate = best[e + 1 - w] + gain(e - w + 1, e)
            if candidate > value:
                value, chosen = candidate, w
        best.append(value)
        length.append(chosen)
    bounds, e = [], frames - 1
    while e >= 0:
        bounds.append([e - length[e] + 1, e])
        e -= length[e]
    return bounds[::-1], best[-1]


@given(
    frames=st.integers(1, 9),
    places=st.integers(1, 5),
    window=st.integers(1, 10),
    rate=st.sampled_from([0.3, 0.6, 0.9]),
    seed=st.integers(0, 999),
)
def test_segments_equal_the_recursion_and_brute_force(frames, places, window, rate, seed):
    generator = torch.Generator().manual_seed(seed)
    links = torch.rand(frames - 1, places, generator=generator) < rate
    found = segment_by_gain(links, max_window=window)
    want, value = dp_by_hand(lambda s, e: gain_by_hand(links, s, e), frames, window)
    assert found.bounds.tolist() == want and found.removed == value
    best = max(
        sum(gain_by_hand(links, s, e) for s, e in cut)
        for cut in partitions(frames)
        if all(e - s < window for s, e in cut)
    )
    assert found.removed == best
    # The gain is what averaging removes: every static place loses all frames but one.
    assert int((found.static.sum(-1) * (found.lengths - 1)).sum()) == found.removed
    for (s, e), static in zip(found.bounds.tolist(), found.static, strict=True):
        assert static.tolist() == (links[s:e].all(0) if e > s else torch.zeros(places)).tolist()


@given(frames=st.integers(1, 8), window=st.integers(1, 9), seed=st.integers(0, 999))
def test_partition_of_any_gain(frames, window, seed):
    gain = torch.randn(frames, frames, generator=torch.Generator().manual_seed(seed)).double()
    bounds, value = optimal_partition(gain, window)
    want, best = dp_by_hand(lambda s, e: float(gain[s, e]), frames, window)
    assert bounds.tolist() == want and value == pytest.approx(best)
    brute = max(
        sum(float(gain[s, e]) for s, e in cut)
        for cut in partitions(frames)
        if all(e - s < window for s, e in cut)
    )
    assert value == pytest.approx(brute)


def test_extremes():
    frames, places = 6, 4
    one = segment_by_gain(torch.ones(frames - 1, places, dtype=torch.bool))
    assert one.bounds.tolist() == [[0, 5]] and one.removed == 5 * places
    assert one.static.tolist() == [[True] * places] and one.num_segments == 1
    none = segment_by_gain(torch.zeros(frames - 1, places, dtype=torch.bool))
    assert none.bounds.tolist() == [[t, t] for t in range(frames)]
    assert none.removed == 0 and not bool(none.static.any())
    still = segment_by_gain(torch.zeros(0, places, dtype=torch.bool))
    assert still.bounds.tolist() == [[0, 0]] and still.static.shape == (1, places)
    short = segment_by_gain(torch.ones(frames - 1, places, dtype=torch.bool), max_window=2)
    assert short.lengths.tolist() == [2, 2, 2]
    assert optimal_partition(torch.zeros(0, 0))[0].shape == (0, 2)


def test_removed_is_an_int_and_more_links_never_remove_less():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(20, 30, generator=generator)
    removed = [segment_by_gain(noise < rate).removed for rate in (0.0, 0.2, 0.5, 0.8, 0.95, 1.1)]
    assert removed == sorted(removed) and type(removed[0]) is int
    assert removed[-1] == 20 * 30


def test_places_may_be_permuted():
    links = torch.rand(9, 12, generator=torch.Generator().manual_seed(1)) < 0.8
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    plain, moved = segment_by_gain(links), segment_by_gain(links[:, order])
    assert torch.equal(plain.bounds, moved.bounds)
    assert torch.equal(plain.static[:, order], moved.static)


def test_change_points():
    similarity = torch.tensor([0.9, 0.2, 0.2, 0.8])
    assert change_points(similarity, threshold=0.5).tolist() == [[0, 1], [2, 2], [3, 4]]
    assert change_points(similarity, threshold=0.0).tolist() == [[0, 4]]
    assert change_points(similarity, num_segments=2).tolist() == [[0, 1], [2, 4]]
    assert change_points(similarity, num_segments=5).tolist() == [[t, t] for t in range(5)]
    assert change_points(similarity[:0], num_segments=1).tolist() == [[0, 0]]


def test_segment_errors():
    with pytest.raises(ValueError, match="bool"):
        segment_by_gain(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"\[T - 1, N\]"):
        segment_by_gain(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="max_window"):
        segment_by_gain(torch.ones(3, 2, dtype=torch.bool), max_window=0)
    with pytest.raises(ValueError, match="square"):
        optimal_partition(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="exactly one"):
        change_points(torch.zeros(3))
    with pytest.raises(ValueError, match="num_segments"):
        change_points(torch.zeros(3), num_segments=5)


def test_scenes_are_cut_where_frames_change():
    scenes = torch.randn(4, 1, 5, 3, generator=torch.Generator().manual_seed(0))
    lengths = [7, 1, 9, 4]
    video = torch.cat([scene.expand(n, -1, -1) for scene, n in zip(scenes, lengths, strict=True)])
    bounds = scene_segments(video, max_cuts=3)
    assert (bounds[:, 1] - bounds[:, 0] + 1).tolist() == lengths
    assert scene_segments(video[:4], max_cuts=3)[:, 0].tolist() == [0, 1, 2, 3]
    assert scene_segments(video, max_cuts=0).tolist() == [[0, 20]]
    with pytest.raises(ValueError, match="features must be"):
        scene_segments(video[0])
    with pytest.raises(ValueError, match="max_cuts"):
        scene_segments(video, max_cuts=-1)
    with pytest.raises(ValueError, match="at least one frame"):
        scene_segments(video[:0])
