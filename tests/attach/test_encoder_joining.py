"""Frames joined inside encoders: the numbers of a forward pass by hand, reports and evidence.

Legend: I images, f of them in a row, N tokens of an image, P of them prefix, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from attach_suite import logits_of, model_of
from encoder_methods import ByHand, Keep
from oracle_methods import _card

import foveate
from foveate.core import Method, Reduction
from foveate.errors import RecipeError
from foveate.models.registry import adapter_for
from tiny import TINY_ENCODERS, Sample, tiny_encoder, tiny_inputs

CLOSE = {"atol": 2e-5, "rtol": 0}


@dataclass(frozen=True)
class Joins(Method):
    """Before block 1 pairs of frames become one row, before block 3 pairs of those.

    Block 2 drops every third patch of the rows it finds.
    """

    card = _card("joins", "encoder")
    encoder_point: ClassVar = "block_start"
    at: tuple[int, ...] = (1, 3)
    drops: bool = True

    def encoder_joins(self, tokens, context):
        return 2 if context.layer in self.at and context.video_frames() else 1

    def encoder(self, tokens, context):
        if context.layer == 2 and self.drops and context.video_frames():
            keep = [
                i
                for i in range(tokens.num_tokens)
                if i < context.num_prefix or (i - context.num_prefix) % 3
            ]
            return Reduction.select(torch.tensor([keep] * tokens.batch), tokens.num_tokens)
        return None


def video(frames: int = 8) -> torch.Tensor:
    return torch.randn(frames, 3, 48, 48, generator=torch.Generator().manual_seed(0))


class Plain(ByHand):
    """Blocks that reduce nothing."""

    def reduce(self, point, index, x_BNC):
        return x_BNC


def by_hand(model, tower, pixels) -> torch.Tensor:
    """What `Joins` leaves of eight frames: two rows of [CLS] tokens and patches."""
    seen = []
    handle = tower.blocks[0].register_forward_pre_hook(
        lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    model(pixels)
    handle.remove()
    (x,), prefix = seen, tower.num_prefix
    block = Plain(tower, Keep()).block
    x = block(0, x)

    def join(x, prefix):
        pairs = x.view(-1, 2, *x.shape[1:])
        front = pairs[:, :, :prefix].flatten(1, 2)
        return torch.cat([front, pairs[:, :, prefix:].flatten(1, 2)], dim=1)

    x = block(1, join(x, prefix))
    prefix *= 2
    keep = [i for i in range(x.shape[1]) if i < prefix or (i - prefix) % 3]
    x = block(2, x[:, keep])
    return block(3, join(x, prefix))


@pytest.mark.parametrize("family", TINY_ENCODERS)
@torch.no_grad()
def test_joined_blocks_equal_the_loop_by_hand(family) -> None:
    model, pixels = tiny_encoder(family), video()
    tower = adapter_for(model).tower(model)
    expected = by_hand(model, tower, pixels)
    with foveate.reduce(model, Joins(), retain=0.5) as run:
        out = model(pixels, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(out, expected, **CLOSE)
    prefix = tower.num_prefix
    assert out.shape[:2] == (2, 4 * (prefix + 24))
    stage = run.report.stages[0]
    assert (stage.before, stage.after) == ((4 * (36 + prefix),) * 2, (4 * (24 + prefix),) * 2)
    assert run.report.flops["reduced"]["encoder"] > 0


@pytest.mark.parametrize("family", ["clip", "siglip", "deit"])
@torch.no_grad()
def test_every_token_comes_back_to_its_frame(family) -> None:
    model, pixels = tiny_encoder(family), video()
    tower = adapter_for(model).tower(model)
    prefix = tower.num_prefix
    short = by_hand(model, tower, pixels)
    with foveate.reduce(model, Joins(), retain=0.5, restore=True):
        full = model(pixels, output_hidden_states=True).hidden_states[-1]
    assert full.shape[:2] == (8, 36 + prefix)
    # Rows of two frames dropped every third of their 72 patches, then two such rows were joined.
    stays = (torch.arange(72) % 3 > 0).view(2, 36)
    for image in range(8):
        row, place = short[image // 4], image % 4
        front = row[: 4 * prefix].view(4, prefix, row.shape[1])[place]
        patches = row[4 * prefix :].view(4, 24, -1)[place]
        torch.testing.assert_close(full[image, :prefix], front)
        mine = full[image, prefix:]
        torch.testing.assert_close(mine[stays[place % 2]], patches)
        assert (mine[~stays[place % 2]] == 0).all()


@torch.no_grad()
def test_what_the_counter_says_is_what_blocks_get() -> None:
    model, pixels = tiny_encoder("siglip"), video()
    tower = adapter_for(model).tower(model)
    shapes = []
    with foveate.reduce(model, Joins(), retain=0.5):
        for block in tower.blocks:
            block.mlp.register_forward_hook(lambda m, a, out: shapes.append(tuple(a[0].shape[:2])))
        model(pixels)
    assert shapes == [(8, 36), (4, 72), (4, 48), (2, 96)]


@pytest.mark.parametrize("family", ["llava_onevision", "llava_next_video", "video_llava"])
def test_stills_and_tiles_are_left_alone(family) -> None:
    model = model_of(family)
    image = tiny_inputs(family, samples=(Sample(items=("image",), seed=0),))
    clip = tiny_inputs(family, samples=(Sample(items=("video",), seed=0),))
    before = logits_of(model, image), logits_of(model, clip)
    with foveate.reduce(model, Joins(drops=False, at=(1, 2)), retain=0.5):
        assert torch.equal(logits_of(model, image), before[0])
        assert (logits_of(model, clip) - before[1]).abs().max() > 1e-3


def test_videos_of_a_batch_are_joined_each_for_itself() -> None:
    model = model_of("llava_onevision")
    samples = tuple(Sample(items=("video",), seed=seed) for seed in (0, 1))
    with foveate.reduce(model, "tempme + divprune", retain=0.4) as run:
        both = logits_of(model, tiny_inputs("llava_onevision", samples=samples))
        assert [stage.stage for stage in run.report.stages] == ["encoder", "projector"]
        for row, sample in enumerate(samples):
            alone = logits_of(model, tiny_inputs("llava_onevision", samples=(sample,)))
            torch.testing.assert_close(both[row, -1], alone[0, -1], atol=1e-4, rtol=0)


# -- maps of the attention -------------------------------------------------------------------------


@dataclass(frozen=True)
class Maps(Method):
    """Notes maps of the feature block."""

    card = _card("maps", "projector")
    needs = ("encoder.received_attention",)
    seen: ClassVar[list] = []

    def encoder_layers(self, num_layers, feature_layer):
        return (feature_layer,)

    def projector(self, tokens, context):
        view = context.encoder_attention(context.encoder_layers[0])
        self.seen[:] = [view, context.signal("encoder.received_attention")]


@pytest.mark.parametrize("family", ["video_llava", "llava_onevision"])
def test_maps_of_joined_frames_are_shares_of_the_row(family) -> None:
    """Frames in one row: what its patches receive adds up over them to what is not the prefix's."""
    model = model_of(family, attn="eager")
    tower = adapter_for(model).towers(model)["video"]
    inputs = tiny_inputs(family, samples=(Sample(items=("video",), seed=0),))
    last, rows = tower.feature_block, []

    def note(module, args, output):
        rows.append(output[1])

    joins = Joins(drops=False, at=(1, 2))
    with foveate.reduce(model, [joins, Maps()], retain=0.5):
        handle = tower.attentions[last].register_forward_hook(note)
        logits_of(model, inputs)
        handle.remove()
    view, _ = Maps.seen
    attention, prefix = rows[0].mean(1)[0], 4 * tower.num_prefix  # [M, M] of four frames
    assert view.num_images == 4
    patches = attention[:, prefix:].view(attention.shape[0], 4, -1)
    own = [[f * tower.num_prefix + i for i in range(tower.num_prefix)] for f in range(4)]
    for frame in range(4):
        # Queries: all patches of the row, and the other frames' prefix tokens among them.
        queries = [i for i in range(attention.shape[0]) if i not in own[frame]]
        expected = patches[queries, frame].mean(0)
        torch.testing.assert_close(view.received()[frame], expected, atol=1e-5, rtol=0)
        if tower.has_cls:
            torch.testing.assert_close(
                view.cls()[frame], patches[own[frame][0], frame], atol=1e-5, rtol=0
            )
    keys = view.patch_keys()
    assert keys.shape[0] == 4 and keys.shape[2] == patches.shape[2]


