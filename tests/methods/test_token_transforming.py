"""Token Transforming: invariants of its card, and other reductions written as its matrix."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.core import Budget, EncoderContext, Reduction, Tokens, get_method, spread
from foveate.methods.token_transforming import TokenTransforming, shares
from tiny import tiny_encoder


def clusters(num: int = 24, groups: int = 6, width: int = 16, noise: float = 0.05) -> torch.Tensor:
    """Tokens of a few kinds, [1, num, width]."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(groups, width, generator=generator)
    return centre[torch.arange(num) % groups][None] + noise * torch.randn(
        1, num, width, generator=generator
    )


def block(
    method: TokenTransforming, x_BNC: torch.Tensor, keep: int, prefix: int = 1, **more
) -> Reduction | None:
    B, N, C = x_BNC.shape
    heads = x_BNC.view(B, N, 2, C // 2).transpose(1, 2)
    context = EncoderContext(
        Budget(tokens=keep),
        num_prefix=prefix,
        queries_BHNd=heads,
        keys_BHNd=heads,
        size_BN=more.get("size_BN"),
    )
    return method.encoder(Tokens(x_BNC, **more), context)


# -- the matrix ------------------------------------------------------------------------------------


def split(num: int, *anchors: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that stay, and all others."""
    gone = [i for i in range(num) if i not in anchors]
    return torch.tensor([anchors]), torch.tensor([gone])


@pytest.mark.parametrize("top", [None, 1, 3])
def test_every_token_is_shared_out_whole(top: int | None) -> None:
    share = shares(clusters(), *split(24, 1, 5, 9, 22), tau=0.1, top=top)
    assert share.shape == (1, 4, 20) and (share >= 0).all()
    torch.testing.assert_close(share.sum(1), torch.ones(1, 20))
    if top is not None:
        assert ((share > 0).sum(1) == top).all()


@pytest.mark.parametrize("candidates", ["alternate", "unimportant"])
def test_rows_add_up_to_one_and_no_size_is_lost(candidates: str) -> None:
    size_BN = torch.rand(1, 25) + 0.5
    x = torch.cat([torch.zeros(1, 1, 16), clusters()], dim=1)
    method = TokenTransforming(tau=0.1, candidates=candidates)
    reduction = block(method, x, 15, size_BN=size_BN)
    assert reduction is not None and reduction.num_out == 16
    torch.testing.assert_close(reduction.matrix().sum(2), torch.ones(1, 16))
    sizes = reduction.sizes(size_BN)
    torch.testing.assert_close(sizes.sum(), size_BN.sum())
    assert sizes[0, 0] == size_BN[0, 0]
    assert reduction.apply(x)[:, 1:].abs().max() <= x[:, 1:].abs().max()


def test_cold_shares_are_a_merge() -> None:
    x = clusters(noise=0.01)
    share = shares(x, *split(24, 0, 1, 2, 3, 4, 5), tau=1e-3)
    assert share.argmax(1)[0].tolist() == [i % 6 for i in range(6, 24)]
    torch.testing.assert_close(share.amax(1), torch.ones(1, 18))


def test_the_whole_is_kept_in_the_mean() -> None:
    """With equal sizes, sums over tokens weighted by size hardly move: mass goes, none is made."""
    x = torch.cat([torch.zeros(1, 1, 16), clusters()], dim=1)
    reduction = block(TokenTransforming(top=1), x, 14)
    assert reduction is not None
    sizes = reduction.sizes(torch.ones(1, 25))
    torch.testing.assert_close(
        (sizes[..., None] * reduction.apply(x)).sum(1), x.sum(1), atol=1e-4, rtol=1e-4
    )


def test_what_is_constant_stays_so() -> None:
    constant = torch.full((1, 25, 16), 0.7)
    reduction = block(TokenTransforming(), constant, 14)
    assert reduction is not None
    torch.testing.assert_close(reduction.apply(constant), constant[:, :15])


def test_order_does_not_matter_to_attention() -> None:
    x, order = clusters(), torch.randperm(24, generator=torch.Generator().manual_seed(3))
    method = TokenTransforming(candidates="unimportant")
    with_cls = torch.cat([torch.ones(1, 1, 16), x], dim=1)
    moved = torch.cat([with_cls[:, :1], x[:, order]], dim=1)
    one, two = block(method, with_cls, 15), block(method, moved, 15)
    assert one is not None and two is not None
    source = torch.cat([torch.zeros(1, dtype=torch.long), order + 1])[two.anchor_BM[0]]
    assert source.sort().values.equal(one.anchor_BM[0])
    torch.testing.assert_close(
        two.apply(moved)[0, source.argsort()], one.apply(with_cls)[0], atol=1e-5, rtol=1e-4
    )


def test_copies_go_first() -> None:
    x = torch.nn.functional.normalize(torch.randn(1, 20, 16), dim=-1)
    x[0, 4], x[0, 10] = x[0, 7], x[0, 13]
    reduction = block(TokenTransforming(), x, 18, prefix=0)
    assert reduction is not None
    gone = set(range(20)) - set(reduction.anchor_BM[0].tolist())
    assert gone == {4, 10}
    torch.testing.assert_close(reduction.restore(reduction.apply(x)), x, atol=1e-4, rtol=1e-4)


def test_prefix_tokens_stay_alone() -> None:
    x = torch.cat([torch.randn(1, 2, 16), clusters()], dim=1)
    reduction = block(TokenTransforming(), x, 15, prefix=2)
    assert reduction is not None
    assert reduction.apply(x)[:, :2].equal(x[:, :2])
    assert (reduction.matrix()[:, 2:, :2] == 0).all()


@pytest.mark.parametrize("noise", [0.05, 0.1, 0.2])
def test_dense_features_come_back_better_than_from_pruning(noise: float) -> None:
    x, (anchor_BM, gone_BR) = clusters(noise=noise), split(24, 0, 1, 2, 3, 4, 5)

    def error(reduction: Reduction) -> float:
        return float((reduction.restore(reduction.apply(x)) - x).norm())

    share = shares(x, anchor_BM, gone_BR)
    total = 1 + share.sum(2)
    many = error(spread(24, anchor_BM, gone_BR, share / total[..., None], 1 / total))
    merged = torch.cat([torch.arange(6)[None], share.argmax(1)], dim=1)
    assert many <= error(Reduction.select(anchor_BM, 24))
    assert many <= 1.05 * error(Reduction.merge(merged, 6))


def test_attention_over_fewer_tokens_is_nearly_that_over_all() -> None:
    x = clusters(48, 6, noise=0.1)
    query, errors = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)), []
    full = (query @ x[0].T / 4).softmax(-1) @ x[0]
    for keep in (24, 32, 40):
        reduction = block(TokenTransforming(candidates="unimportant"), x, keep, prefix=0)
        assert reduction is not None
        y, size = reduction.apply(x)[0], reduction.sizes(torch.ones(1, 48))[0]
        errors.append(float(((query @ y.T / 4 + size.log()).softmax(-1) @ y - full).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.05 * float(full.norm())


@pytest.mark.parametrize("name", ["tome", "zero_tprune"])
def test_other_methods_are_matrices_of_the_same_kind(name: str) -> None:
    """Fast paths by index and scatter agree with the dense product."""
    x = torch.randn(2, 33, 16)
    heads = x.view(2, 33, 2, 8).transpose(1, 2)
    method = get_method(name)()
    if name == "zero_tprune":
        method = method.with_arguments(after=(1,), ratios=(0.5,), rounds=(3,))
    context = EncoderContext(
        Budget(retain=0.6), num_prefix=1, queries_BHNd=2 * heads, keys_BHNd=heads
    )
    reduction = method.encoder(Tokens(x), context)
    assert reduction is not None
    dense = Reduction.transform(reduction.matrix(), reduction.anchor_BM)
    torch.testing.assert_close(dense.apply(x), reduction.apply(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(dense.restore(dense.apply(x)), reduction.restore(reduction.apply(x)))
    torch.testing.assert_close(dense.sizes(torch.ones(2, 33)), reduction.sizes(torch.ones(2, 33)))


# -- schedule and encoders -------------------------------------------------------------------------


def test_schedules() -> None:
    budget = Budget(retain=0.65**3)
    fewer = TokenTransforming(layers=(0.25, 0.5, 0.75)).schedule(196, 12, budget)
    assert fewer == TokenTransforming(layers=[3, 6, 9]).schedule(196, 12, budget)
    left = 196 - sum(fewer[:3])
    assert abs(left - 0.65 * 196) < 1 and 196 - sum(fewer) == round(0.65**3 * 196)
    assert sum(TokenTransforming().schedule(196, 12, Budget(retain=0.4))) == 196 - 78
    with pytest.raises(ValueError, match="this encoder has 6 blocks"):
        TokenTransforming(layers=(3, 9)).check(6, None)


@pytest.mark.parametrize(
    "recipe", ["token_transforming", "token_transforming(layers=(2,3), top=4)"]
)
@pytest.mark.parametrize("family", ["vit", "siglip", "dinov2"])
def test_a_bare_encoder_leaves_as_many_as_asked_for(family: str, recipe: str) -> None:
    encoder = tiny_encoder(family)
    size = encoder.config.image_size
    patches = (size // encoder.config.patch_size) ** 2
    with torch.no_grad(), foveate.reduce(encoder, recipe, retain=0.4) as run:
        out = encoder(torch.randn(2, 3, size, size)).last_hidden_state
        reduction = run.encoder_reduction
    assert out.shape[1] == reduction.num_in - patches + round(0.4 * patches)
    assert reduction.restore(out).shape[1] == reduction.num_in


@pytest.mark.parametrize(
    "arguments",
    [{"tau": 0.0}, {"top": 0}, {"layers": ()}, {"layers": (0, 2)}, {"candidates": "all"}],
)
def test_bad_arguments(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        TokenTransforming(**arguments)


def test_what_it_cannot_work_on() -> None:
    x = torch.randn(2, 9, 4)
    with pytest.raises(ValueError, match="needs the keys"):
        TokenTransforming().encoder(Tokens(x), EncoderContext(Budget(retain=0.5)))
    mask_BN = torch.ones(2, 9, dtype=torch.bool)
    mask_BN[1, 8] = False
    with pytest.raises(ValueError, match="images of one size"):
        block(TokenTransforming(), x, 4, mask_BN=mask_BN)
    assert block(TokenTransforming(), x, 8) is None
    small = block(TokenTransforming(), x, 1)
    assert small is not None and small.num_out == 1 + 4  # half at most
