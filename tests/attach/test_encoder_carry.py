"""What the encoder stage hands to the projector stage, images of unequal length, dropped patches.

Legend: B images, P patches of one of them, M tokens present (prefix included), C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from attach_suite import logits_of, model_of
from method_table import WITH_VIDEOS
from oracle_methods import _card

import foveate
from foveate.core import Budget, Method, Reduction
from foveate.core.flops import encoder_flops
from foveate.errors import AttachmentError, RecipeError
from foveate.methods.flowcut import FlowCut
from foveate.models.dims import vision_dims
from foveate.models.registry import adapter_for
from foveate.video import Clip, FrameTransform
from foveate.view import Encoder, show_video
from tiny import PACKED, TINY_ENCODERS, TINY_FAMILIES, Sample, tiny_encoder, tiny_inputs

UNPACKED = tuple(family for family in TINY_FAMILIES if family not in PACKED)
CLOSE = {"atol": 2e-5, "rtol": 0}


def images(num: int = 2) -> torch.Tensor:
    return torch.randn(num, 3, 48, 48, generator=torch.Generator().manual_seed(0))


# -- the bridge -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Numbers(Method):
    """The encoder stage drops half and numbers the patches; the projector notes what arrives."""

    card = _card("numbers", "encoder")
    encoder_drops: ClassVar[bool] = True
    wrong: bool = False

    def encoder(self, tokens, context):
        prefix, num = context.num_prefix, tokens.num_tokens
        if context.layer == 0:
            B, P = tokens.batch, num - prefix
            number_BP = torch.arange(B * P, dtype=torch.float32).view(B, P)
            context.carry("number", number_BP[:, 1:] if self.wrong else number_BP)
            FOUND["layouts"] = list(context.layouts())
        if context.layer == 1:
            keep_M = torch.tensor([i for i in range(num) if i < prefix or i % 2])
            return Reduction.select(keep_M.expand(tokens.batch, -1), num)
        return None

    def projector(self, tokens, context):
        FOUND.setdefault("maps", []).append(context.carried_from_encoder("number"))
        return None


@dataclass(frozen=True)
class Asks(Method):
    """Asks for what nobody carried."""

    card = _card("asks", "projector")
    any_tokens: ClassVar[bool] = True

    def projector(self, tokens, context):
        context.carried_from_encoder("number")


FOUND: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("family", "modality"),
    [(f, m) for f in UNPACKED for m in ("image", "video") if m == "image" or f in WITH_VIDEOS],
)
def test_carried_maps_go_the_way_of_the_features(family, modality):
    model, adapter = model_of(family), adapter_for(model_of(family))
    FOUND.clear()
    inputs = tiny_inputs(family, samples=(Sample((3, 2, 4), (modality,) * 2, seed=1),))
    with foveate.reduce(model, Numbers(), retain=0.5) as run:
        logits_of(model, inputs)
    grids = [item.grid for item in run.report.items]
    total = len(FOUND["layouts"])
    assert run.encoder_reduction is not None
    tower = adapter.towers(model)[modality]
    patches = run.encoder_reduction.num_in - tower.num_prefix
    arguments = {k: v for k, v in inputs.items() if "pixel" in k or "image" in k or "video" in k}
    score_P = torch.arange(total * patches, dtype=torch.float32)
    expected = adapter.token_scores(model, modality, score_P, arguments, grids)
    assert len(FOUND["maps"]) == len(expected) > 0
    for got, wanted in zip(FOUND["maps"], expected, strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)
    planes = adapter.encoder_planes(model, modality, arguments, grids)
    flat = [(grid, plane) for grid, mine in zip(grids, planes, strict=True) for plane in mine]
    assert FOUND["layouts"] == flat


def test_a_map_of_another_shape_is_refused():
    with (
        foveate.reduce(model_of("llava"), Numbers(wrong=True), retain=0.5),
        pytest.raises(ValueError, match="one number per patch of every image"),
    ):
        logits_of(model_of("llava"), tiny_inputs("llava"))


def test_what_nobody_carried_is_refused():
    with (
        foveate.reduce(model_of("llava"), [Numbers(), Asks()], retain=0.5),
        pytest.raises(ValueError, match="asks carries no 'number' from its encoder stage"),
    ):
        logits_of(model_of("llava"), tiny_inputs("llava"))


def test_an_encoder_alone_has_no_layouts():
    FOUND.clear()
    model = tiny_encoder("vit")
    with torch.no_grad(), foveate.reduce(model, Numbers(), retain=0.5):
        model(images())
    assert FOUND["layouts"] == []


# -- dropped patches and padding --------------------------------------------------------------


def test_dropped_patches_are_as_they_left():
    """Each in the state it had between attention and MLP of the block that dropped it."""
    model = tiny_encoder("siglip")
    tower, method = adapter_for(model).tower(model), Numbers()
    between, last = [], []
    # Ahead of the stage's own hook, so still with all patches.
    tower.mlp_inputs[1].register_forward_pre_hook(lambda m, a: between.append(a[0]))
    with torch.no_grad(), foveate.reduce(model, method, retain=0.5, restore=True) as run:
        tower.blocks[-1].register_forward_hook(
            lambda m, a, out: last.append(_first(out)), prepend=True
        )
        restored = model(images(), output_hidden_states=True).hidden_states[-1]
    assert run.encoder_reduction is not None
    gone_P = run.encoder_reduction.groups_BN[0] < 0
    assert gone_P.sum() == 18 and restored.shape[1] == 36
    torch.testing.assert_close(restored[:, gone_P], between[0][:, gone_P])
    torch.testing.assert_close(restored[:, ~gone_P], last[0])


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("family", TINY_ENCODERS)
def test_images_of_unequal_length_equal_those_alone(family):
    model, pixels = tiny_encoder(family), images(3)
    pixels[1] *= 5
    together, shapes = [], []
    tower = adapter_for(model).tower(model)
    handles = [
        block.register_forward_pre_hook(
            lambda m, a, k: shapes.append((a[0] if a else k["hidden_states"]).shape[1]),
            with_kwargs=True,
        )
        for block in tower.blocks
    ]
    with torch.no_grad(), foveate.reduce(model, "flowcut", retain=0.3, restore=True) as run:
        together = model(pixels, output_hidden_states=True).hidden_states[-1]
        reduction = run.encoder_reduction
        for index in range(3):
            alone = model(pixels[index : index + 1], output_hidden_states=True).hidden_states[-1]
            assert run.encoder_reduction.anchor_BM.equal(reduction.anchor_BM[index : index + 1])
            torch.testing.assert_close(together[index : index + 1], alone, **CLOSE)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", TINY_ENCODERS)
def test_every_block_behind_a_cut_runs_on_fewer_tokens(family):
    model, shapes = tiny_encoder(family), []
    tower = adapter_for(model).tower(model)
    with torch.no_grad(), foveate.reduce(model, "flowcut", tokens=9) as run:
        for attention in tower.attentions:
            attention.register_forward_pre_hook(
                lambda m, a, k: shapes.append((a[0] if a else k["hidden_states"]).shape[1]),
                with_kwargs=True,
            )
        model(images())
    prefix, full = tower.num_prefix, 36 + tower.num_prefix
    assert shapes[0] == full and shapes == sorted(shapes, reverse=True) and shapes[-1] < full
    assert run.report.stages[0].after == (9 + prefix,) * 2
    if tower.has_cls:
        assert shapes[-1] == 9 + prefix  # the last cut comes before the last block
    flops = run.report.flops
    assert flops["untouched"]["encoder"] == encoder_flops(vision_dims(model), full, 2)
    counted = encoder_flops(vision_dims(model), shapes, 2, mlp_lengths=shapes, num_patches=full)
    assert flops["reduced"]["encoder"] == counted < flops["untouched"]["encoder"]


def test_padding_needs_a_mask_that_flash_attention_does_not_take():
    model, pixels = tiny_encoder("vit"), images(2)
    pixels[1] *= 5

    def attached(method: FlowCut) -> foveate.Attachment:
        """As on an encoder that was loaded with flash attention, which a CPU does not run."""
        model.config._attn_implementation = "flash_attention_2"
        run = foveate.reduce(model, method, retain=0.3)
        model.config._attn_implementation = "sdpa"
        return run

    with (
        torch.no_grad(),
        attached(FlowCut()),
        pytest.raises(AttachmentError, match="batch_max=True"),
    ):
        model(pixels)
    with torch.no_grad(), attached(FlowCut(batch_max=True)):
        model(pixels)


# -- FlowCut in models ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "video_llava", "llava_next", "llava_onevision"])
def test_survivors_have_the_features_of_the_shortened_encoder(family):
    """What enters the language model is the projection of what left the encoder."""
    model = model_of(family)
    adapter = adapter_for(model)
    inputs = tiny_inputs(family, samples=(Sample(items=("image",), seed=2),))
    tower = adapter.towers(model)["image"]
    entering, ending = [], []
    text: Any = adapter.language_model(model)
    with foveate.reduce(model, FlowCut(), retain=0.2) as run:
        handles = [
            tower.blocks[tower.feature_block].register_forward_hook(
                lambda m, a, out: ending.append(_first(out))
            ),
            text.register_forward_pre_hook(
                lambda m, a, k: entering.append(k["inputs_embeds"]), with_kwargs=True
            ),
        ]
        logits_of(model, inputs)
        for handle in handles:
            handle.remove()
    (report_item,) = run.report.items
    assert run.encoder_reduction is not None and report_item.reduction is not None
    alive_P = (run.encoder_reduction.groups_BN[:, tower.num_prefix :] >= 0).float()
    arguments = {k: v for k, v in inputs.items() if "pixel" in k or "image" in k}
    (share_N,) = adapter.token_scores(model, "image", alive_P, arguments, [report_item.grid])
    kept_K = report_item.reduction.anchor_BM[0]
    patches_K = kept_K[~share_N[kept_K].isnan()]
    alive = (share_N > 0).nonzero()[:, 0].tolist()
    if family == "llava_onevision":  # its mosaic is scaled down: some tokens have a part of one
        assert set(patches_K.tolist()) <= set(alive)
    else:
        assert patches_K.tolist() == alive and (share_N[patches_K] == 1).all()
    # The feature block's output through the untouched rest of the model.
    handle = tower.blocks[tower.feature_block].register_forward_hook(
        lambda m, a, out: (ending[0], *out[1:]) if isinstance(out, tuple) else ending[0],
        prepend=True,
    )
    with torch.no_grad():
        found = adapter.base(model).get_image_features(**arguments, return_dict=True)
    handle.remove()
    (features_NC,) = adapter.split_features(model, found.pooler_output, [report_item.grid])
    first = int((inputs["input_ids"][0] == adapter.placeholder_ids(model)["image"]).nonzero()[0])
    got_KC = entering[0][0, first : first + len(kept_K)]
    torch.testing.assert_close(got_KC, features_NC[kept_K], **CLOSE)


def test_parts_of_it_alone():
    model, inputs = model_of("llava_onevision"), tiny_inputs("llava_onevision")
    with foveate.reduce(model, "flowcut@encoder", retain=0.2) as run:
        logits_of(model, inputs)
    report = run.report
    assert report.visual_after == report.visual_before  # spread back, for whoever comes next
    assert report.flops["reduced"]["encoder"] < report.flops["untouched"]["encoder"]
    (item,) = report.items
    for recipe, after in (("flowcut@projector", 1), ("flowcut@encoder,projector", 1)):
        with foveate.reduce(model, recipe, retain=0.25) as run:
            logits_of(model, inputs)
        left = FlowCut().leaving(item.grid, Budget(retain=0.25))
        assert run.report.visual_after == after * left + item.grid.num_special, recipe
        assert [stage.stage for stage in run.report.stages][-1] == "projector"
    with foveate.reduce(model, "flowcut@decoder", retain=0.25) as run:
        logits_of(model, inputs)
    (stage,) = run.report.stages
    assert stage.layer == 2 and sum(stage.after) == round(0.25 * run.report.visual_before)


def test_halves_in_two_steps_are_refused():
    """A step's maps are its own; the other half would read blocks that have lost patches."""
    recipe = "flowcut(retain=0.4)@encoder + flowcut(retain=0.2)@projector"
    with pytest.raises(RecipeError, match="drops patches inside the encoder"):
        foveate.reduce(model_of("llava"), recipe)


