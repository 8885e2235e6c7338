"""GTP-ViT: invariants of its card."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

import foveate
from foveate import ops
from foveate.core import Budget, EncoderContext, Reduction, Tokens
from foveate.methods.gtp_vit import (
    GTPViT,
    Score,
    importance,
    read_importance,
    semantic_graph,
    sparsified,
    spatial_graph,
    token_graph,
)
from tiny import tiny_encoder

PLANE = (4, 5)


def one_block(
    method: GTPViT,
    x_BNC: torch.Tensor,
    leaving: int = 3,
    prefix: int = 1,
    order: torch.Tensor | None = None,
    size_BN: torch.Tensor | None = None,
    state: dict | None = None,
) -> tuple[Reduction | None, dict]:
    """Graph, attention and reduction of one block whose queries and keys are its input."""
    state = {} if state is None else state
    B, N, C = x_BNC.shape
    heads = x_BNC.view(B, N, 2, C // 2).transpose(1, 2)
    more = {"num_prefix": prefix, "plane": PLANE, "state": state}
    budget = Budget(tokens=N - prefix - leaving)
    tokens = Tokens(x_BNC, size_BN=size_BN)
    method.encoder(tokens, EncoderContext(budget, point="block_start", **more))
    if order is not None:  # the same graph for patches in another order
        state["graph"] = state["graph"][:, order][:, :, order]
    context = EncoderContext(
        budget, queries_BHNd=heads, keys_BHNd=heads, values_BHNd=heads, size_BN=size_BN, **more
    )
    method.encoder_attention(context)
    return method.encoder(tokens, context), state


def image(seed: int = 0, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 21, 8, generator=torch.Generator().manual_seed(seed))


# -- graphs ----------------------------------------------------------------------------------------


def test_neighbours_touch() -> None:
    graph_PP = spatial_graph(*PLANE)
    assert graph_PP.equal(graph_PP.T) and graph_PP.diagonal().sum() == 0
    assert graph_PP[0].nonzero()[:, 0].tolist() == [1, 5, 6]
    assert graph_PP[7].sum() == 8


def test_semantic_neighbours_are_the_nearest_others() -> None:
    x = torch.eye(6)[None]
    x[0, 4, 1] = 0.9
    x[0, 4] /= x[0, 4].norm()
    graph_BPP = semantic_graph(x, 1)
    assert graph_BPP[0, 1].nonzero()[:, 0].tolist() == [4]
    assert graph_BPP[0, 4].nonzero()[:, 0].tolist() == [1]
    assert (semantic_graph(image()[:, 1:], 5).sum(2) == 5).all()
    assert (semantic_graph(image()[:, 1:], 99).sum(2) == 19).all()


def test_equally_near_patches_are_neighbours_from_the_first_on() -> None:
    x = torch.ones(2, 7, 4)
    x[1, 0] = torch.tensor([1.0, 2, 3, 4])
    graph_BPP = semantic_graph(x, 3)
    assert [row.nonzero()[:, 0].tolist() for row in graph_BPP[0]] == [
        [1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2],
    ]  # fmt: skip
    assert graph_BPP[1, 6].nonzero()[:, 0].tolist() == [1, 2, 3]
    assert semantic_graph(x[:, :1], 5).equal(torch.zeros(2, 1, 1))


def test_the_mixed_graph_is_either() -> None:
    x = image()[:, 1:]
    spatial, semantic, mixed = (
        token_graph(x, PLANE, kind) > 0 for kind in ("spatial", "semantic", "mixed")
    )
    assert mixed.equal(spatial | semantic)
    degree_BP = mixed.sum(2).float()
    expected = mixed / (degree_BP[:, :, None] * degree_BP[:, None]).sqrt()
    torch.testing.assert_close(token_graph(x, PLANE, "mixed"), expected)


# -- attention -------------------------------------------------------------------------------------


def test_the_smallest_entries_go_and_nothing_is_scaled_up() -> None:
    attention = torch.rand(2, 3, 10, 10)
    left = sparsified(attention, 0.6)
    assert (left == 0).sum((2, 3)).tolist() == [[39] * 3] * 2  # strictly below the 40th smallest
    assert left[left > 0].equal(attention[left > 0])
    assert sparsified(attention, 1.0) is attention


@pytest.mark.parametrize(
    "score",
    [
        f"{kind}_{join}"
        for kind in ("mixed", "cls", "received", "diagonal")
        for join in ("max", "mean")
    ],
)
def test_scores_by_hand(score: str) -> None:
    attention = torch.rand(1, 3, 7, 7).softmax(-1)
    kind, join = score.split("_")
    reduce = {"max": lambda x: x.max(0).values, "mean": lambda x: x.mean(0)}[join]
    own = reduce(torch.stack([head.diag() for head in attention[0]]))
    received = reduce(attention[0].sum(1))
    expected = {
        "mixed": own * received,
        "cls": reduce(attention[0, :, 0]),
        "received": received,
        "diagonal": own,
    }[kind]
    torch.testing.assert_close(importance(attention, score, 1), expected[None, 1:])


@pytest.mark.parametrize("score", get_args(Score)[:-1])
@pytest.mark.parametrize("sized", [False, True])
def test_scores_need_no_matrix(score: str, sized: bool) -> None:
    q, k = torch.randn(2, 2, 3, 11, 4)
    bias = torch.rand(2, 1, 1, 11).log() if sized else None
    by_matrix = importance(ops.attention_matrix(q, k, bias), score, 1)
    torch.testing.assert_close(read_importance(q, k, score, 1, bias), by_matrix)


def test_tokens_that_look_where_all_look_are_unimportant_by_similarity() -> None:
    attention = torch.full((1, 1, 5, 5), 0.2)
    attention[0, 0, 3] = torch.tensor([0.0, 0, 0, 1, 0])
    assert importance(attention, "similarity", 1).argmax().item() == 2


# -- handing on ------------------------------------------------------------------------------------


def test_without_alpha_it_is_pruning() -> None:
    x = image()
    reduction, _ = one_block(GTPViT(alpha=0.0), x)
    assert reduction is not None
    kept = x.gather(1, reduction.anchor_BM[..., None].expand(-1, -1, 8))
    assert reduction.apply(x).equal(kept)
    sizes = reduction.sizes(torch.ones(2, 21))
    assert sizes.equal(torch.ones(2, 18))


def test_what_leaves_is_added_along_the_graph() -> None:
    x = image(1, 1)
    reduction, _ = one_block(GTPViT(alpha=0.3), x)
    assert reduction is not None
    kept = reduction.anchor_BM[0]
    gone = torch.tensor([i for i in range(21) if i not in kept.tolist()])
    assert kept[0] == 0 and (kept.diff() > 0).all() and len(gone) == 3
    weight = token_graph(x[:, 1:], PLANE)[0][kept[1:] - 1][:, gone - 1]
    expected = x[0, kept[1:]] + 0.3 * weight @ x[0, gone]
    out = reduction.apply(x)[0]
    torch.testing.assert_close(out[1:], expected)
    assert out[0].equal(x[0, 0])  # [CLS] is handed nothing
    sizes = reduction.sizes(torch.ones(1, 21))[0]
    torch.testing.assert_close(sizes[1:], 1 + 0.3 * weight.sum(1))
    assert sizes[0] == 1 and (sizes >= 1).all()


def test_patches_may_come_in_any_order() -> None:
    x, order = image(2, 1), torch.randperm(20, generator=torch.Generator().manual_seed(5))
    one, _ = one_block(GTPViT(alpha=0.2), x)
    # The graph is made of the patches where they lie; then both are dealt anew.
    state: dict = {}
    moved = torch.cat([x[:, :1], x[:, 1:][:, order]], dim=1)
    method = GTPViT(alpha=0.2)
    budget, more = Budget(tokens=17), {"num_prefix": 1, "plane": PLANE, "state": state}
    method.encoder(Tokens(x), EncoderContext(budget, point="block_start", **more))
    state["graph"] = state["graph"][:, order][:, :, order]
    heads = moved.view(1, 21, 2, 4).transpose(1, 2)
    context = EncoderContext(budget, queries_BHNd=heads, keys_BHNd=heads, values_BHNd=heads, **more)
    method.encoder_attention(context)
    two = method.encoder(Tokens(moved), context)
    assert one is not None and two is not None
    source = torch.cat([torch.zeros(1, dtype=torch.long), order + 1])[two.anchor_BM[0]]
    assert source.sort().values.equal(one.anchor_BM[0])
    torch.testing.assert_close(
        two.apply(moved)[0, source.argsort()], one.apply(x)[0], atol=1e-5, rtol=1e-5
    )


def test_a_patch_without_neighbours_that_stay_disappears() -> None:
    x = image(3, 1)
    reduction, _ = one_block(GTPViT(alpha=0.5), x)
    place = torch.arange(20)[None]
    state = {"graph": torch.zeros(1, 20, 20), "place": place, "patches": 20}
    heads = x.view(1, 21, 2, 4).transpose(1, 2)
    context = EncoderContext(
        Budget(tokens=17), num_prefix=1, plane=PLANE, state=state,
        queries_BHNd=heads, keys_BHNd=heads, values_BHNd=heads,
    )  # fmt: skip
    method = GTPViT(alpha=0.5)
    method.encoder_attention(context)
    pruned = method.encoder(Tokens(x), context)
    assert reduction is not None and pruned is not None
    assert (pruned.groups_BN[0] < 0).sum() == 3
    assert pruned.apply(x).equal(x.gather(1, pruned.anchor_BM[..., None].expand(-1, -1, 8)))


# -- whole encoders --------------------------------------------------------------------------------


@pytest.mark.parametrize("retain", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("family", ["vit", "siglip"])
def test_a_bare_encoder_leaves_as_many_as_asked_for(family: str, retain: float) -> None:
    encoder = tiny_encoder(family)
    size = encoder.config.image_size
    patches = (size // encoder.config.patch_size) ** 2
    with torch.no_grad(), foveate.reduce(encoder, "gtp_vit", retain=retain) as run:
        out = encoder(torch.randn(2, 3, size, size)).last_hidden_state
        prefix = run.encoder_reduction.num_in - patches
    assert out.shape[1] == prefix + max(1, round(retain * patches))


def test_the_block_works_with_the_sparse_attention() -> None:
    """Keeping nearly all entries is nearly the fused kernel; keeping few is not."""
    encoder = tiny_encoder("vit")
    pixels = torch.randn(2, 3, encoder.config.image_size, encoder.config.image_size)

    def features(share: float) -> torch.Tensor:
        recipe = f"gtp_vit(keep_attention={share}, alpha=0.1)"
        with torch.no_grad(), foveate.reduce(encoder, recipe, retain=0.8):
            return encoder(pixels).last_hidden_state

    dense = features(1.0)
    torch.testing.assert_close(features(0.9999), dense, atol=1e-4, rtol=1e-3)
    assert (features(0.3) - dense).abs().max() > 1e-2


def test_chunks_of_images_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.methods import gtp_vit

    x = image(4, 3)
    whole, _ = one_block(GTPViT(keep_attention=0.7), x)
    monkeypatch.setattr(gtp_vit, "_BYTES", 1)
    single, _ = one_block(GTPViT(keep_attention=0.7), x)
    assert whole is not None and single is not None
    assert whole.anchor_BM.equal(single.anchor_BM)


def test_the_published_settings() -> None:
    method = GTPViT(keep_attention=None)
    assert GTPViT().settings(196, 8) == (1.0, 0.1)
    assert method.settings(196, 4) == (1.0, 0.4)
    assert method.settings(196, 50) == (0.8, 0.3)
    assert method.settings(49, 2) == (0.6, 0.1)  # 8 of 196
    assert GTPViT(keep_attention=0.9, alpha=0.0).settings(196, 8) == (0.9, 0.0)
    assert GTPViT(token_scale=False).proportional_attention is False
    assert method.schedule(196, 12, Budget(tokens=100)) == (8,) * 12


@pytest.mark.parametrize("retain", [0.1, 0.5])
def test_states_are_looked_up_only_where_patches_leave_without_a_trace(
    retain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tiny_encoder("vit")
    size, draw = encoder.config.image_size, torch.Generator().manual_seed(3)
    pixels = torch.randn(3, 3, size, size, generator=draw)

    def dense() -> tuple[torch.Tensor, torch.Tensor]:
        recipe = 'gtp_vit(graph="spatial", alpha=0.3)'
        with torch.no_grad(), foveate.reduce(encoder, recipe, retain=retain, restore=True) as run:
            out = encoder(pixels).last_hidden_state
            return out, run.encoder_reduction.groups_BN < 0

    found, lost_BN = dense()
    monkeypatch.setattr("foveate.attach.encoder.loses_some", lambda *args: True)
    always, _ = dense()
    torch.testing.assert_close(found, always)
    assert lost_BN.any() or retain == 0.5


def test_random_scores_follow_the_seed() -> None:
    encoder = tiny_encoder("vit")
    pixels = torch.randn(1, 3, encoder.config.image_size, encoder.config.image_size)

    def kept(seed: int) -> list[int]:
        with foveate.reduce(encoder, 'gtp_vit(score="random")', retain=0.4, seed=seed) as run:
            encoder(pixels)
            return run.encoder_reduction.anchor_BM[0].tolist()

    assert kept(1) == kept(1) != kept(2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"graph": "full"},
        {"score": "mixed"},
        {"neighbours": 0},
        {"alpha": -0.1},
        {"keep_attention": 0.0},
        {"keep_attention": 1.5},
    ],
)
def test_bad_arguments(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        GTPViT(**arguments)


def test_what_it_cannot_work_on() -> None:
    x = image()
    with pytest.raises(ValueError, match="before the first block"):
        GTPViT().encoder(Tokens(x), EncoderContext(Budget(retain=0.5)))
    mask_BN = torch.ones(2, 21, dtype=torch.bool)
    mask_BN[0, 20] = False
    with pytest.raises(ValueError, match="images of one size"):
        GTPViT().encoder(Tokens(x, mask_BN), EncoderContext(Budget(retain=0.5)))
    with pytest.raises(ValueError, match="how 20 patches lie"):
        GTPViT().encoder(
            Tokens(x), EncoderContext(Budget(retain=0.5), point="block_start", num_prefix=1)
        )
    encoder = tiny_encoder("vit")
    pixels = torch.randn(1, 3, encoder.config.image_size, encoder.config.image_size)
    with (
        foveate.reduce(encoder, "tome(retain=0.7) + gtp_vit(retain=0.7)"),
        pytest.raises(ValueError, match="no other method can shorten the encoder"),
    ):
        encoder(pixels)
