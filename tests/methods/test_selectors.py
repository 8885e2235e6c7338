"""DivPrune, FasterVLM and the baselines: invariants of their cards and planted needles."""

from __future__ import annotations

import pytest
import torch

from foveate.core import Budget, Grid, Plane, ProjectorContext, TokenKind, Tokens
from foveate.errors import MissingSignalError
from foveate.methods.divprune import DivPrune
from foveate.methods.fastervlm import FasterVLM, anyres_order
from foveate.methods.norm import Norm
from foveate.methods.pool import Pool, pooled_shape
from foveate.methods.random import Random
from foveate.methods.uniform import Uniform

from .helpers import LAYOUTS, context_for, item, reduce_item


def kept(method, grid: Grid, retain: float, **more) -> list[int]:
    return reduce_item(method, grid, Budget(retain=retain), **more).anchor_BM[0].tolist()


# -- DivPrune ---------------------------------------------------------------------------------


def test_divprune_finds_the_outlier_first() -> None:
    generator = torch.Generator().manual_seed(0)
    background = torch.ones(201, 16) + 0.01 * torch.randn(201, 16, generator=generator)
    background[77] = torch.tensor([1.0, -1.0]).repeat(8)
    grid = Grid.image(1, 201)
    context = context_for(grid, Budget(tokens=2))
    DivPrune().projector(Tokens.from_grid(background, grid), context)
    assert 77 in context.state["order"].tolist()


def test_divprune_ignores_lengths_and_follows_permutations() -> None:
    grid = LAYOUTS["image"]
    tokens = item(grid)
    expected = kept(DivPrune(), grid, 0.3, tokens=tokens)
    scale = torch.linspace(0.1, 9.0, grid.num_tokens)[:, None]
    assert kept(DivPrune(), grid, 0.3, tokens=Tokens(tokens.x_BND * scale)) == expected
    order = torch.randperm(grid.num_tokens, generator=torch.Generator().manual_seed(1))
    shuffled = kept(DivPrune(), grid, 0.3, tokens=Tokens(tokens.x_BND[:, order]))
    assert sorted(order[shuffled].tolist()) == expected


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_divprune_never_repeats_a_token(value: float) -> None:
    grid = LAYOUTS["image"]
    tokens = Tokens(torch.full((1, grid.num_tokens, 4), value))
    found = kept(DivPrune(), grid, 0.5, tokens=tokens)
    assert len(set(found)) == 24 and found == sorted(found)


def test_divprune_treats_newlines_as_candidates() -> None:
    grid = Grid((Plane(4, 4, row_newline=True),))
    x_ND = torch.ones(20, 8)
    newline_N = grid.kinds() == TokenKind.NEWLINE
    x_ND[newline_N] = -1.0
    found = kept(DivPrune(), grid, 0.1, tokens=Tokens.from_grid(x_ND, grid))
    assert len(found) == 2 and newline_N[found].tolist().count(True) == 1


# -- FasterVLM --------------------------------------------------------------------------------


def test_fastervlm_keeps_the_same_number_in_every_frame() -> None:
    grid = LAYOUTS["video"]
    found = torch.tensor(kept(FasterVLM(), grid, 0.2))
    assert torch.bincount(grid.positions()[found, 0]).tolist() == [7] * 6
    assert found.tolist() == sorted(found.tolist())


def test_fastervlm_finds_the_needle_and_ignores_scale() -> None:
    grid = LAYOUTS["video"]
    scores_N = torch.rand(grid.num_tokens, generator=torch.Generator().manual_seed(2))
    scores_N[3 * 35 + 20] = 2.0
    found = kept(FasterVLM(tokens_per_tile=1), grid, 0.5, scores_N=scores_N)
    assert len(found) == 6 and 3 * 35 + 20 in found
    scale_N = torch.tensor([0.1, 1, 10, 2, 5, 3])[grid.positions()[:, 0]]
    assert found == kept(FasterVLM(tokens_per_tile=1), grid, 0.5, scores_N=scores_N * scale_N)


def test_fastervlm_ties_go_to_the_lower_index() -> None:
    grid = Grid.image(3, 4)
    assert kept(FasterVLM(), grid, 0.25, scores_N=torch.ones(12)) == [0, 1, 2]


def test_fastervlm_takes_received_attention_without_cls() -> None:
    grid = LAYOUTS["image"]
    scores_1N = torch.rand(1, grid.num_tokens)
    only_received = {"encoder.received_attention": scores_1N}.get
    context = ProjectorContext(Budget(retain=0.25), "fastervlm", grid=grid, read=only_received)
    reduction = FasterVLM().projector(item(grid), context)
    assert reduction is not None
    best = scores_1N[0].topk(12).indices.sort().values
    assert reduction.anchor_BM[0].equal(best)
    with pytest.raises(MissingSignalError):
        FasterVLM().projector(item(grid), ProjectorContext(Budget(retain=0.2), grid=grid))


