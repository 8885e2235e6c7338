"""CenterCLIP: invariants of its card, on tokens and inside encoders.

Legend: R segments, n patches of a segment, K clusters, C channels.
"""

from __future__ import annotations

import itertools
from itertools import pairwise

import pytest
import torch

import foveate
from foveate import ops
from foveate.core import Budget, EncoderContext, Tokens, get_method
from foveate.methods.centerclip import CenterCLIP
from tiny import tiny_encoder


def segment(n: int = 24, width: int = 8, seed: int = 0, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, n, width, generator=torch.Generator().manual_seed(seed))


def cluster(method: CenterCLIP, x_RnC: torch.Tensor, k: int, prefix: int = 3, cls: int = 1):
    """One clustering of joined rows that hold `prefix` [CLS] tokens in front."""
    R, _, C = x_RnC.shape
    front = torch.arange(prefix).float()[None, :, None].expand(R, prefix, C)
    tokens = Tokens(torch.cat([front, x_RnC], dim=1))
    state = {"frames": 3, "prefix": cls, "plan": ((1, k),)}
    context = EncoderContext(
        Budget(retain=0.5), state=state, layer=1, num_layers=2, num_prefix=prefix
    )
    reduction = method.encoder(tokens, context)
    assert reduction is not None
    return reduction, tokens.reduce(reduction).x_BND


ONE = CenterCLIP(after=1)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", 1, 3.0])
@pytest.mark.parametrize("algorithm", ["k_medoids", "random", "uniform"])
def test_medoids_are_tokens_in_order_and_stand_for_themselves(metric, algorithm) -> None:
    x = segment()
    reduction, out = cluster(CenterCLIP(after=1, metric=metric, algorithm=algorithm), x, 7)
    medoids = reduction.anchor_BM[:, 1:] - 3
    assert (medoids.diff(dim=1) > 0).all() and (medoids >= 0).all()
    own = reduction.groups_BN[:, 3:].gather(1, medoids)
    assert own.tolist() == [list(range(1, 8))] * 2
    assert torch.equal(out[:, 1:], x.gather(1, medoids[..., None].expand(-1, -1, 8)))
    assert torch.equal(out[:, 0], torch.ones(2, 8))  # the mean of 0, 1 and 2


def test_all_clusters_are_the_identity() -> None:
    x = segment()
    reduction, out = cluster(ONE, x, 24)
    assert torch.equal(out[:, 1:], x)
    assert reduction.groups_BN[0].tolist() == [0, 0, 0, *range(1, 25)]


def test_means_are_those_of_the_members() -> None:
    x = segment()
    reduction, out = cluster(CenterCLIP(after=1, aggregate="mean"), x, 5)
    expected = ops.scatter_mean(x, reduction.groups_BN[:, 3:] - 1, 5)
    torch.testing.assert_close(out[:, 1:], expected)


def test_registers_are_averaged_each_kind_for_itself() -> None:
    """Two prefix tokens a frame: [CLS] of the first, its register, [CLS] of the second, ..."""
    reduction, out = cluster(ONE, segment(), 4, prefix=6, cls=2)
    assert reduction.groups_BN[0, :6].tolist() == [0, 1, 0, 1, 0, 1]
    assert out[0, :2, 0].tolist() == [2.0, 3.0]


def cost(x_nC: torch.Tensor, medoids: list[int]) -> float:
    return float(torch.cdist(x_nC, x_nC[medoids]).amin(1).sum())


def test_more_rounds_never_cost_more_and_beat_random_tokens() -> None:
    x = segment(60, 2, seed=4, rows=1)
    found = []
    for rounds in (1, 2, 4, 100):
        reduction, _ = cluster(CenterCLIP(after=1, iterations=rounds), x, 6)
        found.append(cost(x[0], (reduction.anchor_BM[0, 1:] - 3).tolist()))
    assert all(later <= earlier + 1e-4 for earlier, later in pairwise(found))
    assert found[-1] < found[0] - 5
    drawn = [cost(x[0], ops.random_indices(1, 60, 6, seed=seed)[0].tolist()) for seed in range(20)]
    assert found[-1] < min(drawn)


def test_a_small_clip_is_clustered_as_well_as_can_be() -> None:
    """Against all choices of medoids, where the start is good."""
    centre = torch.tensor([[0.0, 0], [9, 0], [0, 9]])
    x = centre.repeat_interleave(4, 0) + 0.5 * segment(12, 2, rows=1)[0]
    reduction, _ = cluster(ONE, x[None], 3)
    best = min(itertools.combinations(range(12), 3), key=lambda m: cost(x, list(m)))
    assert (reduction.anchor_BM[0, 1:] - 3).tolist() == list(best)


@pytest.mark.parametrize("algorithm", ["k_medoids", "spectral"])
def test_planted_groups_across_frames_are_found(algorithm) -> None:
    """Three things that move about: every frame has each, at another place."""
    kinds = torch.stack([torch.arange(24).roll(shift) % 3 for shift in (0, 1, 2)]).flatten()
    x = 8 * torch.eye(3)[kinds] + 0.1 * segment(72, 3, rows=1)[0]
    reduction, _ = cluster(CenterCLIP(after=1, algorithm=algorithm), x[None], 3)
    group = reduction.groups_BN[0, 3:]
    same = kinds[:, None] == kinds
    assert torch.equal(group[:, None] == group, same)


def test_the_needle_stays() -> None:
    """One patch unlike all others, in one frame of three, is a cluster of its own."""
    x = 0.01 * segment(48, seed=1, rows=1)
    x[0, 29] += 5
    reduction, out = cluster(ONE, x, 4)
    assert 29 + 3 in reduction.anchor_BM[0].tolist()
    group = reduction.groups_BN[0]
    assert int((group == group[32]).sum()) == 1
    assert torch.equal(out[0, int(group[32])], x[0, 29])


