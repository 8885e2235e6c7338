"""GRT: the gate on planted motion, the shortened encoder, scenes and packing.

Legend: T frames, N patches of a frame, C channels.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import foveate
from foveate import ops
from foveate.core import Budget, Grid, PatchesContext, ProjectorContext, Recipe, Tokens
from foveate.core.flops import encoder_flops
from foveate.errors import AttachmentError, RecipeError
from foveate.methods.grt import (
    GRT,
    key_frames,
    motion_gate,
    packed_indices,
    reused_embeddings,
    scene_divergences,
)
from foveate.models.dims import vision_dims
from foveate.models.registry import adapter_for
from tiny import Sample, tiny_encoder, tiny_inputs, tiny_model

PATCH, SIDE = 8, 6  # of the tiny encoders: 48 x 48 pixels


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def static_clip(frames: int = 4) -> torch.Tensor:
    return noise(1, 3, 48, 48).repeat(frames, 1, 1, 1)


def moving_square(frames: int = 4) -> torch.Tensor:
    """A square of one patch that steps one patch to the right in every frame."""
    clip = static_clip(frames)
    for t in range(frames):
        clip[t, :, 8:16, 8 * t : 8 * t + 8] = 5.0
    return clip


def context_of(pixels: torch.Tensor, **fields) -> PatchesContext:
    return PatchesContext(
        Budget(0.5), "grt", pixels_B3HW=pixels, patch_size=(PATCH, PATCH), **fields
    )


# -- gate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l2", "ssim"])
def test_a_static_video_is_embedded_once(metric):
    keep, change = motion_gate(static_clip(), (PATCH, PATCH), 1e-4, metric)
    assert keep[0].all() and not keep[1:].any() and change.abs().max() < 1e-4
    embed = reused_embeddings(noise(4, 36, 5), keep, noise(36, 5, seed=1))
    assert torch.equal(embed, embed[:1].expand_as(embed))


@pytest.mark.parametrize("metric", ["l2", "ssim"])
@pytest.mark.parametrize("reference", ["previous", "last_kept"])
def test_exactly_the_touched_patches_pass(metric, reference):
    keep, _ = motion_gate(moving_square(), (PATCH, PATCH), 1e-3, metric, reference)
    for t in (1, 2, 3):
        # Where the square was, and where it is: the second row of six patches.
        assert keep[t].nonzero()[:, 0].tolist() == [6 + t - 1, 6 + t]


@pytest.mark.parametrize("metric", ["l2", "ssim"])
def test_raising_tau_never_adds_patches(metric):
    clip = noise(5, 3, 48, 48).cumsum(0) * 0.3
    gates = [motion_gate(clip, (PATCH, PATCH), tau, metric)[0] for tau in (-1, 0.05, 0.4, 4, 8)]
    assert gates[0].all()
    for lower, higher in pairwise(gates):
        assert not (higher & ~lower).any()
    assert gates[-1].sum() < gates[0].sum()


def test_slow_drift_passes_only_against_what_was_kept():
    """The known failure of the released reference, and its cure."""
    step = 0.9 / (3 * PATCH * PATCH) ** 0.5  # 0.9 in L2 per frame
    clip = static_clip(8) + step * torch.arange(8.0)[:, None, None, None]
    released, _ = motion_gate(clip, (PATCH, PATCH), 1.0)
    bounded, change = motion_gate(clip, (PATCH, PATCH), 1.0, reference="last_kept")
    assert not released[1:].any()
    assert bounded.all(1).tolist() == [True, False] * 4
    assert change.max() < 2.0


def test_a_hard_cut_is_a_key_frame():
    clip = torch.cat([static_clip(2), noise(1, 3, 48, 48, seed=7).repeat(2, 1, 1, 1)])
    keep, _ = motion_gate(clip, (PATCH, PATCH), 1.0)
    assert key_frames(keep, 0.8).tolist() == [True, False, True, False]


def test_clips_of_a_call_do_not_meet():
    image, video = Grid.image(6, 6), Grid.video(2, 6, 6)
    layouts = [(image, 0), (video, 0), (video, 1), (Grid.video(1, 6, 6), 0)]
    context = context_of(static_clip(), layouts=lambda: layouts)
    assert context.clip_starts().tolist() == [True, True, False, True]
    assert GRT().patches(context).all(1).tolist() == [True, True, False, True]


@pytest.mark.parametrize("policy", ["random", "uniform"])
def test_controls_let_as_many_pass(policy):
    clip = moving_square()
    expected, _ = motion_gate(clip, (PATCH, PATCH), 0.3)
    keep = GRT(policy=policy).patches(context_of(clip))
    assert keep.sum(1).tolist() == expected.sum(1).tolist() == [36, 2, 2, 2]
    assert not torch.equal(keep, expected)
    if policy == "uniform":
        assert keep[1].nonzero()[:, 0].tolist() == [17, 35]


def test_codec_lets_every_so_many_frames_pass_whole():
    keep = GRT(policy="codec", gop=2).patches(context_of(static_clip()))
    assert keep.all(1).tolist() == [True, False, True, False]
    assert GRT(policy="all").patches(context_of(static_clip())).all()


# -- encoder --------------------------------------------------------------------------------------


def frame_by_frame(model, tower, pixels, keep):
    """Every frame alone, its gated patches cut out by hand; gaps filled from the frame before."""
    outputs, prefix = [], tower.num_prefix
    for t, frame in enumerate(pixels):
        if not keep[t].any():
            outputs.append(outputs[-1].clone())
            continue
        place = torch.cat([torch.arange(prefix), keep[t].nonzero()[:, 0] + prefix])
        hook = tower.blocks[0].register_forward_pre_hook(
            lambda module, args, kwargs, place=place: (
                ((args[0][:, place], *args[1:]), kwargs)
                if args
                else (args, {**kwargs, "hidden_states": kwargs["hidden_states"][:, place]})
            ),
            with_kwargs=True,
        )
        out = model(frame[None]).last_hidden_state[0]
        hook.remove()
        whole = outputs[-1].clone() if outputs else out.new_zeros(36 + prefix, out.shape[-1])
        whole[place] = out
        outputs.append(whole)
    return torch.stack(outputs)


@pytest.mark.parametrize("family", ["dinov2", "siglip", "clip", "dinov2_with_registers"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_encoder_equals_frames_cut_by_hand(family, attn):
    model = tiny_encoder(family, attn=attn)
    pixels = torch.cat([moving_square(), static_clip(1)])
    pixels = torch.cat([pixels, pixels[-1:]])  # a frame that skips the encoder
    tower = adapter_for(model).tower(model)
    keep, _ = motion_gate(pixels, (PATCH, PATCH), 0.3)
    with torch.no_grad():
        expected = frame_by_frame(model, tower, pixels, keep)
        with foveate.reduce(model, "grt", retain=0.5, restore=True) as run:
            got = model(pixels).last_hidden_state
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    (stage,) = run.report.stages
    assert stage.stage == "patches"
    num = keep.sum(1)
    assert stage.after == tuple((num + tower.num_prefix * (num > 0)).tolist())
    assert sum(stage.after) == 36 + int(keep[1:].sum()) + 5 * tower.num_prefix


def test_a_gate_that_is_open_changes_nothing():
    model, pixels = tiny_encoder("siglip"), noise(3, 3, 48, 48)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        for recipe in ("grt(tau=-1)", "grt(policy='all')"):
            with foveate.reduce(model, recipe, retain=0.5):
                assert torch.equal(model(pixels).last_hidden_state, expected)


def test_blocks_run_on_few_rows_and_cost_is_counted():
    """Fifteen static frames cost nothing, and frames of a few patches share a row."""
    model, seen = tiny_encoder("siglip"), []
    tower = adapter_for(model).tower(model)
    costs = {}
    for name, pixels in (("static", static_clip(16)), ("square", moving_square(6))):
        with torch.no_grad(), foveate.reduce(model, "grt", retain=0.5, restore=True) as run:
            hook = tower.attentions[1].register_forward_pre_hook(
                lambda m, args, kwargs: seen.append((args or [kwargs["hidden_states"]])[0].shape),
                with_kwargs=True,
            )
            model(pixels)
            hook.remove()
        costs[name] = run.report.flops["reduced"]["encoder"]
    assert [tuple(shape[:2]) for shape in seen] == [(1, 36), (2, 36)]
    dims = vision_dims(model)
    # Patches are still projected in all frames.
    assert costs["static"] == encoder_flops(dims, [(36,)] * dims.num_blocks, num_patches=16 * 36)
    assert costs["square"] == encoder_flops(dims, [(36, 36)] * dims.num_blocks, num_patches=6 * 36)


def test_twice_the_frames_of_a_slow_video_cost_far_less_than_twice():
    def entered(frames: int) -> int:
        clip = static_clip(frames)
        for t in range(frames):
            left = round(32 * t / frames)
            clip[t, :, 8:16, left : left + 8] = 5.0
        return int(motion_gate(clip, (PATCH, PATCH), 0.3)[0].sum())

    assert entered(16) < 1.5 * entered(8)


def test_it_goes_together_with_a_method_inside_the_encoder():
    model, pixels = tiny_encoder("dinov2"), moving_square()
    with (
        torch.no_grad(),
        foveate.reduce(model, "grt + flowcut@encoder", retain=0.5, restore=True) as run,
    ):
        out = model(pixels).last_hidden_state
    assert [stage.stage for stage in run.report.stages] == ["patches", "encoder"]
    assert torch.isfinite(out).all()
    # Where the square has never been, every frame has the first one's output.
    far = torch.arange(36)[18:] + 1
    assert torch.equal(out[:, far], out[:1, far].expand(4, -1, -1))


# -- scenes and packing ---------------------------------------------------------------------------


def test_divergence_is_symmetric_and_bounded():
    a, b = noise(50, 30) * 8, noise(50, 30, seed=1) * 8
    there, back = ops.jensen_shannon(a, b), ops.jensen_shannon(b, a)
    torch.testing.assert_close(there, back)
    assert there.min() > 0 and there.max() <= math.log(2) + 1e-6
    assert ops.jensen_shannon(a, b, swapped=True).max() > math.log(2)
    assert scene_divergences(a[:1], lambda x: x).shape == (0,)


def reduced(method: GRT, features, score, key, budget, **fields):
    T, N = features.shape[:2]
    grid = Grid.video(T, 1, N)
    carried = {"motion": score.flatten(), "key": key[:, None].expand(T, N).float().flatten()}
    context = ProjectorContext(budget, "grt", grid=grid, read_carried=carried.get, **fields)
    return method.projector(Tokens.from_grid(features.flatten(0, 1), grid), context), grid


def test_merged_key_frames_are_packed_by_motion():
    features, score = noise(3, 8, 4), noise(3, 8, seed=1).abs()
    key = torch.tensor([True, True, True])
    kept = {}
    for delta in (0.0, 9.0):
        reduction, _ = reduced(
            GRT(delta=delta), features, score, key, Budget(0.5), vocabulary=lambda x: x
        )
        kept[delta] = reduction.anchor_BM[0].view(3, 4) - torch.arange(3)[:, None] * 8
    norm = features.norm(dim=-1)
    assert torch.equal(kept[0.0], ops.top_k(norm, 4))
    assert torch.equal(kept[9.0][0], ops.top_k(norm[0], 4))
    assert torch.equal(kept[9.0][1:], ops.top_k(score[1:], 4))


@pytest.mark.parametrize("budget", [Budget(0.3), Budget(tokens=10), Budget(tokens=2)])
@pytest.mark.parametrize("least", [1, 3])
def test_the_count_is_exact_and_frames_have_as_many(budget, least):
    method = GRT(min_tokens=least)
    score, key = noise(4, 8, seed=1).abs(), torch.tensor([True, False, False, True])
    reduction, grid = reduced(method, noise(4, 8, 4), score, key, budget)
    assert reduction.num_out == method.count(grid, budget).tokens
    index = reduction.anchor_BM[0]
    assert (index.diff() > 0).all()
    counts = torch.bincount(index // 8, minlength=4).tolist()
    assert min(counts) >= least and max(counts) - min(counts) <= (budget.tokens is not None)


def test_a_moving_token_survives():
    score = torch.zeros(2, 8)
    score[1, 5] = 1.0
    index = packed_indices(noise(2, 8, 4), score, torch.tensor([True, False]), torch.tensor([1, 1]))
    assert index[1].tolist() == [5]


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"metric": "mse"}, "metric must be one of l2, ssim"),
        ({"reference": "first"}, "reference must be one of"),
        ({"policy": "none"}, "policy must be one of"),
        ({"gop": 0}, "gop must be a whole number"),
        ({"min_tokens": 1.5}, "min_tokens must be a whole number"),
        ({"scene_cut": 1.5}, "scene_cut is a share"),
        ({"delta": -1.0}, "delta must be >= 0"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        GRT(**arguments)


def test_packed_encoders_and_readers_of_maps_are_refused():
    with pytest.raises(AttachmentError, match="grt keeps patches out of the encoder"):
        foveate.reduce(tiny_model("qwen2_5_vl"), "grt")
    with pytest.raises(RecipeError, match="drops patches before the encoder"):
        Recipe.parse("grt@patches + fastervlm").budgets(Budget(0.5))


def test_without_the_gate_there_is_no_motion_to_pack_by():
    model = tiny_model("llava_onevision")
    inputs = tiny_inputs("llava_onevision", samples=(Sample(items=("video",), seed=0),))
    with (
        foveate.reduce(model, "grt@projector", retain=0.5),
        pytest.raises(ValueError, match="carries no 'motion' from its encoder stage"),
        torch.no_grad(),
    ):
        model(**inputs)


def test_a_gate_must_let_first_frames_pass_and_speak_of_all_patches():
    class Closed(GRT):
        def patches(self, context):
            return torch.zeros_like(super().patches(context))

    class Short(GRT):
        def patches(self, context):
            return super().patches(context)[:, 1:]

    model = tiny_encoder("siglip")
    for method, match in ((Closed(), "first frame of a clip"), (Short(), "patches\\(\\) returns")):
        with (
            torch.no_grad(),
            foveate.reduce(model, method, retain=0.5),
            pytest.raises(ValueError, match=match),
        ):
            model(static_clip())
    with pytest.raises(ValueError, match="hold no patch"):
        ops.image_patches(torch.zeros(1, 3, 4, 4), (8, 8))
    with pytest.raises(ValueError, match="metric must be"):
        ops.patch_change(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), "mse")
