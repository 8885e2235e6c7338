"""DyCoke: which frames are compared, counts from the formula, the released order, the caches."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

import foveate
from foveate.core import Budget, CacheContext, Grid, Plane, Tokens
from foveate.core.flops import published_flops
from foveate.methods.dycoke import DyCoke, similarity_to_earlier
from tiny import tiny_inputs, tiny_model

from .helpers import LAYOUTS, item, reduce_item


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- temporal merging -------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 6, 7, 9])
def test_frames_are_compared_in_groups_of_four(num_frames: int) -> None:
    x_TND = normal(num_frames, 5, 8)
    found_TN = similarity_to_earlier(x_TND, 4)
    for frame in range(num_frames):
        earlier = {0: None, 1: frame - 1, 2: frame - 2, 3: frame - 1}[frame % 4]
        if earlier is None:
            assert bool(found_TN[frame].isinf().all())
            continue
        expected_N = cosine_similarity(x_TND[frame], x_TND[earlier], dim=-1)
        torch.testing.assert_close(found_TN[frame], expected_N)


def test_larger_groups_continue_the_scheme() -> None:
    x_TND = normal(9, 3, 8)
    found_TN = similarity_to_earlier(x_TND, 8)
    for frame, earlier in {1: 0, 2: 0, 3: 2, 4: 0, 5: 4, 6: 4, 7: 6}.items():
        expected_N = cosine_similarity(x_TND[frame], x_TND[earlier], dim=-1)
        torch.testing.assert_close(found_TN[frame], expected_N)
    assert bool(found_TN[[0, 8]].isinf().all())


def test_published_counts_and_flops() -> None:
    """K = 0.7 on 32 frames of 196: 8 whole frames and 24 of int(0.3 * 196) patches."""
    grid = Grid.video(32, 14, 14, newlines_at_end=1)
    count = DyCoke(keep=0.3).count(grid, Budget(retain=0.5))
    assert count.tokens == 8 * 196 + 24 * 58 + 1 and count.exact
    assert DyCoke().count(grid, Budget(retain=DyCoke.card.retain)) == count
    for K in (0.3, 0.5, 0.7, 1.0):
        kept = sum(DyCoke(keep=1 - K).kept_per_frame(grid, Budget(retain=0.5)))
        assert kept / 6272 == pytest.approx((1 + 3 * (1 - K)) / 4, abs=0.004)
    ratio = published_flops(28, 3584, 18944, count.tokens) / published_flops(28, 3584, 18944, 6272)
    assert ratio == pytest.approx(0.424, abs=0.001)


@pytest.mark.parametrize("num_frames", [4, 6, 16, 32, 33])
@pytest.mark.parametrize("retain", [0.1, 0.2, 0.25, 0.5, 0.9])
def test_the_budget_is_met_down_to_one_frame(num_frames: int, retain: float) -> None:
    grid = Grid.video(num_frames, 14, 14)
    share = DyCoke().count(grid, Budget(retain=retain)).tokens / grid.num_tokens
    assert share == pytest.approx(max(retain, 1 / num_frames), abs=0.006)


def test_needle_survives_in_the_frame_where_it_appears() -> None:
    """A still clip, and an object at five places of one compared frame: they are what stays."""
    x_TND = normal(1, 49, 16).expand(8, -1, -1) + 0.01 * normal(8, 49, 16, seed=1)
    x_TND = x_TND.clone()
    places = torch.tensor([3, 4, 17, 30, 48])
    x_TND[6, places] = -x_TND[6, places]
    grid = Grid.video(8, 7, 7)
    kept = reduce_item(
        DyCoke(keep=0.11), grid, Budget(retain=0.3), Tokens(x_TND.reshape(1, -1, 16))
    ).anchor_BM[0]
    assert kept.tolist() == sorted(kept.tolist())
    assert kept[(kept >= 6 * 49) & (kept < 7 * 49)].tolist() == (6 * 49 + places).tolist()
    assert torch.bincount(kept // 49).tolist() == [49, 5, 5, 5, 49, 5, 5, 5]


def released_reference(x_TND: torch.Tensor, keep: int) -> list[int]:
    """Flat indices in the order of the released code, frame by frame."""
    T, N, _ = x_TND.shape
    out: list[list[int]] = [list(range(t * N, (t + 1) * N)) for t in range(T)]

    def thin(frame: int, earlier: int) -> None:
        order = cosine_similarity(x_TND[frame], x_TND[earlier], dim=-1).argsort()[:keep]
        out[frame] = (frame * N + order).tolist()

    for frame in range(0, T - 1, 2):
        thin(frame + 1, frame)
    for frame in range(0, T - 4, 4):
        thin(frame + 2, frame)
    return [index for frame in out for index in frame]


@pytest.mark.parametrize("num_frames", [6, 8, 12, 14])
def test_released_behaviour(num_frames: int) -> None:
    x_TND = normal(num_frames, 10, 8)
    grid = Grid.video(num_frames, 2, 5, newlines_at_end=1)
    tokens = Tokens(torch.cat([x_TND.reshape(1, -1, 8), torch.ones(1, 1, 8)], dim=1))
    method = DyCoke(keep=0.3, released=True)
    kept = reduce_item(method, grid, Budget(retain=0.5), tokens).anchor_BM[0].tolist()
    assert kept == [*released_reference(x_TND, 3), num_frames * 10]
    assert method.count(grid, Budget(retain=0.5)).tokens == len(kept)
    plain = reduce_item(DyCoke(keep=0.3), grid, Budget(retain=0.5), tokens).anchor_BM[0]
    assert plain.tolist() == sorted(plain.tolist()) and set(plain.tolist()) <= set(kept)
    assert len(plain) < len(kept) or num_frames % 4


def test_frames_must_be_of_one_size_and_images_pass() -> None:
    mixed = Grid((Plane(2, 2), Plane(2, 3)), "video")
    with pytest.raises(ValueError, match="frames of one size"):
        reduce_item(DyCoke(), mixed, Budget(retain=0.5), Tokens(torch.zeros(1, 10, 4)))
    for name in ("image", "one frame"):
        grid = LAYOUTS[name]
        assert DyCoke().count(grid, Budget(retain=0.2)).tokens == grid.num_tokens
        context = foveate.core.ProjectorContext(Budget(retain=0.2), grid=grid)
        assert DyCoke().projector(item(grid), context) is None


# -- caches -----------------------------------------------------------------------------------


def test_deeper_caches_keep_what_the_last_token_attends_to() -> None:
    score_N, state = torch.rand(20, generator=torch.Generator().manual_seed(0)), {}
    keys = normal(1, 2, 20, 4)

    def kept(layer: int, id_N: torch.Tensor) -> list[int] | None:
        context = CacheContext(
            Budget(retain=0.5),
            state=state,
            layer=layer,
            num_layers=6,
            id_N=id_N,
            last_token_attention={2: score_N}.__getitem__,
        )
        reduction = DyCoke().cache(keys[:, :, : len(id_N)], keys[:, :, : len(id_N)], context)
        return None if reduction is None else reduction.anchor_BM[0].tolist()

    ids = torch.arange(5, 25)
    assert kept(2, ids) is None
    chosen = kept(3, ids)
    assert chosen == score_N.topk(6).indices.sort().values.tolist()
    assert kept(4, ids) == chosen
    # Another method has taken every second token out of the sequence in between.
    assert kept(5, ids[::2]) == [i // 2 for i in chosen if i % 2 == 0]


def test_cache_lengths_on_a_model() -> None:
    model, inputs = tiny_model("llava_onevision"), tiny_inputs("llava_onevision", modality="video")
    with torch.no_grad(), foveate.reduce(model, "dycoke", layer=2, retain=0.5) as run:
        cache = model(**inputs).past_key_values
    report, visual = run.report, run.report.visual_after
    text = report.prompt_lengths[0] - visual
    few = text + int(0.3 * visual)
    assert report.layer_lengths[0] == [text + visual] * 4
    assert report.cache_lengths[0] == [text + visual] * 2 + [few] * 2
    assert [layer.keys.shape[-2] for layer in cache.layers] == report.cache_lengths[0]
    with torch.no_grad(), foveate.reduce(model, "dycoke", cache_retain=1.0, retain=0.5) as run:
        model(**inputs)
    assert run.report.cache_lengths == run.report.layer_lengths


@pytest.mark.parametrize(
    "arguments",
    [{"group": 6}, {"group": 1}, {"keep": 1.5}, {"cache_retain": 0.0}, {"layer": 0}],
    ids=str,
)
def test_bad_arguments(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        DyCoke(**arguments)


def test_layers_must_exist() -> None:
    assert DyCoke().attention_layers(28) == (2,)
    assert DyCoke(layer=0.5).attention_layers(8) == (3,)
    with pytest.raises(ValueError, match="layer = 9"):
        DyCoke(layer=9).check(None, 8)
    with pytest.raises(ValueError, match="this model has one"):
        DyCoke().check(None, 1)
