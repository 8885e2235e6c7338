"""Page rank over attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.ops import page_rank, page_rank_qk


def logits_of(B=2, H=3, N=10, seed=0, causal=True):
    logits = torch.randn(B, H, N, N, generator=torch.Generator().manual_seed(seed)) * 0.2
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    return logits.masked_fill(hidden, -torch.inf) if causal else logits


def by_hand(logits, temperature=0.1, iterations=5, damping=0.0):
    """One sample, float64, plain loops over the walk."""
    walk = torch.softmax(logits.double() / temperature, -1)
    H, N, _ = walk.shape
    mass = torch.full((H, N), 1 / N, dtype=torch.float64)
    for _ in range(iterations):
        mass = torch.einsum("hi,hij->hj", mass, walk) * (1 - damping) + damping / N
    return mass.square().mean(0).sqrt()


@pytest.mark.parametrize("damping", [0.0, 0.15])
def test_equals_the_walk_written_out(damping):
    logits = logits_of()
    got = page_rank(logits, damping=damping)
    want = torch.stack([by_hand(sample, damping=damping) for sample in logits])
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-4)


def test_valid_start_equals_the_shortened_sequence():
    logits = logits_of(B=1)
    valid = torch.tensor([[True, False, True, True, False, True, True, True, False, True]])
    short = logits[:, :, valid[0]][..., valid[0]]
    got = page_rank(logits, valid=valid)
    torch.testing.assert_close(got[:, valid[0]], page_rank(short), atol=1e-6, rtol=1e-4)
    assert got[~valid].abs().max() == 0


def test_start_all_gives_dropped_rows_their_mass():
    logits = logits_of(B=1)
    valid = torch.tensor([[True] * 5 + [False] * 5])
    got = page_rank(logits, valid=valid, start="all", iterations=1)
    masked = logits.masked_fill(~valid[:, None, None], -torch.inf)
    torch.testing.assert_close(got.double()[0], by_hand(masked[0], iterations=1), atol=1e-6, rtol=0)
    assert not torch.allclose(got, page_rank(logits, valid=valid, iterations=1))


def test_additive_minimum_masks_like_infinity():
    logits = logits_of()
    minimum = logits.masked_fill(logits == -torch.inf, torch.finfo(torch.float32).min)
    torch.testing.assert_close(page_rank(minimum), page_rank(logits))


def test_head_order_and_rows_without_keys_do_not_matter():
    logits = logits_of()
    torch.testing.assert_close(page_rank(logits[:, [2, 0, 1]]), page_rank(logits))
    dead = torch.full((1, 1, 3, 3), -torch.inf)
    assert torch.equal(page_rank(dead), torch.zeros(1, 3))
    none = torch.zeros(1, 10, dtype=torch.bool)
    assert torch.equal(page_rank(logits[:1], valid=none), torch.zeros(1, 10))


@given(
    N=st.integers(1, 14),
    repeat=st.integers(1, 2),
    causal=st.booleans(),
    masked=st.booleans(),
    start=st.sampled_from(["valid", "all"]),
    damping=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 50),
)
def test_from_q_and_k_streamed_or_not(N, repeat, causal, masked, start, damping, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 2 * repeat, N, 4, generator=generator) * 0.3
    k = torch.randn(2, 2, N, 4, generator=generator) * 0.3
    valid = torch.rand(2, N, generator=generator) > 0.3 if masked else None
    args = {"valid": valid, "start": start, "damping": damping}
    logits = q @ k.repeat_interleave(repeat, 1).transpose(-1, -2) * 0.5
    if causal:
        hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
        logits = logits.masked_fill(hidden, -torch.inf)
    want = page_rank(logits, **args)
    for stream in (True, False, None):
        got = page_rank_qk(q, k, causal=causal, stream=stream, **args)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-3)


def test_groups_of_heads_add_up(monkeypatch):
    q = torch.randn(1, 5, 8, 4, generator=torch.Generator().manual_seed(0))
    whole = page_rank_qk(q, q)
    monkeypatch.setattr("foveate.ops.rank._MATRIX_BYTES", 2 * 8 * 8 * 4)
    torch.testing.assert_close(page_rank_qk(q, q), whole)
    monkeypatch.setattr("foveate.ops.rank._MATRIX_BYTES", 1)
    torch.testing.assert_close(page_rank_qk(q, q), whole, atol=1e-6, rtol=1e-3)


def test_a_token_everybody_attends_to_ranks_first():
    logits = logits_of(N=30, causal=False)
    logits[..., 17] += 2.0
    assert (page_rank(logits).argmax(-1) == 17).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"iterations": -1}, "iterations"),
        ({"damping": 1.5}, "damping"),
        ({"start": "some"}, "start"),
        ({"valid": torch.ones(2, 9, dtype=torch.bool)}, "valid"),
    ],
)
def test_wrong_input(change, message):
    with pytest.raises(ValueError, match=message):
        page_rank(logits_of(), **change)
    q = torch.zeros(2, 3, 10, 4)
    with pytest.raises(ValueError, match=message):
        page_rank_qk(q, q, **change)


def test_logits_must_be_square():
    with pytest.raises(ValueError, match="logits"):
        page_rank(torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match="k "):
        page_rank_qk(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4))


@pytest.mark.parametrize("stream", [True, False])
def test_a_mask_of_its_own_replaces_the_causal_order(stream: bool) -> None:
    q, k = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    future = torch.ones(9, 9, dtype=torch.bool).tril()
    causal = page_rank_qk(q, k, stream=stream)
    torch.testing.assert_close(page_rank_qk(q, k, visible_NN=future, stream=stream), causal)
    hidden = future.clone()
    hidden[5:, 2] = False  # nobody behind the fifth row sees the third token
    got = page_rank_qk(q, k, visible_NN=hidden, stream=stream)
    logits = ((q @ k.transpose(-1, -2)) * 4**-0.5).masked_fill(~hidden, -torch.inf)
    torch.testing.assert_close(got, page_rank(logits), atol=1e-5, rtol=1e-4)
    # Sharp attention walked for long may give the third token nothing to lose.
    once = {"iterations": 1, "temperature": 1.0, "stream": stream}
    less, full = page_rank_qk(q, k, visible_NN=hidden, **once), page_rank_qk(q, k, **once)
    assert less[0, 2] < full[0, 2]
