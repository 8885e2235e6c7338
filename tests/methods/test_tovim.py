"""ToP-ViM: importance, schedule, [CLS]."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foveate.core import BackboneContext, Budget, Tokens
from foveate.methods.tovim import ToPViM, scan_importance


def context(y_PBKE: torch.Tensor, cls: int | None, retain: float, **options: Any) -> Any:
    read = {"scan_outputs": lambda: y_PBKE, "cls_index": lambda: cls}
    num = y_PBKE.shape[2]
    return BackboneContext(
        Budget(retain=retain),
        method="tovim",
        **{"layer": 5, "num_layers": 24, "kind": "ssm", "num_source": num, "read": read, **options},
    )


def test_importance_is_the_positive_part_in_token_order():
    y = torch.tensor([[[[3.0, -9.0], [1.0, 1.0]]], [[[-1.0, 1.0], [4.0, -4.0]]]])
    assert scan_importance(y).tolist() == [[2.0, 3.0]]  # not |y|, not y, mean of both directions


@pytest.mark.parametrize("cls", [None, 15])
def test_needles_stay_and_loud_negatives_go(cls):
    """A few patches with a positive output among many that are far below zero."""
    torch.manual_seed(0)
    K = 30 + (cls is not None)
    y = -torch.rand(2, 2, K, 6) * 100
    needles = torch.tensor([[1, 4, 9, 20], [0, 3, 22, 29]])
    rows = torch.arange(2)[:, None]
    y[:, rows, needles] = 1.0
    tokens = Tokens(torch.zeros(2, K, 3))
    arguments = {"after": (5,)}
    reduction = ToPViM(**arguments).encoder(tokens, context(y, cls, 4 / 30))
    assert reduction is not None
    kept = reduction.anchor_BM
    found = kept[kept != cls].view(2, -1) if cls is not None else kept
    assert torch.equal(found, needles)
    if cls is not None:
        assert kept.shape == (2, 5) and kept[:, 2].tolist() == [15, 15]


def test_even_numbers_of_patches_around_cls():
    assert ToPViM().schedule(196, Budget(retain=0.512), even=True) == (158, 126, 102)
    assert ToPViM().schedule(196, Budget(retain=0.512)) == (157, 126, 101)
    assert ToPViM().schedule(196, Budget(retain=1.0)) == (196, 196, 196)
    assert ToPViM().schedule(49, Budget(retain=0.99), even=True)[-1] <= 49
    for keep in range(1, 50):
        counts = ToPViM().schedule(64, Budget(tokens=keep), even=True)
        assert list(counts) == sorted(counts, reverse=True) and counts[-1] in (keep, keep + 1)


def test_published_blocks():
    assert ToPViM().cuts(24) == (5, 10, 15)  # behind blocks 5, 10 and 15, counted from 1
    assert ToPViM(after=(5, 14)).cuts(24) == (5, 14)
    assert ToPViM().cuts(8) == (2, 3, 5)
    with pytest.raises(ValueError, match="after = 30"):
        ToPViM(after=(5, 30)).check(24, None)


@pytest.mark.parametrize("after", [(), (0,), (5, 5), (9, 4)])
def test_bad_cuts_are_refused(after):
    with pytest.raises(ValueError, match="after must"):
        ToPViM(after=after)


def test_without_scans_it_says_so():
    tokens = Tokens(torch.zeros(1, 8, 3))
    blind = context(torch.zeros(2, 1, 8, 3), None, 0.5, read={"cls_index": lambda: None})
    with pytest.raises(ValueError, match="needs the scans"):
        ToPViM().encoder(tokens, blind)
