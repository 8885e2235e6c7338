"""VidCom2: similarities against their definition, frame budgets, needles and counts."""

from __future__ import annotations

import pytest
import torch

from foveate.core import Budget, Count, Grid, ProjectorContext, Tokens
from foveate.methods.vidcom2 import (
    VidCom2,
    frame_ratios,
    similarity_to_means,
    steady_channels,
)

from .helpers import LAYOUTS, item, reduce_item


def video(frames: int = 8, places: int = 30, channels: int = 16, seed: int = 0) -> torch.Tensor:
    """Frames around one scene, [T, L, C]."""
    generator = torch.Generator().manual_seed(seed)
    scene = torch.randn(1, places, channels, generator=generator)
    return scene + 0.1 * torch.randn(frames, places, channels, generator=generator)


def run(x_TLC: torch.Tensor, retain: float, **arguments) -> tuple[torch.Tensor, list[int]]:
    """Kept patches and the number of every frame."""
    T, L, _ = x_TLC.shape
    grid = Grid.video(T, 1, L)
    context = ProjectorContext(Budget(retain=retain), grid=grid)
    tokens = Tokens.from_grid(x_TLC.flatten(0, 1), grid)
    reduction = VidCom2(**arguments).projector(tokens, context)
    assert reduction is not None
    return reduction.anchor_BM[0], context.state["kept"]


def test_similarities_by_their_definition() -> None:
    x_TLC = video()
    unit_TLC = torch.nn.functional.normalize(x_TLC, dim=-1)
    means = unit_TLC.mean((0, 1), keepdim=True), unit_TLC.mean(1, keepdim=True)
    for found, mean in zip(similarity_to_means(x_TLC), means, strict=True):
        square_TL = (unit_TLC - mean).square().sum(-1)
        expected = sum(torch.exp(-square_TL / (2 * a)) for a in (0.125, 0.25, 0.5, 1.0, 2.0))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for found, mean in zip(similarity_to_means(x_TLC, "cosine"), means, strict=True):
        expected = torch.cosine_similarity(x_TLC, mean, dim=-1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_channels_of_low_variance_are_read() -> None:
    x_TLC = video(channels=6) * torch.tensor([9.0, 0.1, 5.0, 0.2, 7.0, 0.3])
    assert steady_channels(x_TLC, 0.5).equal(x_TLC[..., [1, 3, 5]])
    assert steady_channels(x_TLC, 0.01).equal(x_TLC[..., [1]])
    assert steady_channels(x_TLC, 1.0) is x_TLC


def test_ratios_average_to_the_budget() -> None:
    similarity_TL = torch.rand(16, 9, generator=torch.Generator().manual_seed(0))
    ratio_T = frame_ratios(similarity_TL, 0.25, 0.01)
    torch.testing.assert_close(ratio_T.mean(), torch.tensor(0.25))
    assert ratio_T.argmax() == similarity_TL.mean(1).argmin()
    assert frame_ratios(similarity_TL, 0.9, 0.01).max() == 1


@pytest.mark.parametrize(
    ("shape", "retain", "tokens"),
    [((32, 14), 0.25, 1568), ((32, 14), 0.15, 941), ((64, 13), 0.25, 2704), ((64, 13), 0.15, 1622)],
)
def test_counts_of_the_published_settings(shape, retain: float, tokens: int) -> None:
    frames, side = shape
    grid = Grid.video(frames, side, side)
    assert VidCom2().count(grid, Budget(retain=retain)) == Count(tokens)
    x_TLC = video(frames, side * side, 8)
    reduction = reduce_item(
        VidCom2(), grid, Budget(retain=retain), Tokens.from_grid(x_TLC.flatten(0, 1), grid)
    )
    assert reduction.num_out == tokens


def test_the_odd_frame_gets_more() -> None:
    x_TLC = video()
    x_TLC[5] = torch.randn(30, 16, generator=torch.Generator().manual_seed(9))
    _, counts = run(x_TLC, 0.2)
    assert sum(counts) == 48 and counts[5] == max(counts) > counts[0]
    assert max(counts[:5]) - min(counts[:5]) <= 1


@pytest.mark.parametrize("measure", ["gaussian", "cosine"])
def test_the_odd_token_is_kept(measure) -> None:
    x_TLC = torch.ones(6, 30, 16) + 0.05 * video(6)
    x_TLC[3, 21] *= -1
    assert 3 * 30 + 21 in run(x_TLC, 0.05, measure=measure)[0].tolist()


def test_channels_decide_what_is_odd() -> None:
    x_TLC = torch.ones(6, 30, 16) + 0.05 * video(6)
    x_TLC[3, 4, ::2] *= -1  # these channels vary more for it, and half of all are left out
    assert 3 * 30 + 4 not in run(x_TLC, 0.05)[0].tolist()
    assert 3 * 30 + 4 in run(x_TLC, 0.05, channels=1.0)[0].tolist()


def test_still_videos_share_evenly_and_ties_go_to_the_first() -> None:
    kept, counts = run(torch.ones(4, 10, 8), 0.25)
    assert counts == [3, 3, 2, 2]
    assert kept.tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 30, 31]


def test_every_frame_rounded_on_its_own() -> None:
    x_TLC = video(10, 30)
    kept, counts = run(x_TLC, 0.05, rounding="frame")
    video_TL, _ = similarity_to_means(steady_channels(x_TLC, 0.5))
    ratios = frame_ratios(video_TL, 0.05, 0.01).tolist()
    assert counts == [max(1, round(ratio * 30)) for ratio in ratios]
    bound = VidCom2(rounding="frame").count(Grid.video(10, 1, 30), Budget(retain=0.05))
    assert not bound.exact and len(kept) == sum(counts) <= bound.tokens
    # A budget below one token per frame leaves some frames without, unless rounded by frame.
    _, exact = run(x_TLC, 0.01)
    assert sum(exact) == 3
    assert run(x_TLC, 0.01, rounding="frame")[1] == [1] * 10


@pytest.mark.parametrize("retain", [0.02, 0.3, 0.9])
def test_the_bound_holds_where_rows_end_in_newlines(retain: float) -> None:
    grid = LAYOUTS["video, newline per row"]
    method = VidCom2(rounding="frame")
    reduction = reduce_item(method, grid, Budget(retain=retain))
    assert reduction.num_out <= method.count(grid, Budget(retain=retain)).tokens


def test_lengths_and_order_of_channels_do_not_matter() -> None:
    x_TLC = video()
    expected, _ = run(x_TLC, 0.3)
    assert run(x_TLC * 7.0, 0.3)[0].equal(expected)
    assert run(x_TLC.flip(-1), 0.3)[0].equal(expected)


def test_images_pass() -> None:
    grid = LAYOUTS["image"]
    context = ProjectorContext(Budget(retain=0.2), grid=grid)
    assert VidCom2().projector(item(grid), context) is None
    assert VidCom2().count(grid, Budget(retain=0.2)) == Count(grid.num_tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature must be"),
        ({"channels": 0.0}, "channels is a share"),
        ({"measure": "dot"}, "measure must be"),
        ({"rounding": "up"}, "rounding must be"),
    ],
)
def test_bad_arguments(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VidCom2(**arguments)
