"""FlowCut: cuts, counts, the needle, groups, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.core import (
    Budget,
    DecoderContext,
    EncoderContext,
    Grid,
    Plane,
    ProjectorContext,
    Reduction,
    Tokens,
    get_method,
)
from foveate.core.units import patch_groups
from foveate.errors import MissingSignalError
from foveate.methods.flowcut import FlowCut, encoder_flow

from .helpers import encoder_view, item

HEADS, WIDTH = 2, 8
IMAGE = Grid((Plane(4, 4), Plane(8, 8, row_newline=True)))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_encoder(
    method: FlowCut,
    budget: Budget,
    qkv: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    has_cls: bool = True,
    layouts: tuple[tuple[Grid, int], ...] = (),
    stages: tuple = (),
) -> tuple[list[torch.Tensor], Reduction | None, EncoderContext]:
    """Present tokens of every image after each block, when blocks have the given q, k, v."""
    batch, num = qkv[0][0].shape[0], qkv[0][0].shape[2]
    tokens, state, counts = Tokens(torch.zeros(batch, num, 4)), {}, []
    context = EncoderContext(budget)
    for layer, parts in enumerate(qkv):
        if tokens.reduction is not None:
            parts = [tokens.reduction.gather(p.transpose(1, 2)).transpose(1, 2) for p in parts]
        context = EncoderContext(
            budget,
            "flowcut",
            state=state,
            layer=layer,
            num_layers=len(qkv),
            num_prefix=int(has_cls),
            has_cls=has_cls,
            queries_BHNd=parts[0],
            keys_BHNd=parts[1],
            values_BHNd=parts[2],
            layouts=lambda: layouts,
            stages=stages,
        )
        reduction = method.encoder(tokens, context)
        if reduction is not None:
            tokens = tokens.reduce(reduction)
        counts.append((tokens.index_BN >= 0).sum(1))
    return counts, tokens.reduction, context


def blocks(num_blocks: int = 7, batch: int = 1, num: int = 41, spread: float = 1.0):
    return [
        tuple(spread * normal(batch, HEADS, num, WIDTH, seed=3 * i + j) for j in range(3))
        for i in range(num_blocks)
    ]


def kept(reduction: Reduction | None, sample: int = 0) -> list[int]:
    assert reduction is not None
    return [i for i in reduction.anchor_BM[sample].tolist() if i >= 0]


# -- the encoder ------------------------------------------------------------------------------


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("target", [1, 10, 30])
def test_counts_fall_to_the_target(has_cls: bool, target: int) -> None:
    counts, reduction, _ = run_encoder(FlowCut(), Budget(tokens=target), blocks(), has_cls)
    lengths = [int(count) for count in counts]
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] == target + has_cls
    # The last cut: with [CLS] before the last block, without it behind it.
    assert lengths[-2] == target + 1 if has_cls else lengths[-2] > target
    # Cuts only where an even number of blocks remains.
    last = len(lengths) - 2 if has_cls else len(lengths) - 1
    before = [41, *lengths[:-1]]
    assert all(
        a == b for i, (a, b) in enumerate(zip(before, lengths, strict=True)) if (last - i) % 2
    )
    chosen = kept(reduction)
    assert chosen == sorted(set(chosen)) and (not has_cls or chosen[0] == 0)


@pytest.mark.parametrize("target", [40, 41, 100])
def test_a_target_of_all_patches_is_the_identity(target: int) -> None:
    counts, reduction, _ = run_encoder(FlowCut(), Budget(tokens=target), blocks())
    assert reduction is None and all(int(count) == 41 for count in counts)


def test_uniform_attention_waits_for_the_last_cut() -> None:
    uniform = [(0 * q, k, v) for q, k, v in blocks()]
    counts, _, _ = run_encoder(FlowCut(), Budget(tokens=10), uniform)
    assert [int(count) for count in counts] == [41] * 5 + [11] * 2


def test_attention_on_one_patch_cuts_by_the_root_of_what_remains() -> None:
    focused = []
    for q, k, v in blocks():
        q, k = 100 * torch.ones_like(q), 0 * k
        k[:, :, 7] = 1.0
        focused.append((q, k, v))
    counts, reduction, _ = run_encoder(FlowCut(), Budget(tokens=10), focused)
    left, expected = 40, []
    for remaining in (5, 4, 3, 2, 1, 0):
        if remaining % 2 == 0:
            left -= round((left - 10) / math.sqrt(remaining)) if remaining else left - 10
        expected.append(left + 1)
    assert [int(count) for count in counts] == [*expected, 11] and 7 in kept(reduction)


def test_a_lasting_needle_survives_and_a_passing_one_may_not() -> None:
    lasting, passing = 23, 31
    made = []
    for layer, (q, k, v) in enumerate(blocks(spread=0.1)):
        q = q + 1.0
        k, v = k.clone(), v.clone()
        v += 0.5
        k[:, :, lasting] += 1.0
        v[:, :, lasting] *= 4
        if layer == 0:
            v[:, :, passing] *= 3
        else:
            v[:, :, passing] *= 0.1
        made.append((q, k, v))
    _, reduction, _ = run_encoder(FlowCut(), Budget(tokens=1), made)
    assert kept(reduction) == [0, lasting]
    _, reduction, _ = run_encoder(FlowCut(), Budget(tokens=8), made)
    assert lasting in kept(reduction) and passing not in kept(reduction)
    # What only the first block says is enough when it alone counts.
    _, reduction, _ = run_encoder(FlowCut(momentum=0.999), Budget(tokens=8), made)
    assert passing in kept(reduction)


def test_images_of_a_batch_do_not_know_of_each_other() -> None:
    both = blocks(batch=2)
    for q, _, _ in both:
        q[1] *= 6  # much more concentrated: it loses more at first
    counts, together, _ = run_encoder(FlowCut(), Budget(tokens=10), both)
    assert any(int(a) != int(b) for a, b in counts) and together is not None
    for sample in range(2):
        alone = [tuple(part[sample : sample + 1] for part in parts) for parts in both]
        own, reduction, _ = run_encoder(FlowCut(), Budget(tokens=10), alone)
        assert [int(count[sample]) for count in counts] == [int(count) for count in own]
        assert kept(together, sample) == kept(reduction)
    batched, _, _ = run_encoder(FlowCut(batch_max=True), Budget(tokens=10), both)
    least = [min(int(a), int(b)) for a, b in counts]
    assert all(int(a) == int(b) for a, b in batched) and int(batched[1][0]) == least[1]


def test_zero_attention_and_half_precision_give_numbers() -> None:
    for spread, dtype in ((60.0, torch.float32), (1.0, torch.bfloat16)):
        parts = [tuple(x.to(dtype) for x in block) for block in blocks(spread=spread)]
        _, reduction, context = run_encoder(FlowCut(), Budget(tokens=5), parts)
        assert len(kept(reduction)) == 6
        assert context.carried["score"].isfinite().all()
    q, k, v = blocks(1)[0]
    half = encoder_flow(q.bfloat16(), k.bfloat16(), v.bfloat16(), 1, True)[1]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, encoder_flow(q, k, v, 1, True)[1], rtol=0.1, atol=0.05)


@pytest.mark.parametrize("has_cls", [True, False])
def test_padding_has_no_part_in_the_flow(has_cls: bool) -> None:
    q, k, v = blocks(1, num=12)[0]
    exists_BM = torch.arange(12)[None] < 9
    padded = encoder_flow(q, k, v, int(has_cls), has_cls, exists_BM)
    plain = encoder_flow(*(x[:, :, :9] for x in (q, k, v)), int(has_cls), has_cls)
    for got, expected in zip(padded, plain, strict=True):
        torch.testing.assert_close(got[:, : expected.shape[1]], expected)
        assert not got[:, expected.shape[1] :].any()


def test_survivors_are_carried_with_their_score() -> None:
    _, reduction, context = run_encoder(FlowCut(), Budget(tokens=10), blocks())
    score_P = context.carried["score"][0]
    assert score_P.shape == (40,)
    assert (score_P.nonzero()[:, 0] + 1).tolist() == kept(reduction)[1:]
    assert not context.carried["two cuts"].any()


def test_whole_groups_are_cut_where_the_model_merges_patches() -> None:
    grid, num = Grid.image(4, 4), 8 * 8
    layouts = ((grid, 0),)
    parts = blocks(num=num)
    _, reduction, context = run_encoder(FlowCut(), Budget(tokens=3), parts, False, layouts)
    group_P = patch_groups(num, grid.planes[0])
    assert group_P is not None
    groups, sizes = group_P[kept(reduction)].unique(return_counts=True)
    assert len(groups) == 6 and set(sizes.tolist()) == {4}  # twice 3: the LLM cuts the rest
    assert context.carried["two cuts"].all()
    # Without a decoder stage nothing would be cut behind it.
    stages = ("encoder", "projector")
    _, reduction, _ = run_encoder(FlowCut(), Budget(tokens=3), parts, False, layouts, stages)
    assert len(kept(reduction)) == 3 * 4


def test_every_tile_keeps_half_of_the_total() -> None:
    layouts = ((IMAGE, 0), *[(IMAGE, 1)] * 4)
    parts = blocks(batch=5, num=17)
    counts, _, _ = run_encoder(FlowCut(), Budget(tokens=9), parts, True, layouts)
    assert counts[-1].tolist() == [1 + 4] * 5
    other = Grid.image(4, 4)
    counts, reduction, _ = run_encoder(
        FlowCut(), Budget(tokens=9), parts, True, (*layouts[:4], (other, 0))
    )
    # One call may hold images of different targets: they stay apart to the end.
    assert counts[-1].tolist() == [5, 5, 5, 5, 10]
    assert reduction is not None and reduction.mask_BM is not None


def test_frames_share_the_total() -> None:
    video = Grid.video(3, 4, 4)
    layouts = tuple((video, frame) for frame in range(3))
    counts, _, _ = run_encoder(FlowCut(), Budget(tokens=10), blocks(batch=3, num=17), True, layouts)
    assert sorted(counts[-1].tolist()) == [4, 4, 5]


def test_groups_of_unequal_windows() -> None:
    group_P = patch_groups(27 * 27, Plane(14, 14))
    assert group_P is not None
    sizes = group_P.bincount(minlength=196)
    assert len(sizes) == 196 and set(sizes.tolist()) == {1, 2, 4}
    assert patch_groups(16, Plane(4, 4)) is None
    assert patch_groups(7, Plane(2, 2)) is None or len(patch_groups(7, Plane(2, 2))) == 7


# -- behind it --------------------------------------------------------------------------------


def projector_context(grid: Grid, budget: Budget, score_N: torch.Tensor, two_cuts: bool, **more):
    maps = {"score": score_N, "two cuts": torch.full_like(score_N, float(two_cuts))}
    return ProjectorContext(budget, "flowcut", grid=grid, read_carried=maps.get, **more)


def test_exactly_the_survivors_go_on() -> None:
    grid = Grid.image(6, 6)
    score_N = torch.zeros(36)
    score_N[[3, 8, 30]] = torch.tensor([0.1, 5.0, 1e-20])
    context = projector_context(grid, Budget(tokens=3), score_N, False)
    reduction = FlowCut().projector(item(grid), context)
    assert reduction is not None and kept(reduction) == [3, 8, 30]
    assert float(context.carried["share"].sum()) == 36  # each stands for itself
    context = projector_context(grid, Budget(tokens=2), score_N + 1e-3, True)
    reduction = FlowCut().projector(item(grid), context)
    assert reduction is not None and reduction.num_out == 4
    assert float(context.carried["share"][:4].sum()) == pytest.approx(2)


def test_tiles_lose_their_margin_and_their_newlines() -> None:
    score_N = torch.full((IMAGE.num_tokens,), torch.nan)
    score_N[IMAGE.patch_index()] = 0.0
    survivors = IMAGE.patch_index()[[1, 5, 17, 40, 41]]
    score_N[survivors] = 1.0
    context = projector_context(IMAGE, Budget(tokens=4), score_N, True)
    reduction = FlowCut().projector(item(IMAGE), context)
    assert reduction is not None and kept(reduction) == survivors.tolist()
    assert float(context.carried["share"][0]) == pytest.approx(4 / 5)
    counted = FlowCut().count(IMAGE, Budget(tokens=4))
    assert not counted.exact and counted.tokens == 2 + 8


def test_without_the_encoder_stage_the_last_blocks_decide() -> None:
    grid = Grid.image(6, 6)
    view = encoder_view(grid)
    context = ProjectorContext(
        Budget(tokens=5),
        grid=grid,
        encoder_layers=(0,),
        read_encoder=lambda layer: view,
        stages=("projector",),
    )
    reduction = FlowCut().projector(item(grid), context)
    assert reduction is not None
    _, flow = encoder_flow(view.q_IHMd, view.k_IHMd, view.values(), 0, False)
    assert kept(reduction) == sorted(flow[0].topk(5).indices.tolist())
    context.stages = ("projector", "decoder")
    reduction = FlowCut().projector(item(grid), context)
    assert reduction is not None and reduction.num_out == 10
    assert FlowCut().encoder_layers(24, 22) == (19, 20, 21, 22)
    with pytest.raises(MissingSignalError):
        FlowCut().projector(item(grid), ProjectorContext(Budget(tokens=5), "flowcut", grid=grid))


def test_published_counts() -> None:
    plain, tiled = Grid.image(24, 24), Grid((Plane(24, 24), Plane(48, 48, row_newline=True)))
    for total in (192, 128, 64):
        assert FlowCut(llm_cut=False).count(plain, Budget(tokens=total)).tokens == total
        assert not FlowCut().takes_two_cuts(plain, has_cls=True, num_patches=576)
    # 94.4 % fewer of 2880: 80 per tile, then 160.
    assert FlowCut().entering(tiled, Budget(tokens=160), True) == [80, 4 * 80]
    assert FlowCut().leaving(tiled, Budget(tokens=160)) == 160
    assert round(1 - 160 / 2880, 3) == 0.944
    assert FlowCut().takes_two_cuts(tiled, has_cls=True, num_patches=576)
    # Qwen2-VL: 8 T patches in the encoder are 2 T groups of four.
    qwen = Grid.image(16, 16)
    assert FlowCut().takes_two_cuts(qwen, has_cls=False, num_patches=1024)
    assert FlowCut().entering(qwen, Budget(tokens=64), True) == [128]


# -- inside the LLM ---------------------------------------------------------------------------


def test_layers() -> None:
    assert FlowCut().attention_layers(32) == (1,) and FlowCut().decoder_layers(32) == (2,)
    assert FlowCut(layer=0.25).decoder_layers(8) == (3,)
    assert FlowCut(llm_cut=False).decoder_layers(32) == ()
    with pytest.raises(ValueError, match="it is the last of 2"):
        FlowCut().decoder_layers(2)
    with pytest.raises(ValueError, match="needs two, got 1"):
        FlowCut().check(1, 32)


def test_items_without_a_second_cut_are_left_alone() -> None:
    context = DecoderContext(
        Budget(tokens=3),
        layer=2,
        num_visual=9,
        visual_N=torch.arange(9),
        carried=lambda name: torch.ones(9, dtype=torch.float64),
    )
    assert FlowCut().decoder(Tokens(torch.zeros(1, 9, 4)), context) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"momentum": 1.0}, "momentum must lie"),
        ({"every": 0}, "every must be"),
        ({"every": 1.5}, "every must be"),
        ({"layer": -1}, "layer must be"),
    ],
)
def test_bad_arguments(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FlowCut(**arguments)


def test_a_block_that_another_method_has_changed_is_refused() -> None:
    with pytest.raises(ValueError, match="another method has changed the sequence"):
        FlowCut().encoder(Tokens(torch.zeros(1, 9, 4)), EncoderContext(Budget(retain=0.5)))


def test_what_others_may_know_of_it() -> None:
    method = get_method("flowcut")
    assert method.encoder_drops and method.encoder_optional and method.renumbers
    assert not get_method("tome").encoder_drops
