"""TempMe: schedule, matching and merging across frames.

Legend: R clips, L tokens of one, C channels.
"""

from __future__ import annotations

from math import prod

import pytest
import torch
from safetensors.torch import save_file

import foveate
from foveate.attach.encoder_joining import joined_tokens
from foveate.core import Budget, Reduction, Tokens, get_method
from foveate.errors import AttachmentError
from foveate.methods.tempme import TempMe, even_factors, match_patches, read_weights
from tiny import tiny_encoder

PUBLISHED = Budget(retain=85 / 588, published=True)


def lengths(method: TempMe, frames: int, patches: int, layers: int, budget: Budget) -> list[tuple]:
    """(clips, tokens of one) behind every block."""
    clips, prefix, left, found = frames, 1, patches, []
    for step in method.schedule(frames, patches, layers, budget):
        assert clips % step.clips == 0
        clips, prefix, left = clips // step.clips, prefix * step.clips, left * step.clips
        assert 0 <= step.across <= left // 2
        left -= step.across
        assert 0 <= step.within <= left // 2
        left -= step.within
        found.append((clips, prefix + left))
    return found


# -- schedule --------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [PUBLISHED, Budget(retain=85 / 588), Budget(tokens=85)])
def test_the_card_s_token_counts(budget) -> None:
    found = lengths(TempMe(), 12, 49, 12, budget)
    assert found[7:] == [(12, 34), (6, 44), (3, 56), (1, 107), (1, 97)]


@pytest.mark.parametrize("retain", [0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05])
@pytest.mark.parametrize(("frames", "patches", "layers"), [(12, 49, 12), (8, 196, 12), (7, 64, 5)])
def test_a_budget_that_was_asked_for_is_met(retain, frames, patches, layers) -> None:
    clips, tokens = lengths(TempMe(), frames, patches, layers, Budget(retain=retain))[-1]
    assert clips == 1
    assert tokens - frames == Budget(retain=retain).count(frames * patches)


def test_what_cannot_be_met_is_halved_wherever_it_may() -> None:
    clips, tokens = lengths(TempMe(), 4, 16, 2, Budget(tokens=1))[-1]
    assert clips == 1 and 0 < tokens - 4 < 16


def test_a_full_budget_merges_nothing() -> None:
    steps = TempMe().schedule(12, 49, 12, Budget(retain=1.0))
    assert sum(step.across + step.within for step in steps) == 0


