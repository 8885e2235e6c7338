"""ToMe: invariants of its card."""

from __future__ import annotations

import pytest
import torch

from foveate.core import Budget, EncoderContext, Reduction, Tokens
from foveate.methods.tome import ToMe, merge_schedule


def block(
    method: ToMe, tokens: Tokens, prefix: int, layer: int = 0, num_layers: int = 1, **more
) -> Reduction | None:
    """One block whose keys are the features themselves, in two heads."""
    B, N, D = tokens.x_BND.shape
    keys_BHNd = tokens.x_BND.view(B, N, 2, D // 2).transpose(1, 2)
    context = EncoderContext(
        more.pop("budget", Budget(retain=0.5)),
        layer=layer,
        num_layers=num_layers,
        num_prefix=prefix,
        keys_BHNd=keys_BHNd,
        **more,
    )
    return method.encoder(tokens, context)


def image(num: int, seed: int = 0) -> Tokens:
    return Tokens(torch.randn(2, num, 8, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_merging_conserves_mass_and_the_prefix(prefix: int) -> None:
    tokens = image(30 + prefix)
    size_BN = torch.rand(2, 30 + prefix) * 3 + 0.5
    tokens = Tokens(tokens.x_BND, size_BN=size_BN)
    reduction = block(ToMe(r=7), tokens, prefix)
    assert reduction is not None and reduction.num_out == 23 + prefix
    out = tokens.reduce(reduction)
    assert out.size_BN is not None
    torch.testing.assert_close(out.size_BN.sum(1), size_BN.sum(1))
    before_BD = (tokens.x_BND * size_BN[..., None]).sum(1)
    torch.testing.assert_close((out.x_BND * out.size_BN[..., None]).sum(1), before_BD)
    assert out.x_BND[:, :prefix].equal(tokens.x_BND[:, :prefix])
    assert (reduction.groups_BN >= 0).all() and (reduction.groups_BN < 23 + prefix).all()


def test_equal_tokens_merge_first_and_come_back() -> None:
    tokens = image(21)
    x_BND = tokens.x_BND.clone()
    x_BND[:, 3] = x_BND[:, 8]
    x_BND[:, 12] = x_BND[:, 5]
    tokens = Tokens(x_BND)
    reduction = block(ToMe(r=2), tokens, 1)
    assert reduction is not None
    torch.testing.assert_close(reduction.restore(reduction.apply(x_BND)), x_BND)
    group_BN = reduction.groups_BN
    assert group_BN[:, 3].equal(group_BN[:, 8]) and group_BN[:, 12].equal(group_BN[:, 5])


def test_similarity_is_that_of_keys_averaged_over_heads() -> None:
    # Head 0 finds tokens 0 and 1 alike; both heads together find 2 and 3 alike.
    keys = torch.tensor([[[1.0, 0], [1, 0], [1, 0], [0, 1]], [[5.0, 0], [0, 5], [0, 3], [1, 2]]])
    context = EncoderContext(Budget(retain=0.5), keys_BHNd=keys[None])
    reduction = ToMe(r=1).encoder(Tokens(torch.randn(1, 4, 3)), context)
    assert reduction is not None and reduction.groups_BN.tolist() == [[0, 1, 2, 2]]
    context.keys_BHNd = None
    with pytest.raises(ValueError, match="needs the keys"):
        ToMe(r=1).encoder(Tokens(torch.randn(1, 4, 3)), context)


def test_half_of_the_tokens_is_the_most_a_block_merges() -> None:
    reduction = block(ToMe(r=100), image(21), 1)
    assert reduction is not None and reduction.num_out == 11


@pytest.mark.parametrize("patches", [16, 49, 196, 576])
@pytest.mark.parametrize("layers", [1, 4, 12, 24])
@pytest.mark.parametrize("retain", [0.05, 0.2, 0.5, 0.93])
def test_the_schedule_meets_the_budget(patches: int, layers: int, retain: float) -> None:
    keep = max(1, round(patches * retain))
    schedule = merge_schedule(patches, layers, keep)
    left, reachable = patches, patches
    for r in schedule:
        # Constant, but for the last blocks: half of what there is, or what is still to go.
        assert r in (schedule[0], left // 2, left - keep) and 0 <= r <= left // 2
        left, reachable = left - r, reachable - reachable // 2
    assert len(schedule) == layers
    assert left == max(keep, reachable)
    assert sorted(schedule, reverse=True) == list(schedule)


def test_all_blocks_together_meet_the_budget() -> None:
    tokens, state = image(65), {}
    for layer in range(6):
        reduction = block(ToMe(), tokens, 1, layer, 6, state=state, budget=Budget(retain=0.3))
        tokens = tokens if reduction is None else tokens.reduce(reduction)
    assert tokens.num_tokens == 1 + round(64 * 0.3)
    assert tokens.size_BN is not None
    torch.testing.assert_close(tokens.size_BN.sum(1), torch.full((2,), 65.0))
    assert (tokens.index_BN[:, 0] == 0).all()


def test_proportional_attention_is_a_property() -> None:
    assert ToMe().proportional_attention is True
    assert ToMe(prop_attn=False).proportional_attention is False


def test_r_has_three_forms() -> None:
    full = Budget(retain=0.5)
    assert ToMe(r=(8, 0.0)).schedule(196, 3, full) == (8, 8, 8)
    assert ToMe(r=(8, 2)).schedule(196, 3, full) == (8, 2, 0)
    assert ToMe(r=[3]) == ToMe(r=(3,))  # type: ignore[arg-type]
    assert ToMe(r=4).schedule(196, 2, Budget(retain=1.0)) == (0, 0)
    with pytest.raises(ValueError, match="lists 4 layers"):
        ToMe(r=(1, 1, 1, 1)).check(3, None)


@pytest.mark.parametrize("r", [-1, True, 2.5, (3, -2), (8, 1.5), (1.5, 2, 3), "8"])
def test_bad_r(r) -> None:
    with pytest.raises(ValueError, match="r"):
        ToMe(r=r)


def test_half_precision_and_repeats() -> None:
    tokens = Tokens(image(33).x_BND.bfloat16())
    one, two = (block(ToMe(r=6), tokens, 1) for _ in range(2))
    assert one is not None and two is not None
    assert one.anchor_BM.equal(two.anchor_BM)
    assert one.apply(tokens.x_BND).dtype == torch.bfloat16
    assert one.apply(tokens.x_BND)[:, 0].equal(tokens.x_BND[:, 0])


def test_nothing_happens_at_a_full_budget() -> None:
    assert block(ToMe(r=6), image(33), 1, budget=Budget(retain=1.0)) is None
    assert block(ToMe(r=0), image(33), 1) is None