def test_duplicated_frames_keep_medoids_of_the_first() -> None:
    x = segment(16, rows=1).repeat(1, 3, 1)
    reduction, _ = cluster(ONE, x, 9)
    assert (reduction.anchor_BM[0, 1:] - 3 < 16).all()


def test_normalised_tokens_start_from_the_longest() -> None:
    x = segment(rows=1)
    x[0, 13] *= 10
    reduction, _ = cluster(CenterCLIP(after=1, normalise=True), x, 1)
    scaled, _ = cluster(CenterCLIP(after=1, normalise=True), 3 * x, 1)
    assert reduction.anchor_BM.tolist() == scaled.anchor_BM.tolist()
    unit = torch.nn.functional.normalize(x, dim=-1)
    many, _ = cluster(CenterCLIP(after=1, normalise=True), x, 5)
    first = ops.k_medoids(unit, 5, first=torch.tensor([13]))[0]
    assert (many.anchor_BM[:, 1:] - 3).tolist() == first.tolist()


def test_sparse_links_of_the_spectral_variant() -> None:
    x = torch.cat([torch.zeros(5, 1), torch.ones(5, 1)]) + 0.01 * segment(10, 1, rows=1)[0]
    group = ops.spectral_medoids(x, 2, neighbours=3)[1]
    assert group.tolist() in ([0] * 5 + [1] * 5, [1] * 5 + [0] * 5)
    with pytest.raises(ValueError, match="neighbours"):
        ops.spectral_medoids(x, 2, neighbours=10)


# -- counts ----------------------------------------------------------------------------------------


def test_published_counts() -> None:
    default = Budget(retain=1 / 3, published=True)
    assert CenterCLIP().plan(12, 49, default) == ((4, 49),)
    for parts in (6, 4, 3):
        assert CenterCLIP(segments=parts, clusters=49).plan(12, 49, default) == ((parts, 49),)
    assert CenterCLIP(segments=12).plan(60, 49, Budget(tokens=12 * 49)) == ((12, 49),)
    assert CenterCLIP().blocks(12) == (6,)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 7, 8, 32, 60])
def test_every_number_of_frames_divides_by_default(frames) -> None:
    ((parts, count),) = CenterCLIP().plan(frames, 36, Budget(retain=0.25))
    assert frames % parts == 0 and count == round(36 * frames / parts / 4)


def test_several_clusterings() -> None:
    method = CenterCLIP(after=(1, 2), segments=(4, 1), clip_frames=8)
    model, pixels = tiny_encoder("clip"), torch.randn(16, 3, 48, 48)
    with torch.no_grad(), foveate.reduce(model, method, retain=0.25) as run:
        out = model(pixels).last_hidden_state
    assert out.shape[:2] == (2, 73)  # two videos, a quarter of 8 x 36 and one [CLS]
    assert run.report.stages[0].before == (8 * 37,) * 2


# -- encoders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2_with_registers"])
@torch.no_grad()
def test_videos_of_a_call_do_not_mix(family) -> None:
    model, pixels = tiny_encoder(family), torch.randn(12, 3, 48, 48)
    with foveate.reduce(model, "centerclip", clip_frames=6, restore=True):
        both = model(pixels).last_hidden_state
        alone = [model(part).last_hidden_state for part in pixels.split(6)]
    torch.testing.assert_close(both, torch.cat(alone), atol=2e-5, rtol=0)


@torch.no_grad()
def test_frames_of_a_segment_see_each_other_and_no_others() -> None:
    model = tiny_encoder("clip")
    pixels = torch.randn(6, 3, 48, 48)
    changed = pixels.clone()
    changed[1] += 1
    with foveate.reduce(model, "centerclip", segments=2, restore=True):
        out, other = model(pixels).last_hidden_state, model(changed).last_hidden_state
    moved = (out - other).abs().amax((1, 2))
    assert (moved[:3] > 1e-3).all() and (moved[3:] < 1e-5).all()


@torch.no_grad()
def test_frames_that_do_not_divide_are_refused() -> None:
    model, pixels = tiny_encoder("clip"), torch.randn(6, 3, 48, 48)
    with foveate.reduce(model, "centerclip", segments=4), pytest.raises(ValueError, match="divide"):
        model(pixels)
    with (
        foveate.reduce(model, "centerclip", clip_frames=4),
        pytest.raises(ValueError, match="whole"),
    ):
        model(pixels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"after": 0}, "after must be"),
        ({"after": (6, 3), "segments": (4, 2)}, "ascending"),
        ({"after": (3, 6)}, "need segments"),
        ({"after": (3, 6), "segments": (4, 3)}, "divide the one before"),
        ({"segments": (4, 2)}, "one number"),
        ({"clusters": 0}, "clusters takes"),
        ({"algorithm": "kmeans"}, "algorithm must be"),
        ({"aggregate": "sum"}, "aggregate must be"),
        ({"metric": "dot"}, "metric must be"),
        ({"metric": 0.5}, "at least 1"),
        ({"iterations": 0}, "iterations"),
        ({"sigma": 0}, "sigma"),
        ({"clip_frames": 0}, "clip_frames"),
    ],
)
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        get_method("centerclip")(**arguments)


def test_a_block_must_be_left() -> None:
    for after in (4, 5, 0.95):
        with pytest.raises(ValueError, match="one at least must run behind"):
            CenterCLIP(after=after).check(4, None)