@pytest.mark.parametrize("num", [1, 2, 5, 6, 12, 32, 36, 60, 64])
def test_factors_are_as_even_as_can_be(num) -> None:
    factors = even_factors(num, 3)
    assert prod(factors) == num and list(factors) == sorted(factors)
    divisors = [d for d in range(1, num + 1) if num % d == 0]
    best = min(max(a, b, num // a // b) for a in divisors for b in divisors if num // a % b == 0)
    assert factors[-1] == best


def test_factors_that_do_not_divide_are_refused() -> None:
    method = TempMe(factors=(2, 2, 3))
    assert sum(1 for s in method.schedule(24, 49, 12, PUBLISHED) if s.clips > 1) == 3
    with pytest.raises(ValueError, match="10 frames do not divide"):
        method.schedule(10, 49, 12, PUBLISHED)


# -- matching --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 6])
def test_sources_stand_at_even_places_of_the_sequence(prefix) -> None:
    x = torch.randn(2, prefix + 13, 8, generator=torch.Generator().manual_seed(0))
    target, kept = match_patches(x, 5, prefix)
    first = prefix % 2
    sources = [i for i in range(13) if (i - first) % 2 == 0]  # among the patches
    for row in range(2):
        kept_row = kept[row].tolist()
        assert kept_row[:prefix] == list(range(prefix)) == target[row, :prefix].tolist()
        gone = sorted(set(range(13)) - {k - prefix for k in kept_row[prefix:]})
        assert len(gone) == 5 and set(gone) <= set(sources)
        left = [k - prefix for k in kept_row[prefix:]]
        num_left = len(sources) - 5
        assert left[:num_left] == sorted(left[:num_left])
        assert left[num_left:] == sorted(set(range(13)) - set(sources))
        unit = torch.nn.functional.normalize(x[row, prefix:], dim=-1)
        likeness = unit @ unit[left[num_left:]].T
        for source in gone:
            best = left[num_left:][int(likeness[source].argmax())]
            assert kept_row[int(target[row, prefix + source])] == best + prefix
        assert min(likeness[g].max() for g in gone) >= max(
            likeness[s].max() for s in sources if s not in gone
        )


def test_more_than_there_are_is_clamped() -> None:
    target, kept = match_patches(torch.randn(1, 8, 4), 100, 2)
    assert kept.shape[1] == 2 + 3 and target.max() == 4


# -- encoders --------------------------------------------------------------------------------------


def video(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(frames, 3, 48, 48, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["clip", "siglip", "deit", "dinov2_with_registers"])
@torch.no_grad()
def test_sizes_are_conserved_and_frames_keep_their_cls(family) -> None:
    model = tiny_encoder(family)
    prefix = {"clip": 1, "siglip": 0, "deit": 2}.get(family, 5)
    with foveate.reduce(model, "tempme", retain=0.3) as run:
        out = model(video(8)).last_hidden_state
    assert out.shape[:2] == (1, 8 * prefix + round(0.3 * 8 * 36))
    reduction = run.encoder_reduction
    assert reduction is not None
    total = (36 + prefix) * 8
    assert float(reduction.sizes(torch.ones(1, total)).sum()) == total
    assert run.report.stages[0].before == (total,)
    # The tokens in front are the prefix tokens of all frames, in order, alone.
    fronts = [frame * (36 + prefix) + token for frame in range(8) for token in range(prefix)]
    assert reduction.anchor_BM[0, : 8 * prefix].tolist() == fronts
    assert reduction.groups_BN[0, fronts].tolist() == list(range(8 * prefix))


@pytest.mark.parametrize("family", ["clip", "siglip"])
@torch.no_grad()
def test_videos_of_a_call_do_not_mix(family) -> None:
    model, pixels = tiny_encoder(family), video(12)
    for restore in (False, True):
        with foveate.reduce(model, "tempme", clip_frames=6, restore=restore):
            both = model(pixels).last_hidden_state
            alone = [model(part).last_hidden_state for part in pixels.split(6)]
        torch.testing.assert_close(both, torch.cat(alone), atol=2e-5, rtol=0)


def test_identical_frames_merge_across_time_first() -> None:
    """Every patch pairs with itself in the other frame, where they stand at places of two kinds."""
    frame = torch.randn(1, 26, 8, generator=torch.Generator().manual_seed(0))
    tokens = joined_tokens(Tokens(frame.expand(2, -1, -1)), 2, 1)
    target, kept = match_patches(tokens.x_BND, 20, 2)
    size = Reduction.merge(target, kept.shape[1]).sizes(torch.ones(1, 52))
    assert sorted(size[0].tolist()) == [1.0] * 12 + [2.0] * 20
    for group in (size[0] == 2).nonzero()[:, 0].tolist():
        first, second = ((target[0] == group).nonzero()[:, 0] - 2).tolist()
        assert second == first + 25


@torch.no_grad()
def test_a_needle_in_one_frame_stays_alone() -> None:
    """One patch unlike all others of all frames is not averaged with any."""
    model = tiny_encoder("siglip")
    pixels = 0.01 * video(4)
    pixels[2, :, 16:24, 24:32] = 3 * torch.randn(
        3, 8, 8, generator=torch.Generator().manual_seed(1)
    )
    with foveate.reduce(model, "tempme", retain=0.4) as run:
        model(pixels)
    assert run.encoder_reduction is not None
    groups = run.encoder_reduction.groups_BN.view(4, 36)
    assert int((groups == groups[2, 2 * 6 + 3]).sum()) == 1


@torch.no_grad()
def test_frames_see_each_other_behind_the_first_joining() -> None:
    model, pixels = tiny_encoder("clip"), video(4)
    changed = pixels.clone()
    changed[0] += 1
    method = TempMe(factors=(2, 1), layers=(2, 3))
    with foveate.reduce(model, method, restore=True):
        out, other = model(pixels).last_hidden_state, model(changed).last_hidden_state
    moved = (out - other).abs().amax((1, 2))
    assert (moved[:2] > 1e-3).all() and (moved[2:] < 1e-5).all()


# -- weights ---------------------------------------------------------------------------------------


def weights(path, width: int = 24, clips: int = 4, low_rank: bool = True, **more) -> str:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "visual.resblocks.2.TVPt_Video_Positional_embedding": torch.randn(
            1, clips, 1, width, generator=generator
        )
    }
    if low_rank:
        tensors["visual.resblocks.1.attn.TVPt_LoRA_a"] = torch.randn(2, width, generator=generator)
        tensors["visual.resblocks.1.attn.TVPt_LoRA_b"] = torch.randn(72, 2, generator=generator)
        tensors["transformer.resblocks.1.attn.TVPt_LoRA_a"] = torch.zeros(2, 5)  # the text's
    save_file({**tensors, **more}, path)
    return str(path)


@torch.no_grad()
def test_low_rank_updates_act_with_the_method_and_leave_no_trace(tmp_path) -> None:
    model, pixels = tiny_encoder("clip"), video(4)
    path = weights(tmp_path / "w.safetensors")
    before = model(pixels).last_hidden_state
    with foveate.reduce(model, "tempme", restore=True):
        merged = model(pixels).last_hidden_state
    with foveate.reduce(model, "tempme", restore=True, weights=path) as run:
        trained = model(pixels).last_hidden_state
        run.budget = 1.0
        assert torch.equal(model(pixels).last_hidden_state, before)
    assert torch.equal(model(pixels).last_hidden_state, before)
    assert (trained - merged).abs().max() > 1e-2
    # The same as with the update inside the projections themselves.
    found = read_weights(path)[1]
    update = (found["b"] @ found["a"]).chunk(3)
    attention = next(m for n, m in model.named_modules() if n.endswith("layers.1.self_attn"))
    for name, delta in zip("qkv", update, strict=True):
        getattr(attention, f"{name}_proj").weight += delta
    alone = weights(tmp_path / "e.safetensors", low_rank=False)
    with foveate.reduce(model, "tempme", restore=True, weights=alone):
        expected = model(pixels).last_hidden_state
    torch.testing.assert_close(trained, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_weights_of_another_width_are_refused(tmp_path) -> None:
    model = tiny_encoder("clip")
    path = weights(tmp_path / "wide.safetensors", width=32)
    with pytest.raises(AttachmentError, match="block 1 is for a projection"):
        foveate.reduce(model, "tempme", weights=path)
    path = weights(tmp_path / "clips.safetensors", low_rank=False, clips=3)
    with foveate.reduce(model, "tempme", weights=path), pytest.raises(ValueError, match="4 clips"):
        model(video(4))
    save_file({"a": torch.zeros(1)}, tmp_path / "none.safetensors")
    for name, message in (("none", "hold no"), ("missing", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            foveate.reduce(model, "tempme", weights=str(tmp_path / f"{name}.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": -1}, "r must be"),
        ({"clip": 1.0}, "clip must"),
        ({"intra": -0.1}, "intra must"),
        ({"layers": ()}, "layers must"),
        ({"layers": (9, 8)}, "layers must"),
        ({"factors": (2, 2)}, "factors takes"),
        ({"r": 0, "clip": 0, "intra": 0}, "Nothing would be merged"),
        ({"clip_frames": 0}, "clip_frames must"),
    ],
)
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        get_method("tempme")(**arguments)


def test_layers_behind_the_last_block_are_refused() -> None:
    with pytest.raises(ValueError, match="has 4 blocks"):
        TempMe(layers=(8, 9, 10)).check(4, None)
