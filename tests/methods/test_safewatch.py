"""SafeWatch without a model: spans, the rule, and which tokens policies keep."""

from __future__ import annotations

import pytest
import torch

from foveate.core import Budget, RuleContext, Step
from foveate.methods.safewatch import SafeWatch, policy_prompt, policy_spans, policy_tokens
from foveate.world import World
from foveate.world.tokenizer import VIDEO, make_tokenizer


def context(num_tokens: int, visual: range, sample: int = 0) -> RuleContext:
    return RuleContext(
        Budget(retain=0.2),
        sample=sample,
        visual_N=torch.tensor(visual),
        column_S=torch.arange(num_tokens),
        num_columns=num_tokens,
        position_PS=torch.arange(num_tokens)[None],
    )


def test_rule_of_three_policies():
    """[1 system][3 visual][2 + 4 + 1 policies][2 query]."""
    rule = SafeWatch(policies=((4, 6), (6, 10), (10, 11))).attention_rule(context(13, range(1, 4)))
    assert rule is not None and rule.shift_S is not None and rule.visible_SS is not None
    got = (torch.arange(13) - rule.shift_S).tolist()
    assert got == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 4, 8, 9]
    chunk = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 0, 0])
    for row in range(13):
        for key in range(13):
            sees = key <= row and (0 in (chunk[row], chunk[key]) or chunk[row] == chunk[key])
            assert bool(rule.visible_SS[row, key]) == sees
    assert rule.unrotated_S is None


def test_one_policy_is_an_ordinary_prompt():
    assert SafeWatch(policies=((4, 6),)).attention_rule(context(8, range(1, 4))) is None


def test_spans_of_samples():
    one, two = ((-4, -2), (-2, 0)), ((3, 5), (5, 6))
    assert SafeWatch(policies=one).spans(10, 7) == [(6, 8), (8, 10)]
    both = SafeWatch(policies=(one, two))
    assert both.spans(10, 0) == [(6, 8), (8, 10)] and both.spans(10, 1) == [(3, 5), (5, 6)]
    with pytest.raises(ValueError, match="names 2 samples"):
        both.spans(10, 2)
    with pytest.raises(ValueError, match="do not lie in the prompt"):
        SafeWatch(policies=((4, 12),)).spans(10)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"policies": ((4, 6), (7, 9))}, "without gap"),
        ({"policies": ((4, 6), (5, 9))}, "without gap"),
        ({"policies": ((4, 4),)}, "none is empty"),
        ({"policies": ((4, 6, 7),)}, "last \\+ 1"),
        ({"policies": ("abc",)}, "last \\+ 1"),
        ({"allocation": "fair"}, "adaptive"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        SafeWatch(**arguments)


def test_bad_prompts():
    with pytest.raises(ValueError, match="where the policies are"):
        SafeWatch().check(4, 4)
    with pytest.raises(ValueError, match="layers"):
        SafeWatch(policies=((1, 2),), layers=(9,)).check(4, 4)
    with pytest.raises(ValueError, match="hold visual tokens"):
        SafeWatch(policies=((2, 6), (6, 7))).attention_rule(context(9, range(1, 4)))


def test_halves():
    method = SafeWatch(policies=((1, 2), (2, 3)))
    assert not Step(method, ("decoder",)).reduces and Step(method, ("cache",)).reduces


def test_equal_shares_and_turns():
    weight_MN = torch.tensor([[9, 8, 7, 6, 5, 4.0], [4, 9, 8, 7, 6, 5.0], [0, 0, 0, 1, 2, 3.0]])
    # Three policies, budget 4: two each, and first choices come first: 0, 1, 5, then 1, 2, 4.
    assert policy_tokens(weight_MN, 4).tolist() == [0, 1, 2, 5]
    assert policy_tokens(weight_MN, 3).tolist() == [0, 1, 5]
    assert policy_tokens(weight_MN, 2).tolist() == [0, 1]
    # Sets that overlap leave fewer tokens than the budget.
    assert policy_tokens(weight_MN[:1].repeat(3, 1), 6).tolist() == [0, 1]
    # Ties go to the first token.
    assert policy_tokens(torch.zeros(1, 5), 3).tolist() == [0, 1, 2]


def test_adaptive_shares_follow_relevance():
    weight_MN = torch.tensor([[8, 7, 6, 5, 0, 0.0], [0, 0, 0, 0, 0.1, 0.2]])
    assert policy_tokens(weight_MN, 4, "adaptive").tolist() == [0, 1, 2, 5]
    assert policy_tokens(weight_MN, 4).tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("allocation", ["equal", "adaptive"])
def test_counts_and_shares(allocation):
    generator = torch.Generator().manual_seed(0)
    for M, N, budget in ((1, 40, 7), (3, 40, 7), (8, 40, 5), (4, 40, 40), (2, 3, 1)):
        weight_MN = torch.rand(M, N, generator=generator)
        kept = policy_tokens(weight_MN, budget, allocation)
        assert 0 < len(kept) <= budget and kept.tolist() == sorted(set(kept.tolist()))
        if allocation == "equal" and budget >= M:
            firsts = weight_MN.argmax(1)
            assert torch.isin(firsts, kept).all(), "every policy owns its first choice"


def test_a_planted_needle_survives_under_its_policy():
    """4 of 2048 tokens that one of six policies attends to; random pruning loses them."""
    generator = torch.Generator().manual_seed(0)
    weight_MN = torch.rand(6, 2048, generator=generator) / 2048
    needle = torch.tensor([17, 700, 1033, 2000])
    weight_MN[3, needle] += 0.01
    budget = Budget(retain=0.05).count(2048)
    assert torch.isin(needle, policy_tokens(weight_MN, budget)).all()
    # Pooled over policies it would drown: five policies know nothing of it.
    lost = torch.isin(needle, torch.randperm(2048, generator=generator)[:budget])
    assert not lost.all()


def test_spans_are_found_in_the_tokens_of_the_world():
    tokenizer = make_tokenizer()
    found = 0
    for index in range(5):
        sample = World(seed=0, frames=16).sample(index)
        policies = [policy.text for policy in sample.policies]
        text = f"{VIDEO} {VIDEO} {VIDEO} " + policy_prompt(policies, "is the video safe ?")
        ids = tokenizer(text)["input_ids"]
        spans = policy_spans(tokenizer, ids, policies)
        SafeWatch(policies=spans)  # adjacent, in order
        for (first, end), policy in zip(spans, policies, strict=True):
            said = "".join(tokenizer.decode(ids[first:end]).split())
            assert said == "".join(policy.split())
            found += 1
        assert tokenizer.decode(ids[spans[-1][1] :]).startswith("is the video")
    assert found > 10
    with pytest.raises(ValueError, match="does not stand in these tokens"):
        policy_spans(tokenizer, ids, ["no elephants"])