@pytest.mark.parametrize("family", PACKED)
def test_packed_encoders_are_cut_behind(family):
    model, inputs = model_of(family), tiny_inputs(family)
    with foveate.reduce(model, "flowcut", retain=0.25) as run:
        logits_of(model, inputs)
    report = run.report
    assert [stage.stage for stage in report.stages] == ["projector", "decoder"]
    left = sum(FlowCut().leaving(item.grid, Budget(retain=0.25)) for item in report.items)
    assert report.visual_after == 2 * left and sum(report.stages[1].after) == left
    with pytest.raises(AttachmentError, match="packs all images into one row"):
        foveate.reduce(model, "flowcut@encoder", retain=0.25)


def test_evidence_of_every_stage():
    model, inputs = model_of("llava_onevision"), tiny_inputs("llava_onevision")
    with foveate.reduce(model, "flowcut", retain=0.2, evidence=True) as run:
        logits_of(model, inputs)
    names = {(noted.stage, noted.name) for item in run.report.items for noted in item.evidence}
    assert ("encoder", "survivors") in names and ("encoder", "cumulative flow") in names
    assert ("decoder", "flow to the last token") in names


@pytest.mark.parametrize("family", ["dinov2", "siglip"])
def test_a_clip_without_a_language_model(family):
    """`foveate show` runs both stages before it: survivors of the encoder are what is drawn."""
    pixels = torch.randint(0, 255, (4, 3, 60, 90), generator=torch.Generator().manual_seed(0))
    side = {"height": 48, "width": 48}
    half = (0.5, 0.5, 0.5)
    encoder = Encoder(tiny_encoder(family), FrameTransform(size=side, mean=half, std=half), "tiny")
    clip = Clip(pixels.byte(), fps=4)
    for pool in (False, True):
        report = show_video(clip, "flowcut", retain=0.25, encoder=encoder, frames=4, pool=pool)
        assert [stage.stage for stage in report.stages] == ["encoder", "projector"]
        assert report.visual_after == 4 * round(0.25 * report.visual_before / 4)
        assert report.flops["reduced"]["encoder"] < report.flops["untouched"]["encoder"]
    # An absolute budget is one of the clip; no frame has to lose patches inside the encoder.
    report = show_video(clip, "flowcut", tokens=40, encoder=encoder, frames=4, pool=False)
    assert report.visual_after == 40
    chosen = report.items[0].reduction.anchor_BM[0] % 36
    assert chosen.max() > 20  # by score, not the first of every frame
