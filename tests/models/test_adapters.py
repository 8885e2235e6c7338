"""Adapters against the models themselves: what they say of modules, tokens, scores and pixels."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from foveate.core.grid import TokenKind
from foveate.models import adapter_for
from foveate.models.adapter import Adapter
from foveate.models.tower import VisionTower
from tiny import (
    TINY_ENCODERS,
    TINY_FAMILIES,
    Sample,
    tiny_encoder,
    tiny_inputs,
    tiny_model,
)

CASES = [
    (family, modality)
    for family in TINY_FAMILIES
    for modality in (
        ("image",)
        if family in ("llava", "llava_next", "internvl", "smolvlm", "idefics3")
        else ("image", "video")
    )
]
ANYRES = ("llava_next", "llava_next_video", "llava_onevision")


@dataclass
class Call:
    """One forward and what the feature method of one modality got and gave in it."""

    model: nn.Module
    adapter: Adapter
    modality: str
    inputs: dict[str, torch.Tensor]
    arguments: dict[str, Any] = field(default_factory=dict)
    features: Any = None

    @property
    def grids(self) -> list[Any]:
        return self.adapter.grids(self.model, self.modality, self.arguments, self.features)

    @property
    def items(self) -> list[torch.Tensor]:
        return self.adapter.split_features(self.model, self.features, self.grids)

    @property
    def tower(self) -> VisionTower:
        return self.adapter.towers(self.model)[self.modality]


@contextmanager
def watched(call: Call) -> Iterator[None]:
    """Record the arguments and the output of the feature method, as an attachment does."""
    base = call.adapter.base(call.model)
    name = call.adapter.feature_methods[call.modality]
    method = getattr(base, name)
    signature = inspect.signature(method)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        call.arguments = dict(signature.bind(*args, **kwargs).arguments)
        output = method(*args, **kwargs)
        call.features = output.pooler_output
        return output

    setattr(base, name, recorded)
    try:
        yield
    finally:
        delattr(base, name)


def run(
    family: str,
    modality: str,
    samples: tuple[Sample, ...] | None = None,
    *,
    attn: str = "sdpa",
    model: nn.Module | None = None,
) -> Call:
    if samples is None:
        samples = (
            Sample((3, 2, 4), (modality, modality)),
            Sample((2,), ()),
            Sample((5, 7), (modality,)),
        )
    model = model or tiny_model(family, attn=attn)
    adapter = adapter_for(model)
    assert isinstance(adapter, Adapter)
    call = Call(model, adapter, modality, tiny_inputs(family, samples=samples))
    with watched(call), torch.no_grad():
        model(**call.inputs)
    return call


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
    assert (mosaic.height, mosaic.width, mosaic.row_newline) == (12, 10, True)
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
    with torch.no_grad():
        call.model(**call.inputs)
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
    with watched(call), torch.no_grad():
        call.model(**call.inputs)
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
    call = Call(model, adapter_for(model), modality, tiny_inputs(family, modality=modality))
    if (family, modality) == ("llava_onevision", "image"):
        # Without downscaling there are more tokens than placeholders: ask the method alone.
        with watched(call), torch.no_grad():
            model.model.get_image_features(call.inputs["pixel_values"], call.inputs["image_sizes"])
    else:
        call = run(family, modality, (Sample((2, 2), (modality,)),), model=model)
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


# --- encoders -----------------------------------------------------------------------------------


@dataclass
class Trace:
    """What went through the modules of a tower in one forward."""

    taps: list[dict[str, torch.Tensor]]
    attention_inputs: list[tuple[torch.Tensor, dict[str, Any]]]
    attention_outputs: list[Any]
    attention_weights: list[torch.Tensor]
    mlp_inputs: list[torch.Tensor]
    mlp_outputs: list[torch.Tensor]
    blocks: list[torch.Tensor]


def traced(tower: VisionTower, forward: Any) -> Trace:
    trace = Trace([{} for _ in tower.blocks], [], [], [], [], [], [])

    def attention(_m: Any, args: Any, kwargs: Any, out: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        trace.attention_inputs.append((hidden, kwargs))
        trace.attention_outputs.append(out)

    def weights(_m: Any, _i: Any, out: Any) -> None:
        if isinstance(out, tuple):
            trace.attention_weights.append(out[1])

    def tap(index: int, name: str) -> Any:
        return lambda _m, _i, out: trace.taps[index].update({name: out})

    handles = []
    for index, block in enumerate(tower.blocks):
        for name, module in tower.qk_taps(index).items():
            handles.append(module.register_forward_hook(tap(index, name)))
        handles += [
            tower.attentions[index].register_forward_hook(attention, with_kwargs=True),
            # transformers < 5.20 has the attention proper of DINOv2 one level deeper.
            getattr(
                tower.attentions[index], "attention", tower.attentions[index]
            ).register_forward_hook(weights),
            tower.mlp_inputs[index].register_forward_pre_hook(
                lambda _m, args: trace.mlp_inputs.append(args[0])
            ),
            tower.mlp_outputs[index].register_forward_hook(
                lambda _m, _i, out: trace.mlp_outputs.append(out)
            ),
            block.register_forward_hook(lambda _m, _i, out: trace.blocks.append(out)),
        ]
    with torch.no_grad():
        forward()
    for handle in handles:
        handle.remove()
    return trace


def towers_under_test() -> list[Any]:
    return [pytest.param(*case, id="-".join(case)) for case in CASES] + [
        pytest.param(family, None, id=family) for family in TINY_ENCODERS
    ]


def trace_of(family: str, modality: str | None) -> tuple[VisionTower, Trace]:
    if modality is None:
        model = tiny_encoder(family, attn="eager")
        tower = adapter_for(model).tower(model)
        return tower, traced(tower, lambda: model(torch.randn(2, 3, 48, 48)))
    model = tiny_model(family, attn="eager")
    tower = adapter_for(model).towers(model)[modality]
    inputs = tiny_inputs(family, samples=(Sample((3, 2, 4), (modality, modality)),))
    return tower, traced(tower, lambda: model(**inputs))


@pytest.mark.parametrize(("family", "modality"), towers_under_test())
def test_queries_and_keys_are_those_of_the_attention(family: str, modality: str | None) -> None:
    tower, trace = trace_of(family, modality)
    for index in range(len(tower.blocks)):
        hidden, kwargs = trace.attention_inputs[index]
        q, k = tower.assemble_qk(index, trace.taps[index], kwargs)
        scores = q @ k.transpose(-1, -2) * tower.head_dim**-0.5
        cu_seqlens = tower.segments(index, kwargs)
        if not tower.packed:
            assert cu_seqlens is None
            weights = trace.attention_weights[index]
            torch.testing.assert_close(scores.softmax(-1), weights, rtol=0, atol=1e-6)
            continue
        # Packed attention gives no weights: finish it by hand and compare what it put out.
        segment = torch.bucketize(torch.arange(q.shape[2]), cu_seqlens[1:-1], right=True)
        scores = scores.masked_fill(segment[:, None] != segment, -torch.inf)
        attention = tower.attentions[index]
        if "qkv" in trace.taps[index]:
            value, out_proj = trace.taps[index]["qkv"].chunk(3, dim=-1)[2], attention.proj
        else:
            value, out_proj = attention.v_proj(hidden), attention.out_proj
        value = value.unflatten(-1, (tower.num_heads, tower.head_dim)).transpose(0, 1)
        expected = trace.attention_outputs[index]
        expected = expected[0] if isinstance(expected, tuple) else expected
        with torch.no_grad():
            mixed = out_proj((scores[0].softmax(-1) @ value).transpose(0, 1).flatten(1))
        torch.testing.assert_close(mixed, expected, rtol=0, atol=2e-6)


def test_segments_of_qwen2_5_vl_are_windows_except_in_full_blocks() -> None:
    tower, trace = trace_of("qwen2_5_vl", "video")
    sizes = [
        tower.segments(index, trace.attention_inputs[index][1]).diff().tolist()
        for index in range(4)
    ]
    assert sizes == [[16] * 16, [64] * 4, [16] * 16, [64] * 4]


@pytest.mark.parametrize(("family", "modality"), towers_under_test())
def test_blocks_add_their_mlp_to_the_stream_after_attention(
    family: str, modality: str | None
) -> None:
    tower, trace = trace_of(family, modality)
    for index in range(len(tower.blocks)):
        added = trace.mlp_outputs[index]
        gain = tower.mlp_gain(index)
        assert (gain is not None) == (family == "internvl")
        total = trace.mlp_inputs[index] + (added if gain is None else gain * added)
        torch.testing.assert_close(total, trace.blocks[index], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "modality"), CASES)
def test_features_come_from_the_feature_block(family: str, modality: str) -> None:
    call = run(family, modality)
    tower = call.tower
    before = torch.cat(call.items)
    changed = []
    for block in tower.blocks[tower.feature_block :]:
        handle = block.register_forward_hook(lambda _m, _i, out: out * 2 + 1, prepend=True)
        with watched(call), torch.no_grad():
            call.model(**call.inputs)
        handle.remove()
        after = torch.cat(call.items)
        changed.append(not torch.equal(before, after))
    assert changed == [True] + [False] * (len(changed) - 1)
    is_clip = family in ("llava", "llava_next", "llava_next_video", "video_llava")
    assert len(changed) == (2 if is_clip else 1)


def test_assemble_qk_names_what_is_missing() -> None:
    tower, trace = trace_of("clip", None)
    with pytest.raises(ValueError, match=r"\['k'\] were not captured"):
        tower.assemble_qk(0, {"q": trace.taps[0]["q"]}, {})


@pytest.mark.parametrize("family", TINY_ENCODERS)
def test_encoder_grids_count_the_hidden_states(family: str) -> None:
    model = tiny_encoder(family)
    adapter = adapter_for(model)
    pixels = torch.randn(2, 3, 48, 48)
    tower, grid = adapter.tower(model), adapter.grid(model, pixels)
    hidden = model(pixels).last_hidden_state
    assert grid.num_tokens == hidden.shape[1]
    assert tower.num_prefix == grid.planes[0].prefix == hidden.shape[1] - 36
    assert tower.has_cls == (family != "siglip")
    assert tower.module is model
    assert tower.feature_block == 3
    assert [picture.shape for picture in adapter.pixels(pixels)] == [(1, 3, 48, 48)] * 2


def test_encoders_inside_other_models_are_found() -> None:
    from transformers import (
        CLIPConfig,
        CLIPModel,
        Dinov2Config,
        Dinov2ForImageClassification,
        SiglipConfig,
        SiglipModel,
        ViTConfig,
        ViTForImageClassification,
    )

    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    vision = {**small, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    text = {**small, "num_hidden_layers": 3, "vocab_size": 20}
    pairs = {"text_config": text, "vision_config": vision}
    for model, inner in (
        (CLIPModel(CLIPConfig(**pairs)), "vision_model"),
        (SiglipModel(SiglipConfig(**pairs)), "vision_model"),
        (ViTForImageClassification(ViTConfig(**vision)), "vit"),
        (Dinov2ForImageClassification(Dinov2Config(**vision)), "dinov2"),
    ):
        tower = adapter_for(model).tower(model)
        assert tower.module is getattr(model, inner)
        assert len(tower.blocks) == 2
