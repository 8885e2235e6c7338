"""Links to earlier rows, and where chains of them end."""

from __future__ import annotations

import pytest
import torch

from foveate import ops


def alike(seed: int = 0, num: int = 12) -> torch.Tensor:
    x = torch.randn(num, 3, generator=torch.Generator().manual_seed(seed))
    return (ops.cosine_similarity_matrix(x) + 1) / 2


def slowly(similarity_KK: torch.Tensor, threshold: float) -> list[int]:
    found = []
    for row, values in enumerate(similarity_KK.tolist()):
        earlier = values[:row]
        best = max(earlier, default=-1.0)
        found.append(earlier.index(best) if best > threshold else -1)
    return found


@pytest.mark.parametrize("threshold", [0.5, 0.75, 0.95])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_best_earlier_row_above_the_threshold(threshold, dtype) -> None:
    for seed in range(5):
        similarity_KK = alike(seed).to(dtype)
        links = ops.duplicate_links(similarity_KK, threshold).tolist()
        assert links == slowly(similarity_KK, threshold)
        assert links[0] == -1
    assert any(link >= 0 for link in links) or threshold > 0.9


def test_ties_go_to_the_first_row_and_the_upper_half_is_not_read() -> None:
    ones = torch.ones(4, 4)
    assert ops.duplicate_links(ones, 0.5).tolist() == [-1, 0, 0, 0]
    upper = torch.ones(4, 4).triu()
    assert ops.duplicate_links(upper, 0.0).tolist() == [-1, -1, -1, -1]
    assert ops.duplicate_links(ones, 1.0).tolist() == [-1, -1, -1, -1], "above, not at"


def test_most_keeps_the_strongest_links() -> None:
    similarity_KK = alike(3)
    full = ops.duplicate_links(similarity_KK, 0.6)
    strength = similarity_KK[torch.arange(12), full.clamp(min=0)].where(full >= 0, -1.0)
    num = int((full >= 0).sum())
    assert num > 3
    for most in range(num + 2):
        some = ops.duplicate_links(similarity_KK, 0.6, most=most)
        made = some >= 0
        assert int(made.sum()) == min(most, num)
        assert some[made].equal(full[made])
        if 0 < most < num:
            assert strength[made].min() >= strength[(full >= 0) & ~made].max()


def test_ruled_out_pairs_and_nothing_at_all() -> None:
    never = torch.full((3, 3), -torch.inf)
    assert ops.duplicate_links(never, -5.0).tolist() == [-1, -1, -1]
    assert ops.duplicate_links(torch.empty(0, 0), 0.5).shape == (0,)


@pytest.mark.parametrize("num", [1, 2, 3, 17, 64])
def test_chains_of_any_length_end_at_their_root(num) -> None:
    chain = torch.arange(num) - 1
    assert ops.follow_links(chain).tolist() == [0] * num
    generator = torch.Generator().manual_seed(num)
    links = [-1] + [int(torch.randint(-1, k, (1,), generator=generator)) for k in range(1, num)]
    roots = []
    for row, link in enumerate(links):
        roots.append(row if link < 0 else roots[link])
    assert ops.follow_links(torch.tensor(links)).tolist() == roots


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="similarity must have shape"):
        ops.duplicate_links(torch.ones(2, 3), 0.5)
    with pytest.raises(ValueError, match="most must be 0 or more"):
        ops.duplicate_links(torch.ones(2, 2), 0.5, most=-1)
    with pytest.raises(ValueError, match="earlier row"):
        ops.follow_links(torch.tensor([-1, 1]))
    with pytest.raises(ValueError, match="earlier row"):
        ops.follow_links(torch.tensor([-2]))
