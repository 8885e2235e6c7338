"""S5: what the mask generator's logits decide, and the losses it is trained with."""

from __future__ import annotations

import pytest
import torch

from foveate import ops
from foveate.core import BackboneContext, Budget, Tokens
from foveate.methods.s5 import S5, contrastive_loss, keep_scores, ratio_loss


def choose(logits: torch.Tensor | None, retain: float) -> torch.Tensor:
    B, L = (1, 8) if logits is None else logits.shape[:2]
    context = BackboneContext(
        Budget(retain=retain), method="s5", kind="s4", read={"keep_logits": lambda: logits}
    )
    reduction = S5().encoder(Tokens(torch.zeros(B, L, 4)), context)
    assert reduction is not None
    return reduction.anchor_BM


def test_planted_tokens_stay_in_their_order():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1024, 2, generator=draw)
    needles = torch.stack(
        [torch.randperm(1024, generator=draw)[:5].sort().values for _ in range(3)]
    )
    logits[torch.arange(3)[:, None], needles] = torch.tensor([9.0, -9.0])
    kept = choose(logits, 0.25)
    assert kept.shape == (3, 256) and bool((kept.diff(dim=1) > 0).all())
    for row in range(3):
        assert set(needles[row].tolist()) <= set(kept[row].tolist())


def test_it_is_the_probability_that_counts_not_the_logit():
    logits = torch.tensor([[[9.0, 12.0], [1.0, 0.0], [0.0, 0.0], [-3.0, -8.0]]])
    assert choose(logits, 0.5).tolist() == [[1, 3]]
    assert keep_scores(logits).exp()[0, 2].item() == pytest.approx(0.5)


def test_equal_probabilities_keep_the_earlier_token():
    assert choose(torch.zeros(1, 9, 2), 0.5).tolist() == [[0, 1, 2, 3, 4]]


def test_counts_are_rounded_up():
    assert S5().count_tokens(257, Budget(retain=0.5)) == 129
    assert S5().count_tokens(10, Budget(retain=0.01)) == 1
    assert S5().count_tokens(10, Budget(tokens=50)) == 10
    with pytest.raises(ValueError, match="form must be"):
        S5(form="mask")  # pyright: ignore[reportArgumentType]


def test_the_ratio_is_learned():
    """The loss alone brings the share of kept tokens to the wanted one."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 2)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.05)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(8, 256, 4, generator=draw)
    for _ in range(150):
        loss = ratio_loss(ops.gumbel_keep(layer(x), generator=draw), 0.3)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    shares = [ops.gumbel_keep(layer(x), generator=draw).mean().item() for _ in range(5)]
    assert abs(sum(shares) / 5 - 0.3) < 0.03
    with pytest.raises(ValueError, match="ratio must lie"):
        ratio_loss(torch.ones(1, 2), 0.0)


def test_contrastive_loss_is_symmetric_in_the_batch_and_stops_at_the_long_clip():
    torch.manual_seed(0)
    short = torch.randn(5, 3, requires_grad=True)
    long = torch.randn(5, 3, requires_grad=True)
    loss = contrastive_loss(short, long)
    loss.backward()
    assert short.grad is not None and bool(short.grad.ne(0).any()) and long.grad is None
    a, b = torch.nn.functional.normalize(short, dim=1), torch.nn.functional.normalize(long, dim=1)
    table = (a @ b.T / 0.2).exp()
    rows = -(table.diagonal() / table.sum(1)).log().mean()
    columns = -(table.diagonal() / table.sum(0)).log().mean()
    torch.testing.assert_close(loss, (rows + columns) / 2)
    with pytest.raises(ValueError, match="one shape"):
        contrastive_loss(short, long[:4])
    with pytest.raises(ValueError, match="temperature"):
        contrastive_loss(short, long, 0.0)