@pytest.mark.parametrize("policy", ["keep", "row", "end", "remove"])
def test_fastervlm_newline_policies(policy) -> None:
    grid = LAYOUTS["any resolution"]
    method = FasterVLM(newline=policy)
    scores_N = torch.rand(grid.num_tokens, generator=torch.Generator().manual_seed(4))
    reduction = reduce_item(method, grid, Budget(retain=0.04), scores_N=scores_N)
    kinds_M = grid.kinds()[reduction.anchor_BM[0]]
    assert (kinds_M == TokenKind.PATCH).sum() == 1 + 3  # round(25 * .04), round(80 * .04)
    newlines = int((kinds_M == TokenKind.NEWLINE).sum())
    counted = method.count(grid, Budget(retain=0.04))
    assert counted.exact == (policy != "row")
    assert reduction.num_out <= counted.tokens
    expected = {"keep": [9], "row": [2, 3, 4], "end": [1], "remove": [0]}[policy]
    assert newlines in expected


def test_anyres_order_interleaves_tiles() -> None:
    every_TK = torch.arange(4).expand(5, 4)
    found = anyres_order(every_TK, side=2, grid_width=2).tolist()
    # Thumbnail, then picture rows: tiles 1 and 2 share the upper two, 3 and 4 the lower two.
    assert found == [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11, 12, 13, 16, 17, 14, 15, 18, 19]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="newline must be"):
        FasterVLM(newline="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokens_per_tile"):
        FasterVLM(tokens_per_tile=0)


# -- baselines --------------------------------------------------------------------------------


def test_random_follows_the_seed() -> None:
    grid = LAYOUTS["video"]
    one, same, other = (kept(Random(), grid, 0.3, seed=seed) for seed in (1, 1, 2))
    assert one == same != other and one == sorted(one)


def test_random_reaches_every_patch() -> None:
    grid = Grid.image(3, 4)
    seen = {i for seed in range(60) for i in kept(Random(), grid, 0.25, seed=seed)}
    assert seen == set(range(12))


def test_uniform_gives_every_frame_its_share() -> None:
    grid = LAYOUTS["video"]
    found = torch.tensor(kept(Uniform(), grid, 0.2))
    counts = torch.bincount(grid.positions()[found, 0], minlength=6)
    assert counts.sum() == 42 and counts.max() - counts.min() <= 1
    gaps = found.diff()
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("method", [Random(), Uniform(), Pool()], ids=lambda m: m.name)
def test_baselines_keep_special_tokens(method) -> None:
    grid = LAYOUTS["video, [CLS] per frame"]
    kinds_M = grid.kinds()[kept(method, grid, 0.2)]
    assert (kinds_M == TokenKind.CLS).sum() == 6 and kinds_M[-1] == TokenKind.NEWLINE
    rows = LAYOUTS["video, newline per row"]
    found = torch.tensor(kept(method, rows, 0.2))
    is_newline = rows.kinds()[found] == TokenKind.NEWLINE
    lines = {tuple(p) for p in rows.positions()[found[is_newline], :2].tolist()}
    assert lines == {tuple(p) for p in rows.positions()[found[~is_newline], :2].tolist()}


def test_pool_is_average_pooling() -> None:
    grid = Grid.video(2, 6, 8)
    tokens = item(grid)
    reduction = reduce_item(Pool(), grid, Budget(retain=0.25), tokens)
    image_FCHW = tokens.x_BND[0].view(2, 6, 8, -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.avg_pool2d(image_FCHW, 2).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(reduction.apply(tokens.x_BND)[0], expected)


def test_pool_weighs_by_size() -> None:
    grid = Grid.image(1, 2)
    tokens = Tokens(torch.tensor([[[0.0], [4.0]]]), size_BN=torch.tensor([[1.0, 3.0]]))
    out = tokens.reduce(reduce_item(Pool(), grid, Budget(retain=0.5), tokens))
    assert out.x_BND.tolist() == [[[3.0]]] and out.size_BN is not None
    assert out.size_BN.tolist() == [[4.0]]


@pytest.mark.parametrize("most", [1, 2, 7, 29, 97, 140])
def test_pooled_shapes_fit(most: int) -> None:
    h, w = pooled_shape(10, 14, most)
    assert h * w <= most and h <= 10 and w <= 14
    assert max(h * 14, w * 10) <= 2 * min(h * 14, w * 10) or most < 3
    assert (h + 1) * (w + 1) > most


@pytest.mark.parametrize(("largest", "expected"), [(True, [37]), (False, [5])])
def test_norm_keeps_the_longest_or_the_shortest(largest, expected):
    grid = Grid.image(10, 10)
    x_ND = torch.ones(grid.num_tokens, 4)
    x_ND[37] *= 3
    x_ND[5] *= 0.5
    context = ProjectorContext(Budget(tokens=1), grid=grid)
    reduction = Norm(largest=largest).projector(Tokens.from_grid(x_ND, grid), context)
    assert reduction.anchor_BM.tolist() == [expected]
