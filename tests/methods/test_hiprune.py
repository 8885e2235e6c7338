"""HiPrune: who is kept, and why."""

from __future__ import annotations

import pytest
import torch

from foveate import ops
from foveate.core import Budget, EncoderAttentionView, Grid, Plane, ProjectorContext
from foveate.core.dims import TransformerDims
from foveate.core.flops import prefill_flops
from foveate.methods.hiprune import HiPrune, global_attention, hierarchical_choice

from .helpers import item


def scores(planes: int = 3, side: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, planes, side * side, generator=generator).unbind()


def neighbours_of(index: int, height: int, width: int) -> set[int]:
    row, column = divmod(index, width)
    near = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    return {y * width + x for y, x in near if 0 <= y < height and 0 <= x < width}


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("keep", [1, 7, 40, 144])
def test_anchors_buffers_and_registers(alpha: float, keep: int) -> None:
    object_TL, deep_TL = scores()
    kept_TK = hierarchical_choice(object_TL, deep_TL, 12, keep, alpha=alpha)
    assert kept_TK.shape == (3, keep)
    num_anchors = round(keep * alpha / 5)
    for object_L, deep_L, kept in zip(object_TL, deep_TL, kept_TK.tolist(), strict=True):
        assert kept == sorted(set(kept))
        anchors = object_L.argsort(descending=True)[:num_anchors].tolist()
        group = set(anchors).union(*(neighbours_of(a, 12, 12) for a in anchors))
        assert group <= set(kept) and len(group) <= 5 * num_anchors
        registers = [i for i in deep_L.argsort(descending=True).tolist() if i not in group]
        assert set(kept) == group | set(registers[: keep - len(group)])


def test_no_anchors_leave_the_deep_block_alone() -> None:
    object_TL, deep_TL = scores()
    kept_TK = hierarchical_choice(object_TL, deep_TL, 12, 30, alpha=0.0)
    assert kept_TK.equal(ops.top_k(deep_TL, 30))


@pytest.mark.parametrize("index", [0, 11, 60, 71, 143])
def test_the_needle_and_its_neighbours(index: int) -> None:
    object_TL, deep_TL = scores(1)
    object_TL[0, index], deep_TL[0, index] = 2.0, 0.0
    inside = {index, *neighbours_of(index, 12, 12)}
    deep_TL[0, list(inside)] = 0.0
    kept = set(hierarchical_choice(object_TL, deep_TL, 12, 10, alpha=0.5)[0].tolist())
    assert inside <= kept
    released = hierarchical_choice(object_TL, deep_TL, 12, 10, alpha=0.5, neighbours="index")
    wrapped = {min(max(index + step, 0), 143) for step in (0, -1, 1, -12, 12)}
    assert wrapped <= set(released[0].tolist())
    # At the two corners clamping gives back the anchor; on other edges the row runs on.
    assert (wrapped == inside) == (index in (0, 143))


def test_buffers_give_way_when_the_budget_is_too_small() -> None:
    object_TL, deep_TL = scores(1)
    num_anchors, keep = 3, 5
    kept = hierarchical_choice(object_TL, deep_TL, 12, keep, alpha=num_anchors)[0].tolist()
    order = object_TL[0].argsort(descending=True).tolist()
    anchors = order[:num_anchors]
    buffers = set().union(*(neighbours_of(a, 12, 12) for a in anchors)) - set(anchors)
    best = sorted(buffers, key=order.index)[: keep - num_anchors]
    assert kept == sorted([*anchors, *best])


def test_scores_above_one_do_not_let_a_buffer_in_twice() -> None:
    """Sums over queries exceed 1; the released subtraction then fails, ranks do not."""
    object_TL, deep_TL = scores()
    once = hierarchical_choice(object_TL, deep_TL, 12, 40, alpha=0.5)
    assert hierarchical_choice(object_TL * 576, deep_TL * 576, 12, 40, alpha=0.5).equal(once)


def views(grid: Grid, seed: int = 0) -> dict[int, EncoderAttentionView]:
    generator = torch.Generator().manual_seed(seed)
    images, patches = len(grid.planes), grid.planes[0].num_patches
    q = torch.randn(4, images, 3, patches + 1, 8, generator=generator)
    return {
        layer: EncoderAttentionView(q[layer], q[layer + 2], num_prefix=1, has_cls=True)
        for layer in (0, 1)
    }


def kept_of(grid: Grid, found: dict[int, EncoderAttentionView], **arguments) -> list[int]:
    context = ProjectorContext(
        Budget(retain=0.25), grid=grid, encoder_layers=(0, 1), read_encoder=found.get
    )
    reduction = HiPrune(**arguments).projector(item(grid), context)
    assert reduction is not None
    assert set(context.state) == {"object_attention", "deep_attention"}
    return reduction.anchor_BM[0].tolist()


def test_the_first_block_names_objects_and_the_last_registers() -> None:
    grid = Grid.video(3, 6, 6)
    found = views(grid)
    object_TL, deep_TL = (global_attention(found[i]).view(3, 36) for i in (0, 1))
    expected_TK = hierarchical_choice(object_TL, deep_TL, 6, 9, alpha=0.6)
    expected = (expected_TK + 36 * torch.arange(3)[:, None]).flatten().tolist()
    assert kept_of(grid, found, alpha=0.6) == expected
    assert kept_of(grid, {0: found[1], 1: found[0]}, alpha=0.6) != expected


def test_heads_have_no_order() -> None:
    grid = Grid.image(6, 6)
    found = views(grid)
    turned = {
        layer: EncoderAttentionView(
            view.q_IHMd.flip(1), view.k_IHMd.flip(1), num_prefix=1, has_cls=True
        )
        for layer, view in found.items()
    }
    assert kept_of(grid, turned) == kept_of(grid, found)


def test_published_blocks_and_counts() -> None:
    method = HiPrune()
    assert method.encoder_layers(24, 22) == (8, 22)  # CLIP ViT-L in LLaVA
    assert method.encoder_layers(32, 31) == (15, 31)  # Qwen2.5-VL
    assert HiPrune(object_layer=9).encoder_layers(24, 22) == (8, 22)
    assert HiPrune(object_layer=0.5).encoder_layers(4, 3) == (1, 3)
    grid = Grid.image(24, 24)
    for kept, anchors in ((192, 4), (128, 3), (64, 1)):
        assert method.count(grid, Budget(tokens=kept)).tokens == kept
        assert ops.round_half_even(method.alpha * kept / 5) == anchors
    tiles = Grid((Plane(24, 24),) * 5)
    for kept in (640, 320, 160):
        assert method.kept_per_plane(tiles, Budget(tokens=kept)) == [kept // 5] * 5
    # 58.7 % fewer FLOPs at a third of the tokens, as others report, with 80 tokens of text.
    vicuna_7b = TransformerDims(32, 4096, 32, 32, 128, 11008, vocab=32000)
    saved = 1 - prefill_flops(vicuna_7b, 192 + 80) / prefill_flops(vicuna_7b, 576 + 80)
    assert abs(saved - 0.587) < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.5}, r"alpha is a share .* got 1.5"),
        ({"neighbours": "round"}, 'must be "adjacent" or "index"'),
        ({"object_layer": 0}, "counts encoder blocks from 1"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HiPrune(**arguments)


def test_blocks_that_do_not_exist() -> None:
    for layer in (25, 9.5):
        with pytest.raises(ValueError, match="does not exist in a model with 24 layers"):
            HiPrune(object_layer=layer).encoder_layers(24, 22)
