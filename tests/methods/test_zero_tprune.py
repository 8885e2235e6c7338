"""Zero-TPrune: invariants of its card."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.core import Budget, EncoderContext, Reduction, Tokens, get_method
from foveate.methods.zero_tprune import ZeroTPrune, prune_schedule, votes

ONCE = {"after": (1,), "rounds": (5,)}


def random_attention(batch: int, heads: int, num: int, seed: int = 0) -> torch.Tensor:
    logits = torch.randn(batch, heads, num, num, generator=torch.Generator().manual_seed(seed))
    return (2 * logits).softmax(-1)


def block(
    method: ZeroTPrune, q: torch.Tensor, k: torch.Tensor, prefix: int = 1, **more
) -> Reduction | None:
    """One block of an encoder that has no other."""
    x_BMD = more.pop("x", None)
    mask_BM = more.pop("mask", None)
    tokens = Tokens(k.transpose(1, 2).flatten(2) if x_BMD is None else x_BMD, mask_BN=mask_BM)
    context = EncoderContext(
        more.pop("budget", Budget(retain=0.5)),
        layer=0,
        num_layers=1,
        num_prefix=prefix,
        queries_BHNd=q,
        keys_BHNd=k,
        **more,
    )
    return method.encoder(tokens, context)


def heads(num: int, seed: int = 0, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = torch.randn(2, batch, 3, num, 8, generator=torch.Generator().manual_seed(seed)).unbind()
    return 2 * q, k


# -- votes -----------------------------------------------------------------------------------------


def test_the_hand_check_of_the_card() -> None:
    attention = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25], [0.0, 0.5, 0.5]])[None, None]
    for rounds in (1, 2, 30):
        score_BM, _ = votes(attention, rounds)
        torch.testing.assert_close(score_BM, torch.tensor([[0.25, 0.5, 0.25]]))


@pytest.mark.parametrize("rounds", [1, 7])
def test_votes_are_passed_on_and_none_is_lost(rounds: int) -> None:
    score_BM, heads_BH = votes(random_attention(2, 1, 20), rounds)
    torch.testing.assert_close(score_BM.sum(1), torch.ones(2))
    assert heads_BH.shape == (2, 1)


def test_where_all_get_as_much_as_they_give_all_weigh_the_same() -> None:
    shift = torch.roll(torch.eye(6), 1, 0)
    score_BM, heads_BH = votes((0.5 * torch.eye(6) + 0.5 * shift)[None, None], 9)
    torch.testing.assert_close(score_BM, torch.full((1, 6), 1 / 6))
    assert heads_BH.all()  # none varies enough, so all count


def test_heads_that_vary_too_little_or_too_much_have_no_say() -> None:
    flat = torch.full((8, 8), 1 / 8)
    peaked = torch.zeros(8, 8)
    peaked[:, 3] = 1.0
    mild = random_attention(1, 1, 8)[0, 0]
    both = torch.stack([flat, peaked, mild])[None]
    score_BM, heads_BH = votes(both, 1)
    assert heads_BH.tolist() == [[False, False, True]]
    torch.testing.assert_close(score_BM, votes(mild[None, None], 1)[0])


def test_votes_go_with_their_tokens() -> None:
    attention, order = random_attention(1, 3, 12), torch.randperm(12)
    moved = attention[:, :, order][..., order]
    torch.testing.assert_close(votes(moved, 4)[0], votes(attention, 4)[0][:, order])


def test_votes_that_have_settled_are_not_counted_again() -> None:
    attention = random_attention(2, 3, 25)
    torch.testing.assert_close(votes(attention, 40)[0], votes(attention, 4000)[0])


def test_padding_has_no_vote() -> None:
    attention = random_attention(1, 2, 10)
    alive_BM = torch.arange(10)[None] < 7
    short = attention[..., :7, :7]
    short = short / short.sum(-1, keepdim=True)
    padded_BM, _ = votes(attention, 3, alive_BM=alive_BM)
    torch.testing.assert_close(padded_BM[:, :7], votes(short, 3)[0])
    assert (padded_BM[:, 7:] == 0).all()


# -- the two steps ---------------------------------------------------------------------------------


def test_near_copies_of_an_important_patch_go_first() -> None:
    key = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
    key[5], key[7] = 1.01 * key[2], 0.98 * key[2]
    vote_BP = torch.tensor([[0.9, 0.8, 1.0, 0.7, 0.6, 0.1, 0.3, 0.2, 0.4]])
    alive_BP = torch.ones(1, 9, dtype=torch.bool)
    gone_BP = ZeroTPrune().similar_patches(key[None], vote_BP, alive_BP, torch.tensor([2]))
    assert gone_BP.nonzero()[:, 1].tolist() == [5, 7]


@pytest.mark.parametrize("drop", [1, 4, 99])
def test_the_important_half_is_safe_from_the_first_step(drop: int) -> None:
    key = torch.randn(2, 11, 8)
    vote_BP = torch.rand(2, 11)
    alive_BP = torch.ones(2, 11, dtype=torch.bool)
    gone_BP = ZeroTPrune().similar_patches(key, vote_BP, alive_BP, torch.tensor([drop, drop]))
    best_B6 = vote_BP.topk(6).indices
    assert not gone_BP.gather(1, best_B6).any()
    assert gone_BP.sum(1).tolist() == [min(drop, 5)] * 2


@pytest.mark.parametrize("partition", ["important", "alternate", "all"])
@pytest.mark.parametrize("metric", ["cosine", "dot", 1, 2, 4, float("inf")])
def test_other_likenesses_and_other_victims(partition: str, metric: str | float) -> None:
    key = torch.eye(8)[None].clone()
    key[0, 1] = key[0, 6]  # vote ranks: 1 is important, 6 is not; 1 is odd, 6 even
    vote_BP = torch.arange(8, 0, -1).float()[None]
    method = ZeroTPrune(partition=partition, metric=metric)
    alive_BP = torch.ones(1, 8, dtype=torch.bool)
    gone_BP = method.similar_patches(key, vote_BP, alive_BP, torch.tensor([1]))
    expected = {"important": 1, "alternate": 6, "all": 1}[partition]
    assert gone_BP.nonzero()[:, 1].tolist() == [expected]


def test_a_needle_in_a_uniform_background_stays() -> None:
    """Everybody looks at the odd patch; the background is one crowd of copies."""
    key = torch.zeros(1, 1, 37, 8)
    key[..., 1:, 0] = 1.0
    key[..., 1:, 1] = 0.01 * torch.randn(36)
    key[..., 20, :] = torch.tensor([1.0, 0, 3, 0, 0, 0, 0, 0])
    query = torch.ones(1, 1, 37, 8)
    reduction = block(ZeroTPrune(ratios=(0.5,), **ONCE), query, key, budget=Budget(retain=0.2))
    assert reduction is not None
    assert 20 in reduction.anchor_BM[0].tolist()
    assert reduction.anchor_BM[0, 0] == 0 and reduction.num_out == 1 + 7


# -- budget ----------------------------------------------------------------------------------------


def test_the_published_table() -> None:
    counts = ZeroTPrune().schedule(196, Budget(retain=get_method("zero_tprune").card.retain))
    assert counts == ((186, 186), (176, 159), (149, 120), (110, 77), (67, 67))


@pytest.mark.parametrize("patches", [9, 49, 196, 729])
@pytest.mark.parametrize("retain", [0.02, 0.1, 0.34, 0.5, 0.9, 0.99])
def test_the_schedule_meets_the_budget_and_never_grows(patches: int, retain: float) -> None:
    keep = max(1, round(patches * retain))
    counts = prune_schedule(patches, keep, (1, 0.9, 0.8, 0.7, 1), 10 / 196)
    flat = [patches, *(count for pair in counts for count in pair)]
    assert flat[-1] == keep
    assert flat == sorted(flat, reverse=True)


@pytest.mark.parametrize("retain", [0.2, 0.5, 0.85])
def test_a_bare_encoder_leaves_as_many_as_asked_for(retain: float) -> None:
    from tiny import tiny_encoder

    encoder = tiny_encoder("vit")
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad(), foveate.reduce(encoder, "zero_tprune", retain=retain) as run:
        out = encoder(pixels).last_hidden_state
        index_BM = run.encoder_reduction.anchor_BM
    patches = (48 // encoder.config.patch_size) ** 2
    assert out.shape[1] == 1 + max(1, round(retain * patches))
    assert (index_BM.diff(dim=1) > 0).all() and (index_BM[:, 0] == 0).all()


def test_images_that_entered_with_fewer_patches_lose_in_proportion() -> None:
    q, k = heads(41)
    mask_BM = torch.ones(2, 41, dtype=torch.bool)
    mask_BM[1, 21:] = False
    reduction = block(ZeroTPrune(ratios=(0.5,), **ONCE), q, k, mask=mask_BM)
    assert reduction is not None
    assert reduction.counts_B.tolist() == [21, 11]
    alone = block(ZeroTPrune(ratios=(0.5,), **ONCE), q[1:, :, :21], k[1:, :, :21])
    assert alone is not None
    assert reduction.sample(1).anchor_BM.equal(alone.anchor_BM)


def test_chunks_of_images_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.methods import zero_tprune

    q, k = heads(30, batch=5)
    whole = block(ZeroTPrune(ratios=(0.5,), **ONCE), q, k)
    monkeypatch.setattr(zero_tprune, "_BYTES", 1)
    single = block(ZeroTPrune(ratios=(0.5,), **ONCE), q, k)
    assert whole is not None and single is not None
    assert whole.anchor_BM.equal(single.anchor_BM)


@pytest.mark.parametrize("feature", ["queries", "values", "hidden"])
def test_what_likeness_is_measured_on(feature: str) -> None:
    q, k = heads(20, batch=1)
    method = ZeroTPrune(ratios=(1.0,), similar=0.1, feature=feature, **ONCE)
    x = torch.randn(1, 20, 16)
    reduction = block(
        method, q, k, x=x, values_BHNd=torch.randn(1, 3, 20, 8), budget=Budget(retain=17 / 19)
    )
    assert reduction is not None and reduction.num_out == 18


def test_nothing_happens_at_a_full_budget_or_in_other_blocks() -> None:
    q, k = heads(20)
    assert block(ZeroTPrune(**ONCE, ratios=(0.5,)), q, k, budget=Budget(retain=1.0)) is None
    tokens = Tokens(torch.randn(2, 20, 8))
    context = EncoderContext(
        Budget(retain=0.5), layer=3, num_layers=12, queries_BHNd=q, keys_BHNd=k
    )
    assert ZeroTPrune().encoder(tokens, context) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"after": ()}, "one entry per pruning layer"),
        ({"rounds": (1, 2)}, "one entry per pruning layer"),
        ({"after": (1, 1 / 2), "ratios": (1, 0.5), "rounds": (1, 1)}, "ascending"),
        ({"ratios": (1.2, 0.9, 0.8, 0.7, 1)}, "ratios must lie"),
        ({"rounds": (0, 1, 1, 1, 1)}, "rounds must be"),
        ({"similar": 1.0}, "similar must lie"),
        ({"similar": 0, "ratios": (1,) * 5}, "Nothing would be pruned"),
        ({"feature": "pixels"}, "feature must be"),
        ({"partition": "some"}, "partition must be"),
        ({"metric": "angle"}, "metric must be"),
        ({"metric": 0.5}, "at least 1"),
        ({"low": 0.7, "high": 0.1}, "low must be below high"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZeroTPrune(**arguments)


def test_blocks_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="this encoder has 6 blocks"):
        ZeroTPrune(after=(8,), ratios=(0.5,), rounds=(1,)).check(6, None)
    context = EncoderContext(Budget(retain=0.5), layer=0, num_layers=4)
    with pytest.raises(ValueError, match="reads queries and keys"):
        ZeroTPrune().encoder(Tokens(torch.randn(1, 9, 4)), context)
