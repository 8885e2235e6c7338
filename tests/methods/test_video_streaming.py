"""VideoStreaming: clips by the question, counts, and a memory that a question calls clips from."""

from __future__ import annotations

import pytest
import torch

from foveate.core import Budget, Grid, ProjectorContext, Reduction, Tokens
from foveate.core.stream import FrameGroup
from foveate.methods.video_streaming import ClipMemory, VideoStreaming, clip_keys, relevant_clips

from .helpers import LAYOUTS, item

PUBLISHED = Budget(retain=VideoStreaming.card.retain, published=True)
CHANNELS = 16


def planted(frames: int, clip_frames: int, needle: int, seed: int = 0) -> torch.Tensor:
    """Keys of frames; those of one clip point where the question does, others elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    key_TC = torch.randn(frames, CHANNELS, generator=generator)
    key_TC[:, 0] = -key_TC[:, 0].abs()
    key_TC[needle * clip_frames : (needle + 1) * clip_frames, 0] = 6.0
    return key_TC


QUESTION = torch.eye(CHANNELS)[:1]


def run(
    method: VideoStreaming,
    grid: Grid,
    budget: Budget = PUBLISHED,
    key_TC: torch.Tensor | None = None,
) -> Reduction:
    if key_TC is None:
        key_TC = planted(len(grid.planes), method.clip_frames, 0)
    signals = {"paired.frames": key_TC[None], "paired.text": QUESTION}
    made = method.projector(item(grid), ProjectorContext(budget, grid=grid, read=signals.get))
    assert made is not None
    return made


def frames_left(made: Reduction, grid: Grid) -> list[int]:
    return grid.positions()[made.anchor_BM[0], 0].unique().tolist()


# -- a prompt -------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [960, 64, 48, 17, 16, 5])
def test_published_counts(frames) -> None:
    """min(K, V) clips of T frames of P tokens, whatever the length of the video."""
    grid, method = Grid.video(frames, 4, 4), VideoStreaming()
    made, counted = run(method, grid), method.count(grid, PUBLISHED)
    assert made.num_out == min(frames, 64) * 4 == counted.tokens
    assert counted.exact


def test_a_short_clip_at_the_end_has_fewer_tokens() -> None:
    grid, method = Grid.video(70, 4, 4), VideoStreaming(clips=2)
    made = run(method, grid, key_TC=planted(70, 16, 4))
    assert frames_left(made, grid)[-6:] == list(range(64, 70))
    assert made.num_out == (16 + 6) * 4
    counted = method.count(grid, PUBLISHED)
    assert counted.tokens == 32 * 4 and not counted.exact


def test_a_needle_among_200_clips() -> None:
    frames, grid = 201 * 4, Grid.video(201 * 4, 2, 2)
    for needle in (0, 77, 200):
        method = VideoStreaming(clip_frames=4, clips=1)
        made = run(method, grid, key_TC=planted(frames, 4, needle))
        assert frames_left(made, grid) == list(range(4 * needle, 4 * needle + 4))


def test_clips_stay_in_the_order_of_time() -> None:
    key_KC = torch.tensor([[0.1, 1.0], [1.0, 0.1], [0.9, 0.1], [0.0, 1.0], [1.0, 0.0]])
    index_V, score_K = relevant_clips(key_KC, torch.tensor([[1.0, 0.0]]), 3)
    assert index_V.tolist() == [1, 2, 4] and score_K[4] == 1
    assert relevant_clips(key_KC, torch.tensor([[1.0, 0.0]]), 9)[0].tolist() == list(range(5))
    tied = relevant_clips(torch.ones(4, 2), torch.ones(1, 2), 2)[0]
    assert tied.tolist() == [0, 1]


def test_pooling_is_the_mean_of_a_cell() -> None:
    grid = Grid.video(3, 4, 6)
    x, made = item(grid), run(VideoStreaming(frame_tokens=6), grid)
    x_TDhw = x.x_BND[0].view(3, 4, 6, 16).permute(0, 3, 1, 2)
    expected = torch.nn.functional.avg_pool2d(x_TDhw, 2).flatten(2).mT.flatten(0, 1)
    torch.testing.assert_close(made.apply(x.x_BND)[0], expected)
    # A token takes the place of the middle of its cell.
    assert grid.positions()[made.anchor_BM[0, :3]].tolist() == [[0, 0, 0], [0, 0, 2], [0, 0, 4]]
    odd = Grid.video(2, 5, 7)
    anchors = odd.positions()[run(VideoStreaming(), odd).anchor_BM[0, :4]].tolist()
    assert anchors == [[0, 1, 1], [0, 1, 5], [0, 3, 1], [0, 3, 5]]


def test_a_budget_sets_clips_and_then_tokens() -> None:
    grid, method = Grid.video(96, 8, 8), VideoStreaming()
    expected = {  # tokens asked for -> clips, tokens of a frame
        1: (1, 1, 1),
        7: (1, 7, 1),
        16: (1, 16, 1),
        63: (1, 16, 2),
        64: (1, 16, 4),
        128: (2, 32, 4),
        383: (5, 80, 4),
        384: (6, 96, 4),
        2000: (6, 96, 20),
    }
    for keep, (clips, frames, cells) in expected.items():
        made = run(method, grid, Budget(tokens=keep))
        left = frames_left(made, grid)
        assert len({frame // 16 for frame in left}) == clips
        assert len(left) == frames and made.num_out == frames * cells <= keep
        assert method.count(grid, Budget(tokens=keep)).tokens == made.num_out
    counts = [method.count(grid, Budget(tokens=n)).tokens for n in range(1, 6144, 37)]
    assert counts == sorted(counts)


@pytest.mark.parametrize("name", [n for n, grid in LAYOUTS.items() if grid.modality == "video"])
def test_special_tokens_go_but_for_those_at_the_end(name) -> None:
    grid = LAYOUTS[name]
    made = run(VideoStreaming(clip_frames=2, clips=2), grid)
    kinds = grid.kinds()[made.anchor_BM[0]]
    assert int((kinds != 0).sum()) == grid.newlines_at_end
    assert made.num_out == VideoStreaming(clip_frames=2, clips=2).count(grid, PUBLISHED).tokens


def test_what_is_small_enough_stays() -> None:
    grid = Grid.video(8, 2, 2)
    context = ProjectorContext(PUBLISHED, grid=grid)
    assert VideoStreaming().projector(item(grid), context) is None
    assert VideoStreaming().count(grid, PUBLISHED).tokens == grid.num_tokens
    image = LAYOUTS["image"]
    context = ProjectorContext(Budget(retain=0.5), grid=image)
    assert VideoStreaming().projector(Tokens(torch.zeros(1, 48, 4)), context) is None


@pytest.mark.parametrize("name", ["clip_frames", "frame_tokens", "clips", "capacity"])
def test_bad_arguments(name) -> None:
    with pytest.raises(ValueError, match=name):
        VideoStreaming(**{name: 0})
    with pytest.raises(ValueError, match=name):
        ClipMemory(**{name: 0})


# -- a stream -------------------------------------------------------------------------------------


def group_of(key_TC: torch.Tensor, first: int = 0, height: int = 4, width: int = 6) -> FrameGroup:
    """Frames whose tokens are their key in all places, and their place."""
    T, L = len(key_TC), height * width
    place_L2 = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    x_TLD = torch.cat([key_TC[:, None].expand(T, L, -1), place_L2.expand(T, L, 2)], dim=-1)
    return FrameGroup(
        x_TLD.flatten(0, 1).float(),
        torch.arange(T).repeat_interleave(L),
        place_L2.repeat(T, 1),
        torch.tensor([[height, width]]).expand(T, 2),
        tuple(range(first, first + T)),
        key_TC,
    )


def filled(key_TC: torch.Tensor, size: int, **options) -> ClipMemory:
    memory = ClipMemory(**{"clip_frames": 4, "clips": 2, **options})
    for first in range(0, len(key_TC), size):
        memory.push(group_of(key_TC[first : first + size], first))
    return memory


def test_how_many_frames_come_at_a_time_does_not_matter() -> None:
    key_TC = planted(23, 4, 2)
    alone = filled(key_TC, 1).recall(QUESTION)
    for size in (3, 4, 23):
        memory = filled(key_TC, size)
        recall = memory.recall(QUESTION)
        assert memory.num_clips == 5 and memory.num_bytes == filled(key_TC, 1).num_bytes
        assert recall.x_LD.equal(alone.x_LD) and recall.number_L.equal(alone.number_L)
        assert recall.clips == alone.clips


def test_a_stream_recalls_what_a_prompt_keeps() -> None:
    key_TC, grid = planted(24, 4, 3), Grid.video(24, 4, 6)
    group = group_of(key_TC)
    recall = filled(key_TC, 7).recall(QUESTION)
    method = VideoStreaming(clip_frames=4, clips=2)
    signals = {"paired.frames": key_TC[None], "paired.text": QUESTION}
    tokens = Tokens.from_grid(group.x_LD, grid)
    made = method.projector(tokens, ProjectorContext(PUBLISHED, grid=grid, read=signals.get))
    assert made is not None
    torch.testing.assert_close(recall.x_LD, made.apply(tokens.x_BND)[0])
    assert recall.number_L.tolist() == grid.positions()[made.anchor_BM[0], 0].tolist()
    assert [clip.running for clip in recall.clips] == [False, False]


def test_the_running_clip_is_always_there() -> None:
    memory = filled(planted(4 * 200 + 3, 4, 137), 16, clips=1)
    needle, running = memory.recall(QUESTION).clips
    assert (needle.first, needle.last, needle.running) == (548, 551, False)
    assert (running.first, running.last, running.running) == (800, 802, True)
    assert needle.relevance > 0.8 > running.relevance
    early = filled(planted(3, 4, 0), 1).recall(QUESTION)
    assert early.clips[0].running and len(early.x_LD) == 3 * 4


def test_a_later_clip_changes_no_earlier_one() -> None:
    key_TC = planted(16, 4, 1)
    other_TC = key_TC.clone()
    other_TC[12:] = -3.0
    before, after = (filled(keys, 4, clips=4).recall(QUESTION) for keys in (key_TC, other_TC))
    assert before.x_LD[:48].equal(after.x_LD[:48]) and not before.x_LD.equal(after.x_LD)
    assert before.clips[:3] == after.clips[:3]


def test_memory_grows_by_the_same_for_every_clip_and_stops_at_its_capacity() -> None:
    key_TC, bounded = planted(60, 4, 9), ClipMemory(4, 4, 2, capacity=3)
    memory, sizes, forgotten = ClipMemory(4, 4, 2), [], 0
    for first in range(0, 60, 4):
        group = group_of(key_TC[first : first + 4], first)
        assert memory.push(group) == 0
        forgotten += bounded.push(group)
        sizes.append((memory.num_bytes, bounded.num_bytes))
    # 16 tokens of 18 channels with the number of their frame, and a key of 16.
    one = 16 * (18 * 4 + 8) + CHANNELS * 4
    assert [size for size, _ in sizes] == [one * num for num in range(1, 16)]
    assert [size for _, size in sizes[2:]] == [3 * one] * 13
    assert forgotten == 48 and bounded.num_clips == 3
    assert bounded.recall(QUESTION).clips[0].first >= 48
    assert memory.recall(QUESTION).clips[-1].first in (36, 40, 44, 48, 52, 56)


def test_special_tokens_and_gaps_are_no_part_of_a_summary() -> None:
    key_TC = planted(4, 4, 0)
    whole = group_of(key_TC)
    newline_L2 = torch.full((4, 2), -1)
    noisy = FrameGroup(
        torch.cat([whole.x_LD, torch.full((4, 18), 99.0)]),
        torch.cat([whole.frame_L, torch.arange(4)]),
        torch.cat([whole.place_L2, newline_L2]),
        whole.shape_T2,
        whole.number_T,
        key_TC,
    )
    memories = [ClipMemory(4), ClipMemory(4)]
    for memory, group in zip(memories, (whole, noisy), strict=True):
        memory.push(group)
    clean, dirty = (memory.recall(QUESTION) for memory in memories)
    assert clean.x_LD.equal(dirty.x_LD)
    # Of which a method before it left only the upper left quarter: one cell a frame.
    part_L = (whole.place_L2 < torch.tensor([2, 3])).all(1)
    cut = FrameGroup(
        whole.x_LD[part_L],
        whole.frame_L[part_L],
        whole.place_L2[part_L],
        whole.shape_T2,
        whole.number_T,
        key_TC,
    )
    memory = ClipMemory(4)
    memory.push(cut)
    assert memory.recall(QUESTION).x_LD.equal(clean.x_LD[::4])


def test_keys_are_means_and_an_empty_memory_says_so() -> None:
    key_TC = torch.randn(7, 3)
    expected = torch.stack([key_TC[:3].mean(0), key_TC[3:6].mean(0), key_TC[6]])
    torch.testing.assert_close(clip_keys(key_TC, 3), expected)
    with pytest.raises(ValueError, match="No frame"):
        ClipMemory().recall(QUESTION)


@pytest.mark.parametrize("budget", [PUBLISHED, Budget(tokens=5), Budget(tokens=90)])
def test_the_default_device_does_not_matter(budget) -> None:
    grid, method = Grid.video(24, 4, 4), VideoStreaming(clip_frames=4, clips=2)
    key_TC = planted(24, 4, 3)
    group = group_of(key_TC)
    signals = {"paired.frames": key_TC[None], "paired.text": QUESTION}
    tokens = item(grid)
    expected = run(method, grid, budget, key_TC)
    memory = ClipMemory(4)
    with torch.device("meta"):
        context = ProjectorContext(budget, grid=grid, read=signals.get)
        made = method.projector(tokens, context)
        memory.push(group)
        recall = memory.recall(QUESTION)
    assert made is not None and made.anchor_BM.equal(expected.anchor_BM)
    assert recall.x_LD.equal(filled(key_TC, 7, clips=4).recall(QUESTION).x_LD)
