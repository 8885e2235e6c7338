"""Adapters against the models themselves: parts, grids, scores and pixels."""

from __future__ import annotations

import pytest
import torch
from adapter_calls import ANYRES, CASES, Call, run, watched
from torch import nn

from foveate.core.grid import TokenKind
from foveate.models import adapter_for
from tiny import TINY_FAMILIES, Sample, tiny_inputs, tiny_model
from tiny_prompts import packed_patches

# --- parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_parts_are_found_in_the_model_and_in_its_base(family: str) -> None:
    model = tiny_model(family)
    adapter = adapter_for(model)
    assert adapter.family == family
    base = adapter.base(model)
    assert base is model.model
    assert adapter.base(base) is base
    assert type(adapter_for(base)) is type(adapter)
    assert len(adapter.layers(model)) == len(adapter.text_attentions(model)) == 4
    assert adapter.text_config(model).hidden_size == 32
    assert adapter.mrope == (family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"))
    assert adapter.num_deepstack(model) == (2 if family == "qwen3_vl" else 0)
    towers = adapter.towers(model)
    assert tuple(towers) == adapter.modalities == tuple(adapter.placeholder_ids(model))
    for name in adapter.feature_methods.values():
        assert callable(getattr(base, name))
    if "video" in towers:
        shared = towers["video"] is towers["image"]
        assert shared == (family != "video_llava")


# --- grids and features -------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "modality"), CASES)
def test_grids_count_the_placeholders(family: str, modality: str) -> None:
    call = run(family, modality)
    placeholder = call.adapter.placeholder_ids(call.model)[modality]
    count = int((call.inputs["input_ids"] == placeholder).sum())
    grids = call.grids
    assert sum(grid.num_tokens for grid in grids) == count > 0
    assert {grid.modality for grid in grids} == {modality}
    items = call.items
    assert [len(item) for item in items] == [grid.num_tokens for grid in grids]


@pytest.mark.parametrize(("family", "modality"), CASES)
def test_newlines_are_where_the_grid_says(family: str, modality: str) -> None:
    call = run(family, modality)
    items = call.items
    newline = getattr(call.adapter.base(call.model), "image_newline", None)
    for item, grid in zip(items, call.grids, strict=True):
        is_newline = grid.kinds() == TokenKind.NEWLINE
        if newline is None:
            assert not is_newline.any()
        else:
            assert torch.equal((item == newline).all(-1), is_newline)
    if family in ANYRES and modality == "image":
        assert [len(grid.planes) for grid in call.grids] == [2] * 3


def test_a_lone_tile_of_onevision_ends_in_one_newline() -> None:
    model = tiny_model("llava_onevision")
    adapter = adapter_for(model)
    inputs = tiny_inputs("llava_onevision", samples=(Sample((1, 1, 1), ("image", "image")),))
    inputs = {key: inputs[key] for key in ("pixel_values", "image_sizes")}
    call = Call(model, adapter, "image", inputs)
    with watched(call), torch.no_grad():
        model.model.get_image_features(**inputs, batch_num_images=torch.tensor([2]))
    assert [grid.num_tokens for grid in call.grids] == [37, 37]
    assert [len(f) for f in call.features] == [37, 37]
    assert all(grid.newlines_at_end == 1 and len(grid.planes) == 1 for grid in call.grids)


def test_onevision_mosaics_are_not_downscaled_below_their_limit() -> None:
    model = tiny_model("llava_onevision", vision_aspect_ratio="anyres_max_9")
    inputs = tiny_inputs("llava_onevision", samples=(Sample((1, 1), ("image",), seed=2),))
    call = Call(model, adapter_for(model), "image", inputs)
    with watched(call), torch.no_grad():
        model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    mosaic = call.grids[0].planes[1]
    assert (mosaic.height, mosaic.width, mosaic.row_newline) == (12, 8, True)
    assert len(call.features[0]) == call.grids[0].num_tokens


def test_video_grids() -> None:
    expected = {
        "llava_onevision": ((4, 3, 3), 0, 1),
        "llava_next_video": ((4, 3, 3), 0, 0),
        "video_llava": ((4, 4, 4), 1, 0),
        "qwen2_vl": ((2, 4, 4), 0, 0),
        "qwen2_5_vl": ((2, 4, 4), 0, 0),
        "qwen3_vl": ((2, 4, 4), 0, 0),
        "video_llama_3": ((4, 4, 4), 0, 0),
    }
    for family, (shape, prefix, newlines) in expected.items():
        call = run(family, "video")
        for grid in call.grids:
            assert (grid.shape, grid.planes[0].prefix) == (shape, prefix), family
            assert grid.newlines_at_end == newlines


def test_split_features_refuses_other_counts() -> None:
    call = run("llava", "image")
    with pytest.raises(ValueError, match="108 tokens, the grids 72"):
        call.adapter.split_features(call.model, call.features, call.grids[:2])


# --- scores -------------------------------------------------------------------------------------


class ChannelMean(nn.Module):
    """Stands for a projector: every output channel is the mean of the input channels."""

    def __init__(self, group: int, width: int) -> None:
        super().__init__()
        self.group, self.width = group, width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.mean(-1, keepdim=True)
        if self.group > 1:
            x = x.reshape(-1, self.group).mean(-1, keepdim=True)
        return x.expand(*x.shape[:-1], self.width)


def carry_scores(call: Call, scores: torch.Tensor) -> None:
    """Make the encoder put out `scores` in every channel, and the projector pass them on."""
    base, tower = call.adapter.base(call.model), call.tower
    for name in ("post_layernorm", "layernorm"):
        if name in tower.module._modules:
            setattr(tower.module, name, nn.Identity())
    paths = {
        "multi_modal_projector": 1,
        "projector": 1,
        "visual.merger": 4,
        "connector.modality_projection": 1,
    }
    for path, group in paths.items():
        parent, _, name = path.rpartition(".")
        owner = base._modules.get(parent) if parent else base
        if owner is not None and name in owner._modules:
            setattr(owner, name, ChannelMean(group, 32))
    prefix = nn.functional.pad(scores, (tower.num_prefix, 0), value=7.0)
    hidden = prefix[..., None].repeat_interleave(24, dim=-1)
    tower.blocks[tower.feature_block].forward = lambda *args, **kwargs: hidden


def score_shape(call: Call) -> tuple[int, ...]:
    """The shape of the encoder's patches in this call."""
    seen: list[torch.Size] = []
    block = call.tower.blocks[0]
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    call.encode_again()
    handle.remove()
    shape = tuple(seen[0][:-1])
    return (*shape[:-1], shape[-1] - call.tower.num_prefix)


@pytest.mark.parametrize(("family", "modality"), CASES)
def test_scores_go_the_way_of_the_features(family: str, modality: str) -> None:
    call = run(family, modality)
    shape = score_shape(call)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    mapped = call.adapter.token_scores(call.model, modality, scores, call.arguments, call.grids)
    # The dtype of the attention must not decide the precision of the pooling.
    half = call.adapter.token_scores(
        call.model, modality, scores.bfloat16(), call.arguments, call.grids
    )
    assert {score.dtype for score in (*mapped, *half)} == {torch.float32}

    carry_scores(call, scores)
    call.encode_again()
    items = call.items
    for score, item, grid in zip(mapped, items, call.grids, strict=True):
        is_patch = grid.kinds() == TokenKind.PATCH
        assert score.shape == (grid.num_tokens,)
        assert torch.equal(score.isnan(), ~is_patch)
        torch.testing.assert_close(score[is_patch], item[is_patch, 0], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="one score per patch"):
        call.adapter.token_scores(
            call.model, modality, scores.flatten()[:-1], call.arguments, call.grids
        )


@pytest.mark.parametrize(("family", "modality"), CASES)
def test_pixels_lie_under_their_tokens(family: str, modality: str) -> None:
    """The mean colour of a patch, sent the way of scores, is the mean colour under its token."""
    model = tiny_model(
        family, **({"vision_aspect_ratio": "anyres_max_9"} if family == "llava_onevision" else {})
    )
    # The third size of the anyres families has padding to cut off.
    sample = Sample((2, 2), (modality,), seed=2)
    call = Call(model, adapter_for(model), modality, tiny_inputs(family, samples=(sample,)))
    if (family, modality) == ("llava_onevision", "image"):
        # Without downscaling there are more tokens than placeholders: ask the method alone.
        with watched(call), torch.no_grad():
            model.model.get_image_features(call.inputs["pixel_values"], call.inputs["image_sizes"])
    else:
        call = run(family, modality, (sample,), model=model)
    tower, grids = call.tower, call.grids
    pixels = call.adapter._pixel_values(modality, call.arguments)
    height, width = tower.patch_size
    if tower.packed:
        thw = call.arguments[f"{modality}_grid_thw"]
        temporal = pixels.shape[-1] // (3 * height * width)
        scores = pixels.view(-1, 3, temporal, height * width)[:, 0, 0].mean(-1)
        if family == "qwen2_5_vl":
            from transformers.vision_utils import get_vision_window_index

            index, _ = get_vision_window_index(thw, 2, 16, 4)
            scores = scores.view(-1, 4)[index].flatten()
    else:
        images = pixels.flatten(0, -4)[:, :1]
        images = images[(images != 0).flatten(1).any(1)]
        scores = nn.functional.avg_pool2d(images, (height, width)).flatten(1)
    mapped = call.adapter.token_scores(call.model, modality, scores, call.arguments, grids)
    pictures = call.adapter.pixels(call.model, modality, call.arguments, grids)
    assert len(pictures) == len(grids)
    for picture, score, grid in zip(pictures, mapped, grids, strict=True):
        assert (picture.dtype, picture.min(), picture.max()) == (torch.uint8, 0, 255)
        assert picture.shape[:2] == (len(grid.planes), 3)
        kinds, time = grid.kinds(), grid.positions()[:, 0]
        for index, plane in enumerate(grid.planes):
            if family in ANYRES and modality == "image" and index == 0:
                continue  # the thumbnail is resized to the mosaic
            under = nn.functional.adaptive_avg_pool2d(
                picture[index, :1].float(), (plane.height, plane.width)
            ).flatten()
            own = score[(time == index) & (kinds == TokenKind.PATCH)]
            assert torch.corrcoef(torch.stack([under, own]))[0, 1] > 0.9995


@pytest.mark.parametrize(("family", "temporal"), [("qwen2_5_vl", 2), ("video_llama_3", 1)])
def test_packed_patches_become_the_frames_they_were(family: str, temporal: int) -> None:
    frames = torch.arange(4 * 3 * 24 * 16).reshape(4, 3, 24, 16).float()
    arguments = {
        "pixel_values_videos": packed_patches(frames, temporal),
        "video_grid_thw": torch.tensor([[4 // temporal, 6, 4]]),
        "video_merge_sizes": torch.tensor([2]),
    }
    model = tiny_model(family)
    (picture,) = adapter_for(model).pixels(model, "video", arguments, [])
    shown = frames[::temporal]
    expected = (shown - shown.min()) * (255 / (shown.max() - shown.min()))
    assert torch.equal(picture, expected.round().to(torch.uint8))