# -- evidence and pictures -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tempme", "centerclip"])
def test_groups_span_frames_and_differ_between_rows(method) -> None:
    model = model_of("llava_onevision")
    samples = tuple(Sample(items=("video",), seed=seed) for seed in (0, 0))
    inputs = tiny_inputs("llava_onevision", samples=samples)
    with foveate.reduce(model, method, retain=0.3, evidence=True) as run:
        expected = logits_of(model, inputs)
    with foveate.reduce(model, method, retain=0.3):
        assert torch.equal(logits_of(model, inputs), expected)
    for item in run.report.items:
        labels = [entry for entry in item.evidence if entry.kind == "label"]
        assert labels
        frames = labels[0].value[: item.grid.num_patches].view(len(item.grid.planes), -1)
        sets = [set(frame[frame >= 0].tolist()) for frame in frames]
        assert any(a & b for i, a in enumerate(sets) for b in sets[i + 1 :])


@torch.no_grad()
def test_pictures_of_an_encoder_show_groups_across_frames() -> None:
    from foveate.core import Budget, get_method
    from foveate.video import FrameTransform
    from foveate.view.encoders import Encoder, EncoderPass
    from foveate.view.show import _encoder_item

    transform = FrameTransform(size={"height": 48, "width": 48}, mean=(0.5,) * 3, std=(0.5,) * 3)
    encoder = Encoder(tiny_encoder("clip"), transform)
    steps = [(0, get_method("centerclip")())]
    frames = torch.randint(0, 255, (6, 3, 48, 48), dtype=torch.uint8)
    with EncoderPass(encoder, steps=steps, budgets=[Budget(retain=0.25)]) as run:
        run.add(frames)
    item = _encoder_item(run.result(), "video", 1)
    assert item.reduction is not None
    assert (item.reduction.num_in, item.reduction.num_out) == (6 * 37, 2 * (27 + 1))
    groups = item.reduction.groups_BN.view(6, 37)
    assert groups[:3].max() < groups[3:].min()
    assert set(groups[0].tolist()) & set(groups[2].tolist())


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["tome", "zero_tprune", "grt"])
def test_methods_that_expect_an_image_a_row_are_refused_beside_it(other) -> None:
    for recipe in (f"tempme + {other}", f"{other} + centerclip"):
        with pytest.raises(RecipeError, match="joins frames of a clip inside the encoder"):
            foveate.reduce(model_of("llava_onevision"), recipe)


@torch.no_grad()
def test_rows_that_do_not_divide_are_refused() -> None:
    model = tiny_encoder("clip")
    with foveate.reduce(model, Joins(), retain=0.5), pytest.raises(ValueError, match="there are 3"):
        model(video(6))


def test_a_video_read_in_chunks_says_that_frames_were_joined_in_each() -> None:
    from foveate.attach.overlap_rules import chunk_recipe
    from foveate.core import Recipe

    _, notes = chunk_recipe(Recipe.parse("tempme"))
    assert notes == ["tempme joined the frames of every chunk as a video of its own"]
    assert chunk_recipe(Recipe.parse("tome"))[1] == []
